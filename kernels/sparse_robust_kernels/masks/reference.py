"""Bit masks in plain torch: the meaning of the operations, and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import register
from sparse_robust_kernels.masks.table import MaskTable

# The integer type of a float's width: its bits can be cleared whatever the float holds.
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@register("masks.pack_bits", "reference")
def pack_bits(keep: Tensor) -> Tensor:
    """Element ``i`` becomes bit ``i % 8`` of byte ``i // 8``; the spare bits of the last byte are 0."""
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -keep.numel() % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (padded.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


@register("masks.unpack_bits", "reference")
def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """The inverse of `pack_bits`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> shifts) & 1).view(torch.bool).reshape(-1)[:numel]


@register("masks.count_bits", "reference")
def count_bits(packed: Tensor) -> Tensor:
    """The number of set bits: pairs, then nibbles, then bytes are summed in place (Warren, Hacker's Delight, 5-1)."""
    pairs = packed - ((packed >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return ((nibbles + (nibbles >> 4)) & 0x0F).sum(dtype=torch.int64)


@register("masks.zero_", "reference")
def zero_(tensors: Sequence[Tensor | None], masks: MaskTable) -> None:
    """Clear every bit where a weight is not kept. A product would leave -0.0 there, and NaN where inf or NaN was."""
    for index, tensor in enumerate(tensors):
        if tensor is not None:
            zero_one_(tensor, masks, index)


def zero_one_(tensor: Tensor, masks: MaskTable, index: int) -> None:
    """`zero_` for one tensor of any layout."""
    if masks.whole[index]:
        return
    bits = tensor.detach().view(_INTEGER[tensor.element_size()])
    if masks.in_memory_order(index, tensor):
        bits.as_strided((bits.numel(),), (1,)).bitwise_and_(masks.wide(index, bits.dtype))
    else:
        bits.bitwise_and_(masks.logical(index, bits.dtype))


@register("masks.masked_copy", "reference")
def masked_copy(
    sources: Sequence[Tensor], masks: MaskTable, targets: Sequence[Tensor], scales: Sequence[Tensor | None]
) -> None:
    """Copy with torch's own rounding, to the nearest with ties to even, then clear what is not kept."""
    for index, (source, target, scale) in enumerate(zip(sources, targets, scales, strict=True)):
        copy_one_(source.detach(), target.detach(), scale, masks, index)


def copy_one_(source: Tensor, target: Tensor, scale: Tensor | None, masks: MaskTable, index: int) -> None:
    """`masked_copy` for one tensor of any layout."""
    if scale is None:
        target.copy_(source)
    else:
        column = scale.detach().view(-1, *[1] * (source.dim() - 1))
        if target.dtype == source.dtype:
            torch.mul(source, column, out=target)
        else:
            target.copy_(source * column)
    zero_one_(target, masks, index)
