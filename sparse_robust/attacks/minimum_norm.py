"""Attacks that look for the smallest perturbation that fools a model: what they share, FMN and DDN."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparse_robust.attacks.base import EngineAttack
from sparse_robust.attacks.budget import Budget
from sparse_robust.attacks.hyperplane import fill
from sparse_robust.attacks.l1 import project_l1_box
from sparse_robust.attacks.losses import cross_entropy, margin
from sparse_robust.attacks.norms import NORMS
from sparse_robust.attacks.procedure import Look, Procedure, Rows, Seen, Task, per_row, where_row
from sparse_robust.errors import UsageError, unknown

ORDERS = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}
DUALS = {"Linf": 1.0, "L2": 2.0, "L1": math.inf}
"""Orders of the dual norms: |f(x)| / dual norm of f's gradient is the distance to f = 0, were f linear."""


@dataclass(frozen=True, kw_only=True)
class MinimumNormAttack(EngineAttack):
    """What `FMN` and `DDN` have in common: one run from x, one gradient a step."""

    steps: int = 100
    gamma: float = 0.05
    targeted: bool = False
    eot_iter: int = 1

    def __post_init__(self) -> None:
        check(self, at_least_1=("steps", "eot_iter"), fractions=("gamma",))

    @property
    def aimed(self) -> bool:
        """Whether the labels given are classes to reach, not to leave."""
        return self.targeted

    def passes(self, classes: int) -> float:
        """Return what an image that withstands the attack costs, in forward passes; a gradient counts as two more."""
        return (3.0 * self.steps + 1) * self.eot_iter


@dataclass(frozen=True, kw_only=True)
class FMN(MinimumNormAttack):
    """Fast minimum-norm attack (Pintor et al., Fast minimum-norm adversarial attacks through adaptive norm constraints,
    NeurIPS 2021).

    Ascends the margin from x, each step inside a ball around x, cut by the box. Until an image fools the model the ball
    reaches just beyond where the boundary would be if the model were linear (the paper: just there); from then on its
    radius shrinks by the factor 1 - gamma where the image fools the model, and grows by 1 + gamma where it does not. A
    gradient of zeros moves nothing.

    Attributes:
        norm: ``Linf``, ``L2`` or ``L1``.
        step_size: length of the first step, in L2 whatever the norm; it falls to 1 % of that along a cosine.
        steps: gradients taken.
        gamma: relative change of the radius at first, below 1; it falls to 2 % of that along a cosine.
        targeted: the labels given are classes to reach.
        eot_iter: passes averaged at every evaluation.
    """

    norm: str = "Linf"
    step_size: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, above_0=("step_size",))

    def prepare(self, budget: Budget, classes: int) -> Procedure:
        """Return the attack, which is the same in every budget and for any number of classes from 2."""
        return _FMNRows(self, budget)


@dataclass(frozen=True, kw_only=True)
class DDN(MinimumNormAttack):
    """Decoupled direction and norm attack (Rony et al., Decoupling direction and norm for efficient gradient-based L2
    adversarial attacks and defenses, CVPR 2019).

    Ascends the cross-entropy from x. After each step, of a length that falls from 1 to 0.01 along a cosine, the
    perturbation gets a norm that shrinks by the factor 1 - gamma where the image fools the model, and grows by 1 +
    gamma where it does not. A gradient of zeros moves nothing.

    Attributes:
        norm: ``L2``, no other.
        init_norm: norm of the perturbation before the first change.
        steps: gradients taken.
        gamma: relative change of the norm in a step, below 1.
        targeted: the labels given are classes to reach.
        eot_iter: passes averaged at every evaluation.
    """

    norm: str = field(default="L2", init=False)
    init_norm: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, above_0=("init_norm",))

    def prepare(self, budget: Budget, classes: int) -> Procedure:
        """Return the attack, which is the same in every budget and for any number of classes from 2."""
        return _DDNRows(self, budget)


class _FMNRows:
    """The procedure of `FMN`. ``radius`` [n] is that of the ball around x, infinite before the first step."""

    runs, gradient, inside = 1, True, False

    def __init__(self, attack: FMN, budget: Budget) -> None:
        self.attack, self.budget = attack, budget

    def start(self, task: Task, run: Tensor) -> Rows:
        """Return rows at x."""
        rows = first_rows(task, task.x)
        return rows | {"radius": rows["best_norm"]}

    def losses(self, logits: Tensor, task: Task, rows: Rows) -> Tensor:
        """Return the margin, [n]."""
        return margin(logits, task.y) * (-1 if self.attack.targeted else 1)

    def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
        """Judge the shown image, adapt the radius, and take a step within it."""
        x, shown, attack = task.x, rows["shown"], self.attack
        norms, fooled = self.budget.measure(shown, x), fools(seen.logits, task, targeted=attack.targeted)
        rows = keep_smallest(rows, shown, norms, fooled)
        cosine = _falling_cosine(rows["step"], attack.steps).to(x.dtype)

        grad, largest = _scaled(finite(seen.grad))
        slope = torch.linalg.vector_norm(grad.flatten(1), DUALS[attack.norm], dim=1)
        distance = seen.loss.abs().to(x.dtype) / largest / slope.clamp_min(torch.finfo(x.dtype).tiny)
        gamma = attack.gamma * (0.02 + 0.98 * cosine)
        # Growing by gamma leads beyond the boundary: onto it, rounding alone would decide what fools the model.
        found = rows["best_norm"] < torch.inf
        outside = torch.where(found, rows["radius"], norms + distance) * (1 + gamma)
        radius = torch.where(fooled, torch.minimum(rows["radius"] * (1 - gamma), rows["best_norm"]), outside)
        radius = torch.minimum(radius, self.budget.measure(_farthest(x), x))

        length = attack.step_size * (0.01 + 0.99 * cosine)
        stepped = _into_ball(shown + per_row(length, x) * _unit(grad), x, radius, attack.norm)
        step = rows["step"] + 1
        return rows | {"shown": stepped, "radius": radius, "step": step}, step >= attack.steps


class _DDNRows:
    """The procedure of `DDN`. ``radius`` [n] is the norm that perturbations are given."""

    runs, gradient, inside = 1, True, False

    def __init__(self, attack: DDN, budget: Budget) -> None:
        self.attack, self.budget = attack, budget

    def start(self, task: Task, run: Tensor) -> Rows:
        """Return rows at x."""
        rows = first_rows(task, task.x)
        return rows | {"radius": torch.full_like(rows["best_norm"], self.attack.init_norm)}

    def losses(self, logits: Tensor, task: Task, rows: Rows) -> Tensor:
        """Return the cross-entropy, [n]."""
        return cross_entropy(logits, task.y) * (-1 if self.attack.targeted else 1)

    def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
        """Judge the shown image, take a step, and give the perturbation its next norm."""
        x, shown, attack = task.x, rows["shown"], self.attack
        fooled = fools(seen.logits, task, targeted=attack.targeted)
        rows = keep_smallest(rows, shown, self.budget.measure(shown, x), fooled)

        length = 0.01 + 0.99 * _falling_cosine(rows["step"], attack.steps).to(x.dtype)
        delta = shown - x + per_row(length, x) * _unit(finite(seen.grad))
        radius = torch.where(fooled, rows["radius"] * (1 - attack.gamma), rows["radius"] * (1 + attack.gamma))
        radius = torch.minimum(radius, self.budget.measure(_farthest(x), x))
        stepped = (x + _unit(delta) * per_row(radius, x)).clamp(0, 1)
        step = rows["step"] + 1
        return rows | {"shown": stepped, "radius": radius, "step": step}, step >= attack.steps


def check(
    attack: EngineAttack,
    *,
    at_least_1: tuple[str, ...] = (),
    above_0: tuple[str, ...] = (),
    fractions: tuple[str, ...] = (),
) -> None:
    """Raise UsageError for an unknown norm, or a hyper-parameter that is not of its kind."""
    if attack.norm not in NORMS:
        raise unknown("attack norm", attack.norm, NORMS)
    for name in at_least_1:
        value = getattr(attack, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{name} must be an integer of at least 1, got {value!r}.")
    for name in (*above_0, *fractions):
        value, most = getattr(attack, name), 1 if name in fractions else math.inf
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < most:
            raise UsageError(f"{name} must be a number above 0{' and below 1' * (most == 1)}, got {value!r}.")


def first_rows(task: Task, shown: Tensor) -> Rows:
    """Return rows at ``shown`` that have found nothing: ``best`` is x, ``best_norm`` [n] infinite, ``step`` [n] 0."""
    infinite = torch.full_like(task.y, torch.inf, dtype=task.x.dtype)
    return {"shown": shown, "step": torch.zeros_like(task.y), "best": task.x, "best_norm": infinite}


def keep_smallest(rows: Rows, images: Tensor, norms: Tensor, fooled: Tensor) -> Rows:
    """Return the rows with ``best`` and ``best_norm`` of the images that fool the model with a smaller norm."""
    better = fooled & (norms < rows["best_norm"])
    best, best_norm = where_row(better, images, rows["best"]), torch.where(better, norms, rows["best_norm"])
    return rows | {"best": best, "best_norm": best_norm}


def fools(logits: Tensor, task: Task, *, targeted: bool = False) -> Tensor:
    """Return bool [n]: whether the prediction is another than the label, or is the class to reach."""
    return (logits.argmax(1) == task.y) == targeted


def finite(grad: Tensor) -> Tensor:
    """Return gradients with zeros for what is no number."""
    return torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0)


def _scaled(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors [n, ...] over their largest magnitude, and that, [n]; it is 1 for zeros."""
    largest = vectors.abs().flatten(1).amax(1)
    largest = torch.where(largest > 0, largest, 1)
    return vectors / per_row(largest, vectors), largest


def _unit(vectors: Tensor) -> Tensor:
    """Return vectors [n, ...] of length 1 in L2, without under- or overflow; zeros stay zeros."""
    vectors, _ = _scaled(vectors)
    return vectors / per_row(torch.linalg.vector_norm(vectors.flatten(1), dim=1).clamp_min(1), vectors)


def _farthest(x: Tensor) -> Tensor:
    """Return the corner of the box [0, 1] that is farthest from each image."""
    return (x < 0.5).to(x.dtype)


def _falling_cosine(step: Tensor, steps: int) -> Tensor:
    """Return (1 + cos(pi step / steps)) / 2, from 1 at step 0 to 0 at ``steps``; float64 [n].

    A library may round a cosine differently in a row's neighbourhood; in float64 that is lost in the conversion.
    """
    return (1 + torch.cos(step.double() * (math.pi / steps))) / 2


def _into_ball(images: Tensor, x: Tensor, radius: Tensor, norm: str) -> Tensor:
    """Return the nearest points, in L2, of the balls of ``radius`` [n] around x, cut by the box [0, 1].

    To clip what was projected onto the ball alone would leave an image with many pixels at the walls of the box well
    inside the ball, and keep `FMN` from reaching the boundary. In L2 the solution is x plus a multiple of the
    perturbation, clipped, and its squares are min(multiple**2 * delta**2, room**2).
    """
    if norm == "L1":
        return project_l1_box(images, x, radius)
    delta, limit = images - x, per_row(radius, x)
    if norm == "Linf":
        return (x + torch.maximum(torch.minimum(delta, limit), -limit)).clamp(0, 1)
    room = torch.where(delta > 0, 1 - x, x)
    inside = torch.linalg.vector_norm(torch.minimum(delta.abs(), room).flatten(1), dim=1) <= radius
    squares = fill(
        torch.ones_like(x[:1]).flatten(1),
        room.square().flatten(1),
        radius.square()[:, None],
        rate=delta.square().flatten(1),
    )
    shorter = x + torch.copysign(squares.sqrt().view_as(x), delta)
    return where_row(inside, images, shorter).clamp(0, 1)
