"""L2 steps and starts in Triton. A sample that fits a program is read once; others take two sweeps.

The first sweep leaves what it sums of each chunk in a small table, the second adds the table up: no atomics, so the
same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_robust_kernels._dispatch import opaque, register
from sparse_robust_kernels.pgd_step.layout import memory_format
from sparse_robust_kernels.rng.triton import WORDS, split, uniform_quads, words

WHOLE = 8192  # elements of a sample that one program holds
CHUNK = 4096  # elements of a program in a sweep
QUADS = 512  # counters of a program in a start
FUSION = {"enable_fp_fusion": False}


@triton.jit
def box(value, lo, hi):
    value = tl.where(value < lo, lo, value)
    return tl.where(value > hi, hi, value)


@triton.jit
def finite(grad):
    """NaN becomes 0, infinity the largest number."""
    grad = grad.to(tl.float32)
    grad = tl.where(grad == grad, grad, 0.0)
    return tl.where(grad > 3.4028234663852886e38, 3.4028234663852886e38,
                    tl.where(grad < -3.4028234663852886e38, -3.4028234663852886e38, grad))  # fmt: skip


@triton.jit
def share(value, whole):
    """value / whole, and 0 where whole is."""
    return tl.where(whole > 0, tl.div_rn(value, tl.where(whole > 0, whole, 1.0)), 0.0)


@triton.jit
def shorten(moved, x, norm, eps, lo, hi):
    shorter = x + (moved - x) * tl.div_rn(eps, tl.where(norm > 0, norm, 1.0))
    return box(tl.where(norm > eps, shorter, moved), lo, hi)


@triton.jit
def l2_whole_kernel(x_adv, x, grad, out, numel, step_size, eps, lo, hi, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    mask = lane < numel
    i = tl.program_id(0).to(tl.int64) * numel + lane
    g = finite(tl.load(grad + i, mask=mask, other=0.0))
    g = share(g, tl.max(tl.abs(g), 0))
    length = tl.sqrt_rn(tl.sum(g * g, 0))
    here = tl.load(x + i, mask=mask, other=0.0)
    moved = tl.load(x_adv + i, mask=mask, other=0.0) + share(g, length) * step_size
    norm = tl.sqrt_rn(tl.sum((moved - here) * (moved - here), 0))
    tl.store(out + i, shorten(moved, here, norm, eps, lo, hi), mask=mask)


@triton.jit
def l2_gather_kernel(x_adv, x, grad, table, rows, numel, BLOCK: tl.constexpr):
    """Table [4, rows, chunks]: largest |g|, and with g in units of it g.g, d.g, d.d."""
    chunks = tl.cdiv(numel, BLOCK)
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    i = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    i += row.to(tl.int64) * numel
    g = finite(tl.load(grad + i, mask=mask, other=0.0))
    d = tl.load(x_adv + i, mask=mask, other=0.0) - tl.load(x + i, mask=mask, other=0.0)
    largest = tl.max(tl.abs(g), 0)
    g = share(g, largest)
    entry, column = table + tl.program_id(0), rows * chunks
    tl.store(entry, largest)
    tl.store(entry + column, tl.sum(g * g, 0))
    tl.store(entry + 2 * column, tl.sum(d * g, 0))
    tl.store(entry + 3 * column, tl.sum(d * d, 0))


@triton.jit
def l2_move_kernel(
    x_adv, x, grad, out, table, rows, numel, step_size, eps, lo, hi, BLOCK: tl.constexpr, CHUNKS: tl.constexpr
):
    chunks = tl.cdiv(numel, BLOCK)
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    entry, column = table + row * chunks + tl.arange(0, CHUNKS), rows * chunks
    present = tl.arange(0, CHUNKS) < chunks
    largest = tl.load(entry, mask=present, other=0.0)
    unit = tl.max(largest, 0)
    scale = share(largest, unit)
    gg = tl.sum(tl.load(entry + column, mask=present, other=0.0) * scale * scale, 0)
    dg = tl.sum(tl.load(entry + 2 * column, mask=present, other=0.0) * scale, 0)
    dd = tl.sum(tl.load(entry + 3 * column, mask=present, other=0.0), 0)
    length = tl.sqrt_rn(gg)
    ahead = share(dg, length) * step_size  # (d + s g / |g|)^2 = d.d + 2 s d.g / |g| + s^2
    square = dd + 2 * ahead + tl.where(length > 0, step_size * step_size, 0.0)
    norm = tl.sqrt_rn(tl.where(square < 0, 0.0, square))

    i = chunk.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < numel
    i += row.to(tl.int64) * numel
    g = share(share(finite(tl.load(grad + i, mask=mask, other=0.0)), unit), length)
    moved = tl.load(x_adv + i, mask=mask, other=0.0) + g * step_size
    here = tl.load(x + i, mask=mask, other=0.0)
    tl.store(out + i, shorten(moved, here, norm, eps, lo, hi), mask=mask)


@triton.jit
def normal(uniform):
    """Normal numbers but for a factor: erfinv(2u - 1) after Giles, Approximating the erfinv function (2011)."""
    x = (2 * uniform - 1) + 5.9604644775390625e-08
    w = -tl.log((1 - x) * (1 + x))
    a = w - 2.5
    near = 2.81022636e-08 * a + 3.43273939e-07
    near = near * a - 3.5233877e-06
    near = near * a - 4.39150654e-06
    near = near * a + 0.00021858087
    near = near * a - 0.00125372503
    near = near * a - 0.00417768164
    near = near * a + 0.246640727
    near = near * a + 1.50140941
    b = tl.sqrt_rn(tl.where(w < 5, 5.0, w)) - 3
    far = -0.000200214257 * b + 0.000100950558
    far = far * b + 0.00134934322
    far = far * b - 0.00367342844
    far = far * b + 0.00573950773
    far = far * b - 0.0076224613
    far = far * b + 0.00943887047
    far = far * b + 1.00167406
    far = far * b + 2.83297682
    return tl.where(w < 5, near, far) * x


@triton.jit(do_not_specialize=WORDS)
def l2_start_kernel(
    x, out, table, numel, eps, lo, hi, ids, streams, stream, keys, key_low, key_high,
    PER_SAMPLE: tl.constexpr, KEYED: tl.constexpr, GATHER: tl.constexpr, QUADS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # The sphere has two dimensions more than the image; both sweeps draw the same numbers, memory never holds them.
    chunks = tl.cdiv(numel + 2, 4 * QUADS)
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    quad = chunk.to(tl.int64) * QUADS + tl.arange(0, QUADS)
    drawn = normal(uniform_quads(quad, row, ids, streams, stream, keys, key_low, key_high, PER_SAMPLE, KEYED))
    i = chunk.to(tl.int64) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    if GATHER:
        tl.store(table + tl.program_id(0), tl.sum(tl.where(i < numel + 2, drawn * drawn, 0.0), 0))
    else:
        entry = tl.arange(0, CHUNKS)
        squares = tl.load(table + row * chunks + entry, mask=entry < chunks, other=0.0)
        point = tl.div_rn(drawn, tl.sqrt_rn(tl.sum(squares, 0)))
        mask = i < numel
        i += row.to(tl.int64) * numel
        tl.store(out + i, box(tl.load(x + i, mask=mask, other=0.0) + point * eps, lo, hi), mask=mask)


def _like(x: Tensor, *others: object, **_: object) -> Tensor:
    return torch.empty_like(x)


@register("pgd_step.l2_step", "triton", devices=("cuda",))
@opaque("pgd_step.l2_step", fake=_like)
def l2_step(x_adv: Tensor, x: Tensor, grad: Tensor, *, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.l2_step`."""
    layout, out, rows = memory_format(x), torch.empty_like(x), len(x)
    if not x.numel():
        return out
    numel, sizes = x.numel() // rows, (float(step_size), float(eps), float(lo), float(hi))
    x_adv, grad = x_adv.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    with torch.cuda.device_of(x):
        if numel <= WHOLE:
            block = max(256, triton.next_power_of_2(numel))
            l2_whole_kernel[(rows,)](
                x_adv, x, grad, out, numel, *sizes, BLOCK=block, num_warps=max(1, block // 512), **FUSION
            )
        else:
            chunks = triton.cdiv(numel, CHUNK)
            table = torch.empty((4, rows, chunks), dtype=torch.float32, device=x.device)
            l2_gather_kernel[(rows * chunks,)](x_adv, x, grad, table, rows, numel, BLOCK=CHUNK, num_warps=8, **FUSION)
            l2_move_kernel[(rows * chunks,)](
                x_adv, x, grad, out, table, rows, numel, *sizes, BLOCK=CHUNK, CHUNKS=triton.next_power_of_2(chunks),
                num_warps=8, **FUSION,
            )  # fmt: skip
    return out


@opaque("pgd_step.l2_random_start", fake=_like)
def _l2_random_start(
    x: Tensor, ids: Tensor, streams: Tensor | None, keys: Tensor | None, *,
    key: int, stream: int, eps: float, lo: float, hi: float,
) -> Tensor:  # fmt: skip
    images = x.contiguous()  # elements are counted in logical order
    out, numel = torch.empty_like(images), images.numel() // max(1, len(images))
    if out.numel():
        chunks = triton.cdiv(numel + 2, 4 * QUADS)
        table = torch.empty((len(x), chunks), dtype=torch.float32, device=x.device)
        named = words(ids, key if keys is None else keys, stream if streams is None else streams)
        with torch.cuda.device_of(x):
            for gather in (True, False):
                l2_start_kernel[(len(x) * chunks,)](
                    images, out, table, numel, float(eps), float(lo), float(hi), **named, GATHER=gather, QUADS=QUADS,
                    CHUNKS=triton.next_power_of_2(chunks), num_warps=8, **FUSION,
                )  # fmt: skip
    return out.contiguous(memory_format=memory_format(x))


@register("pgd_step.l2_random_start", "triton", devices=("cuda",))
def l2_random_start(
    x: Tensor, ids: Tensor, *, key: int | Tensor, stream: int | Tensor, eps: float, lo: float, hi: float
) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.l2_random_start`."""
    (word, keys), (draw, streams) = split(key, 64), split(stream, 64)
    return _l2_random_start(x, ids, streams, keys, key=word, stream=draw, eps=eps, lo=lo, hi=hi)
