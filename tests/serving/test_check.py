import pytest

from xccl.serving.check import Difference, first_difference
from xccl.serving.request import RequestOutput


def outputs(**tokens):
    return [RequestOutput(int(name[1:]), list(value)) for name, value in tokens.items()]


def test_equal_runs_in_any_order():
    assert first_difference(outputs(r1=[4], r0=[1, 2]), outputs(r0=[1, 2], r1=[4])) is None


def test_the_first_difference_is_named():
    got, expected = outputs(r0=[1, 2], r1=[3, 4, 5], r2=[0]), outputs(r0=[1, 2], r1=[3, 9, 5], r2=[7])
    assert first_difference(got, expected) == Difference(1, 1, 4, 9)


def test_a_text_that_ends_early_differs():
    assert first_difference(outputs(r0=[1]), outputs(r0=[1, 2])) == Difference(0, 1, None, 2)


def test_runs_of_different_requests_cannot_be_compared():
    with pytest.raises(ValueError, match=r"\[1\] are in one of them only"):
        first_difference(outputs(r0=[1]), outputs(r0=[1], r1=[2]))
