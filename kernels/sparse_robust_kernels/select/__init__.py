"""The exact k-th smallest value over many tensors, and the mask that removes the smallest ones.

The rank is found by counting the values' bits, one digit a sweep (a radix select), never by sorting a copy. Only counts
are shared between processes, and integer sums do not depend on their order: on any number of shards the answer is the
same to the last bit. Values may be anything floating; fp16 and bf16 are read as fp32, which holds them exactly, and as
soon as one tensor is fp64 all are read as fp64.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import backends, resolve
from sparse_robust_kernels.select import reference as _reference

__all__ = ["Kth", "Reduce", "kth", "remove_lowest"]

Reduce = Callable[[Tensor], Tensor]
"""Sums an int64 tensor over all processes (an all-reduce) and returns the sum."""

# Bits a sweep, from the highest: {(wide, magnitude): widths}. A magnitude has no sign bit.
_WIDTHS = {
    (False, True): (11, 10, 10),
    (False, False): (11, 11, 10),
    (True, True): (11, 11, 11, 10, 10, 10),
    (True, False): (11, 11, 11, 11, 10, 10),
}
_TRITON_WIDTHS = {(False, True): (8, 8, 8, 7), (False, False): (8, 8, 8, 8)}  # a warp counts in its registers


class Kth(NamedTuple):
    """The k-th smallest value: how many are strictly below it, and how many are equal to it (itself included)."""

    value: float
    below: int
    equal: int


def kth(
    tensors: Sequence[Tensor],
    k: int,
    keep: Sequence[Tensor | None] | None = None,
    *,
    magnitude: bool = True,
    names: Sequence[str] | None = None,
    reduce: Reduce | None = None,
    backend: str = "auto",
) -> Kth:
    """Return the exact k-th smallest kept magnitude (or value) over all tensors together.

    Args:
        tensors: floating-point tensors of any shapes on one device; with ``reduce``, this process's shards.
        k: rank, from 1 to the number of kept values on all processes.
        keep: packed masks (`masks.pack_bits` of the flattened tensors), None where everything counts.
        magnitude: rank by absolute value; otherwise by value.
        names: names of the tensors, for errors.
        reduce: sums the counts over processes. Every process must call with as many tensors and the same ``k``.

    Raises:
        ValueError: if ``k`` is out of range, or a kept value is NaN (the message names the tensor).
    """
    return _selection(tensors, keep, names, magnitude, reduce, backend).kth(k)


def remove_lowest(
    tensors: Sequence[Tensor],
    count: int,
    keep: Sequence[Tensor | None] | None = None,
    *,
    magnitude: bool = True,
    names: Sequence[str] | None = None,
    reduce: Reduce | None = None,
    rank: int = 0,
    world: int = 1,
    backend: str = "auto",
) -> list[Tensor]:
    """Return packed masks of what is kept after removing exactly ``count`` of the kept values, the smallest first.

    Ties are broken by (order of the tensors, flat index), ascending.

    Args:
        tensors, keep, magnitude, names, reduce: as for `kth`.
        count: how many to remove, from 0 to the number of kept values on all processes.
        rank, world: which shard this process holds, of how many. Shard r of every tensor lies directly before shard
            r + 1 in the flattened whole; shards may have any size, also none.

    Returns:
        uint8 ``[ceil(numel / 8)]`` for each tensor, on its device.

    Raises:
        ValueError: as `kth`; where nothing is removed, nothing is ranked and NaN is not looked for.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to world - 1 = {world - 1}, got {rank}")
    selection = _selection(tensors, keep, names, magnitude, reduce, backend)
    ties: list[int] | None = None
    if count == 0:
        key, ties = selection.lowest_key, [0] * len(tensors)
    else:
        found = selection.kth(count)
        key = selection.key(found.value)
        if found.below + found.equal > count:  # some of those equal to it stay
            ties = selection.share(key, count - found.below, rank, world)
    masks: list[Tensor] = selection.run("remove", key=key, ties=ties, **selection.order)
    return masks


@dataclass(frozen=True)
class _Selection:
    """What the sweeps of one selection have in common."""

    tensors: Sequence[Tensor]
    keep: Sequence[Tensor | None]
    names: Sequence[str]
    magnitude: bool
    wide: bool
    reduce: Reduce
    backend: str

    @property
    def order(self) -> dict[str, bool]:
        return {"magnitude": self.magnitude, "wide": self.wide}

    @property
    def lowest_key(self) -> int:
        return 0 if self.magnitude else torch.iinfo(torch.int64 if self.wide else torch.int32).min

    def run(self, op: str, **arguments: Any) -> Any:
        unfit = "float64 values" if self.wide else ""
        function = resolve(f"select.{op}", self.backend, self.tensors[0].device, unfit=unfit)
        return function(self.tensors, self.keep, **arguments)

    def kth(self, k: int) -> Kth:
        widths = (_TRITON_WIDTHS if self.backend == "triton" and not self.wide else _WIDTHS)[self.wide, self.magnitude]
        low, shift = self.lowest_key, sum(widths)
        below = equal = 0
        for sweep, width in enumerate(widths):
            shift -= width
            counts = self.reduce(self.run("histogram", low=low, shift=shift, width=width, **self.order)).cpu()
            if sweep == 0:
                self._refuse_nan(counts, shift)
                total = int(counts.sum())
                if not 1 <= k <= total:
                    raise ValueError(f"k must be from 1 to {total} (the number of kept values), got {k}")
            running = counts.cumsum(0)
            digit = int(torch.searchsorted(running, k - below))
            equal = int(counts[digit])
            below += int(running[digit]) - equal
            low += digit << shift
        return Kth(self.value(low), below, equal)

    def share(self, key: int, take: int, rank: int, world: int) -> list[int]:
        """Return how many of its ties each tensor here removes, when the first ``take`` of all shards are removed."""
        equal = self.run("count_equal", key=key, **self.order)
        table = torch.zeros(len(equal), world, dtype=torch.int64, device=equal.device)
        table[:, rank] = equal
        before = self.reduce(table).flatten().cumsum(0).view(len(equal), world)[:, rank] - equal
        shares: list[int] = (take - before).clamp(min=0).minimum(equal).tolist()
        return shares

    def key(self, value: float) -> int:
        return int(_reference.keys(torch.tensor([value], dtype=torch.float64), **self.order))

    def value(self, key: int) -> float:
        """Return the value that has this key."""
        integer, number, largest = ("<q", "<d", (1 << 63) - 1) if self.wide else ("<i", "<f", (1 << 31) - 1)
        value: float = struct.unpack(number, struct.pack(integer, key if key >= 0 else key ^ largest))[0]
        return value

    def _refuse_nan(self, counts: Tensor, shift: int) -> None:
        """Raise if a kept value is NaN. NaN sorts beyond infinity, so it is sought only if such a bin is in use."""
        ends = [float("inf")] if self.magnitude else [-float("inf"), float("inf")]
        bins = [(self.key(end) - self.lowest_key) >> shift for end in ends]
        beyond = int(counts[bins[-1] :].sum()) + (0 if self.magnitude else int(counts[: bins[0] + 1].sum()))
        if beyond == 0:
            return
        found = self.reduce(self.run("count_nan")).tolist()
        bad = [f"{name} ({n} values)" for name, n in zip(self.names, found, strict=True) if n]
        if bad:
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            raise ValueError(f"NaN has no rank, and there is NaN in {', '.join(bad[:5])}{more}")


def _selection(
    tensors: Sequence[Tensor],
    keep: Sequence[Tensor | None] | None,
    names: Sequence[str] | None,
    magnitude: bool,
    reduce: Reduce | None,
    backend: str,
) -> _Selection:
    """Check the arguments once."""
    if not tensors:
        raise ValueError("selection takes at least one tensor, got none")
    keep = [None] * len(tensors) if keep is None else keep
    names = [f"tensor {index}" for index in range(len(tensors))] if names is None else names
    if not len(keep) == len(names) == len(tensors):
        raise ValueError(f"expected {len(tensors)} masks and names, got {len(keep)} and {len(names)}")
    for name, tensor, bits in zip(names, tensors, keep, strict=True):
        device = tensors[0].device
        if not tensor.is_floating_point() or tensor.device != device:
            raise ValueError(f"{name}: expected a float tensor on {device}, got {tensor.dtype} on {tensor.device}")
        size = (-(-tensor.numel() // 8),)
        if bits is not None and (bits.dtype != torch.uint8 or bits.shape != size or bits.device != device):
            got = f"{bits.dtype} {tuple(bits.shape)} on {bits.device}"
            raise ValueError(f"{name}: expected a packed mask uint8 {size} on {device}, got {got}")
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    if backend == "auto":
        backend = "reference" if wide else backends("select.histogram", tensors[0].device)[0]
    return _Selection(tensors, keep, names, magnitude, wide, reduce or _alone, backend)


def _alone(counts: Tensor) -> Tensor:
    return counts
