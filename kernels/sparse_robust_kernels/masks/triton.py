"""Bit masks in Triton: a word of 32 bits is one load, and each of its bits meets one weight of a row of 32.

Every kernel has a path for whole blocks without bounds, so that accesses are 128 bits wide whatever the length, and one
for the last block of a tensor. Floats are moved as integers of their width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_robust_kernels._dispatch import opaque, register
from sparse_robust_kernels.masks.reference import copy_one_, zero_one_
from sparse_robust_kernels.masks.table import WORDS, MaskTable

COUNTED = 2048
"""Words that one program of the counting kernel sums."""
HALVES = 512
"""Halves of words, 16 bits each, that one program packs or unpacks: 8192 flags, 4 accesses of 128 bits a thread."""
PIECE = tl.constexpr(128)
"""Of these, how many at a time in the last program, which goes flag by flag."""


@triton.jit
def pack_kernel(keep, halves, numel, HALVES: tl.constexpr):
    """``keep`` uint8 [numel] of 0 and 1 -> ``halves`` int16 [ceil(numel / 16)]."""
    first = tl.program_id(0).to(tl.int64) * HALVES
    if (first + HALVES) * 16 <= numel:
        fours = (keep + first * 16).to(tl.pointer_type(tl.int32))  # four flags, a byte each
        place = tl.arange(0, HALVES)[:, None] * 4 + tl.arange(0, 4)[None, :]
        even, odd = tl.split(tl.reshape(tl.load(fours + place), [HALVES, 2, 2]))
        # A flag in bit 0 of each byte and one in bit 4: the product shifts them side by side into the highest byte, and
        # no two of its terms meet in a bit.
        octets = ((odd * 16 + even) * 0x01020408).to(tl.uint32, bitcast=True) >> 24
        low, high = tl.split(octets)
        tl.store(halves + first + tl.arange(0, HALVES), (low | (high << 8)).to(tl.int16))
    else:
        bit = tl.arange(0, 16)[None, :]
        for begun in range(0, HALVES, PIECE):
            half = first + begun + tl.arange(0, PIECE)
            element = half[:, None] * 16 + bit
            flags = tl.load(keep + element, mask=element < numel, other=0).to(tl.int32)
            tl.store(halves + half, tl.sum(flags << bit, axis=1).to(tl.int16), mask=half * 16 < numel)


@triton.jit
def unpack_kernel(halves, keep, numel, HALVES: tl.constexpr):
    """``halves`` int16 [ceil(numel / 16)] -> ``keep`` uint8 [numel] of 0 and 1."""
    first = tl.program_id(0).to(tl.int64) * HALVES
    if (first + HALVES) * 16 <= numel:
        bits = tl.load(halves + first + tl.arange(0, HALVES)).to(tl.int32)
        fours = (bits[:, None] >> (4 * tl.arange(0, 4))[None, :]) & 15
        place = tl.arange(0, HALVES)[:, None] * 4 + tl.arange(0, 4)[None, :]
        # The product copies four bits to where each of them is the lowest of a byte.
        flags = (fours * 0x00204081) & 0x01010101
        tl.store((keep + first * 16).to(tl.pointer_type(tl.int32)) + place, flags)
    else:
        bit = tl.arange(0, 16)[None, :]
        for begun in range(0, HALVES, PIECE):
            half = first + begun + tl.arange(0, PIECE)
            element = half[:, None] * 16 + bit
            bits = tl.load(halves + half, mask=half * 16 < numel, other=0).to(tl.int32)
            tl.store(keep + element, ((bits[:, None] >> bit) & 1).to(tl.uint8), mask=element < numel)


@triton.jit
def count_kernel(words, count, numel, BLOCK: tl.constexpr):
    """Add the number of set bits of ``words`` int32 [numel] to the int64 ``count``."""
    block = tl.program_id(0).to(tl.int64)
    word = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= numel:  # noqa: SIM108  (a ternary would load both)
        bits = tl.load(words + word)
    else:
        bits = tl.load(words + word, mask=word < numel, other=0)
    bits = bits.to(tl.uint32, bitcast=True)
    pairs = bits - ((bits >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    ones = (octets * 0x01010101) >> 24  # the form in which compilers see one instruction
    tl.atomic_add(count, tl.sum(ones.to(tl.int32), axis=0).to(tl.int64), sem="relaxed")


@triton.jit
def _every_bit(words, WORDS: tl.constexpr):
    """Return int32 [WORDS, 32] for this program's block: -1 where a bit is set, 0 elsewhere."""
    first = tl.program_id(0).to(tl.int64) * WORDS
    bits = tl.load(words + first + tl.arange(0, WORDS))
    return -((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1)


@triton.jit
def zero_kernel(addresses, sizes, blocks, words, INTEGER: tl.constexpr, ALIGNED: tl.constexpr, WORDS: tl.constexpr):
    """Clear floats, seen as INTEGER, where the bits in ``words`` are 0. A tensor with the address 0 is left out."""
    block = tl.program_id(0)
    owner = tl.load(blocks + 2 * block)
    first = tl.load(blocks + 2 * block + 1).to(tl.int64) * (WORDS * 32)
    address = tl.load(addresses + owner)
    if address != 0:
        size = tl.load(sizes + owner)
        values = address.to(tl.pointer_type(INTEGER))
        if ALIGNED:
            values = tl.multiple_of(values, 16)
        kept = _every_bit(words, WORDS).to(INTEGER)
        element = first + tl.arange(0, WORDS)[:, None] * 32 + tl.arange(0, 32)[None, :]
        if first + WORDS * 32 <= size:
            tl.store(values + element, tl.load(values + element) & kept)
        else:
            inside = element < size
            tl.store(values + element, tl.load(values + element, mask=inside, other=0) & kept, mask=inside)


@triton.jit
def _rounded(bits, TARGET: tl.constexpr):
    """Return the bits of fp32 values (int32) as those of TARGET, to the nearest with ties to even; NaN stays NaN."""
    if TARGET == "bf16":
        unsigned = bits.to(tl.uint32, bitcast=True)
        nearest = (unsigned + 0x7FFF + ((unsigned >> 16) & 1)) >> 16
        is_nan = (unsigned & 0x7FFFFFFF) > 0x7F800000
        return tl.where(is_nan, 0x7FC0, nearest).to(tl.int16)
    elif TARGET == "fp16":
        return bits.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True)
    else:
        return bits


@triton.jit
def row_of(place, reciprocal):
    """``place // length`` of integers below ``length`` + 2048, by a product: a division takes three times as long.

    (place + 0.5) / length is half an element away from any whole number, which up to `LONGEST_ROW` is more than the
    roundings. Adding 1.5 * 2**23 leaves the integer nearest to it, less a half, in the low bits of the float.
    """
    exact = (place | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    nearest = tl.fma(exact, reciprocal, 0.5 * reciprocal - 0.5) + 12582912.0
    return nearest.to(tl.int32, bitcast=True) & 0x3FFFFF


@triton.jit
def _copy_part(
    source, target, factors, offset, reciprocal, left, words,
    TARGET: tl.constexpr, SCALED: tl.constexpr, TAIL: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    local = tl.arange(0, WORDS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = local < left
    bits = tl.load(source + local, mask=inside, other=0) if TAIL else tl.load(source + local)
    if SCALED:
        row = row_of(offset + local, reciprocal)
        factor = tl.load(factors + row, mask=inside, other=1.0) if TAIL else tl.load(factors + row)
        bits = (bits.to(tl.float32, bitcast=True) * factor).to(tl.int32, bitcast=True)
    kept = _every_bit(words, WORDS).to(target.dtype.element_ty)
    tl.store(target + local, _rounded(bits, TARGET) & kept, mask=inside if TAIL else None)


@triton.jit
def _copy_block(
    source, target, factors, offset, reciprocal, left, words,
    TARGET: tl.constexpr, SCALED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Copy a block, of which ``left`` elements are there, and which begins ``offset`` elements into a row."""
    if left >= WORDS * 32:
        _copy_part(source, target, factors, offset, reciprocal, left, words, TARGET, SCALED, False, WORDS)
    else:
        _copy_part(source, target, factors, offset, reciprocal, left, words, TARGET, SCALED, True, WORDS)


@triton.jit
def copy_kernel(
    sources, targets, scales, lengths, sizes, blocks, words,
    SOURCE: tl.constexpr, INTEGER: tl.constexpr, TARGET: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Write the kept floats of ``sources`` to ``targets``, and +0.0 for the others; see `zero_kernel`.

    With SCALED, each row of ``lengths[i]`` elements of tensor i is multiplied by its number at the address
    ``scales[i]``; 0 stands for no numbers.
    """
    block = tl.program_id(0)
    owner = tl.load(blocks + 2 * block)
    first = tl.load(blocks + 2 * block + 1).to(tl.int64) * (WORDS * 32)
    address = tl.load(sources + owner)
    if address != 0:
        left = tl.load(sizes + owner) - first
        source = address.to(tl.pointer_type(SOURCE))
        target = tl.load(targets + owner).to(tl.pointer_type(INTEGER))
        if ALIGNED:
            source = tl.multiple_of(source, 16)
            target = tl.multiple_of(target, 16)
        source += first
        target += first
        numbers = tl.load(scales + owner) if SCALED else tl.full([], 0, tl.int64)
        if numbers != 0:
            length = tl.load(lengths + owner)
            row = first // length
            offset = (first - row * length).to(tl.int32)
            factors = numbers.to(tl.pointer_type(tl.float32)) + row
            reciprocal = tl.div_rn(1.0, length.to(tl.float32))
            _copy_block(source, target, factors, offset, reciprocal, left, words, TARGET, SCALED, WORDS)
        else:
            _copy_block(source, target, source, 0, 1.0, left, words, TARGET, False, WORDS)


@register("masks.pack_bits", "triton", devices=("cuda",))
@opaque("masks.pack_bits", fake=lambda keep: keep.new_empty(-(-keep.numel() // 8), dtype=torch.uint8))
def pack_bits(keep: Tensor) -> Tensor:
    """See `sparse_robust_kernels.masks.pack_bits`."""
    numel, keep = keep.numel(), keep.contiguous()
    if keep.data_ptr() % 16:  # it is read as whole words
        keep = keep.clone()
    packed = torch.empty(2 * triton.cdiv(numel, 16), dtype=torch.uint8, device=keep.device)
    if numel:
        with _on(keep.device):
            grid = (triton.cdiv(numel, 16 * HALVES),)
            pack_kernel[grid](keep.view(torch.uint8), packed.view(torch.int16), numel, HALVES=HALVES)
    return packed[: triton.cdiv(numel, 8)]


@register("masks.unpack_bits", "triton", devices=("cuda",))
@opaque("masks.unpack_bits", fake=lambda packed, numel: packed.new_empty(numel, dtype=torch.bool))
def unpack_bits(packed: Tensor, numel: int) -> Tensor:
    """See `sparse_robust_kernels.masks.unpack_bits`."""
    keep = torch.empty(numel, dtype=torch.bool, device=packed.device)
    if numel:
        with _on(packed.device):
            grid = (triton.cdiv(numel, 16 * HALVES),)
            unpack_kernel[grid](_as_words(packed).view(torch.int16), keep.view(torch.uint8), numel, HALVES=HALVES)
    return keep


@register("masks.count_bits", "triton", devices=("cuda",))
@opaque("masks.count_bits", fake=lambda packed: packed.new_empty((), dtype=torch.int64))
def count_bits(packed: Tensor) -> Tensor:
    """See `sparse_robust_kernels.masks.count_bits`."""
    count = torch.zeros((), dtype=torch.int64, device=packed.device)
    if packed.numel():
        words = _as_words(packed)
        with _on(packed.device):
            count_kernel[(triton.cdiv(len(words), COUNTED),)](words, count, len(words), BLOCK=COUNTED)
    return count


@register("masks.zero_", "triton", devices=("cuda",))
def zero_(tensors: Sequence[Tensor | None], masks: MaskTable) -> None:
    """See `sparse_robust_kernels.masks.zero_`: one launch for each width of float, which is one for most models."""
    ready: dict[int, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if tensor is None or not tensor.numel():
            continue
        if masks.in_memory_order(index, tensor):
            ready.setdefault(tensor.element_size(), []).append(index)
        else:
            zero_one_(tensor, masks, index)
    for owners in ready.values():
        _zero([tensors[i].detach() for i in owners], owners, masks.sizes, masks.blocks, masks.words)  # type: ignore[union-attr]


@opaque("masks.zero_", fake=lambda *_: None, mutates=("tensors",))
def _zero(tensors: Sequence[Tensor], owners: Sequence[int], sizes: Tensor, blocks: Tensor, words: Tensor) -> None:
    """Zero tensors of one width, which own these rows of the table."""
    addresses, aligned = _addresses(tensors, owners, sizes)
    with _on(words.device):
        zero_kernel[(len(words),)](
            addresses, sizes, blocks, words,
            INTEGER=_INTEGER[tensors[0].element_size()], ALIGNED=aligned, WORDS=WORDS,
        )  # fmt: skip


@register("masks.masked_copy", "triton", devices=("cuda",))
def masked_copy(
    sources: Sequence[Tensor], masks: MaskTable, targets: Sequence[Tensor], scales: Sequence[Tensor | None]
) -> None:
    """See `sparse_robust_kernels.masks.masked_copy`: one launch for each pair of types."""
    ready: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    sources, targets = [source.detach() for source in sources], [target.detach() for target in targets]
    for index, (source, target, scale) in enumerate(zip(sources, targets, scales, strict=True)):
        if not masks.in_memory_order(index, target) or (scale is not None and not masks.rows_outermost(index)):
            copy_one_(source, target, scale, masks, index)
        elif target.numel():
            if not masks.in_memory_order(index, source):
                sources[index] = torch.empty_like(target, dtype=source.dtype).copy_(source)
            ready.setdefault((source.dtype, target.dtype), []).append(index)
    for owners in ready.values():
        scaled = [i for i in owners if scales[i] is not None]
        _copy(
            [sources[i] for i in owners], [targets[i] for i in owners], owners,
            [scales[i].detach().contiguous() for i in scaled], scaled,  # type: ignore[union-attr]
            masks.lengths, masks.sizes, masks.blocks, masks.words,
        )  # fmt: skip


@opaque("masks.masked_copy", fake=lambda *_: None, mutates=("targets",))
def _copy(
    sources: Sequence[Tensor], targets: Sequence[Tensor], owners: Sequence[int],
    scales: Sequence[Tensor], scaled: Sequence[int],
    lengths: Tensor, sizes: Tensor, blocks: Tensor, words: Tensor,
) -> None:  # fmt: skip
    """Copy tensors of one pair of types, which own these rows of the table; ``scaled`` are the rows with a scale."""
    have, want = sources[0].dtype, targets[0].dtype
    from_, from_aligned = _addresses(sources, owners, sizes)
    to, to_aligned = _addresses(targets, owners, sizes)
    factors = _addresses(scales, scaled, sizes)[0] if scales else from_
    with _on(words.device):
        copy_kernel[(len(words),)](
            from_, to, factors, lengths, sizes, blocks, words,
            SOURCE=_INTEGER[have.itemsize], INTEGER=_INTEGER[want.itemsize],
            TARGET="same" if have == want else _CONVERTED[want],
            SCALED=len(scales) > 0, ALIGNED=from_aligned and to_aligned, WORDS=WORDS,
        )  # fmt: skip


_INTEGER = {2: tl.int16, 4: tl.int32, 8: tl.int64}
_CONVERTED = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def _addresses(tensors: Sequence[Tensor], owners: Sequence[int], sizes: Tensor) -> tuple[Tensor, bool]:
    """Return int64 addresses for a launch, 0 for rows that no tensor owns, and whether all are multiples of 16.

    Gradients that are views of a bucket may start anywhere; they are then read in smaller pieces.
    """
    row = [0] * len(sizes)
    for owner, tensor in zip(owners, tensors, strict=True):
        row[owner] = tensor.data_ptr()
    addresses = _on_device(tuple(row), sizes.device)
    if sizes.is_cuda and torch.cuda.is_current_stream_capturing():
        _captured.append(addresses)
    return addresses, all(address % 16 == 0 for address in row)


_captured: list[Tensor] = []
"""Addresses that a CUDA graph reads in every replay; the cache below may forget them."""


@lru_cache(maxsize=64)
def _on_device(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int64 addresses on a device. A training loop has the same ones in every step, so they travel once.

    Nothing waits for them, except while a graph is captured: it cannot hold such a copy, and torch says so.
    """
    there = torch.tensor(addresses, dtype=torch.int64)
    pinned = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    return (there.pin_memory() if pinned else there).to(device, non_blocking=pinned)


def _as_words(packed: Tensor) -> Tensor:
    """Return flat uint8 as int32, padded with zeros to whole words; a view where that is possible."""
    if packed.numel() % 4 or packed.data_ptr() % 4 or packed.storage_offset() % 4:
        packed = torch.nn.functional.pad(packed, (0, -packed.numel() % 4))
    return packed.contiguous().view(torch.int32)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Launch on this device, whichever is current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
