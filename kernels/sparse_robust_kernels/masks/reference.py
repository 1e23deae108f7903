"""Bit masks in plain torch: the meaning of the operations, and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import register

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
def zero_(tensors: Sequence[Tensor], keep: Sequence[Tensor]) -> None:
    """Clear every bit where ``keep`` is False. A product would leave -0.0 there, and NaN where inf or NaN was."""
    for tensor, mask in zip(tensors, keep, strict=True):
        bits = tensor.detach().view(_INTEGER[tensor.element_size()])
        bits.bitwise_and_(mask.to(bits.dtype).neg_())  # -1 has every bit set
