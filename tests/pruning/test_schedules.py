"""Counts and shares of the schedules, against their published formulas and by property."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_robust.errors import UsageError
from sparse_robust.pruning.schedules import Cosine, Cubic


def test_cubic_numbers_done_by_hand() -> None:
    # from 1000 to 200 over 10 updates: 200 + 800 * (1 - t/10)^3
    cubic = Cubic(1000, 200, 5, 15)
    assert [cubic.count(t) for t in (0, 5, 6, 10, 14, 15, 99)] == [1000, 1000, 783, 300, 201, 200, 200]


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(0, 10**6), st.integers(1, 10**6), st.floats(0, 1))
def test_cubic_is_the_formula_in_exact_arithmetic(a: int, b: int, begin: int, length: int, where: float) -> None:
    start, stop = max(a, b), min(a, b)
    cubic = Cubic(start, stop, begin, begin + length)
    assert cubic.count(begin) == start and cubic.count(begin + length) == cubic.count(begin + 2 * length) == stop
    t = begin + int(where * length)
    # Zhu and Gupta's equation 1: s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3, with s = 1 - kept / N
    total = Fraction(start)
    final, initial = 1 - stop / total, Fraction(0)
    sparsity = final + (initial - final) * (1 - Fraction(t - begin, length)) ** 3
    assert abs(cubic.count(t) - (1 - sparsity) * total) <= Fraction(1, 2)
    assert cubic.count(t + 1) <= cubic.count(t)


def test_cosine_is_rigls() -> None:
    cosine = Cosine(0.3, 1000)
    for t in (1, 100, 250, 500, 999):
        assert cosine.share(t) == pytest.approx(0.3 / 2 * (1 + math.cos(math.pi * t / 1000)))
    assert cosine.share(1000) == cosine.share(2000) == 0
    assert Cosine(0.5, 1000, 0.005).share(500) == pytest.approx(0.2525)
    assert Cosine(0.5, 1000, 0.005).share(1000) == pytest.approx(0.005)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cubic(10, 11, 0, 5), "goes down to 1 weight at least, got 10 to 11"),
        (lambda: Cubic(10, 0, 0, 5), "got 10 to 0"),
        (lambda: Cubic(10, 5, 5, 5), "begin < end"),
        (lambda: Cosine(1.0, 5), "falls within"),
        (lambda: Cosine(0.1, 5, 0.2), "falls within"),
    ],
)
def test_impossible_schedules_are_refused(make: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()  # type: ignore[operator]
