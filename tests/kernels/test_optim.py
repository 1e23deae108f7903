"""Masked optimizers against torch.optim with masks applied by hand: the same bits, the same state dict."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from sparse_robust_kernels.masks import pack_bits
from sparse_robust_kernels.optim import MaskedAdamW, MaskedSGD, adamw_, reference, sgd_, storage_bits, storage_integers

VARIANTS: dict[str, tuple[type[Optimizer], type[Optimizer], dict[str, Any]]] = {
    "plain": (MaskedSGD, SGD, {"lr": 0.1}),
    "momentum": (MaskedSGD, SGD, {"lr": 0.1, "momentum": 0.9}),
    "dampening": (MaskedSGD, SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 5e-4}),
    "nesterov": (MaskedSGD, SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}),
    "maximize": (MaskedSGD, SGD, {"lr": 0.01, "momentum": 0.9, "maximize": True, "weight_decay": 5e-4}),
    "decay": (MaskedSGD, SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "adamw": (MaskedAdamW, AdamW, {"lr": 1e-2}),
    "adamw-decay": (MaskedAdamW, AdamW, {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}),
    "adamw-maximize": (MaskedAdamW, AdamW, {"lr": 1e-3, "weight_decay": 0.0, "maximize": True}),
}
SHAPES = [(1,), (7,), (1000,), (33, 31), (6, 5, 3, 3), (4, 3, 1, 1), (0, 3)]


def weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    made = {f"w{index}": torch.randn(shape, dtype=dtype) for index, shape in enumerate(SHAPES)}
    made["w4"] = made["w4"].to(memory_format=torch.channels_last)
    return {name: nn.Parameter(tensor) for name, tensor in made.items()}


def masks_for(named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """A bool mask for every weight but the second, which is not masked."""
    return {name: torch.rand(weight.shape) > 0.6 for name, weight in named.items() if name != "w1"}


def packed(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: pack_bits(mask.reshape(-1)) for name, mask in masks.items()}


def twins(variant: str, dtype: torch.dtype = torch.float32, **own: Any) -> tuple[Any, ...]:
    """(weights, optimizer) of ours and of torch, from the same start, and the masks."""
    kind, torch_kind, options = VARIANTS[variant]
    named = weights(dtype)
    masks = masks_for(named)
    theirs = {name: nn.Parameter(weight.detach().clone()) for name, weight in named.items()}
    apply(masks, theirs)
    return (
        (named, kind(named.items(), masks=packed(masks), **options, **own)),  # type: ignore[call-arg]
        (theirs, torch_kind(theirs.items(), **options)),  # type: ignore[call-arg]
        masks,
    )


@torch.no_grad()
def apply(masks: dict[str, Tensor], named: dict[str, nn.Parameter], optimizer: Optimizer | None = None) -> None:
    """Set to +0.0 what is pruned, in weights, gradients and slots."""
    for name, mask in masks.items():
        state = optimizer.state.get(named[name], {}) if optimizer else {}
        slots = [slot for slot in state.values() if slot is not None and slot.shape == mask.shape and slot.dim()]
        for tensor in (named[name], named[name].grad, *slots):
            if tensor is not None:
                tensor.masked_fill_(~mask, 0.0)


def give_gradients(seed: int, *sides: dict[str, nn.Parameter], skip: str = "") -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in sides[0].items():
        gradient = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        for side in sides:
            like = torch.empty_like(side[name], requires_grad=False)
            side[name].grad = None if name == skip else like.copy_(gradient)


def same_bits(one: Tensor, other: Tensor) -> bool:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.detach().view(integer), other.detach().view(integer))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("chunk", [1 << 18, 48])
def test_fifty_steps_give_the_bits_of_torch_optim_on_masked_gradients(
    variant: str, chunk: int, monkeypatch: pytest.MonkeyPatch, poison: None
) -> None:
    monkeypatch.setattr(reference, "CHUNK", chunk)
    (ours, our_optimizer), (theirs, their_optimizer), masks = twins(variant)
    for step in range(50):
        give_gradients(step, ours, theirs)
        apply(masks, theirs)
        our_optimizer.step()
        their_optimizer.step()
        apply(masks, theirs, their_optimizer)
        for name, weight in ours.items():
            assert same_bits(weight, theirs[name]), (step, name)
            assert same_bits(weight.grad, theirs[name].grad), (step, name)
    for name, weight in ours.items():
        state, expected = our_optimizer.state[weight], their_optimizer.state[theirs[name]]
        assert {key: value is None for key, value in state.items()} == {k: v is None for k, v in expected.items()}
        assert all(same_bits(slot, expected[key]) for key, slot in state.items() if slot is not None)


@pytest.mark.parametrize("variant", ["nesterov", "adamw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_float_types_do_as_torch_too(variant: str, dtype: torch.dtype) -> None:
    (ours, our_optimizer), (theirs, their_optimizer), masks = twins(variant, dtype)
    for step in range(5):
        give_gradients(step, ours, theirs)
        apply(masks, theirs)
        our_optimizer.step()
        their_optimizer.step()
        apply(masks, theirs, their_optimizer)
    assert all(same_bits(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("variant", VARIANTS)
def test_pruned_places_are_positive_zero_whatever_was_there(variant: str) -> None:
    """In weights, gradients and slots, as after loading a dense checkpoint."""
    (ours, optimizer), _, masks = twins(variant)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), -1.0, -0.0, 3e38])
    for step in range(3):
        give_gradients(step, ours)
        for name, mask in masks.items():
            slots = [slot for slot in optimizer.state[ours[name]].values() if slot is not None and slot.dim()]
            for tensor in (ours[name].detach(), ours[name].grad, *slots):
                tensor[~mask] = odd[torch.randint(6, tensor.shape)][~mask]
        optimizer.step()
        for name, mask in masks.items():
            weight = ours[name]
            slots = [slot for slot in optimizer.state[weight].values() if slot is not None and slot.dim()]
            assert len(slots) == {"plain": 0, "decay": 0}.get(variant, 2 if "adamw" in variant else 1)
            for tensor in (weight.detach(), weight.grad, *slots):
                assert not tensor[~mask].view(torch.int32).any(), name
                assert tensor.isfinite().all(), name


def test_gradients_may_be_left_as_they_are() -> None:
    (ours, optimizer), (theirs, their_optimizer), masks = twins("nesterov", mask_gradients=False)
    for step in range(3):
        give_gradients(step, ours, theirs)
        before = {name: weight.grad.clone() for name, weight in ours.items()}
        apply(masks, theirs)
        optimizer.step()
        their_optimizer.step()
        assert all(same_bits(weight.grad, before[name]) for name, weight in ours.items())
    assert all(same_bits(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("variant", ["nesterov", "adamw"])
def test_a_parameter_whose_gradient_comes_late_starts_late(variant: str) -> None:
    (ours, our_optimizer), (theirs, their_optimizer), masks = twins(variant)
    for step in range(6):
        give_gradients(step, ours, theirs, skip="w2" if step in (0, 1, 4) else "")
        apply(masks, theirs)
        our_optimizer.step()
        their_optimizer.step()
    assert all(same_bits(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("variant", ["plain", "nesterov", "adamw"])
@pytest.mark.parametrize("to_ours", [True, False])
def test_state_dicts_go_both_ways(variant: str, to_ours: bool) -> None:
    (ours, our_optimizer), (theirs, their_optimizer), masks = twins(variant)
    for step in range(3):
        give_gradients(step, ours, theirs)
        apply(masks, theirs)
        our_optimizer.step()
        their_optimizer.step()
    kind, torch_kind, options = VARIANTS[variant]
    fresh = {name: nn.Parameter(weight.detach().clone()) for name, weight in ours.items()}
    saved = copy.deepcopy((their_optimizer if to_ours else our_optimizer).state_dict())
    own = {"masks": packed(masks)} if to_ours else {}
    loaded = (kind if to_ours else torch_kind)(fresh.items(), **options | {"lr": 9.0}, **own)  # type: ignore[call-arg]
    loaded.load_state_dict(saved)
    assert loaded.state_dict().keys() == saved.keys() == {"state", "param_groups"}
    assert our_optimizer.state_dict()["param_groups"] == their_optimizer.state_dict()["param_groups"]
    for step in range(3, 6):
        give_gradients(step, ours, theirs, fresh)
        apply(masks, theirs)
        if not to_ours:
            apply(masks, fresh)
        for optimizer in (our_optimizer, their_optimizer, loaded):
            optimizer.step()
    assert all(same_bits(weight, fresh[name]) and same_bits(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("variant", ["nesterov", "adamw"])
def test_slots_of_another_memory_format_and_steps_of_fused_optimizers_load(variant: str) -> None:
    (ours, our_optimizer), (theirs, their_optimizer), masks = twins(variant)
    give_gradients(0, ours, theirs)
    apply(masks, theirs)
    our_optimizer.step()
    their_optimizer.step()
    saved = copy.deepcopy(their_optimizer.state_dict())
    for state in saved["state"].values():
        state.update({k: slot.contiguous() for k, slot in state.items() if slot.dim() == 4})
    our_optimizer.load_state_dict(saved)
    give_gradients(1, ours, theirs)
    ours["w4"].grad = ours["w4"].grad.contiguous()
    apply(masks, theirs)
    our_optimizer.step()
    their_optimizer.step()
    assert all(same_bits(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("variant", ["momentum", "adamw"])
def test_copies_are_the_weights_in_bf16_after_every_step(variant: str, poison: None) -> None:
    (ours, optimizer), _, _ = twins(variant)
    copies = {name: torch.empty_like(weight, dtype=torch.bfloat16) for name, weight in ours.items() if name != "w3"}
    optimizer.set_copies(copies)
    for step in range(3):
        assert all(same_bits(bf16, ours[name].detach().bfloat16()) for name, bf16 in copies.items())
        give_gradients(step, ours)
        optimizer.step()
    assert all(same_bits(bf16, ours[name].detach().bfloat16()) for name, bf16 in copies.items())


def test_masks_come_as_masks_by_name_or_by_parameter() -> None:
    class AsTheLibrary:
        def __init__(self, bits: dict[str, Tensor]) -> None:
            self.bits = bits

        def tensors(self) -> dict[str, Tensor]:
            return self.bits

    results = []
    for form in ("library", "names", "parameters"):
        torch.manual_seed(1)
        named = weights()
        bits = packed(masks_for(named))
        given = {"library": AsTheLibrary(bits), "names": bits, "parameters": {named[n]: b for n, b in bits.items()}}
        parameters = named.values() if form == "parameters" else named.items()
        optimizer = MaskedSGD(parameters, lr=0.1, momentum=0.9, masks=given[form])
        give_gradients(0, named)
        optimizer.step()
        results.append(named)
    for other in results[1:]:
        assert all(same_bits(weight, other[name]) for name, weight in results[0].items())


def test_masks_of_the_library_and_enforcement_agree() -> None:
    from sparse_robust.masks import Masks
    from sparse_robust.pruning import enforce

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 5))
    masks = Masks.from_bools(
        {name: torch.rand_like(net.get_parameter(name)) > 0.5 for name in ("0.weight", "2.weight")}
    )
    other = copy.deepcopy(net)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
    ours = MaskedSGD(net.named_parameters(), **options, masks=masks)
    theirs = SGD(other.parameters(), **options)
    enforce(theirs, other, masks)
    for _ in range(4):
        x, y = torch.rand(6, 3, 8, 8), torch.randint(5, (6,))
        for model, optimizer in ((net, ours), (other, theirs)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    enforce(ours, net, masks).verify()
    assert all(same_bits(weight, other.get_parameter(name)) for name, weight in net.named_parameters())


def test_new_masks_hold_at_once_in_weights_gradients_and_slots() -> None:
    (ours, optimizer), _, masks = twins("nesterov")
    give_gradients(0, ours)
    optimizer.step()
    fewer = {name: mask & (torch.rand(mask.shape) > 0.5) for name, mask in masks.items()}
    optimizer.set_masks(packed(fewer))
    for name, mask in fewer.items():
        for tensor in (ours[name].detach(), ours[name].grad, optimizer.state[ours[name]]["momentum_buffer"]):
            assert not tensor[~mask].view(torch.int32).any()
    optimizer.set_masks(None)
    give_gradients(1, ours)
    optimizer.step()
    assert all((weight != 0).all() for weight in ours.values())


def test_groups_closures_schedulers_hooks_and_copies_of_the_optimizer() -> None:
    weight, bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    groups = [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "lr": 0.0}]
    optimizer = MaskedSGD(groups, lr=1.0, masks={weight: pack_bits(torch.tensor([True, True, False, False]))})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight * 2).sum() + bias.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6.0
    schedule.step()
    assert torch.equal(weight.detach(), torch.tensor([-1.5, -1.5, 0.0, 0.0])) and torch.equal(bias, torch.ones(2))
    held_weight, held = pickle.loads(pickle.dumps((weight, optimizer)))
    for each, parameter in ((optimizer, weight), (held, held_weight)):
        parameter.grad = torch.ones(4)
        each.step()
        assert torch.equal(parameter.detach(), torch.tensor([-1.625, -1.625, 0.0, 0.0]))
    assert calls == [1, 1]


def test_a_grad_scaler_skips_steps_that_overflow() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = MaskedSGD([weight], lr=1.0, masks={weight: pack_bits(torch.tensor([True, False, True]))})
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for loss in ((weight * float("inf")).sum(), (weight * 2).sum()):
        weight.grad = None
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(weight.detach(), torch.tensor([-1.0, 0.0, -1.0]))


def test_masks_are_laid_out_as_the_memory() -> None:
    mask = torch.rand(6, 5, 3, 3) > 0.5
    bits = pack_bits(mask.reshape(-1))
    assert torch.equal(storage_bits(bits, torch.empty(6, 5, 3, 3)), bits)
    weight = torch.empty(6, 5, 3, 3).to(memory_format=torch.channels_last)
    assert torch.equal(storage_bits(bits, weight), pack_bits(mask.permute(0, 2, 3, 1).reshape(-1)))
    with pytest.raises(ValueError, match="dense"):
        storage_bits(pack_bits(torch.ones(4, dtype=torch.bool)), torch.empty(2, 4)[:, ::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masks_of_integers_do_what_packed_ones_do(dtype: torch.dtype) -> None:
    for size in (0, 5, 16, 47, 100):
        found = []
        for lay in (storage_bits, storage_integers):
            torch.manual_seed(size)
            weight, gradient, buffer = (torch.randn(size).to(dtype) for _ in range(3))
            keep = lay(pack_bits(torch.rand(size) > 0.5), weight)
            sgd_([weight], [gradient], [buffer], [keep], lr=0.1, momentum=0.9)
            found.append((weight, gradient, buffer))
        assert all(same_bits(one, other) for one, other in zip(*found, strict=True))
    with pytest.raises(ValueError, match=r"no backend 'triton'|masks of integers"):
        weight = torch.ones(4)
        keep = storage_integers(pack_bits(weight > 0), weight)
        sgd_([weight], [weight.clone()], [], [keep], lr=0.1, backend="triton")


W = torch.ones(4)
BITS = pack_bits(torch.ones(4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sgd_([W], [], [], [None], lr=1.0), "one gradient, slot, mask and copy for each of 1"),
        (lambda: sgd_([W.int()], [W], [], [None], lr=1.0), "dense float tensor"),
        (lambda: sgd_([torch.ones(4, 2)[:, 0]], [W], [], [None], lr=1.0), "dense float tensor .*strides"),
        (lambda: sgd_([W], [W.double()], [], [None], lr=1.0), "gradient of weight 0: .*float32 .*got torch.float64"),
        (lambda: sgd_([W], [W], [W[:2]], [None], lr=1.0, momentum=0.5), r"slot of weight 0: .*\(4,\).*got .*\(2,\)"),
        (lambda: sgd_([W], [W], [], [BITS.bool()], lr=1.0), r"packed mask uint8 \(1,\)"),
        (lambda: sgd_([W], [W], [], [None], [W], lr=1.0), "copy of weight 0: expected torch.bfloat16"),
        (lambda: adamw_([W], [W], [W], [], [None], step=1, lr=1.0), "for each of 1"),
        (lambda: sgd_([W], [W], [], [None], lr=1.0, backend="cuda"), "no backend 'cuda' on cpu.*reference"),
        (lambda: MaskedSGD([nn.Parameter(W)], masks={"w": BITS}), "by the name 'w': pass model.named_parameters"),
        (lambda: MaskedSGD([("v", nn.Parameter(W))], masks={"w": BITS}), "the mask of 'w' belongs to no parameter"),
        (lambda: MaskedSGD([nn.Parameter(W)], masks={W: BITS}), r"a tensor of shape \(4,\) belongs to no"),
        (lambda: MaskedSGD([("w", nn.Parameter(W))], copies={"w": W}), "copy must be bf16 and like its weight"),
        (
            lambda: MaskedSGD([("w", nn.Parameter(torch.ones(9)))], masks={"w": BITS}),
            r"the mask of 'w', \(9,\): expected packed bits, uint8 \(2,\) .*got torch.uint8 \(1,\)",
        ),
        (
            lambda: MaskedSGD([("w", nn.Parameter(W))], masks={"w": W > 0}),
            "the mask of 'w'.*packed bits.*got torch.bool",
        ),
        (lambda: MaskedSGD([nn.Parameter(W)], backend="cuda"), "unknown backend 'cuda'; known: auto, triton"),
        (lambda: MaskedSGD([nn.Parameter(W)], differentiable=True), "have no differentiable; use a torch optimizer"),
        (lambda: MaskedAdamW([nn.Parameter(W)], amsgrad=True), "have no amsgrad"),
        (lambda: MaskedAdamW([nn.Parameter(W)], capturable=True), "have no capturable"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_sparse_gradients_and_amsgrad_are_refused() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = MaskedAdamW([weight])
    weight.grad = torch.ones(4).to_sparse()
    with pytest.raises(ValueError, match="is sparse"):
        optimizer.step()
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match="no amsgrad"):
        optimizer.load_state_dict(AdamW([weight], amsgrad=True, lr=5.0).state_dict())
    assert optimizer.state_dict() == before


def all_zero(tensors: list[Tensor], mask: Tensor) -> bool:
    return not any(tensor[~mask].view(torch.int32).any() for tensor in tensors)


@pytest.mark.parametrize("variant", ["momentum", "adamw"])
def test_masks_follow_weights_that_change_their_memory_format_or_type(variant: str) -> None:
    (ours, our_optimizer), (theirs, their_optimizer), masks = twins(variant)
    for step, layout in enumerate((torch.contiguous_format, torch.contiguous_format, torch.channels_last)):
        for side in (ours, theirs):
            side["w4"].data = side["w4"].data.contiguous(memory_format=layout)
            if step == 0:
                side["w3"].data = side["w3"].data.double()
        give_gradients(step, ours, theirs)
        apply(masks, theirs)
        our_optimizer.step()
        their_optimizer.step()
        assert all(same_bits(weight, theirs[name]) for name, weight in ours.items())


def test_what_is_not_stepped_is_masked_too() -> None:
    weight, other = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    mask = torch.tensor([True, False, True, False])
    bits = pack_bits(mask)
    optimizer = MaskedSGD([weight, other], lr=0.1, masks={weight: bits}, momentum=0.9)
    weight.data.fill_(1.0)
    other.grad = torch.ones(2)
    optimizer.step()  # the weight has no gradient
    assert torch.equal(weight.detach(), mask.float())

    dense = SGD([weight, other], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(4)
    dense.step()
    optimizer.load_state_dict(dense.state_dict())
    assert all_zero([weight.detach(), optimizer.state[weight]["momentum_buffer"]], mask)

    bf16 = torch.full((4,), 5.0, dtype=torch.bfloat16)
    optimizer.set_copies({weight: bf16})
    optimizer.set_masks({weight: pack_bits(mask & torch.tensor([True, True, False, True]))})
    assert torch.equal(bf16, weight.detach().bfloat16()) and weight.count_nonzero() == 1


def test_a_mask_that_does_not_fit_changes_nothing() -> None:
    weight = nn.Parameter(torch.ones(4))
    optimizer = MaskedSGD([("w", weight)], lr=0.1, masks={"w": pack_bits(torch.tensor([True, False, True, True]))})
    with pytest.raises(ValueError, match="the mask of 'w'"):
        optimizer.set_masks({"w": torch.zeros(3, dtype=torch.uint8)})
    weight.grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(weight.detach(), torch.tensor([0.9, 0.0, 0.9, 0.9]))


def test_arguments_of_torch_and_names_of_wrapped_models_are_taken() -> None:
    net = nn.Linear(2, 2, bias=False)
    bits = pack_bits(torch.tensor([True, False, True, True]))
    wrapped = [(f"module._orig_mod.{name}", weight) for name, weight in net.named_parameters()]
    MaskedSGD(wrapped, masks={"weight": bits}, foreach=True, fused=True, differentiable=False)
    optimizer = MaskedAdamW(wrapped, 1e-3, (0.9, 0.99), 1e-8, 0.0, False, foreach=False, capturable=False, fused=True)
    optimizer.set_masks({"weight": bits})
    assert net.weight[0, 1] == 0 and net.weight.count_nonzero() == 3
