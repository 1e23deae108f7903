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
from sparse_robust_kernels.rng.triton import WORDS, draw_four, draw_quads, split, words

WHOLE = 8192  # elements of a sample that one program holds
CHUNK = 4096  # elements of a program in a sweep
QUADS = 1024  # counters of a program in a start; 4 a thread, 16 elements
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
def normal(number):
    """Normal numbers but for a factor: erfinv(2u - 1), for ``number`` 2**24 u, to 5e-7 of it.

    A logarithm and erfinv(x) / x over it are polynomials, fitted for the least error over all numbers of 24 bits. Every
    one takes the same way: with one for what is near to 0 and one for what is far, a block takes both.
    """
    x = tl.fma(number, 2.0**-23, 2.0**-24 - 1)  # nothing is rounded here
    bits = ((1 - x) * (1 + x)).to(tl.int32, bitcast=True)
    # a = -log(1 - x**2) - 6. The bits as a number are the logarithm to the base of 2 but for what the mantissa lacks.
    m = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.5
    a = tl.fma(m, -0.0104837116, 0.0174142081)
    a = tl.fma(a, m, -0.0258623845)
    a = tl.fma(a, m, 0.0489289858)
    a = tl.fma(a, m, -0.0988048691)
    a = tl.fma(a, m, 0.222245402)
    a = tl.fma(a, m, 0.0264814244)
    a = tl.fma(a, m, -6.0588917)
    a = tl.fma((bits - 0x3F800000).to(tl.float32), -8.262958294867817e-08, a)  # log(2) * 2**-23
    ratio = tl.fma(a, 1.63845166e-15, -6.19906e-14)
    ratio = tl.fma(ratio, a, 7.11511276e-13)
    ratio = tl.fma(ratio, a, 1.69811324e-12)
    ratio = tl.fma(ratio, a, -1.08823049e-10)
    ratio = tl.fma(ratio, a, 9.25798098e-10)
    ratio = tl.fma(ratio, a, -7.94579043e-10)
    ratio = tl.fma(ratio, a, -5.58470395e-08)
    ratio = tl.fma(ratio, a, 7.20602468e-07)
    ratio = tl.fma(ratio, a, -5.21090125e-06)
    ratio = tl.fma(ratio, a, 1.40803908e-05)
    ratio = tl.fma(ratio, a, 0.000255509489)
    ratio = tl.fma(ratio, a, -0.00664662446)
    ratio = tl.fma(ratio, a, 0.199729525)
    ratio = tl.fma(ratio, a, 2.28642432)
    return ratio * x


@triton.jit(do_not_specialize=WORDS)
def l2_start_kernel(
    x, out, table, numel, eps, lo, hi, ids, streams, draw, keys, key_low, key_high,
    PER_SAMPLE: tl.constexpr, KEYED: tl.constexpr, GATHER: tl.constexpr, QUADS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # The sphere has two dimensions more than the image; both sweeps draw the same numbers, memory never holds them.
    chunks = tl.cdiv(numel + 2, 4 * QUADS)
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    quad = chunk.to(tl.int64) * QUADS + tl.arange(0, QUADS)
    if GATHER:
        a, b, c, d = draw_four(quad, row, ids, streams, draw, keys, key_low, key_high, PER_SAMPLE, KEYED)
        a, b, c, d = normal(a), normal(b), normal(c), normal(d)
        left = numel + 2 - 4 * quad
        squares = tl.where(left > 0, a * a, 0.0) + tl.where(left > 1, b * b, 0.0)
        squares += tl.where(left > 2, c * c, 0.0) + tl.where(left > 3, d * d, 0.0)
        tl.store(table + tl.program_id(0), tl.sum(squares, 0))
    else:
        drawn = normal(draw_quads(quad, row, ids, streams, draw, keys, key_low, key_high, PER_SAMPLE, KEYED))
        i = chunk.to(tl.int64) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
        entry = tl.arange(0, CHUNKS)
        squares = tl.load(table + row * chunks + entry, mask=entry < chunks, other=0.0)
        scale = tl.div_rn(eps, tl.sqrt_rn(tl.sum(squares, 0)))
        mask = i < numel
        i += row.to(tl.int64) * numel
        tl.store(out + i, box(tl.load(x + i, mask=mask, other=0.0) + drawn * scale, lo, hi), mask=mask)


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
