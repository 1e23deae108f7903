"""Masks of models that DeepSpeed's ZeRO-1, 2 and 3 train; run by torchrun on 2 processes (see test_shard_zero.py)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.attacks import PGD
from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, cut, prunable_weights, unwrap
from sparse_robust.pruning import MaskViolation, enforce, prune
from sparse_robust.training.sharding import Mirror, unsharded
from tests.distributed.shard_network import Network, batch, make
from tests.distributed.shard_ranks import Checks, Traffic, same_everywhere

check = Checks()
# A CPU kernel that takes a compiler, passes torch by, and spins while it waits. (deepspeed.comm.torch is torch.)
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9, weight_decay=1e-3),
}
SLOTS = {"sgd": ["momentum_buffer"], "adamw": ["exp_avg", "exp_avg_sq"], "rmsprop": ["square_avg", "momentum_buffer"]}


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, so that there are two partitions: weights, and norms and biases."""
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": weights}, {"params": others, "weight_decay": 0.0}]


def engine(
    model: Network, stage: int, optimizer: str = "sgd", clip: float = 0.0, **config: Any
) -> tuple[Any, Any, torch.optim.Optimizer]:
    """A copy of a model under ZeRO: the engine, its optimizer and the torch optimizer inside."""
    trained = copy.deepcopy(model)
    inside = OPTIMIZERS[optimizer](groups(trained))
    config = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 10},
    } | config
    made, outer, _, _ = deepspeed.initialize(model=trained, optimizer=inside, config=config)
    return made, outer, inside


def refuses(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    try:
        call()
    except error as found:
        assert all(word in str(found) for word in words), str(found)
    else:
        raise AssertionError(f"expected {error.__name__}")


def step(made: Any, index: int) -> None:
    images, labels = batch(index)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    dtype = next(made.module.parameters()).dtype
    made.backward(F.cross_entropy(made(images[mine].to(dtype)).float(), labels[mine]))
    made.step()


def is_positive_zero(tensor: Tensor) -> bool:
    return not tensor.contiguous().view(torch.uint8).any()


def full(made: Any) -> dict[str, Tensor]:
    with unsharded(made) as plain:
        return {name: parameter.detach().clone() for name, parameter in plain.named_parameters()}


def stages() -> Iterator[int]:
    yield from (1, 2, 3)


def smallest(model: nn.Module, count: int, keep: Masks | None = None) -> Masks:
    """The masks without the ``count`` smallest weights."""
    return cut(prunable_weights(model), count, keep, magnitude=True)


@check
def models_are_cut_as_whole_ones() -> None:
    model = make()
    expected = smallest(model, 500)
    for stage in stages():
        made, _, _ = engine(model, stage)
        with Traffic() as traffic:
            found = smallest(made, 500)
        assert found == expected and same_everywhere(found.digest())
        assert set(traffic.bytes) == ({"allreduce_"} if stage == 3 else set())
        assert smallest(made, 60, found) == smallest(model, 60, found)
        if stage == 3:
            assert not any(parameter.numel() for parameter in made.module.parameters() if parameter.ds_numel > 10)
        else:
            assert prune(made, 0.7) == prune(model, 0.7)
        assert prune(made, 0.7, score="random", seed=3) == prune(model, 0.7, score="random", seed=3)


@check
def nan_on_one_process_is_named_on_all() -> None:
    made, _, _ = engine(make(), 3)
    if dist.get_rank() == 1:
        made.module.body[0].weight.ds_tensor.data[3] = float("nan")
    refuses(lambda: smallest(made, 50), UsageError, "NaN in body.0.weight (1 values)")


@check
def enforcement_holds_on_partitions_after_every_step() -> None:
    """And the weights are those of one process with the whole batch: momentum, decay and clipping included."""
    for stage in stages():
        for name in OPTIMIZERS:
            alone = make(norm=False)
            masks = prune(alone, 0.8)
            made, outer, inside = engine(alone, stage, name, clip=0.05)
            optimizer = OPTIMIZERS[name](groups(alone))
            beside = enforce(optimizer, alone, masks)
            enforcement = enforce(outer if stage != 2 else inside, made if stage != 2 else made.module, masks)
            held = []  # gradients are gone after engine.step: looked at when the optimizer has taken its own
            inside.register_step_post_hook(lambda *_: held.append(enforcement.verify()))  # noqa: B023
            for index in range(8):
                step(made, index)
                F.cross_entropy(alone(batch(index)[0]), batch(index)[1]).backward()
                beside.mask_gradients_()
                norm = nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
                torch.testing.assert_close(float(made.get_global_grad_norm()), float(norm), rtol=1e-3, atol=1e-6)
                enforcement.verify()
                for layer in masks:
                    weight, pruned = made.module.get_parameter(layer), ~masks[layer]
                    tensors = [safe_get_full_fp32_param(weight)]
                    tensors += [safe_get_full_optimizer_state(weight, slot) for slot in SLOTS[name]]
                    assert all(is_positive_zero(tensor[pruned]) for tensor in tensors), (stage, name, layer)
                found = full(made)
                assert all(is_positive_zero(found[layer][~masks[layer]]) for layer in masks)
            assert held
            for layer, tensor in alone.named_parameters():
                torch.testing.assert_close(found[layer], tensor.detach(), rtol=1e-4, atol=1e-5)


@check
def low_precision_weights_follow_the_fp32_ones() -> None:
    for stage in stages():
        model = make(norm=False)
        made, outer, _ = engine(model, stage, bf16={"enabled": True})
        masks = prune(make(norm=False), 0.8)
        enforcement = enforce(outer, made, masks)
        for index in range(4):
            step(made, index)
            enforcement.verify()
        weights = full(made)
        for layer in masks:
            assert weights[layer].dtype == torch.bfloat16 and is_positive_zero(weights[layer][~masks[layer]])
            exact = safe_get_full_fp32_param(made.module.get_parameter(layer))
            assert torch.equal(exact.bfloat16(), weights[layer]) and not torch.equal(exact, exact.bfloat16().float())


@check
def autocast_leaves_the_weights_in_fp32() -> None:
    """As the launch files have it: batch norms run, and masters are the weights themselves."""
    for stage in (2, 3):
        made, outer, _ = engine(make(), stage, torch_autocast={"enabled": True, "dtype": "bfloat16"})
        masks = prune(make(), 0.8)
        enforcement = enforce(outer, made, masks)
        for index in range(3):
            step(made, index)
            enforcement.verify()
        weights = full(made)
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        for layer in masks:
            assert is_positive_zero(weights[layer][~masks[layer]])
            assert torch.equal(safe_get_full_fp32_param(made.module.get_parameter(layer)), weights[layer])


@check
def what_breaks_the_masks_of_a_partition_is_seen() -> None:
    for stage in stages():
        made, outer, inside = engine(make(), stage)
        masks = prune(make(), 0.8)
        enforcement = enforce(outer, made, masks)
        step(made, 0)
        enforcement.verify()
        state = next(iter(inside.state.values()))
        state["momentum_buffer"].fill_(-0.0)
        refuses(enforcement.verify, MaskViolation, "optimizer state 'momentum_buffer' of")
        step(made, 1)
        enforcement.verify()
        enforcement.remove()
        step(made, 2)
        refuses(enforcement.verify, MaskViolation, "is not +0.0 at")
    other = make()
    refuses(lambda: enforce(torch.optim.SGD(other.parameters(), lr=0.1), made, masks), UsageError, "does not hold")


@check
def attacks_on_unsharded_weights_issue_no_collective() -> None:
    model = make()
    images, labels = batch(dist.get_rank(), size=3 + dist.get_rank())
    for stage in stages():
        made, _, _ = engine(model, stage)
        for mode in ("eval", "train_frozen"):
            attack = PGD(steps=2 + dist.get_rank(), step_size=0.02, seed=1, mode=mode)
            expected = attack(model, images, labels, eps=0.1)
            with unsharded(made) as plain:
                with Traffic() as traffic:
                    found = attack(plain, images, labels, eps=0.1)
                assert traffic.bytes == {} and torch.equal(found, expected)
        if stage == 3:
            assert not any(parameter.numel() for parameter in made.module.parameters())
        step(made, 0)


@check
def a_mirror_follows_and_shares_the_statistics() -> None:
    for stage in stages():
        model = make()
        made, _, _ = engine(model, stage)
        mirror = Mirror(made, model)
        step(made, 0)
        before = model.stem.weight.detach().clone()
        assert int(model.norm.num_batches_tracked) == 1
        mirror.refresh()
        found = full(made)
        assert not torch.equal(model.stem.weight, before)
        assert all(torch.equal(parameter, found[name]) for name, parameter in model.named_parameters())


@check
def a_checkpoint_brings_the_masks_back() -> None:
    for stage in stages():
        made, outer, _ = engine(make(), stage)
        masks = prune(make(), 0.8)
        enforcement = enforce(outer, made, masks)
        step(made, 0)
        made.save_checkpoint(f"{sys.argv[1]}/stage{stage}", tag="one")
        step(made, 1)
        expected = full(made)
        again, other, _ = engine(make(seed=5), stage)
        held = enforce(other, again, masks)
        again.load_checkpoint(f"{sys.argv[1]}/stage{stage}", tag="one")
        step(again, 1)
        held.verify()
        enforcement.verify()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in full(again).items())


@check
def masks_are_applied_to_the_weights() -> None:
    for stage in stages():
        made, _, _ = engine(make(), stage)
        masks = prune(make(), 0.8)
        assert isinstance(unwrap(made), Network)
        masks.apply_(made)
        found = full(made)
        assert all(is_positive_zero(found[layer][~masks[layer]]) for layer in masks)
        assert Masks.full(made.module).shapes() == Masks.full(make()).shapes()


if __name__ == "__main__":
    check.run()
