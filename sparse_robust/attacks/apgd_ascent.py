"""Gradient ascent whose step size adapts to every image: what APGD does in Linf and L2."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_robust.attacks.budget import Budget
from sparse_robust.attacks.losses import LOSSES, cross_entropy_targeted, dlr_targeted
from sparse_robust.attacks.norms import L2_ROOM
from sparse_robust.attacks.procedure import Look, Rows, Seen, Task, noise, per_row, where_row
from sparse_robust.seeding import derive_seed

if TYPE_CHECKING:
    from sparse_robust.attacks.apgd import APGD

TARGETED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ce-targeted": lambda logits, y, target: cross_entropy_targeted(logits, target),
    "dlr-targeted": dlr_targeted,
}
"""(logits, y, target) -> [n]."""

MOMENTUM = 0.75
"""Share of the new step in a move; the rest is that of the previous move."""


class Climb:
    """What the procedures of APGD share: loss, targets, noise at the start, and the best point so far.

    Run number r aims at target r // n_restarts. A run of ``steps`` steps takes ``steps`` gradients: the image behind
    the last one is shown without.
    """

    gradient = True
    inside = True

    def __init__(self, attack: APGD, budget: Budget, classes: int) -> None:
        self.attack, self.budget = attack, budget
        self.runs = attack.targets(classes) * attack.n_restarts
        self.key = derive_seed(int(attack.seed), attack.name)

    def losses(self, logits: Tensor, task: Task, rows: Rows) -> Tensor:
        """Return what is climbed, [n]."""
        if self.attack.loss in TARGETED_LOSSES:
            return TARGETED_LOSSES[self.attack.loss](logits, task.y, rows["target"])
        return LOSSES[self.attack.loss](logits, task.y)

    def target(self, task: Task, run: Tensor) -> Rows:
        """Return the class each run aims at: the wrong ones, from the one with the largest clean logit down."""
        if self.attack.loss not in TARGETED_LOSSES:
            return {}
        others = task.logits.scatter(1, task.y[:, None], float("-inf"))
        nearest = others.argsort(dim=1, descending=True, stable=True)
        return {"target": nearest.gather(1, (run // self.attack.n_restarts)[:, None])[:, 0]}

    def uniform(self, task: Task, run: Tensor) -> Tensor:
        """Return uniform numbers in [0, 1), one for each element of the images."""
        return noise(task, task.x[:1].numel(), key=self.key, stream=run).view_as(task.x)

    def normal(self, task: Task, run: Tensor) -> Tensor:
        """Return standard normal numbers, by the inverse of their distribution, one for each element of the images."""
        return torch.erfinv((2 * self.uniform(task, run) - 1) + 2.0**-24) * 2.0**0.5


def no_best(x_adv: Tensor) -> Rows:
    """Return the state of `record_best` before anything was seen."""
    lowest = torch.full((len(x_adv),), -torch.inf, dtype=torch.float64, device=x_adv.device)
    return {"best": x_adv, "best_grad": torch.zeros_like(x_adv), "best_loss": lowest}


def record_best(rows: Rows, seen: Seen) -> Rows:
    """Return the rows with the point of the largest loss so far, its loss and its gradient."""
    loss = seen.loss.double()
    better = loss > rows["best_loss"]
    return {
        **rows,
        "best": where_row(better, rows["shown"], rows["best"]),
        "best_grad": where_row(better, seen.grad, rows["best_grad"]),
        "best_loss": torch.where(better, loss, rows["best_loss"]),
    }


class AdaptiveAscent(Climb):
    """The procedure of `APGD` in Linf and L2: steps with momentum; where they stop to help, half the step size."""

    def __init__(self, attack: APGD, budget: Budget, classes: int) -> None:
        super().__init__(attack, budget, classes)
        # Steps up to the first checkpoint, how much sooner each next one comes, and the fewest steps in between.
        self.interval, self.sooner, self.shortest = (max(int(share * attack.steps), 1) for share in (0.22, 0.03, 0.06))

    def start(self, task: Task, run: Tensor) -> Rows:
        """Begin at a random point of the sphere around each image, cut to the box."""
        x_adv = self._first(task, run)
        zero = torch.zeros_like(run)
        lowest = torch.full(run.shape, -torch.inf, dtype=torch.float64, device=run.device)
        return {
            "shown": x_adv,
            "previous": x_adv,
            "step": zero,
            "step_size": task.x.new_full(run.shape, 2 * self.budget.eps),
            "last_loss": -lowest,  # nothing rises above it
            "rises": zero,
            "interval": zero + self.interval,
            "check_at": zero + self.interval,
            "best_at_check": lowest,
            "halved": zero == 0,
            **no_best(x_adv),
            **self.target(task, run),
        }

    def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
        """Check the progress of the rows that have come to a checkpoint, then take a step in all."""
        # Rises count from the start on, as in the paper. The published code compares the loss after the first step
        # with 0, not with that of the start.
        rises = rows["rises"] + (seen.loss > rows["last_loss"])
        rows = {**record_best(rows, seen), "rises": rises, "last_loss": seen.loss.double()}
        rows, grad = self._check(rows, seen.grad)
        rows = {**rows, **self._move(task, rows, grad), "step": rows["step"] + 1}
        return rows, rows["step"] >= self.attack.steps

    def _check(self, rows: Rows, grad: Tensor) -> tuple[Rows, Tensor]:
        """Halve the step size and go back to the best point where a checkpoint finds too little progress.

        That is: too few steps raised the loss, or the best loss and the step size are those of the last checkpoint.
        """
        due = rows["step"] == rows["check_at"]
        oscillates = rows["rises"] <= self.attack.rho * rows["interval"]
        stuck = ~rows["halved"] & (rows["best_at_check"] >= rows["best_loss"])
        halve = due & (oscillates | stuck) & self._adapts(rows)
        interval = torch.where(due, (rows["interval"] - self.sooner).clamp(min=self.shortest), rows["interval"])
        checked = {
            "shown": where_row(halve, rows["best"], rows["shown"]),
            "step_size": torch.where(halve, rows["step_size"] / 2, rows["step_size"]),
            "rises": torch.where(due, 0, rows["rises"]),
            "interval": interval,
            "check_at": torch.where(due, rows["step"] + interval, rows["check_at"]),
            "best_at_check": torch.where(due, rows["best_loss"], rows["best_at_check"]),
            "halved": torch.where(due, halve, rows["halved"]),
        }
        return {**rows, **checked}, where_row(halve, rows["best_grad"], grad)

    def _adapts(self, rows: Rows) -> Tensor:
        """Return bool [n]: whether the step size may change at a checkpoint."""
        return torch.ones_like(rows["halved"])

    def _move(self, task: Task, rows: Rows, grad: Tensor) -> Rows:
        """Step along the gradient, project, mix with the previous move, project again."""
        x, here = task.x, rows["shown"]
        direction = _unit(grad) if self.budget.norm == "L2" else grad.sign()
        ahead = self._shorten(here + per_row(rows["step_size"], x) * direction, x).clamp(self.budget.lo, self.budget.hi)
        share = per_row(torch.where(rows["step"] > 0, MOMENTUM, 1.0).to(x.dtype), x)
        moved = here + (ahead - here) * share + (here - rows["previous"]) * (1 - share)
        # First onto the ball, then into the box, as published; from outside, the budget alone ends at other points.
        return {"shown": self.budget.project(self._shorten(moved, x), x), "previous": here}

    def _shorten(self, point: Tensor, x: Tensor) -> Tensor:
        """Return the nearest points of the ball, up to rounding."""
        if self.budget.norm == "Linf":
            return point.clamp(x - self.budget.eps, x + self.budget.eps)
        delta = point - x
        return x + delta * (self.budget.eps * (1 - L2_ROOM) / _length(delta)).clamp(max=1)

    def _first(self, task: Task, run: Tensor) -> Tensor:
        if self.budget.norm == "L2":
            direction = _unit(self.normal(task, run))
        else:
            centred = 2 * self.uniform(task, run) - 1
            direction = centred / per_row(centred.abs().flatten(1).amax(1), centred).clamp(min=1e-12)
        return self.budget.project(task.x + self.budget.eps * direction.to(task.x.dtype), task.x)


def _length(delta: Tensor) -> Tensor:
    return per_row(torch.linalg.vector_norm(delta.flatten(1), dim=1), delta)


def _unit(grad: Tensor) -> Tensor:
    """Return the direction of each row; zero and NaN elements stay zero, and nothing under- or overflows."""
    grad = grad.nan_to_num()
    largest = per_row(grad.abs().flatten(1).amax(1), grad)
    scaled = torch.where(largest > 0, grad / largest, 0.0)
    return scaled / _length(scaled).clamp(min=1)
