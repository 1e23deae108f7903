"""Looking through wrappers of a model, to the module whose parameters have the plain names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from sparse_robust.errors import UsageError


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile, DistributedDataParallel, DataParallel or AveragedModel, in any nesting."""
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel, AveragedModel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def find_parameters(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, nn.Parameter]:
    """Return the parameters of these names, in this order.

    Raises:
        UsageError: if one is missing or has another shape; the message lists the first ones.
    """
    parameters = dict(unwrap(model).named_parameters(remove_duplicate=False))
    wrong = []
    for name, shape in shapes.items():
        if name not in parameters:
            wrong.append(f"{name}: expected shape {shape}, the model has no such parameter")
        elif (got := tuple(parameters[name].shape)) != shape:
            wrong.append(f"{name}: expected shape {shape}, the model has {got}")
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UsageError(
            f"these masks belong to another model: {len(wrong)} of {len(shapes)} tensors do not fit. "
            f"{'; '.join(wrong[:5])}{more}. Create the model with the architecture and options the masks were made for."
        )
    return {name: parameters[name] for name in shapes}
