"""Weights that are sharded over processes, made whole on each: for attacks, evaluation and all else but training.

Under FSDP2 and ZeRO-3 every forward pass of the trained module gathers its weights. A training step with PGD-k would
gather them k + 1 times, and ranks that attack different numbers of batches would wait for each other for ever. Here
they are gathered once, and what attacks use is a plain module without the hooks that gather.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from sparse_robust.errors import UsageError
from sparse_robust.masks import unwrap
from sparse_robust.masks.wrappers import is_fsdp

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from sparse_robust.training.recipe import Recipe

_LIBRARIES = ("torch.distributed.", "deepspeed.")


@contextmanager
def unsharded(model: nn.Module) -> Iterator[nn.Module]:
    """Gather the weights of a model once, and give them as a plain module to attack and to evaluate.

    Within the context no pass of that module issues a collective, whatever its number. All processes must enter and
    leave it together. The module is for reading: it shares the buffers of the model, so that batch norms in train mode
    update the model's statistics, and what is written to its weights is lost. It is of no use after the context, and
    the context is not to be nested. A model that is not sharded is given as it is, without its wrapper.

    Args:
        model: sharded by `torch.distributed.fsdp.fully_shard` or by DeepSpeed's ZeRO-3, or whole; wrapped or not.
    """
    model = unwrap(model)
    sharded: list[Any] = [module for module in model.modules() if is_fsdp(module)]
    partitioned = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_tensor")]
    if not sharded and not partitioned:
        yield model
        return
    with ExitStack() as stack:
        for module in sharded:
            module.unshard()
            stack.callback(module.reshard)
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        yield _without_hooks(model, {})


class Mirror:
    """A whole copy, on every process, of a model that is trained in shards.

    Attributes:
        trained: what is trained.
        whole: a plain module of the same structure, to attack, to evaluate and to keep. Its buffers are the trained
            module's own; its weights are those of the last `refresh`.
    """

    def __init__(self, trained: nn.Module, whole: nn.Module) -> None:
        self.trained, self.whole = trained, whole
        modules = dict(unwrap(trained).named_modules())
        for name, module in whole.named_modules():
            module._buffers.update(modules[name]._buffers)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over the present weights: one gathering. Called by every process, after every update."""
        with unsharded(self.trained) as source:
            for mine, new in zip(self.whole.parameters(), source.parameters(), strict=True):
                mine.copy_(new)


def _without_hooks(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """Return a module with the same parameters and buffers, and without the hooks that FSDP2 and DeepSpeed placed."""
    if module in done:
        return done[module]
    kind = type(module).__mro__[type(module)._orig_cls_mro_index] if is_fsdp(module) else type(module)  # type: ignore[attr-defined]
    bare: nn.Module = object.__new__(kind)
    done[module] = bare
    bare.__dict__.update(module.__dict__)
    # Plain dicts: DeepSpeed's own gathers a parameter as it is looked up.
    bare._parameters = dict(module._parameters.items())
    bare._modules = {
        name: None if child is None else _without_hooks(child, done) for name, child in module._modules.items()
    }
    for attribute, hooks in module.__dict__.items():
        if attribute.endswith("_hooks") and isinstance(hooks, dict):
            kept = {key: hook for key, hook in hooks.items() if not _is_theirs(hook)}
            setattr(bare, attribute, type(hooks)(kept))
    return bare


def _is_theirs(hook: Any) -> bool:
    """Whether a hook belongs to a library that shards."""
    for wrapped in ("func", "__wrapped__", "hook"):
        hook = getattr(hook, wrapped, hook)
    return str(getattr(hook, "__module__", "")).startswith(_LIBRARIES)


def shards(accelerator: Accelerator) -> bool:
    """Whether Accelerate was told to use FSDP or DeepSpeed."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, recipe: Recipe
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """Return what ``accelerator.prepare`` makes of a model and its optimizer, with a sharding plugin set up to fit.

    FSDP2 and DeepSpeed keep weights, gradients and sums in fp32 here; lower precision comes from autocast alone, as
    without sharding. Batch norms, which have fp32 statistics, would not run with weights in bf16.

    Raises:
        UsageError: for FSDP1, and for what DeepSpeed's own engine cannot do.
    """
    kind = accelerator.distributed_type
    if kind == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise UsageError("FSDP1 keeps no parameter under its own name: set fsdp_version: 2 in the launch file.")
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if kind == DistributedType.DEEPSPEED:
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        low = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") in (True, "auto")]
        if low or accelerator.mixed_precision != "no":
            raise UsageError(
                "DeepSpeed's bf16 and fp16 modes keep weights in that precision, which batch norms do not run with. "
                "Use mixed_precision no and, for speed, torch_autocast in DeepSpeed's file, as in launch/zero2.json."
            )
        if recipe.accumulate > 1:
            raise UsageError(
                f"recipe.accumulate is {recipe.accumulate}, and DeepSpeed's engine takes a step after every backward "
                "pass: use accumulate 1, or FSDP2."
            )
        config["gradient_clipping"] = recipe.clip_grad or 0.0
        config["train_micro_batch_size_per_gpu"] = -(-recipe.batch_size // accelerator.num_processes)
    prepared: tuple[nn.Module, AcceleratedOptimizer] = accelerator.prepare(model, optimizer)
    return prepared


def require_unperturbed(accelerator: Accelerator, objective: Any) -> None:
    """Refuse objectives that perturb weights in place, which would reach the whole copy alone.

    Raises:
        UsageError: if this is one and weights are sharded.
    """
    if shards(accelerator) and getattr(objective, "perturbation", None) is not None:
        raise UsageError("adversarial weight perturbation does not work on sharded weights: use DDP (one_node.yaml).")
