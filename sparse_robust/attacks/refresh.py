"""Bringing a replica up to date with its model: one masked copy of all its floats, batch norms folded on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparse_robust.attacks.folding import Pair, as_column, folded
from sparse_robust_kernels.masks import MaskTable, masked_copy


class Refresh:
    """Writes a module's present parameters and buffers into a copy of it, in place.

    On a GPU this is one launch for each pair of types, whatever the number of layers, besides a few that fold. The
    original may have replaced its tensors by others since; its layers must be those of then.

    Args:
        original: what is followed.
        module: a copy in which ``pairs`` are folded; its tensors may have other types and memory formats.
    """

    def __init__(self, original: nn.Module, module: nn.Module, pairs: Sequence[Pair]) -> None:
        self._layers: list[Any] = [original.get_submodule(pair.layer) for pair in pairs]
        self._norms = [original.get_submodule(pair.norm) for pair in pairs]
        weights = {f"{pair.layer}.weight": index for index, pair in enumerate(pairs)}
        biases = {f"{pair.layer}.bias": index for index, pair in enumerate(pairs)}
        self._targets: list[Tensor] = []
        # Of each target: where the original has it, and of which folded layer it is the weight, or the bias.
        self._sources: list[tuple[nn.Module, str, int | None, int | None]] = []
        self._others: list[tuple[Tensor, nn.Module, str]] = []  # tensors that are no floats
        seen = set()
        for name, tensor in named_tensors(module):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            path, _, leaf = name.rpartition(".")
            place = original.get_submodule(path)
            if not tensor.is_floating_point():
                self._others.append((tensor, place, leaf))
                continue
            self._targets.append(tensor)
            self._sources.append((place, leaf, weights.get(name), biases.get(name)))
        self._table = MaskTable([None] * len(self._targets), self._targets)

    @torch.no_grad()
    def __call__(self) -> None:
        """Copy."""
        scales, biases = folded(self._layers, self._norms)
        sources: list[Tensor] = []
        factors: list[Tensor | None] = []
        for place, leaf, weight, bias in self._sources:
            source = biases[bias] if bias is not None else getattr(place, leaf)
            factor = scales[weight] if weight is not None else None
            if factor is not None and factor.dtype != source.dtype:
                source, factor = source * as_column(factor, source), None
            sources.append(source)
            factors.append(factor)
        masked_copy(sources, self._table, self._targets, scales=factors)
        for tensor, place, leaf in self._others:
            tensor.copy_(getattr(place, leaf))


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield all parameters and buffers, under every name they have."""
    return chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
