"""Looking through wrappers of a model, to the module whose parameters have the plain names."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sparse_robust.errors import UsageError
from sparse_robust.masks.shards import Shard, shard_of, whole_shape


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DistributedDataParallel, DataParallel, AveragedModel or a DeepSpeed
    engine, in any nesting. FSDP2 does not wrap.

    Raises:
        UsageError: for FSDP1, which renames and flattens parameters.
    """
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel)) or is_deepspeed(model):
            wrapped: nn.Module = model.module  # type: ignore[assignment]
            model = wrapped
        elif _is("torch.distributed.fsdp", "FullyShardedDataParallel", model):
            raise UsageError(
                "this model is wrapped in FSDP1, which keeps no parameter under its own name. Use FSDP2: "
                "torch.distributed.fsdp.fully_shard(model), or fsdp_version: 2 in the configuration of Accelerate."
            )
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def reshard(model: nn.Module) -> nn.Module:
    """Drop the whole weights that FSDP2 still holds, as after an evaluation: what is written to them would be lost."""
    for module in model.modules():
        if is_fsdp(module):
            module.reshard()  # type: ignore[operator]
    return model


def is_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` (FSDP2) was applied to this very module."""
    return _is("torch.distributed.fsdp", "FSDPModule", module)


def is_deepspeed(model: nn.Module) -> bool:
    """Whether this is the engine that ``deepspeed.initialize`` returns."""
    return _is("deepspeed", "DeepSpeedEngine", model)


def _is(module: str, name: str, model: nn.Module) -> bool:
    """Whether a model is of a class of a library, which is not imported for the question."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(model, kind)


def held_parts(weight: nn.Parameter) -> list[Shard]:
    """Return all that this process holds of a weight: its part and, while ZeRO-3 has it gathered, the whole too."""
    parts = [shard_of(weight)]
    if hasattr(weight, "ds_tensor") and weight.numel():
        parts.append(Shard(weight.detach(), 0, whole_shape(weight)))
    return parts


def find_parameters(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    """Return the parameters of these names, in this order.

    Raises:
        UsageError: if one is missing or has another shape; the message lists the first ones.
    """
    parameters = dict(reshard(unwrap(model)).named_parameters(remove_duplicate=False))
    wrong = []
    for name, shape in shapes.items():
        if name not in parameters:
            wrong.append(f"{name}: expected shape {shape}, the model has no such parameter")
        elif (got := whole_shape(parameters[name])) != shape:
            wrong.append(f"{name}: expected shape {shape}, the model has {got}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UsageError(
            f"these masks belong to another model: {len(wrong)} of {len(shapes)} tensors do not fit. "
            f"{'; '.join(wrong[:5])}{more}. Create the model with the architecture and options the masks were made for."
        )
    return {name: parameters[name] for name in shapes}
