"""HYDRA: scores learned by gradient descent on the loss of the pruned network."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from sparse_robust.pruning.scores.registry import Evidence, Scores, register_score


@register_score(
    "hydra",
    "Importance scores that are trained under the (robust) loss of the network they prune, with the weights frozen.",
    "Sehwag et al., HYDRA: pruning adversarially robust neural networks, NeurIPS 2020",
    needs="data",
    magnitude=True,
)
def hydra(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    evidence: Evidence,
    *,
    epochs: int = 20,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
) -> Scores:
    """Return scores s that minimise the loss of w * m(s), where m keeps the highest |s|: the very masks that are asked
    for, with their scope and pattern (the paper's are layer-wise).

    They start at sqrt(6 / fan_in) * w / max|w| (scaled initialisation), so that the first mask is that of the weights,
    and go down by SGD on a cosine schedule, an update a batch; the gradient passes straight through m:
    ds = dL/d(w * m) * w * sign(s). Adversarial batches are made anew for each update, against the network as it is then
    pruned. The paper lets the batch norms learn along; here nothing but the scores does, as only they are kept.

    Args:
        epochs: passes over the batches: 20 in the authors' instructions (github.com/inspire-group/hydra).
        lr, momentum, weight_decay: of SGD on the scores.
    """
    frozen = {name: weight.detach().clone() for name, weight in weights.items()}
    scores = {name: _scaled(weight).requires_grad_(True) for name, weight in frozen.items()}
    optimizer = SGD(scores.values(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    schedule = CosineAnnealingLR(optimizer, max(1, int(epochs) * len(evidence)))
    for _ in range(int(epochs)):
        batches = evidence.examples(model)
        while True:
            _put(weights, frozen, evidence, scores)
            batch = next(batches, None)  # attacked here, against the network as it is pruned now
            if batch is None:
                break
            with torch.enable_grad():
                loss = evidence.loss(model, *batch).mean()
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
            for (name, score), gradient in zip(scores.items(), found, strict=True):
                score.grad = gradient * frozen[name] * score.detach().sign()
            optimizer.step()
            schedule.step()
    return {name: score.detach() for name, score in scores.items()}


def _scaled(weight: Tensor) -> Tensor:
    largest = weight.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)
    return math.sqrt(6 / max(1, weight[0].numel())) * weight / largest


@torch.no_grad()
def _put(
    weights: Mapping[str, Tensor], frozen: Mapping[str, Tensor], evidence: Evidence, scores: Mapping[str, Tensor]
) -> None:
    """Put the frozen weights under the masks of the scores into the network."""
    masks = evidence.select({name: score.detach() for name, score in scores.items()})
    for name, weight in weights.items():
        weight.copy_(torch.where(masks.on(name, weight.device), frozen[name], 0.0))
