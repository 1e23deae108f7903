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

BINS = 256  # before Triton 3.8 a warp spends BINS / 32 registers, and many instructions, on a histogram
BLOCK = 4096  # values a program takes at a time: with 8 warps, 16 a thread, in accesses of 128 bits
WARPS = 8
PROGRAMS = 24 * 132  # of a histogram, at most: whole rounds on the 132 processors of an H200, each with 2, 3, 4, 6 or 8
_COLUMNS = tl.constexpr(5)  # of the table: address of the values, of the mask (or 0), of the output; numel; first block
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _block(table, owners, block, TYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the values of a block [BLOCK / 8, 8], whether each counts, the row of its tensor, its start, and how many
    values the tensor has from there on."""
    row = table + tl.load(owners + block) * _COLUMNS
    start = (block - tl.load(row + 4)) * BLOCK  # int64
    left = tl.load(row + 3) - start
    values = tl.load(row).to(tl.pointer_type(TYPE))
    if ALIGNED:
        values = tl.multiple_of(values, 16)
    mask = tl.load(row + 1)
    byte, bit = tl.arange(0, BLOCK // 8), tl.arange(0, 8)
    place = byte[:, None] * 8 + bit[None, :]
    packed = (mask + start // 8).to(tl.pointer_type(tl.uint8)) + byte
    if left >= BLOCK:
        found = tl.load(values + start + place)  # without a mask, as 128 bits at a time
        bits = tl.load(packed, mask=mask != 0, other=255).to(tl.int32)
    else:
        found = tl.load(values + start + place, mask=place < left, other=0.0)
        room = tl.minimum(tl.maximum(left - byte * 8, 0), 8).to(tl.int32)
        bits = tl.load(packed, mask=(mask != 0) & (room > 0), other=255).to(tl.int32) & ((1 << room) - 1)
    return found.to(tl.float32), (bits[:, None] & (1 << bit)[None, :]) != 0, row, start, left


@triton.jit
def _keys(values, MAGNITUDE: tl.constexpr):
    """Return integers that compare as fp32 ``values`` (or their magnitudes) do, as `reference.keys`."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    if MAGNITUDE:
        return magnitude
    return tl.where(magnitude == 0, 0, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _value(key, MAGNITUDE: tl.constexpr):
    """Return the fp32 number that has this key. Comparing with it takes fewer operations than the keys of all do."""
    bits = key if MAGNITUDE else tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["blocks", "low", "shift"])
def histogram_kernel(
    table, owners, blocks, counts, low, shift,
    TYPE: tl.constexpr, MAGNITUDE: tl.constexpr, LATE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    """Add to ``counts[b]`` the kept keys in ``low + [b, b + 1) * 2 ** shift``, b below BINS.

    A program takes blocks that follow each other, which mostly share their tensor's row of the table.
    """
    share = tl.cdiv(blocks, tl.num_programs(0))
    block = tl.program_id(0) * share
    end = tl.minimum(block + share, blocks)
    total = tl.zeros([BINS], tl.int32)
    while block < end:
        values, kept, _, _, _ = _block(table, owners, block, TYPE, ALIGNED, BLOCK)
        digit = (_keys(values, MAGNITUDE) >> shift) - (low >> shift)
        kept = tl.reshape(kept & (digit >= 0) & (digit < BINS), [BLOCK], can_reorder=True)
        digit = tl.reshape(digit, [BLOCK], can_reorder=True)
        if not LATE:  # noqa: SIM114  (known when compiling, unlike the next)
            total += tl.histogram(digit, BINS, mask=kept)
        elif tl.max(kept.to(tl.int32), 0) != 0:  # late sweeps find nothing in most blocks
            total += tl.histogram(digit, BINS, mask=kept)
        block += 1
    tl.atomic_add(counts + tl.arange(0, BINS), total.to(tl.int64), mask=total > 0, sem="relaxed")


@triton.jit(do_not_specialize=["key"])
def count_kernel(
    table, owners, counts, key,
    TYPE: tl.constexpr, MAGNITUDE: tl.constexpr, NAN: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write to ``counts`` how many kept values of each block are NaN, or else have the key."""
    values, kept, _, _, _ = _block(table, owners, tl.program_id(0), TYPE, ALIGNED, BLOCK)
    if MAGNITUDE:
        values = tl.abs(values)
    found = kept & (values != values if NAN else values == _value(key, MAGNITUDE))
    tl.store(counts + tl.program_id(0), tl.sum(tl.sum(found.to(tl.int32), 1), 0))


@triton.jit(do_not_specialize=["key"])
def remove_kernel(
    table, owners, ties, key,
    TYPE: tl.constexpr, MAGNITUDE: tl.constexpr, TIES: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the packed mask without the keys below ``key`` and the first ``ties[block]`` (all, if not TIES) at it."""
    values, kept, row, start, left = _block(table, owners, tl.program_id(0), TYPE, ALIGNED, BLOCK)
    if MAGNITUDE:
        values = tl.abs(values)
    value = _value(key, MAGNITUDE)
    taken = tl.load(ties + tl.program_id(0)) if TIES else BLOCK
    # What is below goes; NaN stays, be it in the values or, as the lowest key of all, at the cut.
    gone = values < value
    if taken >= BLOCK:
        gone = values <= value
    elif taken > 0:
        equal = tl.reshape(kept & (values == value), [BLOCK])
        first = equal & (tl.cumsum(equal.to(tl.int32), 0) <= taken)
        gone = gone | tl.reshape(first, [BLOCK // 8, 8])
    byte, bit = tl.arange(0, BLOCK // 8), tl.arange(0, 8)
    stays = tl.where(gone, 0, tl.where(kept, (1 << bit)[None, :], 0))
    out = (tl.load(row + 2) + start // 8).to(tl.pointer_type(tl.uint8))
    tl.store(out + byte, tl.sum(stays, 1).to(tl.uint8), mask=byte * 8 < left)


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
    masks = [keep[index] for index in indices]
    packed = [None if mask is None else mask.contiguous() for mask in masks]
    rows, sizes = [], [triton.cdiv(values.numel(), BLOCK) for values in flat]
    for place, (values, bits, first) in enumerate(zip(flat, packed, _starts(sizes), strict=True)):
        out = 0 if outputs is None else outputs[indices[place]].data_ptr()
        rows.append([values.data_ptr(), 0 if bits is None else bits.data_ptr(), out, values.numel(), first])
    device = flat[0].device
    owners = torch.repeat_interleave(torch.arange(len(flat), dtype=torch.int32), torch.tensor(sizes))
    aligned = all(row[0] % 16 == 0 for row in rows)
    options = {"TYPE": _TYPES[flat[0].dtype], "ALIGNED": aligned, "BLOCK": BLOCK, "num_warps": WARPS}
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
        with torch.cuda.device_of(launch.table):
            histogram_kernel[grid](
                launch.table, launch.owners, launch.blocks, counts, low, shift,
                MAGNITUDE=magnitude, LATE=shift < 23, BINS=BINS, **launch.options,
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
            left = left.where(left < counts, BLOCK)  # no block but one a tensor has to look for them
        with torch.cuda.device_of(launch.table):
            remove_kernel[(launch.blocks,)](
                launch.table, launch.owners, left, key, MAGNITUDE=magnitude, TIES=ties is not None, **launch.options
            )
    return outputs


def _count(launch: _Launch, key: int, magnitude: bool, *, nan: bool = False) -> Tensor:
    """Return int32 ``[blocks]``: how many kept values of each block are equal to the key, or NaN."""
    counts = torch.empty(launch.blocks, dtype=torch.int32, device=launch.owners.device)
    with torch.cuda.device_of(launch.table):
        count_kernel[(launch.blocks,)](
            launch.table, launch.owners, counts, key, MAGNITUDE=magnitude, NAN=nan, **launch.options
        )
    return counts


def _add(counts: Tensor, launch: _Launch, blocks: Tensor) -> None:
    """Add what blocks hold to the counts of their tensors."""
    indices = torch.tensor(launch.indices, device=counts.device)
    counts.index_add_(0, indices[launch.owners.long()], blocks.long())
