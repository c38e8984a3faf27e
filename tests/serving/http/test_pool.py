"""Who gets a request, who is woken, and whose tokens come back: the pool with ranks that are only sockets."""

import asyncio
import socket
from collections import Counter

import pytest

from xccl.serving.http.errors import ApiError
from xccl.serving.http.pool import RankPool
from xccl.serving.link import Cancel, Link, RankInfo, Submit, Tokens, Wake
from xccl.serving.request import SamplingParams

SAMPLING = SamplingParams()


class Receiver:
    def __init__(self):
        self.got = []

    def tokens(self, tokens, reason):
        self.got.append((tokens, reason))

    def failed(self, error):
        self.got.append(error)


class Ranks:
    """The other ends of the pool's links."""

    def __init__(self, *slots, queue):
        pairs = [socket.socketpair() for _ in slots]
        self.pool = RankPool([Link(ours) for ours, _ in pairs], queue)
        self.links = [Link(theirs) for _, theirs in pairs]
        self.slots = slots

    async def __aenter__(self):
        for rank, (link, slots) in enumerate(zip(self.links, self.slots, strict=True)):
            link.send(RankInfo(rank, 1, ("attention",), slots, 8, ()))
        await self.pool.start()
        return self

    async def __aexit__(self, *_):
        self.pool.close()
        for link in self.links:
            link.close()

    def submit(self, count=1):
        receivers = [Receiver() for _ in range(count)]
        return receivers, self.pool.submit([(1, 2)] * count, SAMPLING, receivers)


def run(test, *slots, queue=100):
    async def body():
        async with Ranks(*slots, queue=queue) as ranks:
            await test(ranks)

    asyncio.run(body())


def test_requests_go_where_most_slots_are_free_and_all_others_are_woken():
    async def test(ranks):
        ranks.submit(12)
        received = [link.receive() for link in ranks.links]
        owned = [sum(isinstance(message, Submit) for message in messages) for messages in received]
        assert owned == [3, 0, 9]
        for messages in received:
            assert [message.submitted for message in messages] == list(range(1, 13))
            assert all(isinstance(message, Submit | Wake) for message in messages)
        noise = Counter(
            message.request.noise_id for messages in received for message in messages if isinstance(message, Submit)
        )
        assert noise == Counter(range(12))

    run(test, 1, 0, 3)


def test_tokens_find_their_receiver_and_a_place_is_free_after_the_last():
    async def test(ranks):
        (first, second), _ = ranks.submit(2)
        ids = [message.request.request_id for message in ranks.links[0].receive()]
        ranks.links[0].send(Tokens([ids[0], ids[1], ids[0]], [5, 6, 7], [(ids[1], "stop")]))
        while not first.got:
            await asyncio.sleep(0)
        assert first.got == [([5, 7], None)]
        assert second.got == [([6], "stop")]
        assert ranks.pool.num_unfinished == 1

    run(test, 2)


def test_a_cancelled_request_frees_its_place_once_and_hears_no_more():
    async def test(ranks):
        (receiver,), (cancel,) = ranks.submit()
        (submit,) = ranks.links[0].receive()
        cancel()
        cancel()
        assert ranks.pool.num_unfinished == 0
        assert ranks.links[0].receive() == [Cancel(submit.request.request_id)]
        ranks.links[0].send(Tokens([submit.request.request_id], [5], []))
        (other,), _ = ranks.submit()
        (submit,) = ranks.links[0].receive()
        ranks.links[0].send(Tokens([submit.request.request_id], [6], []))
        while not other.got:
            await asyncio.sleep(0)
        assert receiver.got == []

    run(test, 1)


def test_the_queue_is_bounded_and_a_request_is_taken_whole_or_not():
    async def test(ranks):
        ranks.submit(4)
        with pytest.raises(ApiError) as refused:
            ranks.submit(2)
        assert refused.value.status == 429
        assert ranks.pool.num_unfinished == 4
        ranks.submit(1)
        with pytest.raises(ApiError) as refused:
            ranks.submit(6)
        assert refused.value.status == 400

    run(test, 1, 1, queue=3)


def test_when_the_server_ends_all_are_told_and_nobody_is_taken():
    async def test(ranks):
        receivers, _ = ranks.submit(3)
        ranks.pool.end("rank 1 was killed")
        assert all(receiver.got == [ranks.pool.failure] for receiver in receivers)
        assert "rank 1 was killed" in ranks.pool.failure.body["error"]["message"]
        assert ranks.pool.num_unfinished == 0
        with pytest.raises(ApiError):
            ranks.submit()

    run(test, 2)


def test_a_rank_that_reads_late_gets_everything():
    async def test(ranks):
        ranks.pool.submit([(1,) * 200] * 2000, SAMPLING, [Receiver() for _ in range(2000)])
        got = []
        while len(got) < 2000:
            got += ranks.links[0].receive()
            await asyncio.sleep(0)
        assert [message.submitted for message in got] == list(range(1, 2001))

    run(test, 2000)
