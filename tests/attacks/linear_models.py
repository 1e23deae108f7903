"""Linear models, the smallest perturbations that fool them by bisection, and procedures without an engine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from sparse_robust.attacks.procedure import Procedure, Rows, Seen, Task

NORMS = ("Linf", "L2", "L1")
ORDERS = {"Linf": np.inf, "L2": 2.0, "L1": 1.0}


class Linear(nn.Module):
    """Logits W x + c of flattened images."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        # Not a matrix product: a library may split its sums differently at another batch size.
        return (x.flatten(1)[:, None] * self.weight).sum(2) + self.bias


def smallest_move(point: np.ndarray, w: np.ndarray, gap: float, norm: str) -> np.ndarray:
    """Return the smallest d with <w, d> = gap and point + d in the box, in float64; the corner where there is none.

    In Linf and L2 by 200 bisections of the multiplier; in L1 by spending on one coordinate at a time.
    """
    point, w = point.astype(np.float64), w.astype(np.float64)
    direction = np.sign(w) * np.sign(gap)
    room, weight, gap = np.where(direction > 0, 1 - point, np.where(direction < 0, point, 0)), np.abs(w), abs(gap)
    if weight @ room <= gap:
        return direction * room
    if norm == "L1":
        moved = np.zeros_like(room)
        for i in sorted(range(len(w)), key=lambda i: -weight[i]):
            if weight[i] > 0:
                moved[i] = min(room[i], gap / weight[i])
                gap -= weight[i] * moved[i]
        return direction * moved
    rate = weight if norm == "L2" else np.ones_like(weight)
    low, high = 0.0, 1.0
    while weight @ np.minimum(high * rate, room) < gap:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        enough = weight @ np.minimum(middle * rate, room) >= gap
        low, high = (low, middle) if enough else (middle, high)
    return direction * np.minimum(high * rate, room)


def smallest_norms(model: Linear, x: Tensor, y: Tensor, norm: str) -> Tensor:
    """Return the norm of the smallest perturbation of each image that reaches another class, float64 [n].

    For images that a class has to overtake from behind, and within the box.
    """
    weight, bias = model.weight.detach().double().numpy(), model.bias.detach().double().numpy()
    norms = []
    for image, label in zip(x.flatten(1).double().numpy(), y.tolist(), strict=True):
        logits, sizes = weight @ image + bias, []
        for other in range(len(bias)):
            w, gap = weight[other] - weight[label], logits[label] - logits[other]
            move = smallest_move(image, w, gap, norm)
            if other != label and w @ move >= gap * (1 - 1e-9):
                sizes.append(np.linalg.norm(move, ORDERS[norm]))
        norms.append(min(sizes, default=np.inf))
    return torch.tensor(norms, dtype=torch.float64)


def see(procedure: Procedure, model: nn.Module, task: Task, rows: Rows) -> Seen:
    """Evaluate a model at the shown images as an engine does."""
    with torch.enable_grad():
        leaf = rows["shown"].detach().requires_grad_(True)
        logits = model(leaf)
        if getattr(procedure, "jacobian", False):
            grads = [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0] for column in logits.unbind(1)]
            return Seen(logits.detach(), logits.new_empty(0), torch.stack(grads, 1))
        losses = procedure.losses(logits, task, rows)
        return Seen(logits.detach(), losses.detach(), torch.autograd.grad(losses.sum(), leaf)[0])


@torch.no_grad()
def step(procedure: Procedure, model: nn.Module, task: Task, rows: Rows) -> tuple[Rows, Tensor]:
    """Advance all rows by one step."""
    return procedure.advance(task, rows, see(procedure, model, task, rows), model)


@torch.no_grad()
def run_to_end(procedure: Procedure, model: nn.Module, task: Task, run: int = 0) -> Rows:
    """Return the rows at the end of a run that all images begin at once and none leaves."""
    rows, over = procedure.start(task, torch.full_like(task.y, run)), torch.zeros_like(task.y, dtype=torch.bool)
    while not over.all():
        rows, over = step(procedure, model, task, rows)
    return rows


@torch.no_grad()
def task_of(model: nn.Module, x: Tensor, y: Tensor, ids: Tensor | None = None) -> Task:
    """Return a task with the model's answers."""
    return Task(x, y, torch.arange(len(x)) if ids is None else ids, model(x))


@torch.no_grad()
def staggered(procedure: Procedure, model: nn.Module, task: Task, delay: int) -> Rows:
    """Return the rows at the end of a run that every second image begins ``delay`` steps later than the others."""
    late = torch.arange(len(task.y)) % 2 == 1
    first, second = ((late == kind).nonzero().flatten() for kind in (False, True))
    both = torch.cat([first, second])

    def begin(index: Tensor) -> Rows:
        return procedure.start(task.select(index), torch.zeros_like(index))

    rows, ended = begin(first), {}
    for count in range(10_000):
        if count == delay:
            rows = {name: torch.cat([value, begin(second)[name]]) for name, value in rows.items()}
        at = both if count >= delay else first
        rows, over = step(procedure, model, task.select(at), rows)
        for position in over.nonzero().flatten().tolist():
            ended.setdefault(int(at[position]), {name: value[position] for name, value in rows.items()})
        if len(ended) == len(task.y):
            break
    return {name: torch.stack([ended[i][name] for i in range(len(task.y))]) for name in rows}
