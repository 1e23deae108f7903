"""The one loop of gradient attacks, and the gradients that it climbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_robust.attacks.context import Model, attack_context
from sparse_robust.attacks.inputs import check_labels, check_logits


class Seen(NamedTuple):
    """What one evaluation of the model shows.

    Attributes:
        logits: [n, classes].
        loss: [n], one value an image.
        grad: [n, ...], of each image's loss with respect to that image.
    """

    logits: Tensor
    loss: Tensor
    grad: Tensor


def ascend(
    see: Callable[[Tensor], Seen],
    *,
    steps: int,
    start: Callable[[], Tensor],
    direction: Callable[[Seen, int], Tensor],
    project: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """Return the last iterate of ``steps`` steps. It calls ``see`` once a step, and never waits for a device.

    Args:
        see: x_adv -> losses and gradients there.
        start: () -> the first iterate [n, ...].
        direction: (what was seen, step number) -> where to go: the gradient, or what momentum makes of it.
        project: (x_adv, direction, step number) -> the next iterate, inside the budget.
    """
    with torch.no_grad():
        x_adv = start()
        for step in range(steps):
            x_adv = project(x_adv, direction(see(x_adv), step), step)
    return x_adv


class GradientOracle:
    """A model and a loss on fixed labels, as a function of the images: calling it gives what is `Seen` there.

    Losses are summed, not averaged: an image's gradient does not depend on its batch, and does not underflow in a large
    one. They are taken in fp32 whatever precision the model computes in.
    """

    def __init__(self, model: Model, loss: Callable[[Tensor, Tensor], Tensor], y: Tensor, *, check: bool) -> None:
        """``check`` reads the labels' range back once, at the first call."""
        self.model, self.loss, self.y, self.check = model, loss, y, check

    def __call__(self, x_adv: Tensor) -> Seen:
        with torch.enable_grad():
            leaf = x_adv.detach().requires_grad_(True)
            logits = check_logits(self.model(leaf), len(leaf), needs_grad=True)
            if self.check:
                check_labels(self.y, logits)
                self.check = False
            losses = self.loss(logits if logits.dtype == torch.float64 else logits.float(), self.y)
            (grad,) = torch.autograd.grad(losses.sum(), leaf)
        return Seen(logits.detach(), losses.detach(), grad)


def is_fooled(model: Model, images: Tensor, y: Tensor) -> Tensor:
    """Return bool [n]: whether the model, in eval mode, does not predict the label. NaN logits predict nothing."""
    with attack_context(model, "eval"), torch.no_grad():
        logits = check_logits(model(images), len(images))
    check_labels(y, logits)
    return (logits.argmax(1) != y) | logits.isnan().any(1)
