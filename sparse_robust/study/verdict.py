"""Who wins: the double-win predicate, extreme sparsities, and how much two tickets have in common.

A ticket wins against the dense model of the same pre-training, target, fraction and transfer regime. For a metric M
(SA: clean accuracy, RA: robust accuracy) and a regime t (ST: standard, AT: adversarial transfer), with S the sparse
and B the dense runs over seeds,

    match(M, t):  mean(S) >= mean(B) - c * std(B, ddof=1).

Chen, Zhang, Liu, Chang and Wang, "Data-Efficient Double-Win Lottery Tickets from Robust Pre-training" (ICML 2022) ask
one and the same ticket to match in both regimes, on clean and on adversarial accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from sparse_robust.errors import UsageError
from sparse_robust.study.compare import CLEAR, standard_error
from sparse_robust.study.criterion import Criterion, Requirement
from sparse_robust.study.results import StudyResults
from sparse_robust.study.rows import DENSE

_SLACK = 1e-9  # percentage points; equal means that were summed in another order stay equal


@dataclass(frozen=True)
class Match:
    """One comparison of sparse runs with dense runs, in percentage points.

    ``margin`` = difference + tolerance; the sparse model matches where it is not negative. ``error`` is the standard
    error of the difference where one is known: a shortfall of up to `CLEAR` of them may be noise.
    """

    sparse: float
    dense: float
    difference: float
    tolerance: float
    margin: float
    c: float
    n_sparse: int
    n_dense: int
    error: float | None

    @property
    def wins(self) -> bool:
        """Whether the sparse model is as good as the dense one."""
        return self.margin >= -_SLACK

    @property
    def noise(self) -> bool:
        """Whether the margin is too small to tell a win from a loss."""
        return self.error is not None and abs(self.margin) <= CLEAR * self.error

    @property
    def single_seed(self) -> bool:
        """Whether a side has one run only, so that no spread is known and c was forced to 0."""
        return min(self.n_sparse, self.n_dense) == 1


def match(sparse: Sequence[float], dense: Sequence[float], c: float = 1.0, images: int | None = None) -> Match:
    """Compare the mean over seeds: mean(S) >= mean(B) - c * std(B, ddof=1).

    Args:
        sparse: accuracies in percent of the sparse model, one a seed.
        dense: those of the dense baseline.
        c: tolerance in standard deviations; forced to 0 where either side has one seed.
        images: size of the test set, for the standard error.

    Raises:
        UsageError: if a side is empty.
    """
    if not sparse or not dense:
        raise UsageError(
            f"match: expected at least one run on each side, got {len(sparse)} sparse and {len(dense)} dense."
        )
    c = c if min(len(sparse), len(dense)) > 1 else 0.0
    tolerance = c * stdev(dense) if c else 0.0
    s, b = fmean(sparse), fmean(dense)
    error = standard_error(sparse, dense, images)
    return Match(s, b, s - b, tolerance, s - b + tolerance, c, len(sparse), len(dense), error)


@dataclass(frozen=True)
class RoundVerdict:
    """The verdict on one ticket. ``wins`` is None where a needed run is missing; ``reason`` then says which."""

    k: int
    sparsity: float
    wins: bool | None
    matches: Mapping[Requirement, Match | None]
    reason: str

    @property
    def worst(self) -> tuple[Requirement, Match] | None:
        """The needed comparison with the smallest margin, or None where the round is not decided."""
        known = [(r, m) for r, m in self.matches.items() if m is not None]
        return min(known, key=lambda pair: pair[1].margin) if known and self.wins is not None else None

    @property
    def near(self) -> bool:
        """Whether the ticket loses, but by no more than noise in every comparison that it fails."""
        failed = [m for m in self.matches.values() if m is not None and not m.wins]
        return self.wins is False and all(m.noise for m in failed)


@dataclass(frozen=True)
class Extremes:
    """Extreme winning rounds: the largest, and the largest with every run round before it winning too.

    ``label`` is "k = 5", "none" (every decided round loses: both are 0) or "not decided" (no round is: both are None).
    """

    k_max: int | None
    k_contig: int | None
    label: str


def extremes(wins: Mapping[int, bool | None]) -> Extremes:
    """Return the extreme rounds of ``wins``: round that was run -> it wins, it loses, or None for not decided.

    A round that is not decided ends the run of wins that ``k_contig`` counts.
    """
    decided = {k: w for k, w in wins.items() if w is not None and k > 0}
    if not decided:
        return Extremes(None, None, "not decided")
    k_max = max((k for k, w in decided.items() if w), default=0)
    k_contig = 0
    for k in sorted(k for k in wins if k > 0):
        if not wins[k]:
            break
        k_contig = k
    return Extremes(k_max, k_contig, f"k = {k_max}" if k_max else "none")


@dataclass(frozen=True)
class DoubleWin:
    """One row of the double-win table: all rounds of one (pre-training, finder, target, fraction)."""

    theta: str
    finder: str
    target: str
    fraction: float
    criterion: Criterion
    rounds: tuple[RoundVerdict, ...]
    extremes: Extremes
    seeds: int

    @property
    def label(self) -> str:
        """ "single seed", or how many seeds the comparison with the fewest has; "not decided" where there is none."""
        return seeds_label(self.seeds)

    @property
    def undecided(self) -> dict[int, str]:
        """Round -> reason, for the rounds that could not be decided."""
        return {r.k: r.reason for r in self.rounds if r.wins is None}


def seeds_label(seeds: int) -> str:
    """Return "single seed", "3 seeds", or "not decided" for none."""
    return {0: "not decided", 1: "single seed"}.get(seeds, f"{seeds} seeds")


def judge(
    results: StudyResults, theta: str, finder: str, target: str, fraction: float, criterion: Criterion | None = None
) -> DoubleWin:
    """Judge every transferred round of one finder's tickets."""
    criterion = criterion or Criterion()
    rounds = tuple(
        _round(results, theta, finder, k, target, fraction, criterion)
        for k in results.rounds(theta, finder, target, fraction)
    )
    seeds = [min(m.n_sparse, m.n_dense) for r in rounds for m in r.matches.values() if m is not None]
    return DoubleWin(
        theta,
        finder,
        target,
        fraction,
        criterion,
        rounds,
        extremes({r.k: r.wins for r in rounds}),
        min(seeds, default=0),
    )


def double_win_table(results: StudyResults, criterion: Criterion | None = None) -> list[DoubleWin]:
    """Return a row for every (target, fraction, finder, pre-training) that has transferred tickets."""
    return [
        judge(results, theta, finder, target, fraction, criterion)
        for target, fraction in results.targets()
        for finder in results.finders()
        for theta in results.thetas()
        if results.rounds(theta, finder, target, fraction)
    ]


def _round(
    results: StudyResults, theta: str, finder: str, k: int, target: str, fraction: float, criterion: Criterion
) -> RoundVerdict:
    matches: dict[Requirement, Match | None] = {}
    reasons = []
    images = results.test_images(target)
    for metric, regime in criterion.requirements:
        sparse = list(results.values(metric.lower(), theta, finder, k, target, fraction, regime).values())
        dense, missing = _baseline(results, criterion.baseline, metric, theta, target, fraction, regime)
        if not sparse:
            missing = f"no {metric} of the ticket under {regime} transfer"
        matches[(metric, regime)] = None if missing else match(sparse, dense, criterion.c, images)
        if missing:
            reasons.append(missing)
    decided = [m.wins for m in matches.values() if m is not None]
    return RoundVerdict(k, results.sparsity(k, finder), None if reasons else all(decided), matches, "; ".join(reasons))


def _baseline(
    results: StudyResults, baseline: str, metric: str, theta: str, target: str, fraction: float, regime: str
) -> tuple[list[float], str]:
    """Return the dense runs to compare with, and what is missing ("" if nothing is)."""
    candidates = [theta] if baseline == "same" else results.thetas()
    runs = {t: list(results.values(metric.lower(), t, DENSE, 0, target, fraction, regime).values()) for t in candidates}
    lacking = [t for t, values in runs.items() if not values]
    if lacking:
        return [], f"no {metric} of the dense {', '.join(lacking)} model under {regime} transfer"
    return max(runs.values(), key=fmean), ""


def sparsity_label(k: int, *, survivors: int | None = None, numel: int | None = None, rate: float = 0.2) -> str:
    """Return the sparsity of round ``k`` in percent with two digits, as the papers print it.

    From exact counts where they are given, else 100 * (1 - (1 - rate)^k).
    """
    if survivors is not None and numel is not None:
        return f"{100 * (1 - survivors / numel):.2f}"
    return f"{100 * (1 - (1 - rate) ** k):.2f}"
