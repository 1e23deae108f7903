"""Scores of the weights alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparse_robust.masks.shards import whole_shape
from sparse_robust.pruning.scores.registry import Evidence, Scores, register_score
from sparse_robust.seeding import derive_seed


@register_score(
    "magnitude",
    "The absolute value of the weight as it is now.",
    "Han et al., Learning both weights and connections for efficient neural networks, NeurIPS 2015",
    magnitude=True,
)
def magnitude(model: nn.Module, weights: Mapping[str, Tensor], evidence: Evidence) -> Scores:
    """Return the weights themselves: their absolute values are compared without being stored."""
    return dict(weights)


@register_score(
    "random",
    "A uniform random number, a function of the seed and the layer's name: the baseline every score must beat.",
    "Gale et al., The state of sparsity in deep neural networks, 2019",
)
def random(model: nn.Module, weights: Mapping[str, Tensor], evidence: Evidence) -> Scores:
    """Return uniform numbers in [0, 1)."""
    return {
        name: uniform(name, whole_shape(weight), evidence.seed).to(weight.device) for name, weight in weights.items()
    }


def uniform(name: str, shape: Iterable[int], seed: int) -> Tensor:
    """Return uniform fp32 numbers in [0, 1) that depend on name, shape and seed alone, drawn on the CPU."""
    generator = torch.Generator().manual_seed(derive_seed("random mask", seed, name))
    return torch.rand(tuple(shape), generator=generator)
