"""A training run under Accelerate's FSDP2 and DeepSpeed plugins, beside one under DDP (see test_shard_trainer.py).

Accelerate switches to these plugins on GPUs alone. On CPU processes they are put in place by hand; what they do to the
model and its optimizer, and all that the trainer does with them, is then the code that runs on GPUs.
"""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparse_robust.data import Data, DataSpec, load_data
from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks
from sparse_robust.models import create_model
from sparse_robust.pruning import prune
from sparse_robust.training import Recipe, RunOptions, Trainer
from tests.distributed.shard_ranks import Checks, same_everywhere

check = Checks()
KINDS = sys.argv[2:]  # of fsdp2, zero2, zero3


def accelerator(kind: str) -> Accelerator:
    """A new one for this kind of parallelism, whatever there was before."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    made = Accelerator(cpu=True)
    if kind == "fsdp2":
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=300, cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )  # fmt: skip
        PartialState._shared_state["distributed_type"] = made.state.distributed_type = DistributedType.FSDP
        made.state.fsdp_plugin = plugin
    elif kind.startswith("zero"):
        import deepspeed  # noqa: F401
        from accelerate.utils import DeepSpeedPlugin

        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # see shard_zero_checks.py
        DeepSpeedPlugin.set_deepspeed_weakref = lambda self: None  # it tells transformers, which has no part here
        config = {"zero_optimization": {"stage": int(kind[-1])}, "train_micro_batch_size_per_gpu": "auto"}
        plugin = DeepSpeedPlugin(hf_ds_config=config)
        PartialState._shared_state["distributed_type"] = made.state.distributed_type = DistributedType.DEEPSPEED
        made.deepspeed_engine_wrapped = None
        made.state.deepspeed_plugins = {"default": plugin}
        plugin.select(_from_accelerator_state=True)
    return made


@cache
def digits() -> Data:
    return load_data(DataSpec(name="digits", resize=28, fraction=0.1, validation=60))


def network(data: Data) -> nn.Module:
    tiny = {"channels": (4, 6, 8, 10), "stem_width": 4}
    return create_model("resnet10t", num_classes=10, in_chans=1, mean=data.mean, std=data.std, seed=0, **tiny)


def run(
    kind: str, data: Data, masks: Masks | None, folder: Path | None = None, stop: int | None = None, **more: Any
) -> Any:
    recipe = Recipe(
        **{"regime": "adversarial", "steps": 2, "eps": "0.1", "epochs": 2, "batch_size": 31, "lr": 0.05,
           "momentum": 0.9, "weight_decay": 5e-4, "clip_grad": 0.5, "ema_decay": 0.5, "validation_steps": 1,
           "dist_bn": "reduce", "channels_last": False, **more}  # as sharded weights lie
    )  # fmt: skip
    model = network(data)
    options = RunOptions(folder=folder, checkpoint_steps=3)
    trainer = Trainer(model, data, recipe, seed=0, masks=masks, accelerator=accelerator(kind), options=options)
    if stop is not None:
        interrupt(trainer, stop)
    try:
        result = trainer.fit()
    except KeyboardInterrupt:
        return None
    return model, trainer, result


@cache
def finished(kind: str, regime: str = "adversarial") -> Any:
    """A whole run of each kind, of which several checks ask something."""
    return run(kind, digits(), sparse(), regime=regime)


@cache
def sparse() -> Masks:
    return prune(network(digits()), 0.8)


def interrupt(trainer: Trainer, after: int) -> None:
    """Let a run die after so many steps."""
    step, taken = trainer.stepper._update, []

    def dying(update: int) -> None:
        step(update)
        taken.append(update)
        if len(taken) == after:
            raise KeyboardInterrupt

    trainer.stepper._update = dying  # type: ignore[method-assign]


def is_positive_zero(tensor: Tensor) -> bool:
    return not tensor.contiguous().view(torch.uint8).any()


@check
def sharded_runs_end_where_ddp_ends() -> None:
    """In sums of another order; an attack makes more of it, by the sign of gradients that are nearly zero."""
    masks = sparse()
    for regime, atol in (("standard", 1e-5), ("adversarial", 5e-2)):
        reference, _, expected = finished("ddp", regime)
        assert same_everywhere(float(reference.fc.weight.detach().sum()))
        for kind in KINDS:
            model, trainer, result = finished(kind, regime)
            sharded = isinstance(next(trainer.trainee.trained.parameters()), DTensor)
            assert sharded == (kind == "fsdp2") and trainer.trainee.inner is model
            assert type(model) is type(reference) and not any(isinstance(p, DTensor) for p in model.parameters())
            for layer in masks:
                assert is_positive_zero(model.get_parameter(layer).detach()[~masks[layer]]), (kind, layer)
            close(model.state_dict(), reference.state_dict(), atol, f"{kind}, {regime}")
            kept, wanted = result.selection.states, expected.selection.states
            assert kept.keys() == wanted.keys() or regime == "adversarial"
            for epoch in kept.keys() & wanted.keys():
                close(kept[epoch], wanted[epoch], atol, f"{kind}, {regime}, epoch {epoch}")


def close(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float, what: str) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=atol, msg=lambda m, n=name: f"{what}, {n}: {m}")


@check
def an_interrupted_sharded_run_ends_bit_for_bit_as_the_uninterrupted_one() -> None:
    for kind in KINDS:
        whole, _, _ = finished(kind)
        folder = Path(sys.argv[1], f"run-{kind}")
        assert run(kind, digits(), sparse(), folder, stop=4) is None
        dist.barrier()
        assert list(folder.glob("checkpoint/step-*")), kind
        model, _, _ = run(kind, digits(), sparse(), folder)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), (kind, name)


@check
def what_sharding_cannot_do_is_refused() -> None:
    def refuses(kind: str, *words: str, **more: Any) -> None:
        try:
            run(kind, digits(), None, **more)
        except UsageError as found:
            assert all(word in str(found) for word in words), str(found)
        else:
            raise AssertionError(f"expected UsageError: {words}")

    for kind in KINDS:
        refuses(kind, "adversarial weight perturbation", awp=0.01)
        if kind != "fsdp2":
            refuses(kind, "accumulate is 2", "FSDP2", accumulate=2)


if __name__ == "__main__":
    check.run()
