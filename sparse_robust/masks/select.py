"""Exact global selection: the k-th smallest of many tensors, and the cut that removes exactly so many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch.distributed as dist
from torch import Tensor

from sparse_robust.errors import UsageError
from sparse_robust.masks.mask_set import Masks
from sparse_robust.masks.shards import Shard, common_group, gather_bits, shard_of, summing
from sparse_robust_kernels import select as kernel
from sparse_robust_kernels.masks import pack_bits
from sparse_robust_kernels.select import Kth


def select_kth(
    tensors: Mapping[str, Tensor] | Sequence[Tensor],
    k: int,
    keep: Masks | Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    *,
    magnitude: bool = True,
) -> Kth:
    """Return the exact k-th smallest magnitude over many tensors or shards, without sorting or copying them.

    Args:
        tensors: floating-point tensors of any shapes, by name or in order, on one device. Weights that FSDP2 or ZeRO-3
            has sharded are taken as the whole that they are parts of: every process must call, and gets the answer.
        k: rank among the kept values, from 1 (the smallest) to their number.
        keep: `Masks`, or bool tensors like ``tensors`` (whole ones); what is False there has no rank.
        magnitude: rank by absolute value; otherwise by value.

    Returns:
        ``value``, and how many kept values lie ``below`` it and are ``equal`` to it.

    Raises:
        UsageError: if ``k`` is out of range, a kept value is NaN, or ``keep`` does not fit.
    """
    named = tensors if isinstance(tensors, Mapping) else {f"tensor {i}": t for i, t in enumerate(tensors)}
    if keep is not None and not isinstance(keep, Masks):
        keep = Masks.from_bools(keep if isinstance(keep, Mapping) else dict(zip(named, keep, strict=True)))
    values = _Values(named, keep)
    try:
        return kernel.kth(values.here, k, values.packed, magnitude=magnitude, names=list(named), reduce=values.reduce)
    except ValueError as error:
        raise UsageError(str(error)) from error


def cut(scores: Mapping[str, Tensor], count: int, keep: Masks | None = None, *, magnitude: bool = False) -> Masks:
    """Remove exactly the ``count`` lowest-scored kept weights over all tensors together.

    Ties are broken by (layer order, flat index), ascending: of equal scores the first in the order of ``scores`` goes
    first. The mask is the same on every device, in every run and for every number of shards.

    Where scores are sharded (FSDP2, ZeRO-3) every process must call. They add up counts of the scores' bits, a few
    dozen kilobytes, and then the finished masks at 1 bit a weight; scores and weights stay where they are.

    Args:
        scores: a floating-point score a weight, by name; higher is kept.
        count: how many to remove, from 0 to the number of kept weights.
        keep: what is still kept; None keeps all.
        magnitude: order by the absolute value of the scores, which spares a copy of them.

    Returns:
        The masks of the whole weights, on every process.

    Raises:
        UsageError: if ``count`` is out of range, a kept score is NaN (naming the tensor), or ``keep`` does not fit.
    """
    values = _Values(scores, keep)
    alive = keep.count() if keep is not None else sum(prod(shard.shape) for shard in values.shards)
    if not 0 <= count <= alive:
        raise UsageError(f"cannot remove {count} weights: expected from 0 to {alive}, the number of kept ones.")
    try:
        kept = kernel.remove_lowest(
            values.here, count, values.packed, magnitude=magnitude, names=list(scores),
            reduce=values.reduce, rank=values.rank, world=values.world,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(f"cannot select by these scores: {error}") from error
    if values.reduce is not None:
        kept = gather_bits(values.shards, kept, values.reduce)
    shapes = {name: shard.shape for name, shard in zip(scores, values.shards, strict=True)}
    return Masks.from_packed(dict(zip(scores, kept, strict=True)), shapes)


class _Values:
    """What of the values is on this process, and how processes add up their counts; alone they need not."""

    def __init__(self, tensors: Mapping[str, Tensor], keep: Masks | None) -> None:
        self.shards = [shard_of(tensor) for tensor in tensors.values()]
        group = common_group(self.shards)
        self.rank, self.world, self.reduce = 0, 1, None
        if group is not None:
            self.rank, self.world, self.reduce = dist.get_rank(group), dist.get_world_size(group), summing(group)
            self.shards = [self._once(shard) for shard in self.shards]
        self.here = [shard.tensor for shard in self.shards]
        self.packed = None if keep is None else self._packed(list(tensors), keep)

    def _once(self, shard: Shard) -> Shard:
        """A tensor that every process has whole, among sharded ones, is the first process's part alone."""
        if shard.group is not None:
            return shard
        flat = shard.tensor.reshape(-1)
        count = len(flat) if self.rank == 0 else 0
        return Shard(flat[:count], len(flat) - count, shard.shape)

    def _packed(self, names: Sequence[str], keep: Masks) -> list[Tensor | None]:
        shapes, packed = keep.shapes(), keep.tensors()
        mine = dict(zip(names, self.shards, strict=True))
        for name in (*mine, *shapes):
            tensor, mask = mine[name].shape if name in mine else "absent", shapes.get(name, "absent")
            if tensor != mask:
                raise UsageError(f"the masks do not fit the tensors: {name} is {tensor}, its mask {mask}.")
        return [
            packed[name].to(shard.tensor.device)
            if shard.tensor.numel() == prod(shard.shape)
            else pack_bits(keep.on_shard(name, shard).reshape(-1))
            for name, shard in mine.items()
        ]
