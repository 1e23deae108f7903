"""Where DeepSpeed's ZeRO optimizers keep the fp32 weights that they step: flat partitions, of runs of many weights.

The weights of the model are copies of these (in bf16, or in fp32 again). DeepSpeed is not imported here: what it hangs
on its parameters says where their runs are, ``_hp_mapping`` under ZeRO-1, ZeRO-2 and its bf16 optimizer,
``_z3_optimizer`` under ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_robust.errors import UsageError
from sparse_robust.masks.shards import shard_of


class Run(NamedTuple):
    """``length`` flattened elements of a weight from ``start`` on, which lie in another tensor from ``at`` on."""

    name: str
    start: int
    at: int
    length: int


def is_zero(parameter: Tensor) -> bool:
    """Whether a ZeRO optimizer steps a copy of this parameter."""
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_tensor")


def zero_partitions(weights: Mapping[str, nn.Parameter], optimizer: Optimizer) -> list[tuple[Tensor, tuple[Run, ...]]]:
    """Return the flat partitions on this process that hold parts of these weights, and the runs in each.

    Args:
        weights: parameters of a model that ``deepspeed.initialize`` made ready for training.
        optimizer: the torch optimizer inside the ZeRO optimizer.

    Raises:
        UsageError: if it is not this one that trains these weights.
    """
    found: dict[int, tuple[Tensor, list[Run]]] = {}
    for name, weight in weights.items():
        if not weight.requires_grad:
            continue
        place = (_zero3_place if hasattr(weight, "ds_tensor") else _zero_place)(name, weight, optimizer)
        if place is not None:
            tensor, run = place
            found.setdefault(id(tensor), (tensor, []))[1].append(run)
    return [(tensor, tuple(runs)) for tensor, runs in found.values()]


def _zero_place(name: str, weight: Any, optimizer: Optimizer) -> tuple[Tensor, Run] | None:
    mapping = weight._hp_mapping
    if mapping is None:  # all of it is stepped elsewhere
        return None
    inside, address = mapping.hp_fragment_address, mapping.lp_fragment_address
    for tensor in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if tensor.data_ptr() + inside.start * tensor.element_size() == mapping.hp_fragment.data_ptr():
            return tensor, Run(name, address.start, inside.start, inside.numel)
    raise _foreign(name)


def _zero3_place(name: str, weight: Any, optimizer: Optimizer) -> tuple[Tensor, Run]:
    zero = getattr(weight, "_z3_optimizer", None)
    if zero is None or zero.optimizer is not optimizer:
        raise _foreign(name)
    index, at, _ = zero.grad_position[zero.get_param_id(weight)]
    shard = shard_of(weight)
    return zero.fp32_partitioned_groups_flat[index], Run(name, shard.start, at, shard.tensor.numel())


def _foreign(name: str) -> UsageError:
    return UsageError(
        f"the optimizer does not hold the fp32 copy of {name}. Pass the one that deepspeed.initialize returned with "
        "this model, or the one that it was given."
    )
