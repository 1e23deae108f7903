"""The loss around each image: does its gradient say anything about it?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_robust.attacks import Budget, Model, attack_context
from sparse_robust.attacks.losses import cross_entropy
from sparse_robust.attacks.passes import differentiate, full_precision
from sparse_robust.evaluation.streaming import Columns, merge
from sparse_robust.seeding import derive_seed
from sparse_robust_kernels.rng import philox_uniform

# Random directions an image's gradient is compared with, and passes that are compared with one another.
DIRECTIONS = 8
PASSES = 3


@dataclass(frozen=True, eq=False)
class Surface:
    """What `probe_surface` finds, [n] each, in the order of the sample ids.

    Attributes:
        ids: int64.
        zero_gradient: bool, whether every element of the gradient of the cross-entropy is exactly zero.
        zero_elements: float, the share of such elements.
        predicted: float, how much a step of size eps along the gradient raises the loss to first order.
        measured: float, how much it does raise it.
        random_wins: bool, whether one of `DIRECTIONS` random steps of that size raises it more.
        spread: float, largest distance between the logits of `PASSES` passes, each scaled to length one.
        flips: bool, whether the prediction differs between these passes.
        classes: int64, outputs of the model, and ``elements``: of the image.
    """

    ids: Tensor
    zero_gradient: Tensor
    zero_elements: Tensor
    predicted: Tensor
    measured: Tensor
    random_wins: Tensor
    spread: Tensor
    flips: Tensor
    classes: Tensor
    elements: Tensor

    @property
    def realised(self) -> float:
        """The loss a gradient step gains over what its first-order expansion promises, over all images; NaN where that
        is nothing."""
        return float(self.measured.sum() / self.predicted.sum())

    @property
    def first_order_error(self) -> float:
        """Mean distance between the loss and its first-order expansion one step away (in nats), as in Qin et al.,
        Adversarial robustness through local linearization (2019)."""
        return float((self.measured - self.predicted).abs().mean())


def probe_surface(
    model: Model, loader: Iterable[tuple[Tensor, Tensor, Tensor]], budget: Budget, *, seed: int = 0
) -> Surface:
    """Look at the loss around each image of a loader, in eval mode; the shards of several ranks are merged.

    Args:
        loader: yields (x, y, ids) on the model's device.
        budget: norm and size of the steps.
        seed: of the random directions.

    Raises:
        UsageError: for a model whose output has no gradient, and for a loader that yields nothing.
    """
    with attack_context(model, "eval"), torch.no_grad():
        rows = [{"ids": ids, **_probe(model, x, y, ids, budget, seed)} for x, y, ids in loader]
    return Surface(**merge(rows, loader, "probe_surface"))


def _probe(model: Model, x: Tensor, y: Tensor, ids: Tensor, budget: Budget, seed: int) -> Columns:
    seen = differentiate(model, x, lambda logits: cross_entropy(logits, y))

    def loss(images: Tensor) -> Tensor:
        return cross_entropy(full_precision(model(images)), y)

    step = budget.step(x, seen.grad, x, budget.eps)
    along, best = loss(step), torch.full_like(seen.loss, -torch.inf)
    for draw in range(DIRECTIONS):
        noise = philox_uniform(ids, x[0].numel(), key=derive_seed(seed, "surface"), stream=draw).to(x.dtype)
        normal = torch.erfinv((2 * noise - 1) + 2**-24).view_as(x)
        best = torch.maximum(best, loss(budget.step(x, normal, x, budget.eps)))
    zero = (seen.grad == 0).flatten(1)
    logits = [seen.logits, *(full_precision(model(x)) for _ in range(PASSES - 1))]
    units = [torch.nn.functional.normalize(part, dim=1) for part in logits]
    return {
        "zero_gradient": zero.all(1),
        "zero_elements": zero.double().mean(1),
        "predicted": (seen.grad * (step - x)).flatten(1).sum(1).double(),
        "measured": (along - seen.loss).double(),
        "random_wins": best > along,
        "spread": torch.stack([(unit - units[0]).norm(dim=1) for unit in units[1:]]).amax(0).double(),
        "flips": torch.stack([part.argmax(1) != logits[0].argmax(1) for part in logits[1:]]).any(0),
        "classes": torch.full_like(y, seen.logits.shape[1]),
        "elements": torch.full_like(y, x[0].numel()),
    }
