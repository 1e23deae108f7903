"""Schedules: how many weights are kept, and how many are exchanged, at each update of a training run. Exact counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from sparse_robust.errors import UsageError


@dataclass(frozen=True)
class Cubic:
    """Gradual pruning: the number of kept weights falls from ``start`` to ``stop`` along a cubic.

    At update t it is stop + (start - stop) * (1 - (t - begin) / (end - begin))**3, rounded half to even in exact
    arithmetic: ``start`` up to ``begin``, and ``stop`` from ``end`` on.

    Source: Zhu and Gupta, To prune, or not to prune (2017), equation 1, with counts in the place of sparsities.
    """

    start: int
    stop: int
    begin: int
    end: int

    def __post_init__(self) -> None:
        if not 1 <= self.stop <= self.start:
            raise UsageError(f"gradual pruning goes down to 1 weight at least, got {self.start} to {self.stop}.")
        if not 0 <= self.begin < self.end:
            raise UsageError(f"gradual pruning needs begin < end, counted in updates; got {self.begin} and {self.end}.")

    def count(self, update: int) -> int:
        """Return how many weights are kept from the end of an update on."""
        passed = min(max(update - self.begin, 0), self.end - self.begin)
        left = 1 - Fraction(passed, self.end - self.begin)
        return self.stop + round((self.start - self.stop) * left**3)


@dataclass(frozen=True)
class Cosine:
    """The share of kept weights that an update exchanges: from ``first`` along half a cosine to ``last`` at ``end``.

    Source: Evci et al., Rigging the lottery (RigL, 2020), section 3: f(t) = alpha / 2 * (1 + cos(pi * t / end)).
    """

    first: float
    end: int
    last: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.last <= self.first < 1:
            raise UsageError(f"the share to exchange falls within [0, 1), got {self.first} to {self.last}.")

    def share(self, update: int) -> float:
        """Return the share at an update; ``last`` after ``end``."""
        passed = min(update, self.end) / max(self.end, 1)
        return self.last + (self.first - self.last) / 2 * (1 + math.cos(math.pi * passed))
