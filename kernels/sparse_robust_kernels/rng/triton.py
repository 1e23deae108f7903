"""Philox4x32-10 in Triton: one program draws for a run of one sample's elements, four to a counter."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_robust_kernels._dispatch import opaque, register
from sparse_robust_kernels.rng.reference import signed

QUADS = 1024  # counters of a program; 8 a thread, 32 numbers: less of what a thread does but once
WORDS = ("draw", "key_low", "key_high")  # 32 bits each, whatever their value: nothing to specialise on


@triton.jit
def _round(first, second, third, fourth, low, high):
    # Products of 64 bits, of which both halves are used: one instruction, where tl.philox takes two.
    one, other = first.to(tl.uint64) * 0xD2511F53, third.to(tl.uint64) * 0xCD9E8D57
    return (
        (other >> 32).to(tl.uint32) ^ second ^ low, other.to(tl.uint32),
        (one >> 32).to(tl.uint32) ^ fourth ^ high, one.to(tl.uint32),
    )  # fmt: skip


@triton.jit
def draw_four(quad, row, ids, streams, draw, keys, key_low, key_high, PER_SAMPLE: tl.constexpr, KEYED: tl.constexpr):
    """The numbers 4 * quad, ... + 1, + 2 and + 3 of a row, times 2**24; see `philox_uniform` of the reference."""
    sample = tl.load(ids + row)
    word = tl.load(streams + row).to(tl.uint32) if PER_SAMPLE else draw.to(tl.uint32, bitcast=True)
    if KEYED:
        key = tl.load(keys)
        low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    else:
        low, high = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    first, second, third, fourth = quad.to(tl.uint32), word, sample.to(tl.uint32), (sample >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        first, second, third, fourth = _round(first, second, third, fourth, low, high)
        low += 0x9E3779B9
        high += 0xBB67AE85
    return _number(first), _number(second), _number(third), _number(fourth)


@triton.jit
def _number(word):
    return (word >> 8).to(tl.int32).to(tl.float32)


@triton.jit
def draw_quads(quad, row, ids, streams, draw, keys, key_low, key_high, PER_SAMPLE: tl.constexpr, KEYED: tl.constexpr):
    """The same numbers in order, in one tensor. A thread holds whole quads, so that it stores 16 bytes at once."""
    first, second, third, fourth = draw_four(quad, row, ids, streams, draw, keys, key_low, key_high, PER_SAMPLE, KEYED)
    return tl.join(tl.join(first, third), tl.join(second, fourth)).reshape(4 * quad.shape[0])


@triton.jit(do_not_specialize=WORDS)
def uniform_kernel(
    ids, streams, out, numel, draw, keys, key_low, key_high,
    PER_SAMPLE: tl.constexpr, KEYED: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    chunks = tl.cdiv(numel, 4 * QUADS)
    row, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    quad = chunk.to(tl.int64) * QUADS + tl.arange(0, QUADS)
    values = draw_quads(quad, row, ids, streams, draw, keys, key_low, key_high, PER_SAMPLE, KEYED) * 2.0**-24
    element = chunk.to(tl.int64) * (4 * QUADS) + tl.arange(0, 4 * QUADS)
    tl.store(out + row.to(tl.int64) * numel + element, values, mask=element < numel)


def words(ids: Tensor, key: int | Tensor, stream: int | Tensor) -> dict[str, Any]:
    """Return the arguments that name the numbers: tensors as they are, words as signed 32-bit integers.

    The stream is called ``draw``: a launch has an argument ``stream`` of its own, and refuses a kernel's.
    """
    word, per_sample, keyed = 0 if isinstance(key, Tensor) else key, isinstance(stream, Tensor), isinstance(key, Tensor)
    return {
        "ids": ids.contiguous(),
        "streams": stream.contiguous() if isinstance(stream, Tensor) else ids,
        "draw": 0 if isinstance(stream, Tensor) else signed(stream, 32),
        "keys": key if isinstance(key, Tensor) else ids,
        "key_low": signed(word, 32),
        "key_high": signed(word >> 32, 32),
        "PER_SAMPLE": per_sample,
        "KEYED": keyed,
    }


def split(value: int | Tensor, bits: int) -> tuple[int, Tensor | None]:
    """Return a word that comes as a number or as a tensor as an operator's two arguments."""
    return (0, value) if isinstance(value, Tensor) else (signed(value, bits), None)


def _fake(ids: Tensor, numel: int, key: int, stream: int, streams: Tensor | None, keys: Tensor | None = None) -> Tensor:
    return ids.new_empty((len(ids), numel), dtype=torch.float32)


@opaque("rng.philox_uniform", fake=_fake)
def _uniform(
    ids: Tensor, numel: int, key: int, stream: int, streams: Tensor | None, keys: Tensor | None = None
) -> Tensor:
    out = torch.empty((len(ids), numel), dtype=torch.float32, device=ids.device)
    if out.numel():
        grid = (len(ids) * triton.cdiv(numel, 4 * QUADS),)
        with torch.cuda.device_of(out):
            named = words(ids, key if keys is None else keys, stream if streams is None else streams)
            uniform_kernel[grid](out=out, numel=numel, QUADS=QUADS, num_warps=4, **named)
    return out


@register("rng.philox_uniform", "triton", devices=("cuda",))
def philox_uniform(ids: Tensor, numel: int, *, key: int | Tensor, stream: int | Tensor) -> Tensor:
    """See `sparse_robust_kernels.rng.philox_uniform`."""
    (word, keys), (draw, streams) = split(key, 64), split(stream, 64)
    return _uniform(ids, numel, word, draw, streams, keys)
