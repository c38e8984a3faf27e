"""A bounded share of `make soak`: 200 clients at once, well-behaved and not."""

from load_http import QUEUE, SLOTS, run
from serving.http.server import Server


def test_two_hundred_clients(tiny_model):
    with Server(tiny_model, "-n", "2", "--batch", str(SLOTS), "--queue", str(QUEUE)) as server:
        tally = run(server, clients=200, rounds=2, seed=0)
    assert tally.problems == []
    assert all(tally.counts[kind] for kind in ("text", "hang up", "refused", "look", "told 429"))
