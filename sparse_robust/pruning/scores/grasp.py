"""GraSP: what the gradient flow loses when a weight goes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparse_robust.pruning.scores.registry import Evidence, Scores, register_score


@register_score(
    "grasp",
    "How much the squared norm of the gradient falls, to first order, when the weight goes: weight x (Hessian x "
    "gradient).",
    "Wang et al., Picking winning tickets before training by preserving gradient flow, ICLR 2020",
    needs="data",
)
def grasp(model: nn.Module, weights: Mapping[str, Tensor], evidence: Evidence, *, temperature: float = 200.0) -> Scores:
    """Return w * (H g), of the mean loss of logits / temperature over all images.

    The paper scores -w * (H g) and removes the highest, so here, where the highest are kept, the sign is the other one.
    H g comes from a second backward pass through sum(g * gradient), batch by batch; g and H are of all images and of
    the scored weights alone, which makes the score independent of the batch size.

    Args:
        temperature: divides the logits; 200 in the paper and in the authors' code (github.com/alecwangcq/GraSP).
    """
    images, parameters = evidence.images(), list(weights.values())

    def gradient(x: Tensor, y: Tensor, graph: bool) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            loss = evidence.loss(lambda images: model(images) / temperature, x, y).sum() / images
            return torch.autograd.grad(loss, parameters, create_graph=graph, allow_unused=True, materialize_grads=True)

    total = [torch.zeros_like(parameter) for parameter in parameters]
    seen = list(evidence.examples(model))  # both passes are over the same images
    for x, y in seen:
        total = [one + more for one, more in zip(total, gradient(x, y, graph=False), strict=True)]
    product = [torch.zeros_like(parameter) for parameter in parameters]
    for x, y in seen:
        with torch.enable_grad():
            flow = sum(((one * more).sum() for one, more in zip(total, gradient(x, y, graph=True), strict=True)))
        if isinstance(flow, Tensor) and flow.requires_grad:
            second = torch.autograd.grad(flow, parameters, allow_unused=True, materialize_grads=True)
            product = [one + more for one, more in zip(product, second, strict=True)]
    return {name: weight.detach() * one for (name, weight), one in zip(weights.items(), product, strict=True)}
