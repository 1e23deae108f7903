"""Scores: a number a weight, by which pruning decides. Higher is kept; a pruner is nothing more than its score."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_robust.errors import UsageError
from sparse_robust.seeding import derive_seed

Batches = Iterable[tuple[Tensor, Tensor]]
"""Images in [0, 1] and labels, on the model's device."""

ScoreFunction = Callable[[nn.Module, Mapping[str, Tensor], Batches, int], dict[str, Tensor]]
"""(model, weights by name, batches, seed) -> a floating-point score of each weight's shape, by name.

It leaves the model as it found it. ``batches`` is empty unless the score needs data.
"""


@dataclass(frozen=True)
class Score:
    """One entry of `SCORES`.

    Attributes:
        name: how it is asked for.
        description: one sentence.
        source: where it was published.
        needs_data: whether it looks at batches.
        magnitude: whether the weights are ordered by the absolute value of what ``function`` returns.
    """

    name: str
    description: str
    source: str
    needs_data: bool
    function: ScoreFunction
    magnitude: bool = False


SCORES: dict[str, Score] = {}
"""Every score, by name."""


def register_score(
    name: str, description: str, source: str, *, needs_data: bool = False, magnitude: bool = False
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a function as a score, for every pruning command at once."""
    if name in SCORES:
        raise UsageError(f"there is a score {name!r} already: {SCORES[name].description}")

    def add(function: ScoreFunction) -> ScoreFunction:
        SCORES[name] = Score(name, description, source, needs_data, function, magnitude)
        return function

    return add


@register_score(
    "magnitude",
    "The absolute value of the weight as it is now.",
    "Han et al., Learning both weights and connections for efficient neural networks, NeurIPS 2015",
    magnitude=True,
)
def magnitude(model: nn.Module, weights: Mapping[str, Tensor], batches: Batches, seed: int) -> dict[str, Tensor]:
    """Return the weights themselves: their absolute values are compared without being stored."""
    return {name: weight.detach() for name, weight in weights.items()}


@register_score(
    "random",
    "A uniform random number, a function of the seed and the layer's name: the baseline every score must beat.",
    "Gale et al., The state of sparsity in deep neural networks, 2019",
)
def random(model: nn.Module, weights: Mapping[str, Tensor], batches: Batches, seed: int) -> dict[str, Tensor]:
    """Return uniform numbers in [0, 1)."""
    return {name: uniform(name, weight.shape, seed).to(weight.device) for name, weight in weights.items()}


def uniform(name: str, shape: Iterable[int], seed: int) -> Tensor:
    """Return uniform fp32 numbers in [0, 1) that depend on name, shape and seed alone, drawn on the CPU."""
    generator = torch.Generator().manual_seed(derive_seed("random mask", seed, name))
    return torch.rand(tuple(shape), generator=generator)
