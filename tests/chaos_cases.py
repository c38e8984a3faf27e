"""What is run under XCCL_CHAOS: short programs over every protocol, with many seeds in one world.

A case is a function of a communicator and a seed; it checks its results itself. The seed also chooses what the case
does, alike on all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import test_coll
import test_expert_parallel
import test_memory_model
import test_p2p_random
from coll_cases import Buffers
from moe_support import DTYPES, Layer, assert_same_numbers, check_received, random_batch
from test_p2p_random import Transfer

import xccl
from xccl._binding import check, lib

Case = Callable[[xccl.Communicator, int], None]

LITMUS = [
    test_memory_model.test_1_put_is_complete_after_quiet_and_a_later_signal,
    test_memory_model.test_2_put_signal_makes_its_data_visible_before_its_signal,
    test_memory_model.test_3_fence_orders_puts_to_one_pe,
    test_memory_model.test_4_visibility_is_transitive_over_signals,
    test_memory_model.test_5_atomics_lose_no_update,
    test_memory_model.test_5_compare_swap_is_a_lock,
    test_memory_model.test_6_signals_that_add_count_every_sender,
    test_memory_model.test_8_fresh_memory_is_zero_and_early_puts_are_kept,
]


def litmus(comm: xccl.Communicator, seed: int) -> None:
    """Promises of the memory model, half of them with each seed, in few turns."""
    test_memory_model.TURNS = 20
    for i in np.random.default_rng(seed).permutation(len(LITMUS))[: len(LITMUS) // 2]:
        LITMUS[i].__wrapped__(comm)


def puts(comm: xccl.Communicator, seed: int) -> None:
    """Puts of any place and length, over one another, read back by gets; then a signal, an atomic or a barrier."""
    rng = np.random.default_rng(seed)
    told, counter = comm.signal(), comm.zeros(1, np.int64)
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    room = int(rng.choice([100, 3000]))
    target, by_pointer = comm.zeros(room, np.int64), comm.zeros(room, np.int64)
    theirs = comm.ptr(by_pointer, to)
    expected = np.zeros((2, room), np.int64)
    for turn in range(1, 6):
        for number in range(int(rng.integers(1, 12))):
            first, last = np.sort(rng.integers(0, room + 1, 2))
            data = np.full(last - first, turn * 1000 + number)
            row, symmetric = [(0, target), (1, by_pointer)][rng.random() < 0.3]
            expected[row, first:last] = data
            if row == 1 and rng.random() < 0.5:
                theirs[first:last] = data
            else:
                comm.put(symmetric[first:last], data, to)
            if rng.random() < 0.3:
                comm.fence()
            if rng.random() < 0.2:
                back = np.empty(last - first, np.int64)
                comm.get(back, symmetric[first:last], to)
                assert (back == data).all(), "a get does not see this rank's put"
        tell(comm, str(rng.choice(["signal", "put_signal", "atomic", "barrier"])), turn, told, counter)
        assert (target == expected[0]).all(), f"turn {turn}: puts of rank {source} are missing"
        assert (by_pointer == expected[1]).all(), f"turn {turn}: puts and stores of rank {source} are out of order"
        comm._sync(None)
    for a in (told, counter, target, by_pointer):
        comm.free(a)


def tell(comm: xccl.Communicator, how: str, turn: int, told: xccl.Signal, counter: Any) -> None:
    """Returns when the left neighbour's earlier puts are visible."""
    to = (comm.rank + 1) % comm.size
    if how == "signal":
        comm.signal_op(told, turn, to)
        comm.wait_until(told, ">=", turn)
    elif how == "put_signal":
        comm.put_signal(counter, np.array([turn]), to, signal=told, value=turn)
        comm.wait_until(told, ">=", turn)
        assert counter[0] == turn
    elif how == "atomic":
        comm.atomic_swap(counter, turn, to)
        while comm.atomic_fetch(counter, comm.rank) != turn:
            pass
    else:
        comm._sync(None)


def groups(comm: xccl.Communicator, seed: int) -> None:
    """Barriers of groups and of all, memory that comes and goes, puts that come late."""
    to, size = (comm.rank + 1) % comm.size, comm.size
    arrived = comm.zeros(1, np.int64)
    group = comm.split(comm.rank % 2, key=(comm.rank + seed) % size)
    assert group is not None
    for turn in range(1, 5):
        for _ in range(1 + (comm.rank + turn) % 2):
            group._sync(None)
        comm.atomic_fetch_add(arrived, 1, 0)
        comm._sync(None)
        assert comm.atomic_fetch(arrived, 0) == turn * size, "a barrier did not wait for all"
        comm._sync(None)
        fresh = comm.zeros(500, np.int64)
        assert not fresh[:7].any(), "fresh memory is not zero"
        assert not fresh[9:].any(), "fresh memory is not zero"
        comm.put(fresh[7:9], np.array([turn, turn]), to)
        comm._sync(None)
        assert fresh.sum() == 2 * turn, "an early put is lost"
        comm._sync(None)
        comm.put(fresh, np.full(500, -1), to)  # late: it must not reach the next array at this place
        comm.free(fresh)
    group.close()
    comm.free(arrived)


def collectives(comm: xccl.Communicator, seed: int) -> None:
    """Any operations of any sizes in any memory, one behind the other."""
    rng = np.random.default_rng(seed)
    operations = [
        test_coll.all_to_all,
        test_coll.all_gather,
        test_coll.broadcast,
        test_coll.all_to_all_v,
        test_coll.all_reduce,
        test_coll.reduce_scatter,
    ]
    room = 2 * comm.size * 20000 * 8
    memory = {kind: (Buffers(comm, room, kind), Buffers(comm, room, kind)) for kind in (False, True)}
    for turn in range(5):
        operation = operations[rng.integers(len(operations))]
        count = int(rng.choice([0, 1, 6, 512, 3000, 20000], p=[0.1, 0.25, 0.2, 0.2, 0.15, 0.1]))
        operation(comm, turn, str(rng.choice(["float32", "int64", "bfloat16"])), count, *memory[rng.random() < 0.5])
        comm.barrier()
    for pair in memory.values():
        for buffers in pair:
            buffers.free()


def messages(comm: xccl.Communicator, seed: int) -> None:
    """A random program of sends and receives, and one with wildcards."""
    rng = np.random.default_rng(seed)
    transfers = [
        Transfer(
            source=int(rng.integers(comm.size)),
            dest=int(rng.integers(comm.size)),
            tag=int(rng.integers(3)),
            nbytes=int(rng.choice([0, 8, 40, 41, 255, 257, 1024, 5000])),
            symmetric=bool(rng.random() < 0.5),
            sync=bool(rng.random() < 0.3),
            send_early=int(rng.choice([0, 5])),
            send_late=int(rng.choice([0, 5])),
            receive_early=int(rng.choice([0, 5])),
            receive_late=int(rng.choice([0, 5])),
        )
        for _ in range(12)
    ]
    test_p2p_random.perform(comm, transfers, test_p2p_random.plan(transfers))
    comm._sync(None)  # the wildcards are for the second program only
    test_p2p_random.receive_wild(comm, seed, 3, 768, str(rng.choice(["any", "source", "tag"])))


def experts(comm: xccl.Communicator, seed: int) -> None:
    """Dispatch and combine of a random layer in all ways; then as many dispatches ahead as there may be."""
    test_expert_parallel.several_layers(comm, seed, num_layers=1, num_rounds=2)
    rng = np.random.default_rng(seed)
    rank = comm.rank
    layer = Layer(comm.size, 5, int(rng.integers(1, 300)), 2, 6, DTYPES[seed % 3], [None, "int8"][seed % 2], None)
    batches = [random_batch(rng, layer) for _ in range(5)]
    with layer.open(comm) as ep:
        hooks = [ep.dispatch_async(b.xs[rank], b.idxs[rank], b.weights[rank]) for b in batches[:2]]
        for i, batch in enumerate(batches):
            recv_x, handle = hooks.pop(0)()
            if i + 2 < len(batches):
                ahead = batches[i + 2]
                hooks.append(ep.dispatch_async(ahead.xs[rank], ahead.idxs[rank], ahead.weights[rank]))
            check_received(batch, rank, recv_x, handle)
            recv_x[...] = batch.ys[rank]
            combined = ep.combine(recv_x, handle)
            recv_x[...] = 7
            assert_same_numbers(combined, batch.outs(True)[rank])


CASES: dict[str, Case] = {case.__name__: case for case in (litmus, puts, groups, collectives, messages, experts)}


@contextlib.contextmanager
def options(**values: object) -> Iterator[None]:
    """Sets options for the worlds made meanwhile."""
    for name, value in values.items():
        setattr(xccl.rc, name, value)
    try:
        yield
    finally:
        for name in values:
            delattr(xccl.rc, name)


def run_seeds(
    case: Case, seeds: Sequence[int], nranks: int, host: str = "processes", timeout: float = 120, calm: bool = False
) -> None:
    """Runs the case with each seed in turn, in one world. What a seed makes fail is raised, and names it.

    With `calm` nothing is perturbed: the seed only chooses what the case does.
    """

    def body(comm: xccl.Communicator) -> None:
        for seed in seeds:
            if not calm:
                check(lib.xccl_chaos_reseed(comm._world._w, seed))
            group = comm.split(0)
            assert group is not None
            case(group, seed)
            group.close()

    chaos = 0 if calm else seeds[0]
    # small blocks and rings: several chunks without much data
    with options(chaos=chaos, timeout=30, coll_block_size="64K", p2p_slot_size=256, p2p_slots=4):
        xccl.run(body, nranks, timeout=timeout, host=host)
