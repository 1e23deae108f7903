"""Which images the kernels take: they work in storage order, on dense tensors."""

from __future__ import annotations

import torch
from torch import Tensor

_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the memory format of dense images: rows of pixels, or channels last."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def unfit(x: Tensor, grad: Tensor | None = None) -> str:
    """Return why the kernels do not take these images and gradients, or nothing if they do."""
    if x.dtype != torch.float32:
        return "images of float64"
    if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
        return "images that are neither contiguous nor channels-last"
    if grad is not None and grad.dtype not in _GRADIENTS:
        return "gradients of float64"
    return ""
