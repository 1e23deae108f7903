"""Linf steps and starts in Triton: one pass over memory, the reference's bits. ``triton_l2.py`` holds the L2 ones.

Every product is rounded before it is added to something (``enable_fp_fusion=False``), as separate operations do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_robust_kernels._dispatch import opaque, register
from sparse_robust_kernels.pgd_step import triton_l2 as _l2  # noqa: F401  (registers itself)
from sparse_robust_kernels.pgd_step.layout import memory_format
from sparse_robust_kernels.pgd_step.reference import LARGEST_HIDDEN
from sparse_robust_kernels.rng.triton import WORDS, draw_quads, split, words

BLOCK = 1024  # elements of a program; 8 a thread
QUADS = 512  # counters of a program in a start; 4 a thread, 16 elements
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}
_LARGEST_HIDDEN = tl.constexpr(LARGEST_HIDDEN)


@triton.jit
def clip(value, x, eps, lo, hi):
    """Clip to ball and box. Comparisons, not minimum and maximum: those treat NaN as the version of Triton pleases."""
    low, high = x - eps, x + eps
    low = tl.where(low < lo, lo, low)
    high = tl.where(high > hi, hi, high)
    value = tl.where(value < low, low, value)
    value = tl.where(value > high, high, value)
    return tl.where(x != x, x, value)


@triton.jit
def climb(x_adv, grad, step_size):
    grad = grad.to(tl.float32)
    return x_adv + tl.where(grad > 0, step_size, tl.where(grad < 0, -step_size, 0.0))


@triton.jit
def narrow(value, element: tl.constexpr):
    """Round to an element type, int16 standing for the bits of bfloat16: to nearest, ties to even, by hand.

    Hardware rounds the same way, but the interpreter truncates.
    """
    if element == tl.int16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value != value, 0x7FC0, bits).to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        return value.to(element)


@triton.jit
def linf_kernel(x_adv, x, grad, out, numel, step_size, eps, lo, hi, STEP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    value = tl.load(x_adv + i, mask=mask, other=0.0)
    if STEP:
        value = climb(value, tl.load(grad + i, mask=mask, other=0.0), step_size)
    tl.store(out + i, clip(value, tl.load(x + i, mask=mask, other=0.0), eps, lo, hi), mask=mask)


@triton.jit
def linf_normalized_kernel(
    x_adv, x, grad, out, fed, mean, std, pixels, step_size, eps, lo, hi, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    # Images are planes [n, C, pixels], the model is fed [n, pixels, C]: a program does its pixels of all planes.
    chunks = tl.cdiv(pixels, BLOCK)
    image = (tl.program_id(0) // chunks).to(tl.int64) * pixels * CHANNELS
    i = (tl.program_id(0) % chunks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < pixels
    for c in tl.static_range(CHANNELS):
        at = image + c * pixels + i
        value = tl.load(x_adv + at, mask=mask, other=0.0)
        value = climb(value, tl.load(grad + at, mask=mask, other=0.0), step_size)
        value = clip(value, tl.load(x + at, mask=mask, other=0.0), eps, lo, hi)
        tl.store(out + at, value, mask=mask)
        value = tl.div_rn(value - tl.load(mean + c), tl.load(std + c))
        tl.store(fed + image + i * CHANNELS + c, narrow(value, fed.dtype.element_ty), mask=mask)


@triton.jit
def linf_normalized_last_kernel(
    x_adv, x, grad, out, fed, mean, std, numel, step_size, eps, lo, hi, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    # Images and what the model is fed are [n, pixels, C] alike.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = (tl.program_id(0) % CHANNELS * (BLOCK % CHANNELS) + tl.arange(0, BLOCK)) % CHANNELS
    middle, spread = tl.load(mean + channel), tl.load(std + channel)
    mask = i < numel
    value = tl.load(x_adv + i, mask=mask, other=0.0)
    value = climb(value, tl.load(grad + i, mask=mask, other=0.0), step_size)
    value = clip(value, tl.load(x + i, mask=mask, other=0.0), eps, lo, hi)
    tl.store(out + i, value, mask=mask)
    value = tl.div_rn(value - middle, spread)
    tl.store(fed + i, narrow(value, fed.dtype.element_ty), mask=mask)


@triton.jit
def rgd_kernel(
    hidden, x, grad, hidden_out, shown, steps, per_sample, step_size, eps, lo, hi,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(per_sample, BLOCK)
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    i = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < per_sample
    i += row.to(tl.int64) * per_sample
    g = tl.load(grad + i, mask=mask, other=0.0).to(tl.float32)
    g = tl.where(tl.abs(g) < float("inf"), g, 0.0)
    moved = tl.load(hidden + i, mask=mask, other=0.0) + (tl.load(steps + row) if STEPS else step_size) * g
    moved = tl.where(moved > _LARGEST_HIDDEN, _LARGEST_HIDDEN, moved)
    moved = tl.where(moved < -_LARGEST_HIDDEN, -_LARGEST_HIDDEN, moved)
    here = tl.load(x + i, mask=mask, other=0.0)
    tl.store(hidden_out + i, moved, mask=mask)
    tl.store(shown + i, clip(here + moved, here, eps, lo, hi), mask=mask)


@triton.jit(do_not_specialize=WORDS)
def linf_start_kernel(
    x, out, numel, eps, lo, hi, ids, streams, draw, keys, key_low, key_high,
    PER_SAMPLE: tl.constexpr, KEYED: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(numel, 4 * QUADS)
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    quad = chunk.to(tl.int64) * QUADS + tl.arange(0, QUADS)
    i = chunk.to(tl.int64) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    mask = i < numel
    i += row.to(tl.int64) * numel
    here = tl.load(x + i, mask=mask, other=0.0)  # on its way while the numbers are drawn
    drawn = draw_quads(quad, row, ids, streams, draw, keys, key_low, key_high, PER_SAMPLE, KEYED)
    noise = (drawn * 2.0**-23 - 1) * eps
    tl.store(out + i, clip(here + noise, here, eps, lo, hi), mask=mask)


def _like(x: Tensor, *others: Tensor, **_: object) -> Tensor:
    return torch.empty_like(x)


@register("pgd_step.linf_step", "triton", devices=("cuda",))
@opaque("pgd_step.linf_step", fake=_like)
def linf_step(x_adv: Tensor, x: Tensor, grad: Tensor, *, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.linf_step`."""
    return _linf(x_adv, x, grad, step_size, eps, lo, hi)


@register("pgd_step.linf_project", "triton", devices=("cuda",))
@opaque("pgd_step.linf_project", fake=_like)
def linf_project(x_adv: Tensor, x: Tensor, *, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.linf_project`."""
    return _linf(x_adv, x, None, 0.0, eps, lo, hi)


def _linf(x_adv: Tensor, x: Tensor, grad: Tensor | None, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    layout, out, numel = memory_format(x), torch.empty_like(x), x.numel()
    if numel:
        x_adv = x_adv.contiguous(memory_format=layout)
        upwards = x_adv if grad is None else grad.contiguous(memory_format=layout)
        with torch.cuda.device_of(x):
            linf_kernel[(triton.cdiv(numel, BLOCK),)](
                x_adv, x, upwards, out, numel, float(step_size), float(eps), float(lo), float(hi),
                STEP=grad is not None, BLOCK=BLOCK, **LAUNCH,
            )  # fmt: skip
    return out


def _fake_normalized(
    x_adv: Tensor, x: Tensor, *others: Tensor, dtype: torch.dtype, **_: object
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)


@register("pgd_step.linf_step_normalized", "triton", devices=("cuda",))
@opaque("pgd_step.linf_step_normalized", fake=_fake_normalized)
def linf_step_normalized(
    x_adv: Tensor, x: Tensor, grad: Tensor, mean: Tensor, std: Tensor, *,
    step_size: float, eps: float, lo: float, hi: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `sparse_robust_kernels.pgd_step.linf_step_normalized`."""
    layout, (n, channels, height, width) = memory_format(x), x.shape
    out, fed = torch.empty_like(x), torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    if not x.numel():
        return out, fed
    planes = layout == torch.contiguous_format
    kernel = linf_normalized_kernel if planes else linf_normalized_last_kernel
    size = height * width if planes else x.numel()
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(size, BLOCK) * (n if planes else 1),)](
            x_adv.contiguous(memory_format=layout), x, grad.contiguous(memory_format=layout), out,
            fed.view(torch.int16) if dtype == torch.bfloat16 else fed, mean.contiguous(), std.contiguous(), size,
            float(step_size), float(eps), float(lo), float(hi), CHANNELS=channels, BLOCK=BLOCK, **LAUNCH,
        )  # fmt: skip
    return out, fed


def _fake_rgd(hidden: Tensor, x: Tensor, grad: Tensor, steps: Tensor | None, **_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@opaque("pgd_step.rgd_step", fake=_fake_rgd)
def _rgd_step(
    hidden: Tensor, x: Tensor, grad: Tensor, steps: Tensor | None, *, step_size: float, eps: float, lo: float, hi: float
) -> tuple[Tensor, Tensor]:
    layout, moved, shown = memory_format(x), torch.empty_like(x), torch.empty_like(x)
    if x.numel():
        rows = 1 if steps is None else len(x)
        size = x.numel() // rows
        with torch.cuda.device_of(x):
            rgd_kernel[(rows * triton.cdiv(size, BLOCK),)](
                hidden.contiguous(memory_format=layout), x, grad.contiguous(memory_format=layout), moved, shown,
                x if steps is None else steps.contiguous(), size, float(step_size), float(eps), float(lo), float(hi),
                STEPS=steps is not None, BLOCK=BLOCK, **LAUNCH,
            )  # fmt: skip
    return moved, shown


@register("pgd_step.rgd_step", "triton", devices=("cuda",))
def rgd_step(
    hidden: Tensor, x: Tensor, grad: Tensor, *, step_size: float | Tensor, eps: float, lo: float, hi: float
) -> tuple[Tensor, Tensor]:
    """See `sparse_robust_kernels.pgd_step.rgd_step`."""
    steps, size = (step_size, 0.0) if isinstance(step_size, Tensor) else (None, step_size)
    return _rgd_step(hidden, x, grad, steps, step_size=size, eps=eps, lo=lo, hi=hi)


def _fake_start(x: Tensor, *others: object, **_: object) -> Tensor:
    return torch.empty_like(x)


@opaque("pgd_step.linf_random_start", fake=_fake_start)
def _linf_random_start(
    x: Tensor, ids: Tensor, streams: Tensor | None, keys: Tensor | None, *,
    key: int, stream: int, eps: float, lo: float, hi: float,
) -> Tensor:  # fmt: skip
    images = x.contiguous()  # elements are counted in logical order
    out, numel = torch.empty_like(images), images.numel() // max(1, len(images))
    if out.numel():
        named = words(ids, key if keys is None else keys, stream if streams is None else streams)
        with torch.cuda.device_of(x):
            linf_start_kernel[(len(x) * triton.cdiv(numel, 4 * QUADS),)](
                images, out, numel, float(eps), float(lo), float(hi), **named, QUADS=QUADS, **LAUNCH
            )
    return out.contiguous(memory_format=memory_format(x))


@register("pgd_step.linf_random_start", "triton", devices=("cuda",))
def linf_random_start(
    x: Tensor, ids: Tensor, *, key: int | Tensor, stream: int | Tensor, eps: float, lo: float, hi: float
) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.linf_random_start`."""
    (word, keys), (draw, streams) = split(key, 64), split(stream, 64)
    return _linf_random_start(x, ids, streams, keys, key=word, stream=draw, eps=eps, lo=lo, hi=hi)
