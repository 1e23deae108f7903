"""Masked SGD and AdamW in plain torch: the meaning of the operations, and the CPU path.

Each does what ``torch.optim`` does, operation by operation and so bit by bit, with the gradient at +0.0 where the mask
is 0; after it the weight and its slots are +0.0 there, whatever they held.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import register

CHUNK = 1 << 18  # elements: what an operation leaves is still in the cache for the next; a multiple of VECTOR
VECTOR = 16  # floats of the widest vector registers
INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of a float's width: its bits can always be cleared


@register("optim.sgd_", "reference")
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
    """One step of SGD (Sutskever et al. 2013, in the form of ``torch.optim.SGD``)."""
    options: dict[str, Any] = {"lr": float(lr), "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    options |= {"weight_decay": weight_decay, "maximize": maximize, "is_first_step": first}
    slots = [buffers] if momentum != 0 else []
    for parts in _batches(weights, gradients, copies, keep, *slots, vectors=True):
        fused = [part for part in parts if _fuses(part.weight)]
        others = [part for part in parts if not _fuses(part.weight)]
        for step, some in ((torch._fused_sgd_, fused), (_sgd_, others)):
            if not some:
                continue
            step(
                [part.weight for part in some],
                [_masked(part.gradient, part.kept, mask_gradients) for part in some],
                [part.slots[0] for part in some] if slots else [],
                **options,
            )
        for part in parts:
            _finish(part)


def _fuses(weight: Tensor) -> bool:
    """Whether torch's fused operator gives the bits of ``torch.optim.SGD``: not so for what fills no vector."""
    return weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.numel() % VECTOR == 0


def _sgd_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    is_first_step: bool,
) -> None:
    """What torch's fused operator does in one pass, one operation at a time."""
    for index, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        gradient = -gradient if maximize else gradient
        if weight_decay != 0:
            gradient = gradient.add(weight, alpha=weight_decay)
        if momentum != 0:
            buffer = buffers[index]
            if is_first_step:
                buffer.copy_(gradient)
            else:
                buffer.mul_(momentum).add_(gradient, alpha=1 - dampening)
            gradient = gradient.add(buffer, alpha=momentum) if nesterov else buffer
        weight.add_(gradient, alpha=-lr)


@register("optim.adamw_", "reference")
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
    """One step of AdamW (Loshchilov and Hutter 2019, in the form of ``torch.optim.AdamW``)."""
    step_size, root = lr / (1 - beta1**step), (1 - beta2**step) ** 0.5
    for part in chain.from_iterable(_batches(weights, gradients, copies, keep, means, squares)):
        mean, square = part.slots
        gradient = _masked(part.gradient, part.kept, mask_gradients)
        gradient = -gradient if maximize else gradient
        if weight_decay != 0:
            part.weight.mul_(1 - lr * weight_decay)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        part.weight.addcdiv_(mean, (square.sqrt() / root).add_(eps), value=-step_size)
        _finish(part)


class _Part(NamedTuple):
    """A piece of a weight and of all that goes with it, flat, in the order of memory."""

    weight: Tensor
    gradient: Tensor
    copy: Tensor | None
    kept: Tensor | None
    """Integers of the weight's width: all bits set where the mask is 1, none where it is 0."""
    slots: list[Tensor]


def _batches(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    keep: Sequence[Tensor | None],
    *slots: Sequence[Tensor],
    vectors: bool = False,
) -> Iterator[list[_Part]]:
    """Yield the weights in pieces of at most CHUNK, small weights together: few calls, and each in the cache.

    With ``vectors`` what fills no vector at the end of a weight is a piece of its own.
    """
    batch: list[_Part] = []
    held = 0
    for weight, gradient, copy, mask, *own in zip(weights, gradients, copies, keep, *slots, strict=True):
        for part in _parts(weight, gradient, copy, mask, own, vectors):
            if batch and held + part.weight.numel() > CHUNK:
                yield batch
                batch, held = [], 0
            batch.append(part)
            held += part.weight.numel()
    if batch:
        yield batch


def _parts(
    weight: Tensor,
    gradient: Tensor,
    copy: Tensor | None,
    mask: Tensor | None,
    slots: Sequence[Tensor],
    vectors: bool,
) -> Iterator[_Part]:
    whole = weight.numel() // VECTOR * VECTOR if vectors else weight.numel()
    edges = [*range(0, whole, CHUNK), whole, weight.numel()]
    sizes = [end - start for start, end in pairwise(edges) if end > start]
    weights, gradients, *own = [flat(tensor).split(sizes) for tensor in (weight, gradient, *slots)]
    copies = flat(copy).split(sizes) if copy is not None else repeat(None)
    packed = mask is not None and mask.dtype == torch.uint8  # a piece begins with a byte
    masks = mask.split([-(-size // 8) for size in sizes] if packed else sizes) if mask is not None else repeat(None)
    for chunk, gradient, copy, mask, *chunks in zip(weights, gradients, copies, masks, *own, strict=False):
        yield _Part(chunk, gradient, copy, _spread(mask, chunk) if packed else mask, chunks)


def _spread(packed: Tensor, like: Tensor) -> Tensor:
    """Return integers of the width of ``like``: all bits set where a mask is 1, and none where it is 0."""
    table = _bytes(INTEGER[like.element_size()], like.device)
    return table.index_select(0, packed.int()).view(-1)[: like.numel()]


@functools.cache
def _bytes(integer: torch.dtype, device: torch.device) -> Tensor:
    """Return ``[256, 8]``: what `_spread` makes of every byte."""
    return -((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(device, integer)


def flat(tensor: Tensor) -> Tensor:
    """Return a dense tensor as ``[numel]``, in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _masked(gradient: Tensor, kept: Tensor | None, in_place: bool) -> Tensor:
    if kept is None:
        return gradient
    bits = gradient.view(kept.dtype)
    return (bits.bitwise_and_(kept) if in_place else bits & kept).view(gradient.dtype)


def _finish(part: _Part) -> None:
    """Clear what is pruned, then write the copy."""
    if part.kept is not None:
        for tensor in (part.weight, *part.slots):
            tensor.view(part.kept.dtype).bitwise_and_(part.kept)
    if part.copy is not None:
        part.copy.copy_(part.weight)
