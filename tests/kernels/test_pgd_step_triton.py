"""The kernels of the projected step and of Philox: against their references, and their machine code.

Bit for bit where the arithmetic is exact or rounded once; in L2, where sums are taken in another order, up to rounding.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sparse_robust_kernels import resolve
from sparse_robust_kernels.pgd_step import (
    l2_random_start,
    l2_step,
    linf_project,
    linf_random_start,
    linf_start,
    linf_step,
    linf_step_normalized,
    rgd_step,
)
from sparse_robust_kernels.rng import philox_uniform, signed
from tests.kernels.harness import Compiled, compile_sm90, interpret

triton = pytest.importorskip("triton", reason="needs triton")
tl, triton_l2 = triton.language, importlib.import_module("sparse_robust_kernels.pgd_step.triton_l2")
normal = triton_l2.normal

EPS = 8 / 255
KEYS = (0, 1, 2**32, 2**63 + 5, 2**64 - 1)
SHAPES = [
    (1, 1),
    (3, 7),
    (2, 1000),
    (2, 1025),
    (5, 3, 3, 5),
    (2, 3, 33, 31),
    (2, 1, 28, 28),
    (2, 4, 16, 16),
    (0, 3, 4, 4),
]
GPU_SHAPES = [*SHAPES, (64, 3, 32, 32), (4, 3, 224, 224), (3, 3, 299, 299)]


def batch(shape: tuple[int, ...], dtype: torch.dtype, last: bool = False, device: str = "cpu") -> tuple[Tensor, ...]:
    """Iterates, images with exact zeros and ones, and gradients with zeros, NaN and infinity among them."""
    x = torch.rand(shape)
    x[x < 0.1], x[x > 0.9] = 0, 1
    x_adv = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    grad = torch.randn(shape) * (torch.rand(shape) > 0.1)
    for place, value in zip(range(2, grad.numel(), 11), (math.nan, math.inf, -math.inf, 1e-45, -0.0), strict=False):
        grad.view(-1)[place] = value
    layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
    return tuple(t.to(device).contiguous(memory_format=layout) for t in (x_adv, x, grad.to(dtype)))


def both(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[Tensor, Tensor]]:
    """The results of kernel and reference, in pairs."""
    ran, meant = (operation(*args, **kwargs, backend=backend) for backend in ("triton", "reference"))
    return [(ran, meant)] if isinstance(ran, Tensor) else list(zip(ran, meant, strict=True))


def assert_same(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    for ran, meant in both(operation, *args, **kwargs):
        assert ran.dtype == meant.dtype and ran.shape == meant.shape
        torch.testing.assert_close(ran, meant, rtol=0, atol=0, equal_nan=True)


def assert_near(operation: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    for ran, meant in both(operation, *args, **kwargs):
        torch.testing.assert_close(ran, meant, rtol=0, atol=3e-7)


# What must hold, on any device


def check_linf(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str = "cpu") -> None:
    x_adv, x, grad = batch(shape, dtype, last, device)
    for step_size, eps in ((2 / 255, EPS), (0.0, EPS), (1.0, 0.3), (0.1, 0.0)):
        assert_same(linf_step, x_adv, x, grad, step_size=step_size, eps=eps)
    assert_same(linf_step, x_adv, x, grad, step_size=2, eps=1, lo=-1, hi=2)  # integers are numbers too
    wild = x + grad.float()
    assert_same(linf_project, wild, x, eps=EPS, lo=0.1, hi=0.8)
    assert_same(linf_project, x, wild, eps=EPS)


def check_images(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    """All operations on images of one shape, with gradients of one type."""
    for last in (False, True)[: 1 + (len(shape) == 4)]:
        check_linf(shape, dtype, last, device)
        check_rgd(shape, dtype, last, device)
        check_l2(shape, dtype, last, device)
        if dtype == torch.float32:  # starts know of no gradient
            check_starts(shape, last, device)
        if len(shape) == 4 and shape[0]:
            check_normalized(shape, dtype, last, device)


def check_mixed_layouts(device: str = "cpu") -> None:
    x_adv, x, grad = batch((2, 3, 5, 7), torch.bfloat16, device=device)
    for one, two, three in product((False, True), repeat=3):
        mixed = [
            t.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            for t, last in ((x_adv, one), (x, two), (grad, three))
        ]
        mixed[0] = mixed[0].repeat_interleave(2, 3)[..., ::2]  # an iterate may be any view
        assert_same(linf_step, *mixed, step_size=0.01, eps=EPS)
        ran = linf_step(*mixed, step_size=0.01, eps=EPS, backend="triton")
        assert ran.stride() == mixed[1].stride()


def check_normalized(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str = "cpu") -> None:
    x_adv, x, grad = batch(shape, dtype, last, device)
    x[-1, -1, -1, -1] = math.nan  # stays one, though rounded by hand
    mean, std = torch.rand(shape[1]).to(device), (torch.rand(shape[1]) + 0.1).to(device)
    for fed in (torch.bfloat16, torch.float16, torch.float32):
        (ran, meant), pair = both(
            linf_step_normalized, x_adv, x, grad, mean, std, step_size=2 / 255, eps=EPS, dtype=fed
        )
        assert torch.equal(ran.nan_to_num(7), meant.nan_to_num(7))
        assert pair[0].dtype == fed and torch.equal(pair[0].nan_to_num(7), pair[1].nan_to_num(7))
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in pair)


def check_rgd(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str = "cpu") -> None:
    x_adv, x, grad = batch(shape, dtype, last, device)
    for step_size in (0.0, 0.37, 1e30, torch.rand(shape[0], device=device) * 1e3):
        assert_same(rgd_step, x_adv - x, x, grad, step_size=step_size, eps=EPS)
        assert_same(rgd_step, (x_adv - x) * 1e31, x, grad, step_size=step_size, eps=EPS, lo=0.2, hi=0.7)


def check_l2(shape: tuple[int, ...], dtype: torch.dtype, last: bool, device: str = "cpu") -> None:
    x_adv, x, grad = batch(shape, dtype, last, device)
    calm = torch.where(grad.isfinite(), grad, 0)
    for step_size, eps in ((0.1, 0.05), (10.0, 0.5), (0.0, 3.0), (0.2, 3.0), (0.2, 0.0)):
        assert_near(l2_step, x_adv, x, grad, step_size=step_size, eps=eps)
        assert_near(l2_step, x_adv, x, calm, step_size=step_size, eps=eps)


def check_l2_scales(size: int, device: str = "cpu") -> None:
    x_adv, x, grad = batch((2, size), torch.float32, device=device)
    grad = torch.where(grad.isfinite(), grad, 0)
    grad[0] *= torch.logspace(-20, 0, size).to(device)  # the largest elements lie in the last chunk
    for scale in (1e-42, 1e-30, 1.0, 1e30, 1e37):
        assert_near(l2_step, x_adv, x, grad * scale, step_size=0.1, eps=0.5)
    still = torch.stack([torch.zeros_like(grad[0]), torch.full_like(grad[0], math.nan)])
    ran = l2_step(x_adv, x, still, step_size=1.0, eps=100.0, backend="triton")
    assert torch.equal(ran, x_adv)


def check_starts(shape: tuple[int, ...], last: bool, device: str = "cpu") -> None:
    _, x, _ = batch(shape, torch.float32, last, device)
    ids = torch.randint(-(2**63), 2**63 - 1, (shape[0],)).to(device)
    streams = torch.randint(0, 2**32, (shape[0],)).to(device)
    for key, stream in zip(KEYS, (0, 2**32 - 1, streams, 1, streams), strict=True):
        assert_same(linf_random_start, x, ids, key=key, stream=stream, eps=EPS)
        assert_near(l2_random_start, x, ids, key=key, stream=stream, eps=0.5)
    held = torch.tensor(signed(KEYS[-1], 64), device=device)
    assert_near(l2_random_start, x, ids, key=held, stream=streams, eps=0.5)
    assert_same(linf_random_start, x, ids, key=held, stream=streams, eps=EPS)
    uniform = philox_uniform(ids, x.shape[1:].numel(), key=KEYS[-1], stream=streams, backend="reference")
    ran = linf_random_start(x, ids, key=KEYS[-1], stream=streams, eps=EPS, backend="triton")
    assert torch.equal(ran, linf_start(x, uniform, eps=EPS))


def check_uniform(device: str = "cpu") -> None:
    ids = torch.tensor([0, 5, -1, 2**40 + 3, 2**63 - 1, -(2**63)]).to(device)
    streams = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**32 + 5, -1]).to(device)
    for numel, key in zip((0, 1, 3, 4, 7, 1000, 1024, 1025, 3072), 2 * KEYS, strict=False):
        for stream in (0, 1, 2**31, 2**32 - 1, streams):
            assert_same(philox_uniform, ids, numel, key=key, stream=stream)
        held = torch.tensor(signed(key, 64), device=device)
        drawn = philox_uniform(ids, numel, key=key, stream=3, backend="reference")
        assert torch.equal(philox_uniform(ids, numel, key=held, stream=3, backend="triton"), drawn)
    assert_same(philox_uniform, torch.arange(12).to(device)[::2], 9, key=3, stream=torch.arange(12).to(device)[1::2])


# Gate 2: in the interpreter

images = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
pictures = pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) == 4], ids=lambda s: "x".join(map(str, s)))
gradients = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["32", "b16", "f16"])
layouts = pytest.mark.parametrize("last", [False, True], ids=["planes", "last"])


@interpret
@images
@gradients
def test_linf_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for last in (False, True)[: 1 + (len(shape) == 4)]:
        check_linf(shape, dtype, last)


@interpret
def test_linf_takes_any_mixture_of_layouts() -> None:
    check_mixed_layouts()


@interpret
@pictures
@layouts
def test_the_normalised_output_is_the_reference(shape: tuple[int, ...], last: bool) -> None:
    if shape[0]:
        check_normalized(shape, torch.bfloat16, last)


@interpret
@images
@gradients
def test_rgd_is_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_rgd(shape, dtype, len(shape) == 4)


@interpret
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8192), (2, 8193), (1, 3, 65, 65)], ids=str)
def test_l2_is_the_reference_up_to_rounding(shape: tuple[int, ...]) -> None:
    check_l2(shape, torch.bfloat16, False)
    check_l2(shape, torch.float32, True)


@interpret
@pytest.mark.parametrize("size", [100, 9000])
def test_l2_survives_gradients_of_any_scale(size: int) -> None:
    check_l2_scales(size)


@interpret
@pytest.mark.parametrize("shape", [*SHAPES, (1, 8200)], ids=str)  # the last has an odd number of chunks
def test_starts_draw_the_numbers_of_the_reference(shape: tuple[int, ...]) -> None:
    check_starts(shape, len(shape) == 4)


@interpret
def test_philox_is_the_reference() -> None:
    check_uniform()


@interpret
def test_nothing_is_written_beside_the_output() -> None:
    from sparse_robust_kernels.pgd_step.triton import linf_kernel

    x, out = torch.rand(3000), torch.full((4096,), math.nan)
    linf_kernel[(3,)](x, x, x, out[16:], 2999, 0.1, 0.1, 0.0, 1.0, STEP=True, BLOCK=1024)
    assert out.isnan().nonzero().flatten().tolist() == [*range(16), *range(16 + 2999, 4096)]


@triton.jit
def normal_kernel(uniform, out, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(out + i, normal(tl.load(uniform + i) * 2.0**24))


@interpret
def test_normal_numbers_are_accurate() -> None:
    ends = torch.arange(2**14)
    number = torch.cat([ends, 2**24 - 1 - ends, 2**23 - 2**13 + ends, torch.randint(2**24, (2**17 - 3 * 2**14,))])
    uniform = number * 2.0**-24
    out = torch.empty_like(uniform)
    normal_kernel[(1,)](uniform, out, 2**17)
    exact = torch.erfinv((2 * uniform.double() - 1) + 2.0**-24)
    torch.testing.assert_close(out.double(), exact, rtol=5e-7, atol=0)


def test_starts_round_nothing_before_they_scale() -> None:
    """What the kernels do with a number of 24 bits is what the references do with the uniform number."""
    number = torch.arange(2**24, dtype=torch.float32)
    uniform = number * 2.0**-24
    assert torch.equal(uniform.double(), number.double() / 2**24)
    assert torch.equal(number * 2.0**-23 - 1, 2 * uniform - 1)
    centred = number.double() * 2.0**-23 + (2.0**-24 - 1)  # exact, and so is one operation that rounds once
    assert torch.equal(centred.float().double(), centred)
    assert torch.equal(centred.float(), (2 * uniform - 1) + 2.0**-24)


@interpret
def test_what_the_kernels_do_not_take() -> None:
    x = torch.rand(2, 3, 4, 5)
    for odd, reason in ((x.double(), "float64"), (x.transpose(1, 3), "neither contiguous nor channels-last")):
        for operation in (linf_step, l2_step, rgd_step):
            with pytest.raises(ValueError, match=reason):
                operation(odd, odd, odd, step_size=0.1, eps=0.1, backend="triton")
            operation(odd, odd, odd, step_size=0.1, eps=0.1)
        with pytest.raises(ValueError, match=reason):
            linf_random_start(odd, torch.arange(2), key=0, stream=0, eps=0.1, backend="triton")
    with pytest.raises(ValueError, match="gradients of float64"):
        linf_step(x, x, x.double(), step_size=0.1, eps=0.1, backend="triton")
    many = torch.rand(1, 17, 2, 2)
    with pytest.raises(ValueError, match="more than 16 channels"):
        linf_step_normalized(many, many, many, many[0, :, 0, 0], many[0, :, 0, 0], step_size=1, eps=1, backend="triton")


def traced(backend: str, compiler: str) -> None:
    x_adv, x, grad = batch((3, 3, 4, 4), torch.bfloat16)
    ids, sizes, ones = torch.arange(3), torch.rand(3), torch.ones(3)
    grad = grad.nan_to_num(0.0, 0.0, 0.0)

    def everything(x_adv: Tensor, x: Tensor, grad: Tensor, step_size: float) -> list[Tensor]:
        args: dict[str, Any] = {"eps": EPS, "backend": backend}
        return [
            linf_step(x_adv, x, grad, step_size=step_size, **args),
            linf_project(x_adv, x, **args),
            *linf_step_normalized(x_adv, x, grad, ones, sizes, step_size=step_size, **args),
            l2_step(x_adv, x, grad, step_size=step_size, **args),
            *rgd_step(x_adv - x, x, grad, step_size=step_size, **args),
            *rgd_step(x_adv - x, x, grad, step_size=sizes, **args),
            linf_random_start(x, ids, key=2**64 - 1, stream=2**32 - 1, **args),
            l2_random_start(x, ids, key=2**63, stream=ids, **args),
            philox_uniform(ids, 10, key=2**63, stream=ids, backend=backend),
        ]

    compiled = torch.compile(everything, fullgraph=True, backend=compiler)
    for step_size in (0.01, 0.02):
        for ran, meant in zip(compiled(x_adv, x, grad, step_size), everything(x_adv, x, grad, step_size), strict=True):
            assert torch.equal(ran, meant) and ran.stride() == meant.stride()


def test_torch_compile_sees_through_the_references() -> None:
    traced("auto", "eager")


@interpret
def test_torch_compile_sees_through_the_kernels() -> None:
    traced("triton", "aot_eager")


@interpret
def test_operators_say_the_truth_about_themselves() -> None:
    x_adv, x, grad = batch((2, 3, 4, 4), torch.bfloat16, last=True)
    ids, ones = torch.arange(2), torch.ones(3)
    assert resolve("pgd_step.linf_step", "triton") and resolve("rng.philox_uniform", "triton")
    known, size = torch.ops.sparse_robust, {"eps": EPS, "lo": 0.0, "hi": 1.0}
    draw = {"key": -5, "stream": 7, **size}
    for operator, args, kwargs in (
        (known.pgd_step_linf_step, (x_adv, x, grad), {"step_size": 0.1, **size}),
        (known.pgd_step_linf_project, (x_adv, x), size),
        (known.pgd_step_linf_step_normalized, (x_adv, x, grad, ones, ones),
         {"step_size": 0.1, "dtype": torch.bfloat16, **size}),
        (known.pgd_step_l2_step, (x_adv, x, grad), {"step_size": 0.1, **size}),
        (known.pgd_step_rgd_step, (x_adv, x, grad, None), {"step_size": 0.1, **size}),
        (known.pgd_step_linf_random_start, (x, ids, ids, None), draw),
        (known.pgd_step_l2_random_start, (x, ids, None, ids[1]), draw),
        (known.rng_philox_uniform, (ids, 5, 2, 3, None), {}),
        (known.rng_philox_uniform, (ids, 5, 0, 0, ids, ids[1]), {}),
    ):  # fmt: skip
        torch.library.opcheck(operator, args, kwargs)


# Gate 3: machine code


class Code(NamedTuple):
    """A kernel, its arguments, and what its machine code may use."""

    name: str
    arguments: str
    constexprs: dict[str, Any]
    registers: int
    loads: set[int]
    stores: set[int]
    warps: int = 4
    half: bool = False  # compile it for bfloat16 gradients too
    rounded: bool = False  # products are rounded before they are added


SIZES = "step_size:fp32 eps:fp32 lo:fp32 hi:fp32"
COUNTER = "ids:*i64 streams:*i64 draw:i32 keys:*i64 key_low:i32 key_high:i32"
HIDDEN = "hidden:*fp32 x:*fp32 grad:GRAD hidden_out:*fp32 shown:*fp32 steps:*fp32"
TRIPLE = "x_adv:*fp32 x:*fp32 grad:GRAD out:*fp32"
CODES = [
    Code("linf_kernel", f"{TRIPLE} numel:i32 {SIZES}", {"STEP": True, "BLOCK": 1024}, 40, {128}, {128}, half=True,
         rounded=True),
    Code("linf_kernel", f"{TRIPLE} numel:i64 {SIZES}", {"STEP": True, "BLOCK": 1024}, 40, {128}, {128}),
    # The model's input is written two bytes at a time, three channels apart; the caches put them together.
    Code("linf_normalized_kernel", f"{TRIPLE} fed:*i16 mean:*fp32 std:*fp32 pixels:i32 {SIZES}",
         {"CHANNELS": 3, "BLOCK": 1024}, 80, {32, 128}, {16, 128}),
    Code("linf_normalized_last_kernel", f"{TRIPLE} fed:*i16 mean:*fp32 std:*fp32 numel:i32 {SIZES}",
         {"CHANNELS": 3, "BLOCK": 1024}, 48, {32, 128}, {128}, half=True),
    Code("rgd_kernel", f"{HIDDEN} per_sample:i32 {SIZES}", {"STEPS": False, "BLOCK": 1024}, 48, {128}, {128},
         half=True, rounded=True),
    Code("rgd_kernel", f"{HIDDEN} per_sample:i32 {SIZES}", {"STEPS": True, "BLOCK": 1024}, 48, {32, 128}, {128},
         rounded=True),
    Code("linf_start_kernel", f"x:*fp32 out:*fp32 numel:i32 eps:fp32 lo:fp32 hi:fp32 {COUNTER}",
         {"PER_SAMPLE": True, "KEYED": True, "QUADS": 512}, 40, {32, 64, 128}, {128}, rounded=True),
    *(Code("l2_whole_kernel", f"{TRIPLE} numel:i32 {SIZES}", {"BLOCK": block}, 96, {128}, {128}, block // 512, True)
      for block in (1024, 8192)),
    Code("l2_gather_kernel", "x_adv:*fp32 x:*fp32 grad:GRAD table:*fp32 rows:i32 numel:i32", {"BLOCK": 4096},
         80, {128}, {32}, 8, half=True),
    Code("l2_move_kernel", f"{TRIPLE} table:*fp32 rows:i32 numel:i32 {SIZES}", {"BLOCK": 4096, "CHUNKS": 64},
         96, {32, 128}, {128}, 8, half=True),
    *(Code("l2_start_kernel", f"x:*fp32 out:*fp32 table:*fp32 numel:i32 eps:fp32 lo:fp32 hi:fp32 {COUNTER}",
           {"PER_SAMPLE": True, "KEYED": True, "GATHER": gather, "QUADS": 1024, "CHUNKS": 128}, 64, loads, stores, 8)
      for gather, loads, stores in ((True, {32, 64}, {32}), (False, {32, 64, 128}, {128}))),
    *(Code("uniform_kernel", f"out:*fp32 numel:i32 {COUNTER}", {"PER_SAMPLE": True, "KEYED": keyed, "QUADS": 1024},
           40, {32, 64}, {128}) for keyed in (False, True)),
]  # fmt: skip


def compiled(code: Code, grad: str = "*fp32") -> Compiled:
    from sparse_robust_kernels.pgd_step import triton, triton_l2
    from sparse_robust_kernels.rng import triton as triton_rng

    kernel = next(vars(module)[code.name] for module in (triton, triton_l2, triton_rng) if code.name in vars(module))
    signature = dict(part.split(":") for part in code.arguments.replace("GRAD", grad).split())
    words = [name for name in ("draw", "key_low", "key_high") if name in signature]
    return compile_sm90(kernel, signature, code.constexprs, num_warps=code.warps, unaligned=words)


CASES = [(code, "*fp32") for code in CODES] + [(code, "*bf16") for code in CODES if code.half]


@pytest.mark.sm90
@pytest.mark.parametrize(("code", "grad"), CASES, ids=lambda case: case if isinstance(case, str) else case.name)
def test_machine_code(code: Code, grad: str) -> None:
    used = compiled(code, grad)
    assert used.spill_bytes == 0 and used.registers <= code.registers
    assert used.load_widths == code.loads and used.store_widths == code.stores
    # A gradient of 16 bits changes its layout on the way, 4 bytes an element; reductions leave a word a warp.
    assert used.shared_bytes <= 16 * 1024
    if code.rounded:
        assert "FFMA" not in used.sass and "fma.rn" not in used.ptx


# Gate 4: on a GPU


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@gradients
def test_kernels_on_a_gpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_images(shape, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("poison")
def test_the_rest_on_a_gpu() -> None:
    check_mixed_layouts("cuda")
    check_uniform("cuda")
    for size in (100, 9000):
        check_l2_scales(size, "cuda")
    x_adv, x, grad = (t.cuda() for t in batch((8, 3, 32, 32), torch.float32))
    captured = torch.cuda.CUDAGraph()
    linf_step(x_adv, x, grad, step_size=0.1, eps=EPS)  # compiled before the capture
    with torch.cuda.graph(captured):
        out = linf_step(x_adv, x, grad, step_size=0.1, eps=EPS)
    grad.neg_()
    captured.replay()
    assert torch.equal(out, linf_step(x_adv, x, grad, step_size=0.1, eps=EPS, backend="reference"))
    assert resolve("pgd_step.linf_step", "auto", "cuda") is resolve("pgd_step.linf_step", "triton", "cuda")
