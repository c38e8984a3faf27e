"""Requests that arrive and are cancelled while others run: the texts are those of requests served alone."""

import random
import select
import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving.tiny_model import CONFIG

import xccl
from xccl.serving.engine import Engine, EngineOptions
from xccl.serving.link import Cancel, Link, RankStatus, Submit, Tokens, Wake
from xccl.serving.local_experts import LocalExperts
from xccl.serving.model import MoEModel
from xccl.serving.online import serve_online
from xccl.serving.request import Request, SamplingParams
from xccl.serving.service import ServiceOptions, serve_reference


def make_requests(count, seed):
    rng = np.random.default_rng(seed)
    sampling = SamplingParams(max_tokens=20, temperature=1.0, seed=seed)
    return [
        Request(100 + i, tuple(rng.integers(1, CONFIG["vocab_size"], rng.integers(1, 150)).tolist()), sampling, i)
        for i in range(count)
    ]


def expected_texts(model, requests):
    """Tokens of each request, served alone with its noise."""
    alone = [Request(request.noise_id, request.prompt_tokens, request.sampling) for request in requests]
    outputs = serve_reference(alone, ServiceOptions(model, batch=len(alone))).outputs
    return {100 + output.request_id: output.tokens for output in outputs}


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 8),
    slots=st.integers(1, 4),
    kv_blocks=st.integers(16, 30),
    data=st.data(),
)
def test_arrivals_and_cancellations_change_no_other_text_and_free_everything(
    tiny_model, seed, count, slots, kv_blocks, data
):
    requests = make_requests(count, seed)
    arrival = data.draw(st.lists(st.integers(0, 15), min_size=count, max_size=count))
    end = data.draw(st.lists(st.none() | st.integers(0, 30), min_size=count, max_size=count))
    model = MoEModel.load(tiny_model, LocalExperts(CONFIG["num_experts"], "int8"), np.arange(CONFIG["num_experts"]))
    # so few rows a step that prompts are cancelled when a part of them is computed
    engine = Engine(model, EngineOptions(slots, kv_blocks=kv_blocks, prefill_rows=1))
    got = {request.request_id: [] for request in requests}
    at_cancel = {}
    step = 0
    while step <= max(arrival) or engine.num_unfinished:
        for request, when, cancelled in zip(requests, arrival, end, strict=True):
            if when == step:
                engine.add([request])
            if cancelled is not None and when + cancelled == step:
                engine.cancel(request.request_id)
                at_cancel[request.request_id] = len(got[request.request_id])
        news = engine.step()
        for request_id, token in zip(news.request_ids, news.tokens.tolist(), strict=True):
            got[request_id].append(token)
        step += 1
    for _ in range(4):
        assert engine.step().request_ids == []  # nothing is left of what was cancelled
    texts = expected_texts(tiny_model, requests)
    for request in requests:
        mine, whole = got[request.request_id], texts[request.request_id]
        assert mine == whole[: at_cancel.get(request.request_id)]
    assert (engine.occupancy.waiting, engine.occupancy.running, engine.occupancy.kv_blocks) == (0, 0, 0)


class Front:
    """Sends requests to ranks in bursts with pauses, cancels some, and collects what comes back."""

    def __init__(self, links, requests, seed):
        self.links = links
        self.requests = requests
        self.rng = random.Random(seed)
        self.tokens = {request.request_id: [] for request in requests}
        self.cancelled = set()
        self.ended = set()
        self.status = {}
        self.trouble = None
        self.owner = {}

    def main(self):
        try:
            self.drive()
        except BaseException as error:
            self.trouble = error
        finally:
            for link in self.links:
                link.close()

    def drive(self):
        pause = threading.Event()
        for submitted, request in enumerate(self.requests, 1):
            owner = self.owner[request.request_id] = self.rng.randrange(len(self.links))
            order = list(range(len(self.links)))
            self.rng.shuffle(order)  # whoever hears of it first
            # now and then so late that all earlier requests have ended when the last rank hears of it
            seconds = self.rng.choice([0, 0, 0.002, 0.1])
            for rank in order:
                self.links[rank].send(Submit(request, submitted) if rank == owner else Wake(submitted))
                pause.wait(seconds)
            if self.rng.random() < 0.3:
                self.cancelled.add(request.request_id)
                self.links[owner].send(Cancel(request.request_id))
            if self.rng.random() < 0.5:
                self.collect_all()  # the ranks fall asleep
        self.collect_all()

    def collect_all(self):
        known = set(self.owner)
        deadline = time.monotonic() + 30
        while not known <= self.ended | self.cancelled or not self.quiet():
            select.select(self.links, [], [], 1)
            assert time.monotonic() < deadline, "the ranks do not answer"
            for number, link in enumerate(self.links):
                for message in link.receive():
                    self.take(number, message)

    def quiet(self):
        return all(
            s is not None and not (s.running or s.waiting or s.kv_blocks)
            for s in map(self.status.get, range(len(self.links)))
        )

    def take(self, rank, message):
        if isinstance(message, RankStatus):
            self.status[rank] = message
        elif isinstance(message, Tokens):
            for request_id, token in zip(message.request_ids, message.tokens, strict=True):
                self.tokens[request_id].append(token)
            self.ended.update(request_id for request_id, _ in message.ended)


class LateFront(Front):
    """A rank hears that a second request is on its way while the first one runs; it arrives when that has ended."""

    def drive(self):
        first, second = self.requests
        self.owner = {first.request_id: 0}
        self.links[1].send(Wake(1))
        self.links[1].send(Wake(2))
        self.links[0].send(Submit(first, 1))
        self.collect_all()
        self.owner[second.request_id] = 0
        self.links[0].send(Submit(second, 2))
        self.collect_all()


def serve(model, front, pairs):
    """Run the ranks while `front` drives them; returns when it has let go of them."""
    nranks = len(pairs)

    def rank(comm):
        for number, (ours, theirs) in enumerate(pairs):
            ours.close()
            if number != comm.rank:
                theirs.close()
        serve_online(comm, ServiceOptions(model, batch=2 * nranks), Link(pairs[comm.rank][1]))

    driver = threading.Thread(target=front.main, daemon=True)
    threading.Timer(0.5, driver.start).start()  # forking is done by then, mostly
    with pytest.raises(xccl.XcclAborted, match="the server's front has ended"):
        xccl.run(rank, nranks, timeout=100)
    driver.join(60)
    for _, theirs in pairs:
        theirs.close()
    assert front.trouble is None


@pytest.mark.parametrize("nranks", [1, 2, 5])
def test_ranks_sleep_and_wake_together_whatever_the_order_of_messages(tiny_model, nranks):
    requests = make_requests(15, nranks)
    pairs = [socket.socketpair() for _ in range(nranks)]
    front = Front([Link(ours) for ours, _ in pairs], requests, nranks)
    serve(tiny_model, front, pairs)
    texts = expected_texts(tiny_model, requests)
    for request in requests:
        mine, whole = front.tokens[request.request_id], texts[request.request_id]
        assert mine == (whole[: len(mine)] if request.request_id in front.cancelled else whole)


def test_ranks_stay_awake_for_a_request_that_only_others_have_heard_of(tiny_model):
    requests = make_requests(2, 0)
    pairs = [socket.socketpair() for _ in range(2)]
    front = LateFront([Link(ours) for ours, _ in pairs], requests, 0)
    serve(tiny_model, front, pairs)
    assert front.tokens == expected_texts(tiny_model, requests)
