"""Masked SGD and AdamW in plain torch: the meaning of the operations, and the CPU path.

Each does what ``torch.optim`` does, operation by operation and so bit by bit, with the gradient at +0.0 where the mask
is 0; after it the weight and its slots are +0.0 there, whatever they held.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import register

CHUNK = 1 << 18  # elements: what an operation leaves is still in the cache for the next; a multiple of 8
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # of a float's width: its bits can always be cleared


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
    slots = [buffers] if momentum != 0 else []
    for weight, gradient, copy, kept, own in _each(weights, gradients, copies, keep, *slots):
        gradient = _masked(gradient, kept, mask_gradients, maximize)
        if weight_decay != 0:
            gradient = gradient.add(weight, alpha=weight_decay)
        if momentum != 0:
            (buffer,) = own
            if first:
                buffer.copy_(gradient)
            else:
                buffer.mul_(momentum).add_(gradient, alpha=1 - dampening)
            gradient = gradient.add(buffer, alpha=momentum) if nesterov else buffer
        weight.add_(gradient, alpha=-lr)
        _finish(kept, copy, weight, *own)


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
    for weight, gradient, copy, kept, (mean, square) in _each(weights, gradients, copies, keep, means, squares):
        gradient = _masked(gradient, kept, mask_gradients, maximize)
        if weight_decay != 0:
            weight.mul_(1 - lr * weight_decay)
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weight.addcdiv_(mean, (square.sqrt() / root).add_(eps), value=-step_size)
        _finish(kept, copy, weight, mean, square)


def _each(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    copies: Sequence[Tensor | None],
    keep: Sequence[Tensor | None],
    *slots: Sequence[Tensor],
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None, list[Tensor]]]:
    """Yield chunks of a weight, its gradient, copy, the bits to keep, and its slots, in the order of their memory."""
    for weight, gradient, copy, packed, *own in zip(weights, gradients, copies, keep, *slots, strict=True):
        flats = [flat(tensor) for tensor in (weight, gradient, *own)]
        flat_copy = None if copy is None else flat(copy)
        for start in range(0, weight.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            chunk, chunk_gradient, *chunks = [tensor[part] for tensor in flats]
            kept = None if packed is None else _spread(packed[start // 8 : (start + CHUNK) // 8], chunk)
            yield chunk, chunk_gradient, None if flat_copy is None else flat_copy[part], kept, chunks


def _spread(packed: Tensor, like: Tensor) -> Tensor:
    """Return integers of the width of ``like``: all bits set where a mask is 1, and none where it is 0."""
    table = _bytes(_INTEGER[like.element_size()], like.device)
    return table.index_select(0, packed.int()).view(-1)[: like.numel()]


@functools.cache
def _bytes(integer: torch.dtype, device: torch.device) -> Tensor:
    """Return ``[256, 8]``: what `_spread` makes of every byte."""
    return -((torch.arange(256)[:, None] >> torch.arange(8)) & 1).to(device, integer)


def flat(tensor: Tensor) -> Tensor:
    """Return a dense tensor as ``[numel]``, in the order of its memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _masked(gradient: Tensor, kept: Tensor | None, in_place: bool, maximize: bool) -> Tensor:
    if kept is not None:
        bits = gradient.view(kept.dtype)
        gradient = (bits.bitwise_and_(kept) if in_place else bits & kept).view(gradient.dtype)
    return -gradient if maximize else gradient


def _finish(kept: Tensor | None, copy: Tensor | None, *tensors: Tensor) -> None:
    """Clear what is pruned, then write the copy."""
    if kept is not None:
        for tensor in tensors:
            tensor.view(kept.dtype).bitwise_and_(kept)
    if copy is not None:
        copy.copy_(tensors[0])
