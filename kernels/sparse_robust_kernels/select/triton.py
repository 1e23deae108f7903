"""Exact selection in Triton: the sweeps of the reference, each one launch for all tensors of a type.

A launch reads a table of addresses, one row a tensor, and a map from blocks to tensors. Everything counted is an
integer, so the results are those of the reference whatever the order of the programs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_robust_kernels._dispatch import register

BINS = 256  # before Triton 3.8 a warp spends BINS / 32 registers, and as many instructions, on a histogram
BLOCK_BYTES = 4096  # of values a program takes at a time: with 8 warps, one access of 128 bits a thread
WARPS = 8
PROGRAMS = 1024  # of a histogram, at most: each ends with BINS atomic additions
_COLUMNS = tl.constexpr(5)  # of the table: address of the values, of the mask (or 0), of the output; numel; first block
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _block(table, owners, block, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the values of a block, whether each counts, the row of its tensor, and where it starts in it."""
    row = table + tl.load(owners + block) * _COLUMNS
    values = tl.load(row).to(tl.pointer_type(TYPE))
    if ALIGNED:
        values = tl.multiple_of(values, 16)
    mask = tl.load(row + 1)
    numel = tl.load(row + 3)
    start = (block - tl.load(row + 4)) * BLOCK  # int64
    index = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        found = tl.load(values + index)  # without a mask, as 128 bits at a time
    else:
        found = tl.load(values + index, mask=index < numel, other=0.0)
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    there = (mask != 0) & (byte * 8 < numel)
    packed = tl.load(mask.to(tl.pointer_type(tl.uint8)) + byte, mask=there, other=255).to(tl.int32)
    kept = tl.reshape((packed[:, None] >> tl.arange(0, 8)[None, :]) & 1, [BLOCK]) != 0
    return found, kept & (index < numel), row, start


@triton.jit
def _keys(values, MAGNITUDE: tl.constexpr):
    """Return integers that compare as fp32 ``values`` (or their magnitudes) do, as `reference.keys`."""
    bits = values.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if MAGNITUDE:
        return magnitude
    return tl.where(magnitude == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit(do_not_specialize=["blocks", "low", "shift"])
def histogram_kernel(
    table, owners, blocks, counts, low, shift,
    TYPE: tl.constexpr, MAGNITUDE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Add to ``counts[b]`` the kept keys in ``low + [b, b + 1) * 2 ** shift``, b below BINS."""
    block = tl.program_id(0)
    total = tl.zeros([BINS], tl.int32)
    while block < blocks:
        values, kept, _, _ = _block(table, owners, block, TYPE, ALIGNED, BLOCK)
        digit = (_keys(values, MAGNITUDE) >> shift) - (low >> shift)
        kept = kept & (digit >= 0) & (digit < BINS)
        if tl.max(kept.to(tl.int32), 0) != 0:  # late sweeps find nothing in most blocks
            total += tl.histogram(digit, BINS, mask=kept)
        block += tl.num_programs(0)
    tl.atomic_add(counts + tl.arange(0, BINS), total.to(tl.int64), mask=total > 0)


@triton.jit(do_not_specialize=["key"])
def count_kernel(
    table, owners, counts, key,
    TYPE: tl.constexpr, MAGNITUDE: tl.constexpr, NAN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write to ``counts`` how many kept values of each block are NaN, or else have the key."""
    values, kept, _, _ = _block(table, owners, tl.program_id(0), TYPE, ALIGNED, BLOCK)
    found = _keys(values, True) > 0x7F800000 if NAN else _keys(values, MAGNITUDE) == key  # bits above infinity
    tl.store(counts + tl.program_id(0), tl.sum((found & kept).to(tl.int32), 0))


@triton.jit(do_not_specialize=["key"])
def remove_kernel(
    table, owners, ties, key,
    TYPE: tl.constexpr, MAGNITUDE: tl.constexpr, TIES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the packed mask without the keys below ``key`` and the first ``ties[block]`` (all, if not TIES) at it."""
    values, kept, row, start = _block(table, owners, tl.program_id(0), TYPE, ALIGNED, BLOCK)
    keys = _keys(values, MAGNITUDE)
    stays = kept & (keys > key)
    if TIES:
        equal = kept & (keys == key)
        stays = stays | (equal & (tl.cumsum(equal.to(tl.int32), 0) > tl.load(ties + tl.program_id(0))))
    places = tl.reshape(stays.to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    out = tl.load(row + 2).to(tl.pointer_type(tl.uint8))
    tl.store(out + byte, tl.sum(places, 1).to(tl.uint8), mask=byte * 8 < tl.load(row + 3))


@dataclass(frozen=True)
class _Launch:
    """Tensors of one type in one launch. ``flat`` keeps the memory alive to which the table points."""

    indices: list[int]
    flat: list[Tensor]
    table: Tensor  # int64 [tensors, _COLUMNS]
    owners: Tensor  # int32 [blocks]: the row of each block
    options: dict[str, object]

    @property
    def blocks(self) -> int:
        return self.owners.numel()


def _launches(
    tensors: Sequence[Tensor], keep: Sequence[Tensor | None], outputs: Sequence[Tensor] | None = None
) -> Iterator[_Launch]:
    """Yield launches that cover all values: one a type, and one for each tensor that has to be copied to be flat."""
    together: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.numel() == 0:
            continue
        if tensor.dtype not in _TYPES:
            raise ValueError(f"the triton backend selects among fp32, fp16 and bf16, got {tensor.dtype}")
        if tensor.is_contiguous():
            together.setdefault(tensor.dtype, []).append(index)
        else:
            yield _launch([index], tensors, keep, outputs)
    for indices in together.values():
        yield _launch(indices, tensors, keep, outputs)


def _launch(
    indices: list[int], tensors: Sequence[Tensor], keep: Sequence[Tensor | None], outputs: Sequence[Tensor] | None
) -> _Launch:
    flat = [tensors[index].detach().reshape(-1) for index in indices]
    block = BLOCK_BYTES // flat[0].element_size()  # values; a multiple of 8, so that a block of a mask begins at a byte
    masks = [keep[index] for index in indices]
    packed = [None if mask is None else mask.contiguous() for mask in masks]
    rows, sizes = [], [triton.cdiv(values.numel(), block) for values in flat]
    for place, (values, bits, first) in enumerate(zip(flat, packed, _starts(sizes), strict=True)):
        out = 0 if outputs is None else outputs[indices[place]].data_ptr()
        rows.append([values.data_ptr(), 0 if bits is None else bits.data_ptr(), out, values.numel(), first])
    device = flat[0].device
    owners = torch.repeat_interleave(torch.arange(len(flat), dtype=torch.int32), torch.tensor(sizes))
    aligned = all(row[0] % 16 == 0 for row in rows)
    options = {"TYPE": _TYPES[flat[0].dtype], "ALIGNED": aligned, "BLOCK": block, "num_warps": WARPS}
    alive = [*flat, *(bits for bits in packed if bits is not None)]
    return _Launch(indices, alive, torch.tensor(rows).to(device), owners.to(device), options)


def _starts(sizes: Sequence[int]) -> list[int]:
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    return starts[:-1]


@register("select.histogram", "triton", devices=("cuda",))
def histogram(
    tensors: Sequence[Tensor],
    keep: Sequence[Tensor | None],
    *,
    low: int,
    shift: int,
    width: int,
    magnitude: bool,
    wide: bool,
) -> Tensor:
    """Count the kept keys from ``low`` on by their next ``width`` bits (8 at most): int64 ``[2 ** width]``."""
    counts = torch.zeros(BINS, dtype=torch.int64, device=tensors[0].device)
    for launch in _launches(tensors, keep):
        grid = (min(launch.blocks, PROGRAMS),)
        histogram_kernel[grid](
            launch.table, launch.owners, launch.blocks, counts, low, shift,
            MAGNITUDE=magnitude, BINS=BINS, **launch.options,
        )  # fmt: skip
    return counts[: 1 << width]


@register("select.count_nan", "triton", devices=("cuda",))
def count_nan(tensors: Sequence[Tensor], keep: Sequence[Tensor | None]) -> Tensor:
    """Return int64 ``[len(tensors)]``: how many kept values of each tensor are NaN."""
    counts = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for launch in _launches(tensors, keep):
        _add(counts, launch, _count(launch, 0, True, nan=True))
    return counts


@register("select.count_equal", "triton", devices=("cuda",))
def count_equal(
    tensors: Sequence[Tensor], keep: Sequence[Tensor | None], *, key: int, magnitude: bool, wide: bool
) -> Tensor:
    """Return int64 ``[len(tensors)]``: how many kept values of each tensor have this key."""
    counts = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for launch in _launches(tensors, keep):
        _add(counts, launch, _count(launch, key, magnitude))
    return counts


@register("select.remove", "triton", devices=("cuda",))
def remove(
    tensors: Sequence[Tensor],
    keep: Sequence[Tensor | None],
    *,
    key: int,
    ties: Sequence[int] | None,
    magnitude: bool,
    wide: bool,
) -> list[Tensor]:
    """Return packed masks without the keys below ``key`` and the first ``ties[i]`` (all, if None) equal to it."""
    device = tensors[0].device
    outputs = [torch.empty(triton.cdiv(t.numel(), 8), dtype=torch.uint8, device=device) for t in tensors]
    for launch in _launches(tensors, keep, outputs):
        left = launch.owners  # not read
        if ties is not None:
            # What the blocks before leave of the tensor's share: the running count restarts at a tensor's first block.
            counts = _count(launch, key, magnitude).long()
            before = counts.cumsum(0) - counts
            share = torch.tensor([ties[index] for index in launch.indices], device=device)
            owners = launch.owners.long()
            left = share[owners] - before + before[launch.table[:, 4]][owners]
        remove_kernel[(launch.blocks,)](
            launch.table, launch.owners, left, key, MAGNITUDE=magnitude, TIES=ties is not None, **launch.options
        )
    return outputs


def _count(launch: _Launch, key: int, magnitude: bool, *, nan: bool = False) -> Tensor:
    """Return int32 ``[blocks]``: how many kept values of each block are equal to the key, or NaN."""
    counts = torch.empty(launch.blocks, dtype=torch.int32, device=launch.owners.device)
    count_kernel[(launch.blocks,)](
        launch.table, launch.owners, counts, key, MAGNITUDE=magnitude, NAN=nan, **launch.options
    )
    return counts


def _add(counts: Tensor, launch: _Launch, blocks: Tensor) -> None:
    """Add what blocks hold to the counts of their tensors."""
    indices = torch.tensor(launch.indices, device=counts.device)
    counts.index_add_(0, indices[launch.owners.long()], blocks.long())
