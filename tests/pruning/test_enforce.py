"""Enforcement: +0.0 after every step under any optimizer, and the same surviving weights as a reparametrised mask."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks
from sparse_robust.pruning import MaskViolation, enforce, prune
from sparse_robust_kernels.masks import zero_

Make = Callable[..., nn.Module]
Batches = list[tuple[Tensor, Tensor]]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "plain": partial(SGD, lr=0.1),
    "maximize": partial(SGD, lr=1e-3, momentum=0.9, maximize=True),
    "foreach": partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, foreach=True),
    "fused": partial(SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True),
    "adam": partial(Adam, lr=1e-2, weight_decay=1e-2),
    "amsgrad": partial(Adam, lr=1e-2, amsgrad=True),
    "adamw": partial(AdamW, lr=1e-2, weight_decay=0.1),
    "rmsprop": partial(RMSprop, lr=1e-3, momentum=0.9, centered=True, weight_decay=1e-3),
    "adagrad": partial(Adagrad, lr=1e-2),
}


def step(model: nn.Module, optimizer: Optimizer, batch: tuple[Tensor, Tensor]) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def is_positive_zero(tensor: Tensor) -> bool:
    return not tensor.view(torch.int32).any()


@pytest.mark.acceptance("double-win", "A-12")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_gradients_and_slots_are_positive_zero_after_every_step(
    name: str, make_net: Make, batches: Batches
) -> None:
    model = make_net()
    masks = prune(model, 0.8)
    optimizer = OPTIMIZERS[name](model.parameters())
    enforcement = enforce(optimizer, model, masks)
    steps = []

    def look(optimizer: Optimizer, *_: object) -> None:
        steps.append(0)
        zeros = 0
        for layer in masks:
            weight, pruned = model.get_parameter(layer), ~masks[layer]
            slots = [s for s in optimizer.state[weight].values() if isinstance(s, Tensor) and s.shape == weight.shape]
            assert name == "plain" or slots
            for tensor in (weight.detach(), weight.grad, *slots):
                assert is_positive_zero(tensor[pruned])
            zeros += int((weight == 0).sum())
        assert zeros == masks.numel() - masks.count()

    optimizer.register_step_post_hook(look)
    for index in range(60):
        step(model, optimizer, batches[index % len(batches)])
    assert len(steps) == 60
    enforcement.verify()


Disturb = Callable[[nn.Module, Optimizer, Tensor], None]


def write_weights(model: nn.Module, optimizer: Optimizer, pruned: Tensor) -> None:
    with torch.no_grad():
        model.conv2.weight[pruned] = 1.0


def write_weights_unseen(model: nn.Module, optimizer: Optimizer, pruned: Tensor) -> None:
    model.conv2.weight.data[pruned] = float("nan")


def write_state(model: nn.Module, optimizer: Optimizer, pruned: Tensor) -> None:
    for value in optimizer.state[model.conv2.weight].values():
        if value.shape == pruned.shape:
            value[pruned] = float("inf")


def restore_state(model: nn.Module, optimizer: Optimizer, pruned: Tensor) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for held in state["state"].values():
        for value in held.values():
            if value is not None:
                value.add_(1.0)
    optimizer.load_state_dict(state)


def negate_and_fill_gradients_later(model: nn.Module, optimizer: Optimizer, pruned: Tensor) -> None:
    def fill(*_: object) -> None:
        model.conv2.weight.grad.neg_()[pruned] = 5.0

    optimizer.register_step_pre_hook(fill)


def replace_gradients_later(model: nn.Module, optimizer: Optimizer, pruned: Tensor) -> None:
    optimizer.register_step_pre_hook(lambda *_: setattr(model.conv2.weight, "grad", torch.ones(pruned.shape)))


def decay_that_turns_signs(model: nn.Module, optimizer: Optimizer, pruned: Tensor) -> None:
    optimizer.param_groups[0].update(weight_decay=1e4, lr=1e-3)


def no_epsilon(model: nn.Module, optimizer: Optimizer, pruned: Tensor) -> None:
    optimizer.param_groups[0]["eps"] = 0.0


@pytest.mark.acceptance("double-win", "A-12")
@pytest.mark.parametrize("name", ["sgd", "adamw", "fused", "foreach", "adagrad"])
@pytest.mark.parametrize(
    "disturb",
    [
        write_weights, write_weights_unseen, write_state, restore_state, negate_and_fill_gradients_later,
        replace_gradients_later, decay_that_turns_signs, no_epsilon,
    ],
)  # fmt: skip
def test_whatever_else_writes_there_is_gone_after_the_next_step(
    disturb: Disturb, name: str, make_net: Make, batches: Batches
) -> None:
    model = make_net()
    masks = prune(model, 0.8)
    optimizer = OPTIMIZERS[name](model.parameters())
    enforcement = enforce(optimizer, model, masks)
    for batch in batches[:2]:
        step(model, optimizer, batch)
    disturb(model, optimizer, ~masks["conv2.weight"])
    for batch in batches[:2]:
        step(model, optimizer, batch)
        enforcement.verify()


@pytest.mark.parametrize("name", ["sgd", "nesterov", "foreach", "adam", "amsgrad", "adamw"])
def test_two_sweeps_a_step_are_enough_for_optimizers_that_take_zeros_to_zeros(
    name: str, make_net: Make, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_net()
    optimizer = OPTIMIZERS[name](model.parameters())
    enforcement = enforce(optimizer, model, prune(model, 0.8))
    sweeps = []
    module = sys.modules[type(enforcement).__module__]
    monkeypatch.setattr(module, "zero_", lambda *given: (sweeps.append(len(given[0])), zero_(*given)))
    for batch in batches:
        step(model, optimizer, batch)
        enforcement.verify()
    assert sweeps == [3, 3] * len(batches), "gradients, then weights, of three layers"


@pytest.mark.acceptance("double-win", "A-14")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_survivors_equal_those_of_a_reparametrised_mask_bit_for_bit(
    name: str, make_net: Make, batches: Batches
) -> None:
    model = make_net()
    masks = prune(model, 0.7)
    reference = copy.deepcopy(model)
    for layer in masks:
        module = reference.get_submodule(layer.removesuffix(".weight"))
        torch_prune.custom_from_mask(module, "weight", masks[layer])
    ours, theirs = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](reference.parameters())
    enforce(ours, model, masks)
    for index in range(50):
        step(model, ours, batches[index % len(batches)])
        step(reference, theirs, batches[index % len(batches)])
    for layer, tensor in model.state_dict().items():
        if layer in masks:
            hidden = reference.get_parameter(f"{layer}_orig")
            assert torch.equal(tensor[masks[layer]], hidden[masks[layer]])
        else:
            assert torch.equal(tensor, reference.state_dict()[layer])


class NormalisedSGD(Optimizer):
    """Steps of fixed length along the gradient of all weights together: every gradient matters to every weight."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        norm = sum(float((p.grad.double() ** 2).sum()) for p in parameters) ** 0.5
        for parameter in parameters:
            parameter -= 0.1 * parameter.grad / norm


def test_pruned_gradients_have_no_part_in_a_step(make_net: Make, batches: Batches) -> None:
    model, twin = make_net(), make_net()
    masks = prune(model, 0.7)
    optimizer, plain = NormalisedSGD(model.parameters()), NormalisedSGD(twin.parameters())
    enforce(optimizer, model, masks)
    masks.apply_(twin)
    for batch in batches:
        step(model, optimizer, batch)
        plain.zero_grad()
        nn.functional.cross_entropy(twin(batch[0]), batch[1]).backward()
        for name in masks:
            twin.get_parameter(name).grad.masked_fill_(~masks[name], 0)
        plain.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.acceptance("double-win", "A-13")
def test_training_leaves_the_mask_as_it_was(make_net: Make, batches: Batches) -> None:
    model = make_net()
    masks = prune(model, 0.8)
    digest, sparsity = masks.digest(), masks.sparsity
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    enforcement = enforce(optimizer, model, masks)
    for batch in batches:
        step(model, optimizer, batch)
    with torch.no_grad():
        model.conv1.weight.zero_()
    assert enforcement.masks.digest() == digest == Masks.from_packed(masks.tensors(), masks.shapes()).digest()
    assert masks.sparsity == sparsity


def test_it_takes_effect_at_once(make_net: Make, batches: Batches) -> None:
    model = make_net()
    masks = prune(model, 0.8)
    optimizer = OPTIMIZERS["adam"](model.parameters())
    step(model, optimizer, batches[0])
    enforcement = enforce(optimizer, model, masks)
    enforcement.verify()
    assert is_positive_zero(model.conv2.weight.grad[~masks["conv2.weight"]])
    assert is_positive_zero(optimizer.state[model.conv2.weight]["exp_avg_sq"][~masks["conv2.weight"]])


@pytest.mark.acceptance("double-win", "A-16")
def test_nan_and_infinity_under_the_mask_go_nowhere(make_net: Make, batches: Batches) -> None:
    model = make_net()
    masks = prune(model, 0.5)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    enforcement = enforce(optimizer, model, masks)
    pruned = ~masks["conv2.weight"]
    for poison in (float("nan"), float("inf")):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        model.conv2.weight.grad[pruned] = poison
        optimizer.step()
        enforcement.verify()
        assert model(batches[0][0]).isfinite().all()


def test_gradients_can_be_masked_before_they_are_clipped(make_net: Make, batches: Batches) -> None:
    model = make_net()
    masks = prune(model, 0.8)
    enforcement = enforce(OPTIMIZERS["sgd"](model.parameters()), model, masks)
    nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    unmasked = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    enforcement.mask_gradients_()
    assert nn.utils.get_total_norm([p.grad for p in model.parameters()]) < unmasked
    enforcement.verify()


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_closure_that_steps_call_is_masked_too(as_keyword: bool, make_net: Make, batches: Batches) -> None:
    model, twin = make_net(), make_net()
    masks = prune(model, 0.6)
    optimizer, plain = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](twin.parameters())
    enforcement = enforce(optimizer, model, masks)
    enforce(plain, twin, masks)
    calls = []

    def closure() -> Tensor:
        calls.append(0)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batches[0][0]), batches[0][1])
        loss.backward()
        return loss

    for _ in range(3):
        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        step(twin, plain, batches[0])
        enforcement.verify()
        assert loss is not None and loss.isfinite()
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_lbfgs_moves_no_pruned_weight(make_net: Make, batches: Batches) -> None:
    model = make_net().eval()
    masks = prune(model, 0.6)
    optimizer = LBFGS(model.parameters(), lr=0.1, max_iter=5)
    enforcement = enforce(optimizer, model, masks)

    def closure() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(batches[0][0]), batches[0][1])
        loss.backward()
        pruned = torch.cat([model.get_parameter(name)[~masks[name]] for name in masks])
        assert (pruned == 0).all(), "not even inside a step"
        return float(loss.detach())

    losses = [float(optimizer.step(closure)) for _ in range(3)]
    enforcement.verify()
    assert losses[-1] < losses[0]


def test_grad_scaler_works_and_a_skipped_step_changes_nothing(make_net: Make, batches: Batches) -> None:
    model = make_net()
    masks = prune(model, 0.8)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    enforcement = enforce(optimizer, model, masks)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for index in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(batches[index][0]), batches[index][1])
        scaler.scale(loss).backward()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        if index == 2:
            model.conv1.weight.grad[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert moved == (index != 2)
        if index != 2:
            enforcement.verify()


def test_channels_last_and_a_model_moved_to_another_type(make_net: Make, batches: Batches) -> None:
    model = make_net().to(memory_format=torch.channels_last).to(torch.float64)
    masks = prune(model, 0.8)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    enforcement = enforce(optimizer, model, masks)
    for x, y in batches[:3]:
        step(model, optimizer, (x.double(), y))
        enforcement.verify()
    assert int((model.conv2.weight != 0).sum()) == int(masks["conv2.weight"].sum())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [False, True])
def test_steps_and_masks_survive_another_memory_format(
    kind: str, fused: bool, make_net: Make, batches: Batches
) -> None:
    """torch's fused steps take weight, gradient and slot by their places in memory."""
    options = {"lr": 0.05, "momentum": 0.9} if kind == "sgd" else {"lr": 0.01}
    make = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    found = []
    for change in (False, True):
        model = make_net().double()  # so exactly that a convolution's other roundings do not show
        masks = prune(model, 0.8)
        optimizer = make(model.parameters(), **options, fused=fused)
        enforcement = enforce(optimizer, model, masks)
        for index, (x, y) in enumerate(batches[:3]):
            if change and index == 1:
                model.to(memory_format=torch.channels_last)
            step(model, optimizer, (x.double(), y))
            enforcement.verify()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    for plain, changed in zip(*found, strict=True):
        torch.testing.assert_close(changed, plain, rtol=1e-6, atol=1e-9)


def test_restoring_the_optimizers_state_keeps_the_hooks(make_net: Make, batches: Batches) -> None:
    model = make_net()
    masks = prune(model, 0.8)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    enforcement = enforce(optimizer, model, masks)
    step(model, optimizer, batches[0])
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, batches[1])
    enforcement.verify()


def test_removed_hooks_let_weights_grow_again(make_net: Make, batches: Batches) -> None:
    model = make_net()
    masks = prune(model, 0.8)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    enforcement = enforce(optimizer, model, masks)
    step(model, optimizer, batches[0])
    enforcement.remove()
    enforcement.remove()
    step(model, optimizer, batches[1])
    assert (model.conv2.weight[~masks["conv2.weight"]] != 0).any()
    with pytest.raises(MaskViolation):
        enforcement.verify()


@pytest.mark.parametrize("wrapper", ["accelerate", "lookahead", "scheduler"])
def test_wrapped_optimizers_are_looked_through(wrapper: str, make_net: Make, batches: Batches) -> None:
    model = make_net()
    masks = prune(model, 0.8)
    optimizer: Optimizer = OPTIMIZERS["sgd"](model.parameters())
    if wrapper == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        optimizer = accelerate.Accelerator(cpu=True).prepare_optimizer(optimizer)
    elif wrapper == "lookahead":
        optimizer = pytest.importorskip("timm.optim").Lookahead(optimizer, k=2)
    else:
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
    enforcement = enforce(optimizer, model, masks)
    for batch in batches:
        step(model, optimizer, batch)
        enforcement.verify()
    assert int((model.conv2.weight != 0).sum()) == int(masks["conv2.weight"].sum())


def test_a_compiled_or_parallel_model_may_be_passed(make_net: Make, batches: Batches) -> None:
    model = make_net()
    wrapped = torch.compile(nn.DataParallel(model))
    masks = prune(wrapped, 0.8)
    optimizer = OPTIMIZERS["sgd"](wrapped.parameters())
    enforcement = enforce(optimizer, wrapped, masks)
    step(model, optimizer, batches[0])
    enforcement.verify()


@pytest.mark.parametrize("what", ["weight", "gradient", "momentum_buffer", "negative zero"])
def test_verify_names_the_tensor(what: str, make_net: Make, batches: Batches) -> None:
    model = make_net()
    masks = prune(model, 0.8)
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    enforcement = enforce(optimizer, model, masks)
    step(model, optimizer, batches[0])
    enforcement.verify()
    place = tuple((~masks["conv3.weight"]).nonzero()[0])
    with torch.no_grad():
        weight = model.conv3.weight
        tensor = {"gradient": weight.grad, "momentum_buffer": optimizer.state[weight].get("momentum_buffer")}
        tensor.get(what, weight)[place] = -0.0 if what == "negative zero" else 1e-30
    name = {"negative zero": "weight", "momentum_buffer": "optimizer state 'momentum_buffer'"}.get(what, what)
    with pytest.raises(MaskViolation, match=f"the {name} of conv3.weight is not .* at 1 of"):
        enforcement.verify()


def test_verify_notices_a_replaced_parameter(make_net: Make) -> None:
    model = make_net()
    enforcement = enforce(OPTIMIZERS["sgd"](model.parameters()), model, prune(model, 0.5))
    model.conv2 = nn.Conv2d(8, 8, 3)
    with pytest.raises(MaskViolation, match="conv2.weight was replaced"):
        enforcement.verify()


def test_a_parameter_the_optimizer_does_not_hold_is_refused(make_net: Make) -> None:
    model = make_net()
    masks = prune(model, 0.5)
    before = copy.deepcopy(model.state_dict())
    optimizer = OPTIMIZERS["sgd"]([model.conv1.weight, model.fc.weight])
    with pytest.raises(UsageError, match=r"does not hold 2 of 3 masked parameters, first \['conv2.weight', 'conv3"):
        enforce(optimizer, model, masks)
    other = OPTIMIZERS["sgd"](make_net().parameters())
    with pytest.raises(UsageError, match="does not hold 3 of 3"):
        enforce(other, model, masks)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not optimizer._optimizer_step_pre_hooks


def test_frozen_layers_need_no_optimizer(make_net: Make, batches: Batches) -> None:
    model = make_net()
    masks = prune(model, 0.5)
    model.conv1.weight.requires_grad_(False)
    optimizer = OPTIMIZERS["sgd"]([p for p in model.parameters() if p.requires_grad])
    enforcement = enforce(optimizer, model, masks)
    step(model, optimizer, batches[0])
    enforcement.verify()
    assert int((model.conv1.weight == 0).sum()) == int((~masks["conv1.weight"]).sum())


def test_masks_of_another_model_and_optimizers_without_hooks_are_refused(make_net: Make) -> None:
    model = make_net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with pytest.raises(UsageError, match="belong to another model"):
        enforce(optimizer, model, Masks.full({"conv9.weight": torch.zeros(3)}))

    class Homemade(Optimizer):
        def __init__(self, parameters: list[nn.Parameter]) -> None:
            self.param_groups, self.state = [{"params": parameters}], {}

        def step(self, closure: object = None) -> None:  # type: ignore[override]
            return None

    with pytest.raises(UsageError, match="Homemade calls no step hooks"):
        enforce(Homemade(list(model.parameters())), model, prune(model, 0.5))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [True, False])
def test_enforcement_on_a_gpu_with_fused_optimizers_and_half_precision(
    fused: bool, make_net: Make, batches: Batches
) -> None:
    model = make_net().cuda().to(memory_format=torch.channels_last)
    masks = prune(model, 0.8)
    assert masks == prune(make_net(), 0.8)
    optimizer = AdamW(model.parameters(), lr=1e-3, fused=fused)
    enforcement = enforce(optimizer, model, masks)
    scaler = torch.amp.GradScaler("cuda")
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = nn.functional.cross_entropy(model(x.cuda()), y.cuda())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        enforcement.verify()
