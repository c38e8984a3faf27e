"""Named workloads do to the ranks what their names say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xccl import reference
from xccl.bench.workload import SHAPES, WORKLOADS, choose_experts, chosen_rows, moved_rows, received_rows

QWEN = SHAPES["qwen3"]


@given(st.sampled_from(list(WORKLOADS)), st.integers(0, 99), st.integers(1, 8), st.integers(1, 20))
def test_tokens_choose_different_experts_and_seeds_repeat(name: str, seed: int, ranks: int, tokens: int) -> None:
    chosen = choose_experts(name, seed, 0, ranks, tokens, QWEN)
    again = choose_experts(name, seed, 0, ranks, tokens, QWEN)
    assert len(chosen) == ranks
    for idx, same in zip(chosen, again, strict=True):
        assert (idx == same).all()
        assert idx.dtype == np.int64
        assert ((idx >= 0) & (idx < QWEN.num_experts)).all()
        assert all(len(set(row)) == QWEN.num_topk for row in idx.tolist())


@pytest.mark.parametrize("name", WORKLOADS)
def test_rows_of_ranks_are_those_of_the_reference(name: str) -> None:
    idx = choose_experts(name, 3, 1, 3, 9, QWEN)
    received = reference.dispatch([np.zeros((len(i), 4), np.float32) for i in idx], idx, QWEN.num_experts)
    assert received_rows(idx, QWEN.num_experts).tolist() == [len(r.recv_x) for r in received]
    tokens = [len(set(zip(r.src_rank.tolist(), r.src_token.tolist(), strict=True))) for r in received]
    assert moved_rows(idx, QWEN.num_experts).sum(axis=0).tolist() == tokens
    moved, chosen = moved_rows(idx, QWEN.num_experts), chosen_rows(idx, QWEN.num_experts)
    assert chosen.sum(axis=1).tolist() == [i.size for i in idx]
    assert ((moved <= chosen) & (moved > 0) == (chosen > 0)).all()


def _rows(name: str, buffer: int = 0) -> list[int]:
    return received_rows(choose_experts(name, 0, buffer, 4, 64, QWEN), QWEN.num_experts).tolist()


def test_uniform_is_even() -> None:
    assert max(_rows("uniform")) < 1.2 * np.mean(_rows("uniform"))


def test_hot_expert_is_chosen_by_every_token() -> None:
    assert all((idx == 5).any(axis=1).all() for idx in choose_experts("hot-expert", 5, 0, 2, 30, QWEN))


def test_hot_rank_receives_most() -> None:
    rows = _rows("hot-rank")
    assert rows[0] > 2 * max(rows[1:])


def test_empty_rank_has_no_tokens_and_gets_none() -> None:
    assert len(choose_experts("empty-rank", 0, 0, 4, 64, QWEN)[-1]) == 0
    assert _rows("empty-rank")[-1] == 0


def test_rotating_has_another_hot_expert_in_each_buffer() -> None:
    hot = []
    for buffer in range(4):
        idx = np.concatenate(choose_experts("rotating", 0, buffer, 4, 64, QWEN))
        hot.append(int(np.bincount(idx.ravel()).argmax()))
    assert len(set(hot)) == 4


def test_zipf_has_few_popular_experts() -> None:
    idx = np.concatenate(choose_experts("zipf", 0, 0, 4, 64, QWEN))
    loads = np.sort(np.bincount(idx.ravel(), minlength=QWEN.num_experts))[::-1]
    assert loads[:16].sum() > loads[16:].sum()
