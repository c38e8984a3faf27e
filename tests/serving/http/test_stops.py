"""Stop strings in a text that comes in pieces."""

from hypothesis import given
from hypothesis import strategies as st

from xccl.serving.http.stops import StopScanner

LETTERS = st.text(alphabet="ab\n", max_size=20)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=4)


def expected(text, stops):
    """The text before the stop string that is complete first, and whether there is one."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@given(pieces=st.lists(LETTERS, max_size=8), stops=STOPS)
def test_the_text_ends_before_the_first_complete_stop_however_it_is_cut(pieces, stops):
    scanner = StopScanner(stops)
    shown = "".join(scanner.push(piece) for piece in pieces)
    stopped = scanner.stopped
    shown += scanner.flush()
    assert (shown, stopped) == expected("".join(pieces), stops)


@given(text=LETTERS, stops=STOPS)
def test_nothing_is_held_back_that_cannot_begin_a_stop(text, stops):
    scanner = StopScanner(stops)
    shown = scanner.push(text)
    held = text[len(shown) :]
    if not scanner.stopped and held:
        assert any(stop.startswith(held) for stop in stops)


def test_nothing_is_shown_after_a_stop():
    scanner = StopScanner(["END"])
    assert scanner.push("abcEND and more") == "abc"
    assert scanner.push("yet more") == ""
    assert scanner.flush() == ""
