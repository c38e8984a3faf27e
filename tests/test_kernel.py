"""csrc/kernel.c: every vector width gives the bits of the plain NumPy reference."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from moe_support import DTYPES, assert_same_numbers, bits

from xccl import reference

SOURCE = Path(__file__).parent.parent / "csrc" / "kernel.c"
SIMD = {"scalar": 1, "avx2": 2, "avx512": 3}
GUARD = 0x5A

Pointer, Size, Dtype = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


class KernelSet(ctypes.Structure):
    """xccl_kernel_t."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("to_float32", ctypes.CFUNCTYPE(None, Dtype, Pointer, Pointer, Size)),
        ("from_float32", ctypes.CFUNCTYPE(None, Dtype, Pointer, Pointer, Size)),
        ("quantize", ctypes.CFUNCTYPE(ctypes.c_float, Dtype, Pointer, Pointer, Size)),
        ("dequantize", ctypes.CFUNCTYPE(None, Dtype, Pointer, Pointer, ctypes.c_float, Size)),
        ("weighted_sum", ctypes.CFUNCTYPE(None, Dtype, Pointer, Pointer, Pointer, Size, Size)),
        ("stream", ctypes.CFUNCTYPE(None, Pointer, Pointer, Size)),
    ]


class Kernel:
    """One set of functions on arrays; every result stands before a guard that must stay untouched."""

    def __init__(self, library: ctypes.CDLL, simd: int) -> None:
        library.xccl_kernel_get.restype = ctypes.POINTER(KernelSet)
        found = library.xccl_kernel_get(simd)
        if not found:
            pytest.skip("this processor lacks the instructions")
        self.set = found.contents
        self.name = self.set.name.decode()

    def _result(self, n: int, dtype: np.dtype, offset: int) -> tuple[np.ndarray, np.ndarray]:
        """n elements at an odd element offset, and the raw bytes behind them."""
        raw = np.full((n + offset) * dtype.itemsize + 64, GUARD, np.uint8)
        end = (n + offset) * dtype.itemsize
        return raw[offset * dtype.itemsize : end].view(dtype), raw[end:]

    def convert(self, x: np.ndarray, dtype: np.dtype, offset: int = 0) -> np.ndarray:
        out, guard = self._result(x.size, dtype, offset)
        if dtype == np.float32:
            self.set.to_float32(DTYPES.index(x.dtype), out.ctypes.data, x.ctypes.data, x.size)
        else:
            self.set.from_float32(DTYPES.index(dtype), out.ctypes.data, x.ctypes.data, x.size)
        assert (guard == GUARD).all()
        return out

    def quantize(self, x: np.ndarray, offset: int = 0) -> tuple[np.ndarray, np.float32]:
        q, guard = self._result(x.size, np.dtype(np.int8), offset)
        scale = self.set.quantize(DTYPES.index(x.dtype), q.ctypes.data, x.ctypes.data, x.size)
        assert (guard == GUARD).all()
        return q, np.float32(scale)

    def dequantize(self, q: np.ndarray, scale: float, dtype: np.dtype, offset: int = 0) -> np.ndarray:
        out, guard = self._result(q.size, dtype, offset)
        self.set.dequantize(DTYPES.index(dtype), out.ctypes.data, q.ctypes.data, scale, q.size)
        assert (guard == GUARD).all()
        return out

    def weighted_sum(self, rows: np.ndarray, weights: np.ndarray | None, offset: int = 0) -> np.ndarray:
        num_rows, n = rows.shape
        out, guard = self._result(n, rows.dtype, offset)
        pointers = (ctypes.c_void_p * max(num_rows, 1))(*[row.ctypes.data for row in rows])
        weights_at = None if weights is None else weights.ctypes.data
        self.set.weighted_sum(DTYPES.index(rows.dtype), out.ctypes.data, pointers, weights_at, num_rows, n)
        assert (guard == GUARD).all()
        return out

    def stream(self, x: np.ndarray, offset: int) -> np.ndarray:
        out, guard = self._result(x.size, np.dtype(np.uint8), offset)
        before = out.base[:offset].copy()
        self.set.stream(out.ctypes.data, x.ctypes.data, x.size)
        assert (guard == GUARD).all()
        assert (out.base[:offset] == before).all()
        return out


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    target = tmp_path_factory.mktemp("kernel") / "kernel.so"
    flags = ["-std=c11", "-O3", "-ffp-contract=off", "-fPIC", "-shared"]
    subprocess.run([compiler, *flags, "-o", str(target), str(SOURCE)], check=True, timeout=120)
    return ctypes.CDLL(str(target))


@pytest.fixture(scope="module", params=sorted(SIMD.values()), ids=sorted(SIMD, key=SIMD.__getitem__))
def kernel(request: pytest.FixtureRequest, library: ctypes.CDLL) -> Kernel:
    return Kernel(library, request.param)


def random_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, kind: str) -> np.ndarray:
    """Usual values, multiples of half a step, near the smallest scale, any bits, or any finite bits."""
    size = int(np.prod(shape))
    if kind == "normal":
        return rng.standard_normal(shape).astype(dtype)
    if kind == "halves":  # quantises to k + 0.5: ties
        x = (rng.integers(-254, 255, shape) * 0.5).astype(dtype)
        x.reshape(-1)[: min(1, size)] = 127
        return x
    if kind == "tiny":  # the scale is around FLT_MIN, where float16 cannot go
        return (rng.standard_normal(shape) * 127 * 2.0**-126).astype(np.float32).astype(dtype)
    x = rng.integers(0, 256, size * dtype.itemsize, dtype=np.uint8).view(dtype).reshape(shape)
    if kind == "finite":
        x = np.where(np.isfinite(x.astype(np.float32)), x, np.zeros((), dtype))
    specials = np.array([0.0, -0.0, np.inf, -np.inf, np.nan]).astype(dtype)[: 5 if kind == "any" else 2]
    chosen = rng.random(shape) < 0.05
    return np.where(chosen, rng.choice(specials, shape), x)


cases = given(
    seed=st.integers(0, 2**32 - 1),
    n=st.one_of(st.integers(1, 70), st.integers(1, 8192)),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["normal", "halves", "tiny", "any", "finite"]),
    offset=st.integers(0, 3),
)
many = settings(max_examples=150, deadline=None)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
class TestConversions:
    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_every_16_bit_number_widens(self, kernel: Kernel, dtype: np.dtype) -> None:
        x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
        np.testing.assert_array_equal(bits(kernel.convert(x, DTYPES[0])), bits(x.astype(np.float32)))

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
    def test_every_float32_boundary_narrows(self, kernel: Kernel, dtype: np.dtype) -> None:
        """All upper halves with the lower halves around each way to round, NaN payloads included."""
        lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
        x = ((np.arange(1 << 16, dtype=np.uint32) << 16)[:, None] | lower).reshape(-1).view(np.float32)
        with np.errstate(all="ignore"):
            expected = x.astype(dtype)
        np.testing.assert_array_equal(bits(kernel.convert(x, dtype)), bits(expected))

    @cases
    @many
    def test_any_length_and_alignment(
        self, kernel: Kernel, seed: int, n: int, dtype: np.dtype, kind: str, offset: int
    ) -> None:
        x = random_values(np.random.default_rng(seed), (n,), DTYPES[0], kind)
        with np.errstate(all="ignore"):
            expected = x.astype(dtype)
        actual = kernel.convert(x, dtype, offset)
        np.testing.assert_array_equal(bits(actual), bits(expected))


class TestQuantize:
    @cases
    @example(seed=0, n=8192, dtype=DTYPES[0], kind="halves", offset=1)
    @many
    def test_is_the_reference(self, kernel: Kernel, seed: int, n: int, dtype: np.dtype, kind: str, offset: int) -> None:
        x = random_values(np.random.default_rng(seed), (n,), dtype, kind)
        q, scale = kernel.quantize(x, offset)
        expected_q, expected_scales = reference.quantize(x[None])
        np.testing.assert_array_equal(q, expected_q[0])
        np.testing.assert_array_equal(bits(scale), bits(expected_scales[0]))

    @pytest.mark.parametrize("place", [0, 63, 99])
    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
    def test_row_with_a_non_finite_value_is_marked(self, kernel: Kernel, bad: float, place: int) -> None:
        x = np.ones(100, np.float32)
        x[place] = bad
        q, scale = kernel.quantize(x)
        assert np.isnan(scale)
        assert not q.any()

    def test_extreme_rows_never_leave_the_range(self, kernel: Kernel) -> None:
        """Just above the smallest scale, and at the largest number."""
        smallest = np.float32(127) * np.finfo(np.float32).tiny
        for m in (smallest, np.nextafter(smallest, np.float32(1)), np.finfo(np.float32).max):
            q, scale = kernel.quantize(np.array([m, -m, 0], np.float32))
            np.testing.assert_array_equal(q, [127, -127, 0])
            assert scale >= np.finfo(np.float32).tiny


class TestDequantize:
    @cases
    @many
    def test_is_the_reference(self, kernel: Kernel, seed: int, n: int, dtype: np.dtype, kind: str, offset: int) -> None:
        rng = np.random.default_rng(seed)
        q = rng.integers(-128, 128, n).astype(np.int8)
        scale = random_values(rng, (1,), DTYPES[0], kind)
        expected = reference.dequantize(q[None], scale, dtype)[0]
        assert_same_numbers(kernel.dequantize(q, float(scale[0]), dtype, offset), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_products_are_not_flushed(kernel: Kernel, dtype: np.dtype) -> None:
    """Instructions that round to bfloat16 take them for zero."""
    q = np.arange(-128, 128).astype(np.int8)
    for exponent in (-149, -140, -133, -127):
        scale = np.array([2.0**exponent], np.float32)
        np.testing.assert_array_equal(
            bits(kernel.dequantize(q, float(scale[0]), dtype)), bits(reference.dequantize(q[None], scale, dtype)[0])
        )


def plain_weighted_sum(rows: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    total = np.zeros(rows.shape[1], np.float32)
    with np.errstate(all="ignore"):
        for j, row in enumerate(rows.astype(np.float32)):
            total = total + (row if weights is None else weights[j] * row)
        return total.astype(rows.dtype)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
class TestWeightedSum:
    @cases
    @many
    def test_is_numpy(self, kernel: Kernel, seed: int, n: int, dtype: np.dtype, kind: str, offset: int) -> None:
        rng = np.random.default_rng(seed)
        num_rows = int(rng.integers(0, 17))
        rows = random_values(rng, (num_rows, n), dtype, kind)
        weights = rng.standard_normal(num_rows).astype(np.float32) if seed % 2 else None
        assert_same_numbers(kernel.weighted_sum(rows, weights, offset), plain_weighted_sum(rows, weights))

    def test_multiplication_and_addition_round_apart(self, kernel: Kernel) -> None:
        """(1 + 2^-12)^2 - 1 has a last bit that only a fused multiply-add would keep."""
        a = np.float32(1 + 2.0**-12)
        rows = np.array([[-1], [a]], np.float32)
        weights = np.array([1, a], np.float32)
        assert kernel.weighted_sum(rows, weights)[0] == np.float32(a * a) - np.float32(1)


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 1000), skip=st.integers(0, 64), offset=st.integers(0, 130))
@many
def test_stream_copies_any_length_to_any_alignment(kernel: Kernel, seed: int, n: int, skip: int, offset: int) -> None:
    x = np.random.default_rng(seed).integers(0, 256, n + skip).astype(np.uint8)[skip:]
    np.testing.assert_array_equal(kernel.stream(x, offset), x)


def test_auto_takes_the_widest(library: ctypes.CDLL) -> None:
    widths = []
    for simd in SIMD.values():
        library.xccl_kernel_get.restype = ctypes.POINTER(KernelSet)
        if library.xccl_kernel_get(simd):
            widths.append(Kernel(library, simd).name)
    assert Kernel(library, 0).name == widths[-1]


def test_unknown_width_is_refused(library: ctypes.CDLL) -> None:
    library.xccl_kernel_get.restype = ctypes.POINTER(KernelSet)
    assert not library.xccl_kernel_get(99)
