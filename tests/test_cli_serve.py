"""The command xccl serve as a user meets it."""

import importlib.util
import json

import pytest
from serving.tiny_model import CONFIG, write_model

from xccl.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_model(tmp_path_factory.mktemp("model")))


def serve(*arguments):
    return main(["serve", *arguments, "--timeout", "60"])


@pytest.mark.parametrize("ranks", ["1", "2", "3"])
def test_check_passes_and_says_so(model, capfd, ranks):
    assert (
        serve("--model", model, "-n", ranks, "--check", "--prompt", "abc", "--prompt", "de", "--max-tokens", "9") == 0
    )
    out = capfd.readouterr().out
    assert "check passed: 2 requests" in out
    assert "same as those of one process" in " ".join(out.split())
    assert "tokens/s" in out


def test_the_shipped_model_is_the_default(capfd):
    assert serve("--check", "--max-tokens", "6") == 0
    out = capfd.readouterr().out
    assert out.startswith("[0] Genesis 51")
    assert "check passed: 4 requests" in out


def test_check_fails_with_the_first_difference(model, capfd, monkeypatch):
    from xccl.serving import sampling

    honest = sampling.gumbel_noise
    monkeypatch.setattr("xccl.serving.service.slots_of_rank", _spoil_noise_in_ranks(monkeypatch, honest))
    assert serve("--model", model, "--check", "--prompt", "abc", "--max-tokens", "9") == 1
    assert "check failed: request 0 differs at its token" in " ".join(capfd.readouterr().out.split())


def _spoil_noise_in_ranks(monkeypatch, honest):
    """Only ranks ask for their slots: there, and not in the reference, the noise is that of other positions."""
    from xccl.serving import sampling
    from xccl.serving.service import slots_of_rank

    def slots(batch, rank, size):
        sampling.gumbel_noise = lambda keys, positions, vocab: honest(keys, positions + 1, vocab)
        return slots_of_rank(batch, rank, size)

    return slots


def test_one_text_streams_and_many_are_numbered(model, capfd):
    assert serve("--model", model, "--prompt", "only one", "--max-tokens", "3") == 0
    assert capfd.readouterr().out.startswith("only one")
    assert serve("--model", model, "--prompt", "abc", "--requests", "11", "--max-tokens", "3") == 0
    out = capfd.readouterr().out
    assert [f"[{i}] abc" in out for i in range(9)] == [True] * 8 + [False]


def test_json(model, tmp_path, capfd):
    path = tmp_path / "out.json"
    arguments = ["--prompt", "abc", "--requests", "3", "--max-tokens", "5", "--temperature", "0", "--check"]
    assert serve("--model", model, *arguments, "--json", str(path)) == 0
    document = json.loads(path.read_text())
    assert document["check"]["passed"]
    assert document["summary"]["requests"] == len(document["requests"]) == 3
    assert document["summary"]["tokens"] == sum(len(r["tokens"]) for r in document["requests"])
    first = document["requests"][0]
    assert (first["prompt"], first["finish_reason"] in ("length", "stop")) == ("abc", True)
    shown = capfd.readouterr().out
    assert first["text"].strip("\ufffd\n")[:3] in shown


def test_speculation_and_ranks_do_not_change_the_text(model, tmp_path, capfd):
    texts = []
    for arguments in (
        ["-n", "1"],
        ["-n", "2", "--no-mtp"],
        ["-n", "3", "--batch", "1"],
        ["-n", "2", "--kv-blocks", "3"],
    ):
        path = tmp_path / "out.json"
        common = ["--model", model, "--prompt", "ab", "--prompt", "cd", "--max-tokens", "20", "--seed", "3"]
        assert serve(*common, *arguments, "--json", str(path)) == 0
        texts.append([r["tokens"] for r in json.loads(path.read_text())["requests"]])
    assert all(text == texts[0] for text in texts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "x" * CONFIG["max_context"]], "prompt 0 is too long: 257 tokens, the model takes at most 255"),
        (["--file", "/no/such/file"], "cannot read prompts from /no/such/file"),
        (["--temperature", "-1"], "temperature must be a number from 0 up, got -1.0"),
        (["--temperature", "nan"], "temperature must be"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1, got 0.0"),
        (["--seed", "-3"], "seed must be"),
        (["--prompt", "abc", "--kv-blocks", "1"], "--kv-blocks 1 is too small: the longest request needs 5 blocks"),
        (["--prompt", "abc", "--json", "/no/such/folder/f"], "cannot write /no/such/folder/f"),
    ],
)
def test_wrong_input_gets_a_message_and_exit_code_2(model, capfd, arguments, message):
    assert serve("--model", model, *arguments) == 2
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments",
    [["-n", "0"], ["-n", "x"], ["--max-tokens", "0"], ["--batch", "-1"], ["--requests", "0"], ["--quant", "fp8"]],
)
def test_bad_numbers_are_refused_by_the_parser(capfd, arguments):
    with pytest.raises(SystemExit) as end:
        serve(*arguments)
    assert end.value.code == 2
    assert arguments[0] in capfd.readouterr().err


def test_a_folder_without_a_model(tmp_path, capfd):
    assert serve("--model", str(tmp_path)) == 2
    assert "has no config.json, model.safetensors, tokenizer.json" in capfd.readouterr().err


def test_missing_extras_are_named(model, capfd, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tokenizers" else found(name))
    assert serve("--model", model) == 2
    assert "tokenizers not installed: run  pip install 'xccl[serve]'" in capfd.readouterr().err
