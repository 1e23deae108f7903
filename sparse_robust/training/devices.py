"""How a run computes: precision, compiler, batch norm over ranks, deterministic algorithms."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import convert_sync_batchnorm
from timm.utils import distribute_bn
from torch import Tensor, distributed, nn

from sparse_robust._env import set_cublas_workspace
from sparse_robust.attacks.context import attack_context
from sparse_robust.errors import UsageError
from sparse_robust.seeding import seeded

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sparse_robust.training.recipe import Recipe

DIST_BN: dict[str, str] = {
    "broadcast": "every rank normalises by its own images; the running statistics of rank 0 are kept",
    "reduce": "every rank normalises by its own images; running statistics are averaged at the end of an epoch",
    "sync": "all ranks normalise by all images of the step (SyncBatchNorm; on GPUs)",
}


def compiler(accelerator: Accelerator) -> str | None:
    """Return the backend of torch.compile that Accelerate was told to use, or None."""
    backend = str(getattr(accelerator.state.dynamo_plugin.backend, "value", "NO"))
    return None if backend == "NO" else backend.lower()


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Give all 4-d parameters a memory format, in place; their values, names and identities stay."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            # Of one channel `contiguous` would keep the strides, by which torch picks the format of the output.
            parameter.data = torch.empty_like(parameter.data, memory_format=memory_format).copy_(parameter.data)


def train_channels_last(model: nn.Module, image: Tensor) -> bool:
    """Lay a network's 4-d parameters out with channels last and return True, if it still takes an image [1, C, H, W].

    A network that reads memory in the order of another layout (``x.view(len(x), -1)``) is left as it was, with a
    warning.
    """
    lay_out(model, torch.channels_last)
    try:
        with seeded("layout"), torch.no_grad(), attack_context(model):
            model(image)
    except RuntimeError as error:
        lay_out(model, torch.contiguous_format)
        warnings.warn(
            f"the network is trained without recipe.channels_last, which it does not take: {error}", stacklevel=2
        )
        return False
    return True


def synchronise_batch_norm(model: nn.Module, accelerator: Accelerator) -> dict[str, nn.Module]:
    """Replace batch norms by SyncBatchNorm, with the same parameters and buffers; return the originals by name.

    Raises:
        UsageError: on other devices than GPUs, for which torch has none.
    """
    if accelerator.num_processes == 1:
        return {}
    if accelerator.device.type != "cuda":
        raise UsageError(
            f"recipe.dist_bn sync needs GPUs: torch's SyncBatchNorm does not run on {accelerator.device.type}. Use "
            "broadcast or reduce."
        )
    before = dict(model.named_modules())
    convert_sync_batchnorm(model)
    after = dict(model.named_modules())
    return {name: module for name, module in before.items() if after.get(name) is not module}


def put_back(model: nn.Module, originals: dict[str, nn.Module]) -> None:
    """Undo `synchronise_batch_norm`: parameters and buffers are shared, so nothing is lost."""
    for name, module in originals.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


def share_buffers(modules: list[nn.Module], how: str) -> None:
    """Give all ranks the same running statistics and other buffers.

    Args:
        how: a key of `DIST_BN`.
    """
    for module in modules:
        if how == "reduce":
            distribute_bn(module, distributed.get_world_size(), reduce=True)
        for buffer in module.buffers():
            distributed.broadcast(buffer, src=0)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms alone for the length of a block, where that is wanted.

    An operation that has none raises a RuntimeError. What was set before comes back.
    """
    if not wanted:
        yield
        return
    set_cublas_workspace()
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark


def describe(accelerator: Accelerator, recipe: Recipe, channels_last: bool) -> dict[str, Any]:
    """Return by what means a run is computed, as JSON."""
    precision = accelerator.mixed_precision
    return {
        "device": accelerator.device.type,
        "ranks": accelerator.num_processes,
        "precision": "fp32" if precision in ("no", None) else precision,
        "channels_last": channels_last,
        "compile": compiler(accelerator),
        "dist_bn": recipe.dist_bn if accelerator.num_processes > 1 else None,
        "deterministic": recipe.deterministic,
    }
