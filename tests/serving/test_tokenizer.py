from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving.tiny_model import byte_tokenizer

from xccl.serving.tokenizer import TextStream, Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    """Every character outside ASCII takes several tokens."""
    return Tokenizer(byte_tokenizer(), eot_token=0)


@given(text=st.text(max_size=40))
def test_text_survives_and_begins_with_end_of_text(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens[0] == 0
    assert tokenizer.decode(tokens) == text


@given(text=st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), max_size=40))
def test_a_stream_shows_whole_characters_only(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == text


@given(junk=st.lists(st.integers(0, 256), max_size=60))
def test_a_stream_never_gets_stuck_on_bytes_that_are_no_text(tokenizer, junk):
    stream = TextStream(tokenizer)
    for token in junk:
        stream.push(token)
        assert len(stream._pending) < 4
    stream.flush()
    assert not stream._pending


def test_load(tokenizer, tmp_path: Path):
    tokenizer._inner.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path / "tokenizer.json", 0).encode("ab") == tokenizer.encode("ab")
