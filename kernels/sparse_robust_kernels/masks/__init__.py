"""Masks of one bit a weight: pack, unpack, count, zero what is pruned, and copy what is kept.

Packed masks are little-endian: element ``i`` of the flattened (logical, row-major) weight is bit ``i % 8`` of byte
``i // 8``, and the spare bits of the last byte are 0. A set bit means that the weight is kept. A `MaskTable` holds the
masks of all layers in the order of memory, for the operations that run over a whole model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import resolve
from sparse_robust_kernels.masks import reference as _reference  # noqa: F401  (registers itself)
from sparse_robust_kernels.masks.table import MaskTable, same_layout

__all__ = ["MaskTable", "count_bits", "masked_copy", "pack_bits", "same_layout", "unpack_bits", "zero_"]


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


def zero_(tensors: Sequence[Tensor | None], keep: MaskTable | Sequence[Tensor], backend: str = "auto") -> None:
    """Set ``tensors[i]`` to +0.0 in place wherever ``keep[i]`` is False; every other bit stays as it is.

    Inf and NaN under the mask are cleared too. No gradient is recorded. On a GPU all tensors of one width of float take
    one launch.

    Args:
        tensors: floating-point tensors on one device, any memory format: weights, gradients, momentum. None, such as a
            gradient that is not there, is left out.
        keep: a table made for tensors of these shapes, which is what to pass in a loop; or bool tensors of the same
            shapes on the same device, and then no tensor may be None.
    """
    if not isinstance(keep, MaskTable):
        if len(tensors) != len(keep):
            raise ValueError(f"zero_ takes one mask a tensor, got {len(tensors)} tensors and {len(keep)} masks")
        keep = MaskTable(keep, [_present(index, tensor) for index, tensor in enumerate(tensors)])
    else:
        _check_fits(tensors, keep)
    resolve("masks.zero_", backend, keep.device)(tensors, keep)


def masked_copy(
    sources: Sequence[Tensor],
    keep: MaskTable | Sequence[Tensor | None],
    targets: Sequence[Tensor],
    backend: str = "auto",
    *,
    scales: Sequence[Tensor | None] | None = None,
) -> None:
    """Write ``sources[i]`` to ``targets[i]`` where ``keep[i]`` is True, and +0.0 elsewhere: a masked compute copy.

    Values are rounded to the target's type, to the nearest with ties to even (on the CPU fp64 by way of fp32, as torch
    does). NaN stays NaN, with any payload. On a GPU
    all tensors of one pair of types take one launch. No gradient is recorded.

    Args:
        sources: floating-point tensors on one device, such as the weights of a model.
        keep: a table made for the targets, which is what to pass in a loop; or bool tensors, None for a tensor that is
            copied whole.
        targets: tensors of the sources' shapes, any type and memory format. Where source and target lie in memory in
            different orders, a GPU makes one copy more.
        scales: one number for each row ``sources[i][r]``, [rows], of the source's type, by which the row is multiplied
            before it is rounded, as a batch norm folded into a layer does; None for those, or for all, that have none.
    """
    if len(sources) != len(targets):
        raise ValueError(f"masked_copy takes one target a source, got {len(sources)} and {len(targets)}")
    if not isinstance(keep, MaskTable):
        keep = MaskTable(keep, targets)
    _check_fits(sources, keep)
    _check_fits(targets, keep)
    scales = [None] * len(sources) if scales is None else scales
    _check_scales(scales, sources)
    pairs = {(s.dtype, t.dtype) for s, t in zip(sources, targets, strict=True)}
    unfit = ", ".join(f"{have} to {want}" for have, want in sorted(pairs - _COPIED, key=str) if have != want)
    scaled = {f"scaled {scale.dtype}" for scale in scales if scale is not None and scale.dtype != torch.float32}
    unfit = unfit or ", ".join(sorted(scaled))
    resolve("masks.masked_copy", backend, keep.device, unfit=unfit)(sources, keep, targets, scales)


_COPIED = {(torch.float32, torch.bfloat16), (torch.float32, torch.float16)}
"""Pairs of types that the kernels convert; equal ones are only copied."""


def _present(index: int, tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError(f"tensor {index} is None: make a MaskTable of all tensors and pass that")
    return tensor


def _check_fits(tensors: Sequence[Tensor | None], table: MaskTable) -> None:
    if len(tensors) != len(table):
        raise ValueError(f"the table has masks of {len(table)} tensors, got {len(tensors)} tensors")
    for index, tensor in enumerate(tensors):
        if tensor is None:
            continue
        if tensor.shape != table.shapes[index]:
            raise ValueError(f"tensor {index}: shape {tuple(tensor.shape)}, but its mask {tuple(table.shapes[index])}")
        if tensor.device != table.device:
            raise ValueError(f"tensor {index}: on {tensor.device}, its mask on {table.device}; one device is needed")
        if not tensor.is_floating_point():
            raise ValueError(f"tensor {index}: expected a float, got {tensor.dtype}")


def _check_scales(scales: Sequence[Tensor | None], sources: Sequence[Tensor]) -> None:
    if len(scales) != len(sources):
        raise ValueError(f"masked_copy takes one scale, or None, a source, got {len(scales)} for {len(sources)}")
    for index, (scale, source) in enumerate(zip(scales, sources, strict=True)):
        if scale is None:
            continue
        rows = source.shape[:1]
        if scale.dim() != 1 or scale.shape != rows or (scale.dtype, scale.device) != (source.dtype, source.device):
            raise ValueError(
                f"tensor {index}: its scale must be {source.dtype} {tuple(rows)} on {source.device}, got "
                f"{scale.dtype} {tuple(scale.shape)} on {scale.device}"
            )


def _check_packed(packed: Tensor) -> None:
    if packed.dtype != torch.uint8 or packed.dim() != 1:
        raise ValueError(f"packed bits are a flat uint8 tensor, got {packed.dtype} of shape {tuple(packed.shape)}")
