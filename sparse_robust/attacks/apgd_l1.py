"""What APGD does in L1: sparse steps whose number of elements adapts to every image, in balls that shrink to eps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_robust.attacks.apgd_ascent import Climb, no_best, record_best
from sparse_robust.attacks.budget import Budget
from sparse_robust.attacks.l1 import l1_norm, project_l1_box, sparse_sign
from sparse_robust.attacks.procedure import Look, Rows, Seen, Task, per_row, where_row

if TYPE_CHECKING:
    from sparse_robust.attacks.apgd import APGD


class SparseAscent(Climb):
    """The procedure of `APGD` in L1.

    A step of length s moves ``count`` elements by s / count each, and is projected onto ball and box; there is no
    momentum. Checkpoints follow the best point: 2/3 of the elements it changes are moved from then on, and the step
    length is set back to the radius where these became fewer, else divided by 1.5, down to a tenth of the radius.

    With the schedule of larger radii, 30 % of the steps are taken in a ball of 3 eps, 30 % in one of 2 eps, and the
    rest in the budget's. A ball is entered at the best point of the last one, which takes one gradient more.
    """

    def __init__(self, attack: APGD, budget: Budget, classes: int) -> None:
        super().__init__(attack, budget, classes)
        self.balls = 3 if attack.grows else 1
        self.inside = not attack.grows
        self.early = -(-3 * attack.steps // 10)  # steps in each larger ball
        self.late = attack.steps - (self.balls - 1) * self.early

    def start(self, task: Task, run: Tensor) -> Rows:
        """Begin at a projected Gaussian random point of the first ball."""
        zero = torch.zeros_like(run)
        x_adv = project_l1_box(task.x + self.normal(task, run).to(task.x.dtype), task.x, self._radius(zero))
        rows = {"shown": x_adv, "ball": zero, **self._enter(task, x_adv, zero), **self.target(task, run)}
        if self.balls == 1:
            numel = task.x[:1].numel()
            rows |= {"changed": zero + numel, "count": zero + -(-numel // 5)}
        return rows

    def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
        """Take a step, or enter the next ball where all steps in this one have been taken."""
        rows, grad = self._check(task, record_best(rows, seen), seen.grad)
        steps = self._steps(rows["ball"])
        enters = rows["step"] == steps
        ball = rows["ball"] + enters
        point = where_row(enters, rows["best"], self._step(rows, grad))
        shown = project_l1_box(point, task.x, self._radius(ball))
        moved = {**rows, "shown": shown, "ball": ball, "step": rows["step"] + 1}
        entered = self._enter(task, shown, ball)
        rows = {name: where_row(enters, entered.get(name, value), value) for name, value in moved.items()}
        return rows, ~enters & (ball == self.balls - 1) & (rows["step"] >= steps)

    def _radius(self, ball: Tensor) -> Tensor:
        return (self.balls - ball).double() * self.budget.eps

    def _steps(self, ball: Tensor) -> Tensor:
        return torch.where(ball < self.balls - 1, self.early, self.late)

    def _enter(self, task: Task, x_adv: Tensor, ball: Tensor) -> Rows:
        """Return the state with which a ball is entered at x_adv."""
        changed = _changed(x_adv, task.x)
        return {
            "step": torch.zeros_like(ball),
            "step_size": self._radius(ball).to(x_adv.dtype),
            "changed": changed,
            "count": _two_thirds(changed),
            **no_best(x_adv),
        }

    def _check(self, task: Task, rows: Rows, grad: Tensor) -> tuple[Rows, Tensor]:
        """Adapt the number of elements and the step size, and go back to the best point where that became sparser."""
        apart = torch.where(
            rows["ball"] < self.balls - 1, max(int(0.04 * self.early), 1), max(int(0.04 * self.late), 1)
        )
        due = (rows["step"] > 0) & (rows["step"] % apart == 0)
        changed = _changed(rows["best"], task.x)
        sparser = due & (20 * changed < 19 * rows["changed"])
        radius = self._radius(rows["ball"]).to(rows["step_size"].dtype)
        shorter = torch.where(sparser, radius, torch.maximum(rows["step_size"] / 1.5, radius / 10))
        checked = {
            "shown": where_row(sparser, rows["best"], rows["shown"]),
            "step_size": torch.where(due, shorter, rows["step_size"]),
            "changed": torch.where(due, changed, rows["changed"]),
            "count": torch.where(due, _two_thirds(changed), rows["count"]),
        }
        return {**rows, **checked}, where_row(sparser, rows["best_grad"], grad)

    def _step(self, rows: Rows, grad: Tensor) -> Tensor:
        signs = sparse_sign(grad, rows["count"])
        moving = l1_norm(signs).clamp(min=1)
        return rows["shown"] + per_row(rows["step_size"] / moving, signs) * signs


def _changed(x_adv: Tensor, x: Tensor) -> Tensor:
    """Return how many elements of each image differ, int64 [n]."""
    return (x_adv != x).flatten(1).sum(1)


def _two_thirds(changed: Tensor) -> Tensor:
    """Return two thirds of counts, rounded up, at least 1."""
    return ((2 * changed + 2) // 3).clamp(min=1)
