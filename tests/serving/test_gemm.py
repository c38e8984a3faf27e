import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xccl.serving import gemm as gemm_module
from xccl.serving.gemm import RowGemm, probe

GEMMS = [RowGemm(None), RowGemm(4), RowGemm(8)]


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("rows", [0, 1, 2, 7, 8, 9, 64])
def test_linear_is_the_matrix_product(gemm, rows):
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((rows, 12), np.float32), rng.standard_normal((12, 20), np.float32)
    got = gemm.linear(x, w)
    assert got.shape == (rows, 20)
    np.testing.assert_allclose(got, x.astype(np.float64) @ w, atol=1e-4)


@pytest.mark.parametrize("gemm", GEMMS)
@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 19), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_grouped_uses_each_groups_matrix(gemm, counts, seed):
    rng = np.random.default_rng(seed)
    rows, slack = sum(counts), gemm.min_rows - 1
    x = rng.standard_normal((rows + slack, 6), np.float32)
    w = rng.standard_normal((len(counts), 6, 10), np.float32)
    out = np.empty((rows + slack, 10), np.float32)
    gemm.grouped(x, counts, w, out)
    expected = np.einsum("rk,rkn->rn", x[:rows], np.repeat(w, counts, axis=0))
    np.testing.assert_allclose(out[:rows], expected, atol=1e-4)


@pytest.mark.parametrize("gemm", GEMMS)
def test_grouped_rows_have_the_bits_of_linear_rows(gemm):
    """A group of one row too, which BLAS would treat in another way."""
    rng = np.random.default_rng(2)
    counts = [1, 0, 3, 1, 8, 1]
    rows, slack = sum(counts), gemm.min_rows - 1
    x = rng.standard_normal((rows + slack, 128), np.float32)
    w = rng.standard_normal((len(counts), 128, 64), np.float32)
    out = np.empty((rows + slack, 64), np.float32)
    gemm.grouped(x, counts, w, out)
    owner = np.repeat(np.arange(len(counts)), counts)
    expected = [gemm.linear(x[i : i + 1], w[owner[i]]) for i in range(rows)]
    assert np.array_equal(out[:rows], np.concatenate(expected))


def test_probe_finds_a_form_whose_rows_do_not_depend_on_the_batch():
    gemm = probe([(128, 64), (32, 128)])
    assert gemm.row_stable
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((200, 128), np.float32), rng.standard_normal((128, 64), np.float32)
    alone = np.concatenate([gemm.linear(x[i : i + 1], w) for i in range(200)])
    assert np.array_equal(gemm.linear(x, w), alone)


def test_probe_turns_to_tiles_when_rows_depend_on_the_batch(monkeypatch):
    """A product that adds something for large batches, as a BLAS with another path does."""

    class Unstable(RowGemm):
        def linear(self, x, w):
            return super().linear(x, w) + np.float32(len(x) > 50 and self.tile != 8)

    monkeypatch.setattr(gemm_module, "RowGemm", Unstable)
    assert probe([(16, 16)]).tile == 8


def test_probe_admits_defeat(monkeypatch):
    class Hopeless(RowGemm):
        def linear(self, x, w):
            return super().linear(x, w) + np.float32(len(x))

    monkeypatch.setattr(gemm_module, "RowGemm", Hopeless)
    assert not probe([(16, 16)]).row_stable
