"""SynFlow: the flow through each weight of the network with absolute values for weights; no data."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_robust.errors import UsageError
from sparse_robust.models import get_normalization, set_normalization
from sparse_robust.pruning.scores.registry import Evidence, Scores, register_score


@register_score(
    "synflow",
    "The part of the network's output that passes through the weight, with all parameters made positive and an input "
    "of ones.",
    "Tanaka et al., Pruning neural networks without any data by iteratively conserving synaptic flow, NeurIPS 2020",
    needs="shape",
    steps=100,
)
@torch.enable_grad()
def synflow(model: nn.Module, weights: Mapping[str, Tensor], evidence: Evidence) -> Scores:
    """Return |w * dR/dw| in float64, where R is the summed output of the network of absolute parameters on one input of
    ones, in eval mode.

    Batch norms scale by |gamma| / sqrt(running variance + eps) and shift by |beta|; their running mean is left out. At
    initialisation it is 0 and this is what the authors' code does; taking trained means off would break the positivity
    by which every layer carries the same flow, and with it the guarantee that no layer is emptied first. For the same
    reason the input is not normalised.
    """
    if not evidence.batches:
        raise UsageError("the score 'synflow' takes the shape of its input from a batch: give batches (one is enough).")
    model.eval().double()
    if get_normalization(model) is not None:
        set_normalization(model, [0.0], [1.0])
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.abs_()
        for module in model.modules():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.zero_()
    shape = evidence.batches[0][0].shape[1:]
    ones = torch.ones(1, *shape, dtype=torch.float64, device=evidence.batches[0][0].device)
    found = torch.autograd.grad(model(ones).sum(), list(weights.values()), allow_unused=True, materialize_grads=True)
    return {
        name: (weight.detach() * gradient).abs_()
        for (name, weight), gradient in zip(weights.items(), found, strict=True)
    }
