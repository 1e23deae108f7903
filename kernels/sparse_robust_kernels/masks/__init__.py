"""Masks of one bit a weight: pack, unpack, count, and zero what is pruned.

Bit order is little-endian: element ``i`` of the flattened (logical, row-major) weight is bit ``i % 8`` of byte
``i // 8``, and the spare bits of the last byte are 0. A set bit means that the weight is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import resolve
from sparse_robust_kernels.masks import reference as _reference  # noqa: F401  (registers itself)

__all__ = ["count_bits", "pack_bits", "unpack_bits", "zero_"]


def pack_bits(keep: Tensor, backend: str = "auto") -> Tensor:
    """Pack a mask to one bit an element.

    Args:
        keep: bool ``[numel]``, True where the weight is kept.

    Returns:
        uint8 ``[ceil(numel / 8)]`` on the same device.
    """
    if keep.dtype != torch.bool or keep.dim() != 1:
        raise ValueError(f"pack_bits takes a flat bool tensor, got {keep.dtype} of shape {tuple(keep.shape)}")
    packed: Tensor = resolve("masks.pack_bits", backend, keep.device)(keep)
    return packed


def unpack_bits(packed: Tensor, numel: int, backend: str = "auto") -> Tensor:
    """Return the bool ``[numel]`` mask whose packed form is uint8 ``[ceil(numel / 8)]``."""
    _check_packed(packed)
    if packed.numel() != -(-numel // 8):
        raise ValueError(f"{numel} elements are packed in {-(-numel // 8)} bytes, got {packed.numel()}")
    keep: Tensor = resolve("masks.unpack_bits", backend, packed.device)(packed, numel)
    return keep


def count_bits(packed: Tensor, backend: str = "auto") -> Tensor:
    """Return how many bits of a flat uint8 tensor are set, as an int64 scalar on its device."""
    _check_packed(packed)
    count: Tensor = resolve("masks.count_bits", backend, packed.device)(packed)
    return count


def zero_(tensors: Sequence[Tensor], keep: Sequence[Tensor], backend: str = "auto") -> None:
    """Set ``tensors[i]`` to +0.0 in place wherever ``keep[i]`` is False; every other bit stays as it is.

    Inf and NaN under the mask are cleared too. No gradient is recorded.

    Args:
        tensors: floating-point tensors on one device, any memory format.
        keep: bool tensors of the same shapes on the same device.
    """
    if len(tensors) != len(keep):
        raise ValueError(f"zero_ takes one mask a tensor, got {len(tensors)} tensors and {len(keep)} masks")
    for index, (tensor, mask) in enumerate(zip(tensors, keep, strict=True)):
        if not tensor.is_floating_point() or mask.dtype != torch.bool:
            raise ValueError(f"tensor {index}: expected a float and a bool mask, got {tensor.dtype} and {mask.dtype}")
        if tensor.shape != mask.shape:
            raise ValueError(f"tensor {index}: shape {tuple(tensor.shape)}, but its mask {tuple(mask.shape)}")
        if not tensor.device == mask.device == tensors[0].device:
            raise ValueError(f"tensor {index}: on {tensor.device}, its mask on {mask.device}; one device is needed")
    if tensors:
        resolve("masks.zero_", backend, tensors[0].device)(tensors, keep)


def _check_packed(packed: Tensor) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"packed bits are a flat uint8 tensor, got {packed.dtype} of shape {tuple(packed.shape)}")
