"""Normalisation inside the model: attacks and data stay in pixel space [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from sparse_robust.attacks.normalized import normalize_input
from sparse_robust.errors import UsageError
from sparse_robust.masks import unwrap
from sparse_robust.models.spec import find_spec


def set_normalization(model: nn.Module, mean: Sequence[float] | float, std: Sequence[float] | float) -> None:
    """Make ``model(x)`` compute its logits of ``(x - mean) / std``.

    A forward pre-hook reads the non-persistent buffers ``input_mean`` and ``input_std`` of shape [1, C, 1, 1], so names
    and the state dict are those of the bare network, copies keep it, and ``.to()`` moves it. A second call replaces the
    values of the first.

    Args:
        model: a network whose first positional argument is images of shape [n, C, H, W] in [0, 1].
        mean: one number a channel, in the units of the images; one number alone is used for all channels.
        std: likewise, above 0.

    Raises:
        UsageError: for values that are not finite, a std of 0 or less, or a count that differs from the channels.
    """
    model, spec = unwrap(model), find_spec(model)
    mean, std = _checked("mean", mean), _checked("std", std)
    if min(std) <= 0:
        raise UsageError(f"std must be above 0 in every channel, got {std}.")
    channels = spec.in_chans if spec else max(len(mean), len(std))
    parameter = next(model.parameters(), torch.empty(0))
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UsageError(f"{name} has {len(values)} values, but the model takes {channels} channels.")
    if get_normalization(model) is None:
        model.register_forward_pre_hook(normalize_input)
    for name, values in (("input_mean", mean), ("input_std", std)):
        buffer = torch.tensor(values * (channels // len(values)), device=parameter.device, dtype=parameter.dtype)
        model.register_buffer(name, buffer.view(1, channels, 1, 1), persistent=False)


def get_normalization(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return (mean, std) as the model uses them, one number a channel, or None where it does not normalise."""
    buffers = dict(unwrap(model).named_buffers(recurse=False))
    if "input_mean" not in buffers:
        return None
    return tuple(buffers["input_mean"].flatten().tolist()), tuple(buffers["input_std"].flatten().tolist())


def default_normalization(model: nn.Module, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the (mean, std) that timm records for the network's weights, fitted to ``in_chans``.

    For one channel they are averaged, for other counts repeated in turn, as timm does with the first convolution's
    weights. Without a record they are 0.5.
    """
    record = getattr(model, "pretrained_cfg", None) or {}
    mean, std = tuple(record.get("mean") or (0.5,)), tuple(record.get("std") or (0.5,))
    return _fit(mean, in_chans), _fit(std, in_chans)


def _checked(name: str, values: Sequence[float] | float) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in ([values] if isinstance(values, (int, float)) else values))
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise UsageError(f"{name} must be one finite number a channel, got {values!r}.")
    return numbers


def _fit(values: tuple[float, ...], in_chans: int) -> tuple[float, ...]:
    if in_chans == 1:
        return (sum(values) / len(values),)
    return tuple(values[channel % len(values)] for channel in range(in_chans))
