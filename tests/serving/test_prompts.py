import io
import os
from pathlib import Path

import pytest

from xccl.serving.prompts import BUILT_IN, PromptError, collect_prompts


@pytest.fixture
def no_stdin():
    return io.StringIO()


@pytest.fixture
def pipe():
    read_end, write_end = os.pipe()
    with open(read_end) as reader, open(write_end, "w") as writer:
        yield reader, writer


def test_built_in_prompts_without_any_input(no_stdin):
    assert collect_prompts([], None, no_stdin) == list(BUILT_IN)


def test_given_prompts_then_the_lines_of_the_file(tmp_path: Path, no_stdin):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  \ntwo é\n", encoding="utf-8")
    assert collect_prompts(["zero"], str(file), no_stdin) == ["zero", "one", "two é"]


def test_lines_of_a_pipe(pipe):
    reader, writer = pipe
    writer.write("a prompt\nanother\n")
    writer.close()
    assert collect_prompts([], None, reader) == ["a prompt", "another"]


def test_a_given_prompt_leaves_the_pipe_alone(pipe):
    reader, _ = pipe
    assert collect_prompts(["x"], None, reader) == ["x"]


def test_a_pipe_that_nobody_writes_to_does_not_block(pipe):
    reader, _ = pipe
    assert collect_prompts([], None, reader) == list(BUILT_IN)


def test_an_empty_pipe_gives_the_built_in_prompts(pipe):
    reader, writer = pipe
    writer.close()
    assert collect_prompts([], None, reader) == list(BUILT_IN)


def test_a_dash_reads_standard_input(no_stdin):
    assert collect_prompts([], "-", io.StringIO("p\n")) == ["p"]


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_prompt_is_an_error(prompt, no_stdin):
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        collect_prompts(["fine", prompt], None, no_stdin)


def test_files_without_prompts(tmp_path: Path, no_stdin):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n\n")
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match=r"empty\.txt holds no prompt"):
        collect_prompts([], str(empty), no_stdin)
    with pytest.raises(PromptError, match="cannot read prompts from"):
        collect_prompts([], str(tmp_path / "missing"), no_stdin)
    with pytest.raises(PromptError, match="cannot read prompts from"):
        collect_prompts([], str(binary), no_stdin)
