"""FAB: walks along the decision boundary towards the image, by projections onto the linearised boundary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_robust.attacks.base import EngineAttack
from sparse_robust.attacks.budget import Budget
from sparse_robust.attacks.hyperplane import to_hyperplane
from sparse_robust.attacks.minimum_norm import DUALS, ORDERS, check, finite, first_rows, fools, keep_smallest
from sparse_robust.attacks.procedure import Look, Procedure, Rows, Seen, Task, noise, where_row
from sparse_robust.seeding import derive_seed

# Restarts begin at half the radius of the budget; where that is the whole box, at half of these.
_COMMON_RADII = {"Linf": 0.3, "L2": 1.0, "L1": 5.0}


@dataclass(frozen=True, kw_only=True)
class FAB(EngineAttack):
    """Fast adaptive boundary attack (Croce and Hein, Minimally distorted adversarial examples with a fast adaptive
    boundary attack, ICML 2020).

    At every step the model is linearised at the current point. The next point lies just beyond the nearest boundary of
    another class, between the projections of the current point and of x onto it; where it fools the model, it goes back
    towards x. A step costs the gradients of all logits and one forward pass; `FABT` needs one gradient alone.

    The noise of restarts is a function of (seed, sample id, run, element) alone.

    Attributes:
        norm: ``Linf``, ``L2`` or ``L1``.
        steps: linearisations of a run.
        n_restarts: runs (with targets, for each target): the first from x, the others from random points at half the
            radius.
        alpha_max: largest weight of the projection of x, in (0, 1).
        eta: how far beyond the boundary a projection goes, 1 being onto it.
        beta: share of the perturbation that is left after the backward step, in (0, 1).
        eot_iter: passes averaged at every evaluation.
        seed: any integer.
    """

    norm: str = "Linf"
    steps: int = 100
    n_restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    eot_iter: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check(self, at_least_1=("steps", "n_restarts", "eot_iter"), above_0=("eta",), fractions=("alpha_max", "beta"))

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return "fab"

    def targets(self, classes: int) -> int | None:
        """Return how many classes are aimed at one after the other, None if all at once."""
        return None

    def prepare(self, budget: Budget, classes: int) -> Procedure:
        """Return the attack within a budget, on a model with so many classes."""
        return _Walk(self, budget, self.targets(classes))

    def passes(self, classes: int) -> float:
        """Return what an image that withstands the attack costs, in forward passes; a gradient counts as two more."""
        targets = self.targets(classes)
        step = 2 + 2 * (1 if targets else classes)
        return (targets or 1) * self.n_restarts * (step * self.steps + 1) * self.eot_iter


@dataclass(frozen=True, kw_only=True)
class FABT(FAB):
    """FAB towards one class after the other: for models with many classes (Croce and Hein, Reliable evaluation of
    adversarial robustness with an ensemble of diverse parameter-free attacks, ICML 2020).

    Attributes:
        n_target_classes: the wrong classes with the largest logits on the clean image; with fewer wrong classes all of
            them.
    """

    n_target_classes: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, at_least_1=("n_target_classes",))

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return "fab-t"

    def targets(self, classes: int) -> int:
        """Return how many classes are aimed at one after the other."""
        return min(self.n_target_classes, classes - 1)


class _Walk:
    """The procedure of `FAB` and `FABT`. Its rows are those of `first_rows`, and ``target`` [n], the class aimed at."""

    gradient, inside = True, False

    def __init__(self, attack: FAB, budget: Budget, targets: int | None) -> None:
        """``targets`` None: all classes at once."""
        self.attack, self.budget, self.jacobian = attack, budget, targets is None
        self.runs = (targets or 1) * attack.n_restarts
        self.key = derive_seed(int(attack.seed), attack.name)

    def start(self, task: Task, run: Tensor) -> Rows:
        """Return rows at x, or at a random point; run = target number * n_restarts + restart."""
        shown = task.x
        if self.attack.n_restarts > 1:
            shown = where_row(run % self.attack.n_restarts > 0, self._random_points(task, run), shown)
        wrong = task.logits.scatter(1, task.y[:, None], torch.inf).argsort(dim=1, descending=True, stable=True)[:, 1:]
        target = wrong.gather(1, (run // self.attack.n_restarts)[:, None])[:, 0]
        return first_rows(task, shown) | {"target": target}

    def losses(self, logits: Tensor, task: Task, rows: Rows) -> Tensor:
        """Return the logit of the target minus that of the label, [n]."""
        return _at(logits, rows["target"]) - _at(logits, task.y)

    def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
        """Go beyond the linearised boundary, look there, and go back towards x where that fools the model."""
        x, attack = task.x, self.attack
        rows = self._judge(task, rows, rows["shown"], seen.logits)[0]

        w, gap = self._boundary(task, seen)
        points = torch.stack([rows["shown"].flatten(1), x.flatten(1)], 1)
        gaps = torch.stack([gap, gap + (w * (points[:, 0] - points[:, 1])).sum(1)], 1)
        moves = to_hyperplane(points, w[:, None], gaps, norm=attack.norm)
        lengths = torch.linalg.vector_norm(moves, ORDERS[attack.norm], dim=2).clamp_min(1e-8)
        bias = (lengths[:, 0] / (lengths[:, 0] + lengths[:, 1])).clamp_max(attack.alpha_max)[:, None]
        beyond, from_x = (points + attack.eta * moves).unbind(1)
        there = (beyond + (from_x - beyond) * bias).clamp(0, 1).view_as(x)

        rows, fooled = self._judge(task, rows, there, look(there))
        shown = where_row(fooled, x + (there - x) * attack.beta, there)
        step = rows["step"] + 1
        return rows | {"shown": shown, "step": step}, step >= attack.steps

    def _judge(self, task: Task, rows: Rows, images: Tensor, logits: Tensor) -> tuple[Rows, Tensor]:
        fooled = fools(logits, task)
        return keep_smallest(rows, images, self.budget.measure(images, task.x), fooled), fooled

    def _boundary(self, task: Task, seen: Seen) -> tuple[Tensor, Tensor]:
        """Return the linearised boundary {z: <w, z - shown> = gap}, w [n, d] and gap [n]; of all classes, the nearest.

        Gradients that are no numbers count as 0.
        """
        grads = finite(seen.grad)
        if not self.jacobian:
            return grads.flatten(1), finite(-seen.loss).to(grads.dtype)
        grads, own = grads.flatten(2), task.y[:, None]
        normals = grads - grads.take_along_dim(own[:, :, None], 1)
        ahead = finite(seen.logits - seen.logits.gather(1, own)).to(grads.dtype)
        distances = ahead.abs() / (torch.linalg.vector_norm(normals, DUALS[self.attack.norm], dim=2) + 1e-12)
        nearest = distances.scatter(1, own, torch.inf).argmin(1, keepdim=True)
        return normals.take_along_dim(nearest[:, :, None], 1)[:, 0], -ahead.gather(1, nearest)[:, 0]

    def _random_points(self, task: Task, run: Tensor) -> Tensor:
        """Return points at half the radius from x, clipped to the box; the stream of an image's noise is its run."""
        x, norm, eps = task.x, self.attack.norm, self.budget.eps
        numel = x.flatten(1).shape[1]
        if eps >= numel ** (1 / ORDERS[norm]):
            eps = _COMMON_RADII[norm]
        centred = 2 * noise(task, numel, key=self.key, stream=run).to(x.dtype) - 1
        if norm != "Linf":
            centred = torch.erfinv(centred + 2.0**-24)
        length = torch.linalg.vector_norm(centred, ORDERS[norm], dim=1)
        return (x + (centred / length[:, None] * (eps / 2)).view_as(x)).clamp(0, 1)


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]
