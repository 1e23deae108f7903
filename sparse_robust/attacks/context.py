"""The model while it is attacked: frozen, in the mode that was asked for, and afterwards exactly as before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_robust.errors import unknown

Model = nn.Module | Callable[[Tensor], Tensor]

MODES: dict[str, str] = {
    "eval": "running statistics, nothing in the model changes",
    "train": "batch statistics, and every attack step updates the running ones (Madry et al., 2018)",
    "train_frozen": "batch statistics, running ones untouched",
}


@contextmanager
def attack_context(model: Model, mode: str = "eval") -> Iterator[None]:
    """Freeze a model's parameters and put it in a mode for the length of a block.

    On the way out every ``requires_grad`` and every ``training`` flag is what it was, submodule by submodule. A model
    that is in training mode already stays as it is in both training modes, so layers that its owner put in eval mode
    remain there. Anything but an nn.Module is left alone. Give it the inner module of a distributed wrapper: the
    wrapper's forward issues collectives.

    Args:
        mode: a key of `MODES`, the batch-norm mode.

    Raises:
        UsageError: for an unknown mode.
    """
    if mode not in MODES:
        raise unknown("attack mode", mode, MODES)
    if not isinstance(model, nn.Module):
        yield
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flags = [(module, module.training) for module in model.modules()]
    with ExitStack() as stack:
        stack.callback(_restore, trainable, flags)
        for parameter in trainable:
            parameter.requires_grad_(False)
        if mode == "eval":
            model.eval()
        elif not model.training:
            model.train()
        if mode == "train_frozen":
            stack.enter_context(_frozen_statistics(model))
        yield


def _restore(trainable: list[nn.Parameter], flags: list[tuple[nn.Module, bool]]) -> None:
    for parameter in trainable:
        parameter.requires_grad_(True)
    for module, training in flags:
        module.training = training


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    tracking: list[Any] = [module for module in model.modules() if getattr(module, "track_running_stats", False)]
    # Batch norms that do not track neither read nor write their statistics while training. Instance norms write them
    # all the same.
    buffers = [b for module in tracking if not isinstance(module, _BatchNorm) for b in module.buffers(recurse=False)]
    saved = [buffer.clone() for buffer in buffers]
    for module in tracking:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in tracking:
            module.track_running_stats = True
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
