"""Differences between two settings, with an error that decides whether they may be called differences at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from sparse_robust.study.results import StudyResults

CLEAR = 2.0  # standard errors; a smaller difference is "no clear difference"


@dataclass(frozen=True)
class Setting:
    """One side of a comparison: a pre-training with the masks of one finder ("dense" values are used at k = 0)."""

    theta: str
    finder: str


@dataclass(frozen=True)
class Place:
    """Where two settings are compared."""

    target: str
    fraction: float
    regime: str
    metric: str  # "sa" or "ra"


@dataclass(frozen=True)
class Difference:
    """Mean over rounds of accuracy(a) - accuracy(b), in percentage points.

    Attributes:
        mean: the mean difference; None where no round has both sides.
        error: its standard error; None where neither seeds nor a test-set size give one.
        rounds: round -> difference.
        seeds: the smallest number of seeds on a side of any round.
        test_images: size of the test set where it is known.
    """

    mean: float | None
    error: float | None
    rounds: dict[int, float]
    seeds: int
    test_images: int | None

    @property
    def outcome(self) -> str:
        """ "higher", "lower", "no clear difference" (up to `CLEAR` standard errors), or "not decided" without data."""
        if self.mean is None or self.error is None:
            return "not decided"
        if abs(self.mean) <= CLEAR * self.error:
            return "no clear difference"
        return "higher" if self.mean > 0 else "lower"

    @property
    def basis(self) -> str:
        """What the error rests on, in words."""
        if self.mean is None:
            return "no round has both"
        if self.seeds > 1:
            return f"{self.seeds} seeds, ± is the standard error"
        if self.test_images is None:
            return "single seed, no error known because the size of the test set is not recorded"
        return f"single seed, ± is the binomial standard error of {self.test_images:,} test images"

    @property
    def amount(self) -> str:
        """The size of the difference with its error, without a sign: "12.3 ± 2.1"."""
        if self.mean is None:
            return "?"
        return f"{abs(self.mean):.1f}" + (f" ± {self.error:.1f}" if self.error is not None else "")

    @property
    def spread(self) -> str:
        """Smallest and largest difference over the rounds, "−1.2 to +3.4"; one value where there is one round."""
        values = sorted(self.rounds.values())
        ends = [values[0], values[-1]] if len(values) > 1 else values
        return " to ".join(signed(v) for v in ends) or "none"

    def numbers(self) -> dict[str, object]:
        """Return the values for the machine-readable report."""
        return {
            "difference": self.mean,
            "standard_error": self.error,
            "outcome": self.outcome,
            "per_round": {str(k): v for k, v in self.rounds.items()},
            "seeds": self.seeds,
            "test_images": self.test_images,
        }


def difference(results: StudyResults, place: Place, a: Setting, b: Setting, rounds: Sequence[int]) -> Difference:
    """Compare ``a`` with ``b`` over those of ``rounds`` that both have."""

    def values(setting: Setting, k: int) -> list[float]:
        at = (setting.theta, setting.finder, k, place.target, place.fraction, place.regime)
        return list(results.values(place.metric, *at).values())

    pairs = {k: (values(a, k), values(b, k)) for k in rounds}
    return measure({k: p for k, p in pairs.items() if all(p)}, results.test_images(place.target))


def measure(pairs: Mapping[int, tuple[Sequence[float], Sequence[float]]], images: int | None) -> Difference:
    """Return the mean difference of ``pairs``: round -> (accuracies of a, accuracies of b) over seeds, none empty.

    The error of a round is the standard error over seeds, sqrt(var_a / n_a + var_b / n_b), but never less than the
    binomial error of all test predictions pooled; with one seed it is the binomial error alone. The rounds share their
    test images, so their errors are averaged and not reduced by averaging.
    """
    rounds = {k: fmean(a) - fmean(b) for k, (a, b) in pairs.items()}
    errors = [standard_error(a, b, images) for a, b in pairs.values()]
    known = [e for e in errors if e is not None]
    return Difference(
        mean=fmean(rounds.values()) if rounds else None,
        error=fmean(known) if known and len(known) == len(errors) else None,
        rounds=rounds,
        seeds=min((min(len(a), len(b)) for a, b in pairs.values()), default=0),
        test_images=images,
    )


def standard_error(a: Sequence[float], b: Sequence[float], images: int | None) -> float | None:
    """Return the standard error of mean(a) - mean(b) in percentage points, or None where nothing gives one."""
    over_seeds = math.sqrt(variance(a) / len(a) + variance(b) / len(b)) if min(len(a), len(b)) > 1 else None
    if images is None:
        return over_seeds
    pooled = math.hypot(binomial_error(fmean(a), images * len(a)), binomial_error(fmean(b), images * len(b)))
    return pooled if over_seeds is None else max(pooled, over_seeds)


def binomial_error(percent: float, images: int) -> float:
    """Return the standard error in points of an accuracy over ``images`` images.

    One success and one failure are added, so that 0 % and 100 % do not look exact.
    """
    p = (percent / 100 * images + 1) / (images + 2)
    return 100 * math.sqrt(p * (1 - p) / images)


def signed(points: float) -> str:
    """Return a difference in points with its sign: "+1.2", "−0.4", and with two digits what one would round to 0."""
    text = f"{points:+.1f}" if abs(points) >= 0.05 else f"{points:+.2f}"
    return "0.0" if float(text) == 0 else text.replace("-", "\u2212")
