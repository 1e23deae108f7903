"""Scores of gradients: SNIP, Taylor, Fisher and movement. With g the gradient of the loss and w the weight:

snip      |w * mean g|           the first-order change of the mean loss when the weight goes
taylor    mean |w * g|           the same for each image, before it can cancel
fisher    w^2 * mean g^2 / 2     the second-order change, by the diagonal of the empirical Fisher matrix
movement  - sum over updates of w * g
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD

from sparse_robust.pruning.scores.registry import Evidence, Scores, register_score


@register_score(
    "snip",
    "How much the loss on the batches changes, to first order, when the weight goes: |weight x mean gradient|.",
    "Lee et al., SNIP: single-shot network pruning based on connection sensitivity, ICLR 2019",
    needs="data",
    magnitude=True,
)
def snip(model: nn.Module, weights: Mapping[str, Tensor], evidence: Evidence) -> Scores:
    """Return weight x gradient of the mean loss over all images."""
    total = _sum(model, weights, evidence, None, lambda gradient, weight: gradient)
    return {name: weight.detach() * total[name] / evidence.images() for name, weight in weights.items()}


@register_score(
    "taylor",
    "The mean over images of how much the loss on that image changes, to first order, when the weight goes.",
    "Molchanov et al., Pruning convolutional neural networks for resource efficient inference, ICLR 2017",
    needs="data",
)
def taylor(model: nn.Module, weights: Mapping[str, Tensor], evidence: Evidence) -> Scores:
    """Return the mean over images of |weight x gradient|."""
    total = _sum(model, weights, evidence, 1, lambda gradient, weight: (gradient * weight).abs_())
    return {name: each / evidence.images() for name, each in total.items()}


@register_score(
    "fisher",
    "How much the loss rises, to second order with the diagonal of the empirical Fisher matrix, when the weight goes.",
    "Theis et al., Faster gaze prediction with dense networks and Fisher pruning, 2018",
    needs="data",
)
def fisher(model: nn.Module, weights: Mapping[str, Tensor], evidence: Evidence) -> Scores:
    """Return weight^2 / 2 x the mean over images of gradient^2."""
    total = _sum(model, weights, evidence, 1, lambda gradient, weight: gradient.square())
    return {name: weight.detach() ** 2 / 2 * total[name] / evidence.images() for name, weight in weights.items()}


@register_score(
    "movement",
    "Minus the sum over a short training run of weight x gradient: what moves away from zero is kept.",
    "Sanh et al., Movement pruning: adaptive sparsity by fine-tuning, NeurIPS 2020",
    needs="data",
)
def movement(
    model: nn.Module, weights: Mapping[str, Tensor], evidence: Evidence, *, lr: float = 0.01, epochs: int = 1
) -> Scores:
    """Train by plain SGD and accumulate as in the paper's equation for S, an update a batch.

    The paper masks the forward pass by the scores so far; here the run is dense (or under the masks that are there),
    and the scores are cut once at its end. ``lr=0`` freezes the weights, which makes it the signed first-order score
    - weight x sum of gradients, independent of the batch size but for the mean that each batch takes.

    Args:
        lr: learning rate of all parameters.
        epochs: passes over the batches.
    """
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    pruned = {name: ~evidence.keep.on(name, weight.device) for name, weight in weights.items()}
    model.requires_grad_(True)
    optimizer = SGD(model.parameters(), lr=lr)
    for _ in range(int(epochs)):
        for x, y in evidence.examples(model):
            optimizer.zero_grad()
            with torch.enable_grad():
                evidence.loss(model, x, y).mean().backward()
            with torch.no_grad():
                for name, weight in weights.items():
                    if weight.grad is not None:
                        weight.grad.masked_fill_(pruned[name], 0.0)
                        total[name] -= weight * weight.grad
            optimizer.step()
    return total


def _sum(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    evidence: Evidence,
    size: int | None,
    term: Callable[[Tensor, Tensor], Tensor],
) -> Scores:
    """Sum ``term(gradient of the summed loss, weight)`` over batches of ``size`` images; None takes those there are."""
    total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for x, y in evidence.examples(model, size):
        with torch.enable_grad():
            loss = evidence.loss(model, x, y).sum()
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        for (name, weight), gradient in zip(weights.items(), found, strict=True):
            total[name] += term(gradient, weight.detach())
    return total
