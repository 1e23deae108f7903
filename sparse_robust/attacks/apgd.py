"""Auto-PGD: projected gradient ascent without a step size to choose."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_robust.attacks.apgd_ascent import TARGETED_LOSSES, AdaptiveAscent
from sparse_robust.attacks.apgd_l1 import SparseAscent
from sparse_robust.attacks.base import EngineAttack
from sparse_robust.attacks.budget import Budget
from sparse_robust.attacks.losses import LOSSES
from sparse_robust.attacks.norms import NORMS
from sparse_robust.attacks.procedure import Procedure
from sparse_robust.errors import UsageError, unknown

_SUFFIX = {"dlr-targeted": "t", "ce-targeted": "ce-t"}


@dataclass(frozen=True, kw_only=True)
class APGD(EngineAttack):
    """Auto-PGD, the gradient attack of AutoAttack.

    In Linf and L2: steps with momentum, of 2 eps at first; at checkpoints the step size of an image is halved, and the
    image set back to its best point, where its loss has stopped rising (Croce and Hein, Reliable evaluation of
    adversarial robustness with an ensemble of diverse parameter-free attacks, 2020). In L1: steps along the signs of
    the largest elements of the gradient, whose number adapts to the image, first in balls of three and two times the
    radius (Croce and Hein, Mind the box: l1-APGD for sparse adversarial attacks on image classifiers, 2021).

    Starts are random, functions of (seed, name, sample id, run, element) alone.

    Attributes:
        norm: ``Linf``, ``L2`` or ``L1``.
        steps: gradients of a run, 1 or more.
        n_restarts: random starts; with a targeted loss, for each target.
        loss: ``ce``, ``dlr``, ``cw`` or, towards one class after the other, ``dlr-targeted`` or ``ce-targeted``. For
            what the DLR losses are with 2 and 3 classes see `losses`.
        n_target_classes: targets of a targeted loss: the wrong classes with the largest logits on the clean image. With
            fewer wrong classes all of them.
        rho: share of the steps between two checkpoints that have to raise the loss, in [0, 1]. Not used in L1.
        large_eps_schedule: in L1, the first 60 % of the steps in larger balls; needs 3 steps or more. None: in L1 yes.
        eot_iter: passes that each gradient averages, for stochastic models.
        seed: any integer; 0 is a seed like any other.
    """

    norm: str = "Linf"
    steps: int = 100
    n_restarts: int = 1
    loss: str = "ce"
    n_target_classes: int = 9
    rho: float = 0.75
    large_eps_schedule: bool | None = None
    eot_iter: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, value, known in (("norm", self.norm, NORMS), ("loss", self.loss, (*LOSSES, *TARGETED_LOSSES))):
            if value not in known:
                raise unknown(f"attack {kind}", value, known)
        for name in ("steps", "n_restarts", "n_target_classes", "eot_iter"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise UsageError(f"{name} must be an integer of at least 1, got {count!r}.")
        if not 0 <= self.rho <= 1:
            raise UsageError(f"rho is a share of steps, in [0, 1], got {self.rho!r}.")
        if self.large_eps_schedule and self.norm != "L1":
            raise UsageError(f"the schedule of larger radii belongs to norm L1, got norm {self.norm!r}.")
        if self.grows and self.steps < 3:
            raise UsageError(f"the schedule of three radii needs 3 steps or more, got {self.steps}; or switch it off.")

    @property
    def name(self) -> str:
        """Name in tables and files: apgd-ce, apgd-dlr, apgd-cw; apgd-t with loss dlr-targeted, apgd-ce-t."""
        return f"apgd-{_SUFFIX.get(self.loss, self.loss)}"

    @property
    def grows(self) -> bool:
        """Whether the first steps are taken in larger balls."""
        return self.norm == "L1" if self.large_eps_schedule is None else self.large_eps_schedule

    def targets(self, classes: int) -> int:
        """Return how many targets a model with so many classes is attacked with; 1 for an untargeted loss."""
        return min(self.n_target_classes, classes - 1) if self.loss in TARGETED_LOSSES else 1

    def passes(self, classes: int) -> float:
        """Return what an image that withstands the attack costs, in forward passes; a gradient counts as two more."""
        gradients = self.steps + 2 * self.grows
        return self.targets(classes) * self.n_restarts * (3 * gradients + 1) * self.eot_iter

    def prepare(self, budget: Budget, classes: int) -> Procedure:
        """Return the attack within a budget, on a model with so many classes."""
        return (SparseAscent if self.norm == "L1" else AdaptiveAscent)(self, budget, classes)
