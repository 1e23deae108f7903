"""Masked SGD and AdamW in Triton: one pass over weights, gradients and slots, one launch for all parameters.

Products and sums are fused where torch fuses them, and nowhere else, so that SGD gives the bits of the reference. The
table of a launch holds addresses; a mask or a copy that is not there has address 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_robust_kernels._dispatch import register

BLOCK = 1024  # elements of a program: with 8 warps, one access of 128 bits a thread and tensor
WARPS = 8
_COLUMNS = tl.constexpr(8)  # of the table: weight, gradient, first and second slot, mask, copy; numel; first block


@triton.jit
def _address(row, COLUMN: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + COLUMN).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _read(pointer, index, inside, TAIL: tl.constexpr):
    if TAIL:
        return tl.load(pointer + index, mask=inside, other=0.0)
    return tl.load(pointer + index)  # without a mask, as 128 bits at a time


@triton.jit
def _write(pointer, index, value, inside, TAIL: tl.constexpr):
    if TAIL:
        tl.store(pointer + index, value, mask=inside)
    else:
        tl.store(pointer + index, value)


@triton.jit
def _kept(row, start, BLOCK: tl.constexpr):
    """Return whether each weight of a block is kept: a byte of the mask for every eight of them."""
    mask = tl.load(row + 4)
    byte = start // 8 + tl.arange(0, BLOCK // 8)
    there = (mask != 0) & (byte * 8 < tl.load(row + 6))
    packed = tl.load(mask.to(tl.pointer_type(tl.uint8)) + byte, mask=there, other=255).to(tl.int32)
    return tl.reshape((packed[:, None] >> tl.arange(0, 8)[None, :]) & 1, [BLOCK]) != 0


@triton.jit
def _bf16(value):
    """Return the bits of ``value`` rounded to bf16, to nearest even, as torch rounds."""
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, rounded, 0x7FC0).to(tl.uint16)


@triton.jit
def _gradient(row, index, kept, inside, MAXIMIZE: tl.constexpr, WRITE: tl.constexpr, ALIGNED: tl.constexpr,
              TAIL: tl.constexpr):  # fmt: skip
    """Read the gradient, cleared where the mask is 0, and write it back so if asked to."""
    pointer = _address(row, 1, tl.float32, ALIGNED)
    gradient = tl.where(kept, _read(pointer, index, inside, TAIL), 0.0)
    if WRITE:  # noqa: SIM102  (known when compiling, unlike the next)
        if tl.load(row + 4) != 0:
            _write(pointer, index, gradient, inside, TAIL)
    return -gradient if MAXIMIZE else gradient


@triton.jit
def _copy(row, index, weight, inside, ALIGNED: tl.constexpr, TAIL: tl.constexpr):
    if tl.load(row + 5) != 0:
        _write(_address(row, 5, tl.uint16, ALIGNED), index, _bf16(weight), inside, TAIL)


@triton.jit
def _sgd(
    row, start, lr, momentum, rate, decay,
    MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr,
    WRITE: tl.constexpr, ALIGNED: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = start + tl.arange(0, BLOCK)
    inside = index < tl.load(row + 6)
    weights = _address(row, 0, tl.float32, ALIGNED)
    kept = _kept(row, start, BLOCK)
    weight = _read(weights, index, inside, TAIL)
    step = _gradient(row, index, kept, inside, MAXIMIZE, WRITE, ALIGNED, TAIL)
    if DECAY:
        step = tl.fma(weight, decay, step)
    if MOMENTUM:
        buffers = _address(row, 2, tl.float32, ALIGNED)
        buffer = step
        if not FIRST:
            buffer = tl.fma(step, rate, _read(buffers, index, inside, TAIL) * momentum)
        _write(buffers, index, tl.where(kept, buffer, 0.0), inside, TAIL)
        step = tl.fma(buffer, momentum, step) if NESTEROV else buffer
    weight = tl.where(kept, tl.fma(step, -lr, weight), 0.0)
    _write(weights, index, weight, inside, TAIL)
    _copy(row, index, weight, inside, ALIGNED, TAIL)


@triton.jit
def sgd_kernel(
    table, owners, lr, momentum, rate, decay,
    MOMENTUM: tl.constexpr, FIRST: tl.constexpr, NESTEROV: tl.constexpr, DECAY: tl.constexpr, MAXIMIZE: tl.constexpr,
    WRITE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rate`` is 1 - dampening."""
    row = table + tl.load(owners + tl.program_id(0)) * _COLUMNS
    start = (tl.program_id(0) - tl.load(row + 7)) * BLOCK  # int64
    if start + BLOCK <= tl.load(row + 6):
        _sgd(row, start, lr, momentum, rate, decay, MOMENTUM, FIRST, NESTEROV, DECAY, MAXIMIZE, WRITE, ALIGNED, False,
             BLOCK)  # fmt: skip
    else:
        _sgd(row, start, lr, momentum, rate, decay, MOMENTUM, FIRST, NESTEROV, DECAY, MAXIMIZE, WRITE, ALIGNED, True,
             BLOCK)  # fmt: skip


@triton.jit
def _adamw(
    row, start, shrink, rate1, beta2, rate2, root, eps, step_size,
    MAXIMIZE: tl.constexpr, WRITE: tl.constexpr, ALIGNED: tl.constexpr, TAIL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = start + tl.arange(0, BLOCK)
    inside = index < tl.load(row + 6)
    weights = _address(row, 0, tl.float32, ALIGNED)
    means = _address(row, 2, tl.float32, ALIGNED)
    squares = _address(row, 3, tl.float32, ALIGNED)
    kept = _kept(row, start, BLOCK)
    weight = _read(weights, index, inside, TAIL)
    mean = _read(means, index, inside, TAIL)
    square = _read(squares, index, inside, TAIL)
    gradient = _gradient(row, index, kept, inside, MAXIMIZE, WRITE, ALIGNED, TAIL)
    mean = tl.where(kept, tl.fma(gradient - mean, rate1, mean), 0.0)
    square = tl.where(kept, tl.fma(gradient * rate2, gradient, square * beta2), 0.0)
    denominator = tl.div_rn(tl.sqrt_rn(square), root) + eps
    weight = tl.where(kept, weight * shrink - tl.div_rn(mean * step_size, denominator), 0.0)
    _write(means, index, mean, inside, TAIL)
    _write(squares, index, square, inside, TAIL)
    _write(weights, index, weight, inside, TAIL)
    _copy(row, index, weight, inside, ALIGNED, TAIL)


@triton.jit
def adamw_kernel(
    table, owners, shrink, rate1, beta2, rate2, root, eps, step_size,
    MAXIMIZE: tl.constexpr, WRITE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``rate1``, ``rate2``: 1 - beta; ``root``: square root of the second bias correction; ``shrink``: weight decay."""
    row = table + tl.load(owners + tl.program_id(0)) * _COLUMNS
    start = (tl.program_id(0) - tl.load(row + 7)) * BLOCK  # int64
    if start + BLOCK <= tl.load(row + 6):
        _adamw(row, start, shrink, rate1, beta2, rate2, root, eps, step_size, MAXIMIZE, WRITE, ALIGNED, False, BLOCK)
    else:
        _adamw(row, start, shrink, rate1, beta2, rate2, root, eps, step_size, MAXIMIZE, WRITE, ALIGNED, True, BLOCK)


@register("optim.sgd_", "triton", devices=("cuda",))
def sgd_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    keep: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    first: bool,
    mask_gradients: bool,
) -> None:
    """As the reference, in one launch."""
    slots = buffers if momentum != 0 else weights
    grid, options = _launch(weights, gradients, slots, slots, keep, copies)
    with torch.cuda.device_of(weights[0]):
        sgd_kernel[grid](
            lr=float(lr), momentum=float(momentum), rate=float(1 - dampening), decay=float(weight_decay),
            MOMENTUM=momentum != 0, FIRST=first, NESTEROV=nesterov, DECAY=weight_decay != 0, MAXIMIZE=maximize,
            WRITE=mask_gradients, **options,
        )  # fmt: skip


@register("optim.adamw_", "triton", devices=("cuda",))
def adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    keep: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    mask_gradients: bool,
) -> None:
    """As the reference, in one launch."""
    grid, options = _launch(weights, gradients, means, squares, keep, copies)
    with torch.cuda.device_of(weights[0]):
        adamw_kernel[grid](
            shrink=float(1 - lr * weight_decay), rate1=float(1 - beta1), beta2=float(beta2), rate2=float(1 - beta2),
            root=float((1 - beta2**step) ** 0.5), eps=float(eps), step_size=float(lr / (1 - beta1**step)),
            MAXIMIZE=maximize, WRITE=mask_gradients, **options,
        )  # fmt: skip


def _launch(weights: Sequence[Tensor], *others: Sequence[Tensor | None]) -> tuple[tuple[int], dict[str, Any]]:
    """Return the grid, and what all launches are given: the table, the map from blocks to its rows, the settings."""
    pointers = [
        [0 if tensor is None else tensor.data_ptr() for tensor in tensors] for tensors in (weights, *others)
    ]  # weight, gradient, two slots, mask, copy
    sizes = tuple(weight.numel() for weight in weights)
    aligned = not any(pointer % 16 for column in (*pointers[:4], pointers[5]) for pointer in column)
    owners, starts = _blocks(sizes, weights[0].device)
    rows = tuple(zip(*pointers, sizes, starts, strict=True))
    options = {"ALIGNED": aligned, "BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}
    return (owners.numel(),), {"table": _table(rows, weights[0].device), "owners": owners, **options}


@functools.lru_cache(maxsize=16)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, list[int]]:
    """Return the row of each block, int32 on the device, and the first block of each row."""
    blocks = torch.tensor([triton.cdiv(size, BLOCK) for size in sizes])
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), blocks)
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + triton.cdiv(size, BLOCK))
    return owners.to(device), starts[:-1]


@functools.lru_cache(maxsize=16)
def _table(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Return the table on the device. The addresses rarely change between steps; the same ones are sent once."""
    table = torch.tensor(rows)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
