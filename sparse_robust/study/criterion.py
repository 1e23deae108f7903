"""What counts as a win; see `sparse_robust.study.verdict`. Light to import: the command line lists the names."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_robust.errors import UsageError, unknown

Requirement = tuple[str, str]  # (metric, regime), e.g. ("SA", "ST")

PREDICATES: dict[str, tuple[Requirement, ...]] = {
    "strict": (("SA", "ST"), ("SA", "AT"), ("RA", "AT")),
    "lenient": (("SA", "ST"), ("RA", "AT")),
    "literal": (("SA", "ST"), ("SA", "AT"), ("RA", "AT"), ("RA", "ST")),
    "standard": (("SA", "ST"),),
    "robust": (("SA", "AT"), ("RA", "AT")),
}
BASELINES = ("same", "best_dense")


@dataclass(frozen=True)
class Criterion:
    """What counts as a win.

    Attributes:
        predicate: one of `PREDICATES`.
        c: tolerance in standard deviations of the dense runs, >= 0; 0 means "same or better". One seed forces 0.
        baseline: "same" = the dense model of the ticket's own pre-training; "best_dense" = the best of all dense
            pre-trainings, chosen for each metric and regime.
    """

    predicate: str = "strict"
    c: float = 1.0
    baseline: str = "same"

    def __post_init__(self) -> None:
        if self.predicate not in PREDICATES:
            raise unknown("predicate", self.predicate, PREDICATES)
        if self.baseline not in BASELINES:
            raise unknown("baseline", self.baseline, BASELINES)
        if not 0 <= self.c < float("inf"):
            raise UsageError(
                f"tolerance c: expected a finite number >= 0 (standard deviations of the dense runs), got {self.c}."
            )

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """The (metric, regime) pairs that must match."""
        return PREDICATES[self.predicate]
