"""The bit masks of many tensors in the order in which those lie in memory, made once for all later launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import resolve

WORDS = 64
"""Words of 32 bits that one program of a kernel handles: 2048 weights."""

LONGEST_ROW = 1 << 20
"""Elements of a row up to which the kernels find the row of an element; torch multiplies longer ones."""


class MaskTable:
    """What to keep of each of many tensors, on their device, as one launch over all of them reads it.

    Elementwise kernels walk through memory, so the bits lie in the order of memory: a mask comes in the logical order
    of its weight and is permuted once, here, to the strides of the tensor it is made for. A table serves every list of
    tensors of these shapes (weights, their gradients, their momentum); one of another layout is served too, slower.

    On a GPU it takes 1 bit a weight. On a CPU, where no instruction spreads bits over floats, it takes 1 byte, and from
    its first use the width of the floats that it is used on: the mask is widened once, not in every sweep.

    Args:
        keep: bool masks of the tensors' shapes, on their device, True where kept; None keeps everything.
        like: the tensors, all on one device; only shape, strides and device are looked at.
    """

    def __init__(self, keep: Sequence[Tensor | None], like: Sequence[Tensor]) -> None:
        if len(keep) != len(like):
            raise ValueError(f"a table takes one mask a tensor, got {len(like)} tensors and {len(keep)} masks")
        for index, (mask, tensor) in enumerate(zip(keep, like, strict=True)):
            _check(index, tensor, mask, like[0].device)
        self.device = like[0].device if like else torch.device("cpu")
        self.shapes = [tensor.shape for tensor in like]
        self.numels = [tensor.numel() for tensor in like]
        orders = [memory_order(tensor) for tensor in like]
        # A tensor with gaps has no order of its own; its bits take the logical one.
        self.orders = [
            tuple(i for i in range(t.dim()) if t.shape[i] != 1) if order is None else order
            for t, order in zip(like, orders, strict=True)
        ]
        self._strides = [
            tensor.stride() if order is not None else None for tensor, order in zip(like, orders, strict=True)
        ]
        self.whole = [mask is None for mask in keep]
        flags = [None if mask is None else self._ordered(index, mask) for index, mask in enumerate(keep)]
        self._wide: list[Tensor | None] | None = flags if self.device.type == "cpu" else None
        if self._wide is None:
            self.words = self._pack(flags)

    def __len__(self) -> int:
        return len(self.shapes)

    def in_memory_order(self, index: int, tensor: Tensor) -> bool:
        """Whether a tensor of this shape lies in memory as the bits of ``index`` do, without gaps."""
        return tensor.stride() == self._strides[index] or memory_order(tensor) == self.orders[index]

    def wide(self, index: int, dtype: torch.dtype) -> Tensor:
        """Return ``[numel]`` of a signed integer in the order of memory: -1, every bit set, where kept, else 0."""
        if self._wide is not None:
            held = self._wide[index]
            if held is None:
                return torch.full((self.numels[index],), -1, dtype=dtype)
            if held.dtype != dtype:
                held = self._wide[index] = held.to(dtype)
            return held
        keep: Tensor = resolve("masks.unpack_bits", "reference", self.device)(self.bits(index), self.numels[index])
        return keep.to(dtype).neg_()

    def bits(self, index: int) -> Tensor:
        """Return uint8 ``[ceil(numel / 8)]``: the packed mask in the order of memory, a part of `words`."""
        first = sum(-(-numel // (32 * WORDS)) for numel in self.numels[:index])
        return self.words[first:].reshape(-1).view(torch.uint8)[: -(-self.numels[index] // 8)]

    def logical(self, index: int, dtype: torch.dtype) -> Tensor:
        """Return `wide` in the tensor's shape."""
        shape, order = self.shapes[index], self.orders[index]
        moved = self.wide(index, dtype).view([shape[i] for i in order])
        return moved.permute([order.index(i) for i in sorted(order)]).reshape(shape)

    @cached_property
    def words(self) -> Tensor:
        """Int32 ``[blocks, WORDS]``: bit i of word j of a block is element ``32 j + i``; tensors begin with a block."""
        assert self._wide is not None
        return self._pack(self._wide)

    @cached_property
    def blocks(self) -> Tensor:
        """Int32 ``[blocks, 2]``: the tensor of a block, and which of its blocks it is."""
        counts = torch.tensor([-(-numel // (32 * WORDS)) for numel in self.numels], dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(self)), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        return torch.stack([owner, torch.arange(len(owner)) - first], 1).to(torch.int32).to(self.device)

    @cached_property
    def sizes(self) -> Tensor:
        """Int64 ``[tensors]``: their numbers of elements."""
        return torch.tensor(self.numels, dtype=torch.int64, device=self.device)

    @cached_property
    def lengths(self) -> Tensor:
        """Int32 ``[tensors]``: the numbers of elements of one row of each, see `rows_outermost`."""
        lengths = [shape[1:].numel() for shape in self.shapes]
        return torch.tensor([min(length, LONGEST_ROW) for length in lengths], dtype=torch.int32, device=self.device)

    def rows_outermost(self, index: int) -> bool:
        """Whether the rows ``tensor[i]`` follow each other in memory, and are short enough for the kernels."""
        shape, order = self.shapes[index], self.orders[index]
        outermost = bool(shape) and (shape[0] == 1 or order[:1] == (0,))
        return outermost and shape[1:].numel() <= LONGEST_ROW

    def _ordered(self, index: int, mask: Tensor) -> Tensor:
        squeezed = mask.detach().reshape([size for size in mask.shape if size != 1])
        rank = {axis: place for place, axis in enumerate(sorted(self.orders[index]))}
        # Contiguous and new, whatever the mask was: it is negated in place.
        ordered = squeezed.permute([rank[axis] for axis in self.orders[index]]).reshape(-1)
        return ordered.to(torch.int8, copy=True).neg_()

    def _pack(self, wide: Sequence[Tensor | None]) -> Tensor:
        if not wide:
            return torch.empty(0, WORDS, dtype=torch.int32, device=self.device)
        pack = resolve("masks.pack_bits", "reference", self.device)
        kept = [
            torch.ones(numel, dtype=torch.bool, device=self.device) if flags is None else flags != 0
            for numel, flags in zip(self.numels, wide, strict=True)
        ]
        padded = [torch.nn.functional.pad(flags, (0, -len(flags) % (32 * WORDS))) for flags in kept]
        return torch.cat([pack(flags) for flags in padded]).view(torch.int32).view(-1, WORDS)


def memory_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Return the axes longer than 1, from the outermost in memory to the innermost; None if there are gaps."""
    strides = tensor.stride()
    axes = sorted((i for i in range(tensor.dim()) if tensor.shape[i] != 1), key=lambda i: -strides[i])
    expected = 1
    for i in reversed(axes):
        if strides[i] != expected and tensor.numel():
            return None
        expected *= tensor.shape[i]
    return tuple(axes)


def same_layout(one: Tensor, other: Tensor) -> bool:
    """Whether two dense tensors have the same shape and lie in memory in the same order."""
    if one.shape != other.shape:
        return False
    return one.stride() == other.stride() or memory_order(one) == memory_order(other)


def _check(index: int, tensor: Tensor, mask: Tensor | None, device: torch.device) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"tensor {index}: expected a float and a bool mask, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"tensor {index}: on {tensor.device}, tensor 0 on {device}; one device is needed")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise ValueError(f"tensor {index}: expected a float and a bool mask, got {tensor.dtype} and {mask.dtype}")
    if mask.shape != tensor.shape:
        raise ValueError(f"tensor {index}: shape {tuple(tensor.shape)}, but its mask {tuple(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"tensor {index}: on {tensor.device}, its mask on {mask.device}; one device is needed")
