"""Exact global selection: the k-th smallest of many tensors, and the cut that removes exactly so many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from sparse_robust.errors import UsageError
from sparse_robust.masks.mask_set import Masks
from sparse_robust_kernels import select as kernel
from sparse_robust_kernels.select import Kth, Reduce


def select_kth(
    tensors: Mapping[str, Tensor] | Sequence[Tensor],
    k: int,
    keep: Masks | Mapping[str, Tensor] | Sequence[Tensor] | None = None,
    *,
    magnitude: bool = True,
    reduce: Reduce | None = None,
) -> Kth:
    """Return the exact k-th smallest magnitude over many tensors or shards, without sorting or copying them.

    Args:
        tensors: floating-point tensors of any shapes, by name or in order, on one device.
        k: rank among the kept values, from 1 (the smallest) to their number.
        keep: `Masks`, or bool tensors like ``tensors``; what is False there has no rank.
        magnitude: rank by absolute value; otherwise by value.
        reduce: sums int64 counts over processes, when ``tensors`` are this process's shards.

    Returns:
        ``value``, and how many kept values lie ``below`` it and are ``equal`` to it.

    Raises:
        UsageError: if ``k`` is out of range, a kept value is NaN, or ``keep`` does not fit.
    """
    named = tensors if isinstance(tensors, Mapping) else {f"tensor {i}": t for i, t in enumerate(tensors)}
    packed: list[Tensor | None] | None = None
    if isinstance(keep, Masks):
        packed = _packed_like(named, keep)
    elif keep is not None:
        flags = keep if isinstance(keep, Mapping) else dict(zip(named, keep, strict=True))
        packed = _packed_like(named, Masks.from_bools(flags))
    try:
        return kernel.kth(list(named.values()), k, packed, magnitude=magnitude, names=list(named), reduce=reduce)
    except ValueError as error:
        raise UsageError(str(error)) from error


def cut(
    scores: Mapping[str, Tensor],
    count: int,
    keep: Masks | None = None,
    *,
    magnitude: bool = False,
    reduce: Reduce | None = None,
    rank: int = 0,
    world: int = 1,
) -> Masks:
    """Remove exactly the ``count`` lowest-scored kept weights over all tensors together.

    Ties are broken by (layer order, flat index), ascending: of equal scores the first in the order of ``scores`` goes
    first. The mask is the same on every device, in every run and for every number of shards.

    Args:
        scores: a floating-point score a weight, by name; higher is kept.
        count: how many to remove, from 0 to the number of kept weights.
        keep: what is still kept; None keeps all.
        magnitude: order by the absolute value of the scores, which spares a copy of them.
        reduce, rank, world: for sharded scores, see `sparse_robust_kernels.select.remove_lowest`; the masks returned
            are then those of this shard.

    Raises:
        UsageError: if ``count`` is out of range, a kept score is NaN (naming the tensor), or ``keep`` does not fit.
    """
    named = {name: score.detach() for name, score in scores.items()}
    packed = None if keep is None else _packed_like(named, keep)
    if world == 1:
        alive = keep.count() if keep is not None else sum(score.numel() for score in named.values())
        if not 0 <= count <= alive:
            raise UsageError(f"cannot remove {count} weights: expected from 0 to {alive}, the number of kept ones.")
    try:
        kept = kernel.remove_lowest(
            list(named.values()),
            count,
            packed,
            magnitude=magnitude,
            names=list(named),
            reduce=reduce,
            rank=rank,
            world=world,
        )
    except ValueError as error:
        raise UsageError(f"cannot select by these scores: {error}") from error
    return Masks.from_packed(dict(zip(named, kept, strict=True)), {n: tuple(s.shape) for n, s in named.items()})


def _packed_like(tensors: Mapping[str, Tensor], keep: Masks) -> list[Tensor | None]:
    """The packed masks in the order and on the devices of the tensors."""
    shapes = keep.shapes()
    for name in (*tensors, *shapes):
        tensor = tuple(tensors[name].shape) if name in tensors else "absent"
        mask = shapes.get(name, "absent")
        if tensor != mask:
            raise UsageError(f"the masks do not fit the tensors: {name} is {tensor}, its mask {mask}.")
    packed = keep.tensors()
    return [packed[name].to(tensor.device) for name, tensor in tensors.items()]
