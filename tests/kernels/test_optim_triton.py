"""Masked optimizers in Triton against their references: in the interpreter, as machine code, and on a GPU.

The interpreter rounds a product before it is added where a GPU and torch do not. So bits are compared on numbers of few
bits, for which nothing is rounded, and all others within a stated tolerance.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from sparse_robust_kernels.masks import pack_bits, unpack_bits
from sparse_robust_kernels.optim import MaskedAdamW, MaskedSGD, adamw_, sgd_
from sparse_robust_kernels.optim import triton as kernels
from tests.kernels.harness import Compiled, compile_sm90, interpret

SIZES = [1, 7, 1000, 1024, 1025, 0, 3000]
SGD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": {"weight_decay": 0.125, "maximize": True},
    "momentum": {"momentum": 0.5, "weight_decay": 0.25, "dampening": 0.5},
    "nesterov": {"momentum": 0.5, "weight_decay": 0.25, "nesterov": True},
}


def some(kind: str, device: str = "cpu", sizes: list[int] = SIZES) -> list[Tensor]:
    """fp32 tensors: numbers of few bits, or any; a pruned place may hold anything."""
    if kind == "few bits":
        return [torch.randint(-8, 9, (size,)).div(4).to(device) for size in sizes]
    return [torch.randn(size).to(device) for size in sizes]


def masks_for(tensors: list[Tensor]) -> list[Tensor | None]:
    """A random mask for all but every third tensor."""
    masks = [pack_bits(torch.rand(tensor.numel()) > 0.5).to(tensor.device) for tensor in tensors]
    return [None if index % 3 == 2 else mask for index, mask in enumerate(masks)]


def cpu(tensors: list[Any]) -> list[Any]:
    return [None if tensor is None else tensor.cpu().clone() for tensor in tensors]


def assert_same(got: list[Any], expected: list[Any], exact: bool, what: str) -> None:
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        if one is None:
            continue
        where = f"{what} {index}"
        if exact:
            assert torch.equal(one.cpu().view(torch.uint8), other.view(torch.uint8)), where
        else:  # a few units in the last place, of numbers of about 1
            torch.testing.assert_close(one.cpu(), other, rtol=2e-6, atol=1e-6, msg=where)


def assert_zero_where_pruned(tensors: list[Tensor], keep: list[Tensor | None]) -> None:
    for tensor, packed in zip(tensors, keep, strict=True):
        if packed is not None:
            assert not tensor[~unpack_bits(packed, tensor.numel())].view(torch.int32).any()


def check_sgd(kind: str, variant: str, exact: bool, device: str = "cpu", sizes: list[int] = SIZES) -> None:
    weights, keep = some(kind, device, sizes), masks_for(some(kind, device, sizes))
    weights = [torch.cat([w[:1], w])[1:] if index == 1 else w for index, w in enumerate(weights)]
    buffers = [torch.empty_like(weight) for weight in weights]
    copies = [torch.empty_like(w, dtype=torch.bfloat16) if i % 2 else None for i, w in enumerate(weights)]
    expected = cpu(weights), cpu(buffers), cpu(copies)
    options = {"lr": 0.25, **SGD_OPTIONS[variant]}
    if kind != "few bits":
        options |= {"lr": 0.0317} | {key: value * 0.73 for key, value in options.items() if isinstance(value, float)}
    for step in range(3):
        gradients = some(kind, device, sizes)
        gradients[3][~unpack_bits(keep[3], len(gradients[3]))] = float("inf")
        reference = cpu(gradients)
        sgd_(weights, gradients, buffers, keep, copies, first=step == 0, backend="triton", **options)
        sgd_(
            expected[0], reference, expected[1], cpu(keep), expected[2], first=step == 0, backend="reference", **options
        )
        assert_same(weights, expected[0], exact, "weight")
        assert_same(gradients, reference, exact, "gradient")
        if "momentum" in options:
            assert_same(buffers, expected[1], exact, "buffer")
            assert_zero_where_pruned(buffers, keep)
        assert_zero_where_pruned(weights, keep)
        for weight, copy in zip(weights, copies, strict=True):
            assert copy is None or torch.equal(copy.view(torch.int16), weight.bfloat16().view(torch.int16))


def check_adamw(device: str = "cpu", sizes: list[int] = SIZES) -> None:
    weights, keep = some("any", device, sizes), masks_for(some("any", device, sizes))
    means, squares = ([torch.zeros_like(weight) for weight in weights] for _ in range(2))
    copies = [torch.empty_like(w, dtype=torch.bfloat16) if i % 2 else None for i, w in enumerate(weights)]
    expected = cpu(weights), cpu(means), cpu(squares), cpu(copies)
    for step in range(1, 6):
        gradients = some("any", device, sizes)
        reference = cpu(gradients)
        options: dict[str, Any] = {"step": step, "lr": 0.01, "eps": 0.1, "weight_decay": 0.1, "maximize": step == 3}
        adamw_(weights, gradients, means, squares, keep, copies, backend="triton", **options)
        adamw_(expected[0], reference, expected[1], expected[2], cpu(keep), expected[3], backend="reference", **options)
        assert_same(gradients, reference, True, "gradient")
        for name, tensors, right in zip(
            ("weight", "mean", "square"), (weights, means, squares), expected, strict=False
        ):
            assert_same(tensors, right, False, name)
            assert_zero_where_pruned(tensors, keep)
        for weight, copy in zip(weights, copies, strict=True):
            assert copy is None or torch.equal(copy.view(torch.int16), weight.bfloat16().view(torch.int16))


@interpret
@pytest.mark.parametrize("variant", SGD_OPTIONS)
def test_sgd_gives_the_bits_of_the_reference_where_nothing_is_rounded(variant: str) -> None:
    check_sgd("few bits", variant, exact=True)


@interpret
@pytest.mark.parametrize("variant", SGD_OPTIONS)
def test_sgd_is_the_reference_within_rounding(variant: str) -> None:
    check_sgd("any", variant, exact=False)


@interpret
def test_adamw_is_the_reference_within_rounding() -> None:
    check_adamw()


@interpret
def test_bf16_is_rounded_to_nearest_even() -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (4000,)).to(torch.int32)
    special = [0x3F808000, 0x3F818000, 0x3F80FFFF, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0, 0x8000, 0x18000]
    weight = torch.cat([torch.tensor(special, dtype=torch.int64).to(torch.int32), bits]).view(torch.float32)
    copy, zero = torch.empty_like(weight, dtype=torch.bfloat16), torch.zeros_like(weight)
    sgd_([weight], [zero], [], [None], [copy], lr=0.0, backend="triton")
    expected = weight.bfloat16()
    assert torch.equal(copy.isnan(), expected.isnan()) and expected.isnan().any()
    real = ~expected.isnan()
    assert torch.equal(copy.view(torch.int16)[real], expected.view(torch.int16)[real])


@interpret
def test_gradients_may_be_left_as_they_are() -> None:
    weight, gradient = torch.ones(1030), torch.full((1030,), 2.0)
    keep = pack_bits(torch.arange(1030) % 2 == 0)
    sgd_([weight], [gradient], [], [keep], lr=0.5, mask_gradients=False, backend="triton")
    assert (gradient == 2).all() and not weight.any()
    weight = torch.ones(1030)
    sgd_([weight], [gradient], [], [keep], lr=0.25, backend="triton")
    assert torch.equal(gradient[:4], torch.tensor([2.0, 0, 2, 0])) and torch.equal(
        gradient[-2:], torch.tensor([2.0, 0])
    )
    assert torch.equal(weight[:4], torch.tensor([0.5, 0, 0.5, 0]))


@interpret
def test_the_optimizers_run_on_the_kernels_and_other_types_are_refused() -> None:
    for kind, torch_kind, options in ((MaskedSGD, SGD, {"lr": 0.1, "momentum": 0.9}), (MaskedAdamW, AdamW, {})):
        weight = nn.Parameter(torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last))
        other = nn.Parameter(weight.detach().clone())
        mask = torch.rand(weight.shape) > 0.5
        ours: Any = kind([("w", weight)], masks={"w": pack_bits(mask.reshape(-1))}, backend="triton", **options)
        theirs: Any = torch_kind([other], **options)
        for _ in range(4):
            weight.grad = torch.randn(weight.shape)  # of another memory format
            other.grad = weight.grad * mask
            other.data.mul_(mask)
            ours.step()
            theirs.step()
        torch.testing.assert_close(weight.detach(), other.detach() * mask, rtol=2e-6, atol=1e-6)
    with pytest.raises(ValueError, match="no backend 'triton' on cpu for torch.float64 weights"):
        sgd_([torch.ones(2).double()], [torch.ones(2).double()], [], [None], lr=1.0, backend="triton")


def compiled(name: str, **more: bool) -> Compiled:
    numbers = {
        "sgd": ["lr", "momentum", "rate", "decay"],
        "adamw": ["shrink", "rate1", "beta2", "rate2", "root", "eps", "step_size"],
    }[name]
    signature = {"table": "*i64", "owners": "*i32", **dict.fromkeys(numbers, "fp32")}
    options = {"MAXIMIZE": False, "ALIGNED": True, "BLOCK": kernels.BLOCK, **more}
    return compile_sm90(getattr(kernels, f"{name}_kernel"), signature, options, num_warps=kernels.WARPS)


MOMENTUM = {"MOMENTUM": True, "FIRST": False, "NESTEROV": True, "DECAY": True}


@pytest.mark.sm90
@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize(
    ("name", "more", "registers"),
    [
        ("sgd", MOMENTUM, 40),
        ("sgd", MOMENTUM | {"FIRST": True, "NESTEROV": False, "DECAY": False}, 40),
        ("sgd", MOMENTUM | {"MOMENTUM": False}, 40),
        ("adamw", {}, 64),
    ],
)
def test_machine_code_needs_few_registers_and_moves_128_bits(
    name: str, more: dict[str, bool], registers: int, write: bool
) -> None:
    code = compiled(name, **more, WRITE=write)
    assert code.registers <= registers and code.spill_bytes == 0 and code.shared_bytes == 0
    assert 128 in code.load_widths and 128 in code.store_widths and 64 in code.store_widths  # 64: four of bf16
    single = compiled(name, **more, WRITE=write, **{"ALIGNED": False})
    assert 128 not in single.load_widths | single.store_widths and single.spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("variant", SGD_OPTIONS)
@pytest.mark.parametrize("kind", ["few bits", "any"])
def test_sgd_on_a_gpu(kind: str, variant: str, poison: None) -> None:
    check_sgd(kind, variant, exact=True, device="cuda", sizes=[*SIZES, 1_000_003])


@pytest.mark.gpu
def test_adamw_on_a_gpu(poison: None) -> None:
    check_adamw("cuda", [*SIZES, 1_000_003])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [MaskedSGD, MaskedAdamW])
def test_optimizers_on_a_gpu_take_the_steps_of_those_on_the_cpu(kind: Any) -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 5)).to(d) for d in ("cpu", "cuda")]
    nets[1].load_state_dict(nets[0].state_dict())
    masks = {"0.weight": pack_bits(torch.rand(432) > 0.5), "2.weight": pack_bits(torch.rand(5 * 576) > 0.5)}
    optimizers = [kind(net.named_parameters(), lr=0.01, masks=masks) for net in nets]
    for _ in range(5):
        for name, parameter in nets[0].named_parameters():
            parameter.grad = torch.randn(parameter.shape)
            nets[1].get_parameter(name).grad = parameter.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in nets[0].named_parameters():
        torch.testing.assert_close(nets[1].get_parameter(name).cpu(), parameter, rtol=2e-6, atol=1e-6)
