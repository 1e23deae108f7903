"""Exact selection in plain torch: the meaning of the operations, and the CPU path.

A float is turned into an integer key that sorts the same way, and keys are counted one digit at a time. Everything
runs over chunks, so the memory needed beside the input is that of a few chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import register
from sparse_robust_kernels.masks.reference import pack_bits, unpack_bits

CHUNK = 1 << 20  # elements; a multiple of 8, so that chunks of a packed mask begin at a byte


def keys(values: Tensor, *, magnitude: bool, wide: bool) -> Tensor:
    """Return integers that compare as ``values`` (or their magnitudes) do; -0.0 and +0.0 have the same one.

    The bits of an IEEE 754 float without its sign, read as an integer, grow with its magnitude. With a sign, negative
    floats are turned round. int32 for fp32, fp16 and bf16 (which fp32 holds exactly); int64, ``wide``, for fp64.
    """
    number, integer = (torch.float64, torch.int64) if wide else (torch.float32, torch.int32)
    largest = torch.iinfo(integer).max
    if magnitude:
        return values.to(number).view(integer) & largest
    bits = (values.to(number) + 0.0).view(integer)  # -0.0 + 0.0 is +0.0
    return bits ^ ((bits >> (torch.iinfo(integer).bits - 1)) & largest)


@register("select.histogram", "reference")
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
    """Count the kept keys from ``low`` on by their next ``width`` bits above bit ``shift``: int64 ``[2 ** width]``.

    Bin ``b`` counts the keys in ``low + [b, b + 1) * 2 ** shift``; ``low`` is a multiple of ``2 ** (shift + width)``.
    """
    bins = 1 << width
    counts = torch.zeros(bins + 2, dtype=torch.int64, device=tensors[0].device)
    for _, values, kept in _chunks(tensors, keep):
        digit = (keys(values, magnitude=magnitude, wide=wide) >> shift).sub_(low >> shift)
        if kept is not None:
            digit.bitwise_or_(kept.to(digit.dtype).sub_(1))  # pruned: -1
        counts += torch.bincount(digit.clamp_(-1, bins).add_(1), minlength=bins + 2)  # outside: the first or last bin
    return counts[1:-1]


@register("select.count_nan", "reference")
def count_nan(tensors: Sequence[Tensor], keep: Sequence[Tensor | None]) -> Tensor:
    """Return int64 ``[len(tensors)]``: how many kept values of each tensor are NaN."""
    counts = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for index, values, kept in _chunks(tensors, keep):
        nan = values.isnan()
        counts[index] += (nan if kept is None else nan & kept).sum()
    return counts


@register("select.count_equal", "reference")
def count_equal(
    tensors: Sequence[Tensor], keep: Sequence[Tensor | None], *, key: int, magnitude: bool, wide: bool
) -> Tensor:
    """Return int64 ``[len(tensors)]``: how many kept values of each tensor have this key."""
    counts = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    for index, values, kept in _chunks(tensors, keep):
        equal = keys(values, magnitude=magnitude, wide=wide) == key
        counts[index] += (equal if kept is None else equal & kept).sum()
    return counts


@register("select.remove", "reference")
def remove(
    tensors: Sequence[Tensor],
    keep: Sequence[Tensor | None],
    *,
    key: int,
    ties: Sequence[int] | None,
    magnitude: bool,
    wide: bool,
) -> list[Tensor]:
    """Return packed masks without the keys below ``key`` and without the first ``ties[i]`` of tensor i equal to it.

    ``ties=None`` removes every one that is equal.
    """
    parts: list[list[Tensor]] = [[] for _ in tensors]
    seen = [0] * len(tensors)
    for index, values, kept in _chunks(tensors, keep):
        found = keys(values, magnitude=magnitude, wide=wide)
        if ties is None:
            survives = found > key
        else:
            survives = found >= key
            equal = found == key if kept is None else (found == key) & kept
            place = equal.nonzero().view(-1)
            survives[place[: max(ties[index] - seen[index], 0)]] = False
            seen[index] += place.numel()
        parts[index].append(pack_bits(survives if kept is None else survives & kept))
    empty = torch.empty(0, dtype=torch.uint8, device=tensors[0].device)
    return [torch.cat(part) if part else empty for part in parts]


def _chunks(tensors: Sequence[Tensor], keep: Sequence[Tensor | None]) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield (index of the tensor, flat values, bool mask of those that count) in order."""
    for index, (tensor, bits) in enumerate(zip(tensors, keep, strict=True)):
        flat = tensor.detach().reshape(-1)  # a copy of one tensor at most, when it is not contiguous
        for start in range(0, flat.numel(), CHUNK):
            values = flat[start : start + CHUNK]
            first = start // 8
            kept = None if bits is None else unpack_bits(bits[first : first + CHUNK // 8], values.numel())
            yield index, values, kept
