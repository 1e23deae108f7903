"""Procedures without an engine: all rows begin together, and none leaves before the end of its run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparse_robust.attacks.procedure import Procedure, Rows, Seen, Task
from tests.attacks.linear_models import Linear

RADII = {"Linf": 8 / 255, "L2": 0.3, "L1": 2.5}
"""Radii at which attacks on the network of the fixture find neither all nor nothing."""


def binary(weight: Tensor) -> Linear:
    """Return the model with logits (0, w.x) of flattened images."""
    return Linear(torch.stack([torch.zeros_like(weight), weight]), torch.zeros(2))


def walk(
    procedure: Procedure, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, run: int = 0
) -> Iterator[tuple[Rows, Tensor]]:
    """Yield the state and the losses at the start and after every step of a run; at the end no losses."""
    with torch.no_grad():
        task = Task(x, y, torch.arange(len(x)), model(x))
    rows, over = procedure.start(task, torch.full_like(y, run)), torch.tensor([False])
    while not over.any():
        leaf = rows["shown"].clone().requires_grad_(True)
        logits = model(leaf)
        loss = procedure.losses(logits, task, rows)
        (grad,) = torch.autograd.grad(loss.sum(), leaf)
        yield rows, loss.detach()
        rows, over = procedure.advance(task, rows, Seen(logits.detach(), loss.detach(), grad), model)
    assert over.all()
    yield rows, torch.empty(0)
