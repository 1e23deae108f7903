"""The normalisation at the input of a model, and the attack loop in which the step does it on the way.

A model that normalises its images reads and writes them twice more in every pass, and their gradient once. On a replica
the Linf step writes what the network behind the normalisation computes on, in its precision and layout, as it moves the
images, and takes the gradient there: a step goes along signs, which a division by a standard deviation leaves alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_robust.attacks.passes import Losses, differentiate
from sparse_robust.attacks.procedure import Task
from sparse_robust.errors import UsageError
from sparse_robust_kernels.pgd_step import linf_step_normalized
from sparse_robust_kernels.pgd_step.layout import memory_format

if TYPE_CHECKING:
    from sparse_robust.attacks.iterated import Iteration
    from sparse_robust.attacks.replica import Replica


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel, [C], in the units of the images."""

    mean: Tensor
    std: Tensor

    def fits(self, images: Tensor) -> bool:
        """Whether the fused step takes such images."""
        return images.dim() == 4 and images.shape[1] == len(self.mean) and images.dtype == torch.float32


def normalize_input(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Normalise the first argument: a forward pre-hook that reads the buffers ``input_mean`` and ``input_std``.

    They have the shape [1, C, 1, 1].

    Raises:
        UsageError: for images with another number of channels.
    """
    images, *others = args
    channels = module.input_mean.shape[1]
    if images.shape[1] != channels:  # broadcasting would otherwise turn grey images into colour ones unasked
        raise UsageError(f"the model takes {channels}-channel images [n, {channels}, H, W], got {list(images.shape)}.")
    return ((images - module.input_mean) / module.input_std, *others)


def find_normalization(module: nn.Module) -> Normalization | None:
    """Return views of a module's own normalisation; None where it has none, or its call does more than that.

    ``module.forward(x)`` is then ``module`` without its normalisation.
    """
    if list(module._forward_pre_hooks.values()) != [normalize_input] or module._forward_hooks:
        return None
    mean, std = module.get_buffer("input_mean"), module.get_buffer("input_std")
    return Normalization(mean.view(-1), std.view(-1)) if mean.dtype == torch.float32 else None


def climb_normalized(
    procedure: Iteration, replica: Replica, normalization: Normalization, task: Task, shown: Tensor, losses: Losses
) -> Tensor:
    """Return the last iterates of plain sign steps from ``shown``, laid out like it.

    Args:
        procedure: its direction is the gradient; its norm is Linf.
        normalization: the replica's; it fits the images.
        losses: of the logits of exactly these images.
    """
    budget, size, steps = procedure.budget, procedure.step_size, procedure.attack.steps
    settings: dict[str, Any] = {"step_size": size, "eps": budget.eps, "lo": budget.lo, "hi": budget.hi}
    x, moved = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (task.x, shown))
    fed = replica.feed(moved)
    for step in range(steps):
        grad = differentiate(replica.compute, fed, losses).grad
        if step < steps - 1:
            moved, fed = linf_step_normalized(moved, x, grad, *normalization, **settings, dtype=fed.dtype)
        else:
            moved = budget.step(moved, grad, x, size)
    return moved.contiguous(memory_format=memory_format(shown))
