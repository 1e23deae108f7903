"""The part of a weight that this process holds, under FSDP2 or ZeRO-3, and sums over the processes that hold the rest.

Both cut a weight into runs of its flattened elements, one a process, in the order of their ranks: FSDP2 by rows of the
first dimension (a DTensor), ZeRO-3 by elements (``ds_tensor``). Runs may have any length; small weights leave some
processes with none.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_robust.errors import UsageError
from sparse_robust_kernels.masks import pack_bits, unpack_bits
from sparse_robust_kernels.select import Reduce


@dataclass(frozen=True)
class Shard:
    """A run of a weight's flattened elements.

    Attributes:
        tensor: the elements that are here, a plain tensor of any shape that shares the weight's memory.
        start: the place of the first of them in the flattened weight.
        shape: the shape of the whole weight.
        group: the processes that hold the other parts; None where the whole weight is here.
    """

    tensor: Tensor
    start: int
    shape: tuple[int, ...]
    group: Any = None


def shard_of(tensor: Tensor) -> Shard:
    """Return the part of a weight, gradient or optimizer slot that is on this process; of a plain tensor all of it.

    Raises:
        UsageError: for a DTensor that is cut in any other way than by rows of its first dimension, over one dimension
            of its mesh, or a ZeRO-3 weight that is on a disk.
    """
    if hasattr(tensor, "ds_tensor"):
        return _zero3_shard(tensor)
    if is_dtensor(tensor):
        return _fsdp_shard(tensor)
    return Shard(tensor.detach(), 0, tuple(tensor.shape))


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole weight, wherever its parts are."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def is_dtensor(tensor: Tensor) -> bool:
    """Whether this is a DTensor. Where nobody imported that class, which takes a second, nothing is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def plain(tensor: Tensor) -> Tensor:
    """Return what of a tensor is on this process, as a plain tensor in the same memory: the same object every time."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local


def gather_bits(shards: Sequence[Shard], packed: Sequence[Tensor], reduce: Reduce) -> list[Tensor]:
    """Return the packed masks of whole weights, from those of every process's shards: an eighth of a byte a weight.

    Every process writes its bits into its place among zeros, and the sum of all is their union.
    """
    pieces, sizes = [], []
    for shard, bits in zip(shards, packed, strict=True):
        whole = torch.zeros(prod(shard.shape), dtype=torch.bool, device=bits.device)
        count = shard.tensor.numel()
        whole[shard.start : shard.start + count] = unpack_bits(bits, count)
        pieces.append(pack_bits(whole))
        sizes.append(len(pieces[-1]))
    return list(reduce(torch.cat(pieces)).split(sizes))


def common_group(shards: Iterable[Shard]) -> Any:
    """Return the processes that the shards are spread over; None if all of them are whole.

    Raises:
        UsageError: if they are spread over different ones.
    """
    groups = {tuple(dist.get_process_group_ranks(s.group)): s.group for s in shards if s.group is not None}
    if len(groups) > 1:
        raise UsageError(f"weights are sharded over different processes, {sorted(groups)}; shard all of them alike.")
    return next(iter(groups.values()), None)


def summing(group: Any) -> Reduce:
    """Return the function that sums a tensor of integers over a group; tensors come back on their own device."""

    def reduce(counts: Tensor) -> Tensor:
        backend = str(dist.get_backend_config(group))
        there = counts if f"{counts.device.type}:" in backend else counts.to(_accelerator())
        dist.all_reduce(there, group=group)
        return there.to(counts.device)

    return reduce


def _accelerator() -> torch.device:
    found = torch.accelerator.current_accelerator()
    if found is None:
        raise UsageError("the process group has no backend for CPU tensors, and there is no accelerator.")
    return torch.device(found.type, torch.accelerator.current_device_index())


def _fsdp_shard(tensor: Any) -> Shard:
    shape = tuple(tensor.shape)
    sharded = [axis for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    local = plain(tensor)
    if not sharded:
        return Shard(local, 0, shape)
    axis, mesh = sharded[0], tensor.device_mesh
    rows = -(-shape[0] // mesh.size(axis)) if shape else 0
    first = min(rows * mesh.get_local_rank(axis), shape[0] if shape else 0)
    here = min(rows, shape[0] - first) if shape else 0
    # The exact class: a strided shard, of tensor parallelism within FSDP, is no run of rows.
    plain_shard = type(tensor.placements[axis]).__name__ == "Shard" and tensor.placements[axis].dim == 0
    if len(sharded) > 1 or not plain_shard or local.shape != (here, *shape[1:]):
        raise UsageError(
            f"a weight of shape {shape} is placed as {tensor.placements}, with {tuple(local.shape)} of it here. Masks "
            "work on weights that are sharded by rows of the first dimension over one dimension of the mesh, as "
            "fully_shard does without shard_placement_fn."
        )
    return Shard(local, first * prod(shape[1:]), shape, mesh.get_group(axis))


def _zero3_shard(tensor: Any) -> Shard:
    part, shape = tensor.ds_tensor, tuple(tensor.ds_shape)
    if part.status.name != "AVAILABLE":
        raise UsageError("a ZeRO-3 weight is offloaded to a disk; masks need it in memory: offload_param cpu or none.")
    size = part.ds_numel  # of every process's partition, the last ones padded
    start = min(size * dist.get_rank(tensor.ds_process_group), prod(shape))
    here = min(size, prod(shape) - start)
    return Shard(part.detach()[:here], start, shape, tensor.ds_process_group)
