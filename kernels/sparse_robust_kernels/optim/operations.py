"""The steps of masked optimizers on lists of tensors: checked here, computed by the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import resolve
from sparse_robust_kernels.masks import MaskTable, same_layout, unpack_bits
from sparse_robust_kernels.masks.table import memory_order
from sparse_robust_kernels.optim.reference import INTEGER


def sgd_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    keep: Sequence[Tensor | None],
    copies: Sequence[Tensor | None] | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    first: bool = False,
    mask_gradients: bool = True,
    backend: str = "auto",
) -> None:
    """Take one step of SGD as ``torch.optim.SGD`` does, in place, with +0.0 wherever a mask is 0.

    Args:
        weights: dense floating-point tensors of any memory format, on one device; the kernels take fp32.
        gradients: of the same shapes, types and memory formats. What they hold at pruned places has no effect.
        buffers: momentum buffers like the weights; not used, and may be empty, if ``momentum`` is 0.
        keep: masks in the order of the weights' memory, None where nothing is pruned: `storage_bits`, or, which is
            quicker on a CPU, `storage_integers`.
        copies: bf16 tensors like the weights that the new weights are written to, rounded to nearest even; None for
            those without one.
        first: the buffers hold nothing yet and are set to the gradient, without dampening.
        mask_gradients: also set the gradients to +0.0 where pruned, which costs another 4 bytes a weight.

    Raises:
        ValueError: if the tensors do not fit together.
    """
    slots = [buffers] if momentum != 0 else []
    copies = [None] * len(weights) if copies is None else copies
    if not _check(weights, gradients, slots, keep, copies):
        return
    resolve("optim.sgd_", backend, weights[0].device, unfit=_unfit(weights, keep))(
        weights, gradients, buffers, keep, copies, lr=lr, momentum=momentum, dampening=dampening,
        weight_decay=weight_decay, nesterov=nesterov, maximize=maximize, first=first, mask_gradients=mask_gradients,
    )  # fmt: skip


def adamw_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    keep: Sequence[Tensor | None],
    copies: Sequence[Tensor | None] | None = None,
    *,
    step: float,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    mask_gradients: bool = True,
    backend: str = "auto",
) -> None:
    """Take one step of AdamW as ``torch.optim.AdamW`` does, in place, with +0.0 wherever a mask is 0.

    Args:
        means, squares: running means of the gradient and of its square, like the weights.
        step: number of this step, from 1.

    The other arguments and errors are those of `sgd_`.
    """
    copies = [None] * len(weights) if copies is None else copies
    if not _check(weights, gradients, [means, squares], keep, copies):
        return
    resolve("optim.adamw_", backend, weights[0].device, unfit=_unfit(weights, keep))(
        weights, gradients, means, squares, keep, copies, step=step, lr=lr, beta1=beta1, beta2=beta2, eps=eps,
        weight_decay=weight_decay, maximize=maximize, mask_gradients=mask_gradients,
    )  # fmt: skip


def storage_bits(packed: Tensor, weight: Tensor) -> Tensor:
    """Return a packed mask (logical order, as in files) in the order of the weight's memory, on its device.

    Raises:
        ValueError: if the mask has another size, or the weight's memory has gaps.
    """
    return _table(packed, weight).bits(0)


def storage_integers(packed: Tensor, weight: Tensor) -> Tensor:
    """Return `storage_bits` as integers of the weight's width: -1, every bit set, where kept, else 0.

    Raises:
        ValueError: as `storage_bits`.
    """
    return _table(packed, weight).wide(0, INTEGER[weight.element_size()])


def _table(packed: Tensor, weight: Tensor) -> MaskTable:
    if memory_order(weight) is None:
        raise ValueError(f"expected a dense weight, got shape {tuple(weight.shape)}, strides {weight.stride()}")
    keep = unpack_bits(packed.to(weight.device), weight.numel()).view(weight.shape)
    return MaskTable([keep], [weight])


def _unfit(weights: Sequence[Tensor], keep: Sequence[Tensor | None]) -> str:
    found = (f"{weight.dtype} weights" for weight in weights if weight.dtype != torch.float32)
    wide = ("masks of integers" for bits in keep if bits is not None and bits.dtype != torch.uint8)
    return next(found, "") or next(wide, "")


def _check(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    slots: Sequence[Sequence[Tensor]],
    keep: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
) -> bool:
    """Check that all fit together; return whether there is anything to do."""
    counts = {len(weights), len(gradients), len(keep), len(copies), *map(len, slots)}
    if len(counts) != 1:
        raise ValueError(f"expected one gradient, slot, mask and copy for each of {len(weights)} weights, got {counts}")
    for index, (weight, bits, copy) in enumerate(zip(weights, keep, copies, strict=True)):
        dense = weight.is_contiguous() or memory_order(weight) is not None
        if not weight.is_floating_point() or not dense or weight.device != weights[0].device:
            raise ValueError(
                f"weight {index}: expected a dense float tensor on {weights[0].device}, got {weight.dtype}, "
                f"strides {weight.stride()}, on {weight.device}"
            )
        for what, other in [("gradient", gradients[index]), *(("slot", each[index]) for each in slots)]:
            if other.dtype != weight.dtype or other.device != weight.device or not same_layout(other, weight):
                raise ValueError(_other(index, what, weight.dtype, weight, other))
        if copy is not None and not is_copy_of(copy, weight):
            raise ValueError(_other(index, "copy", torch.bfloat16, weight, copy))
        if bits is not None:
            size = (-(-weight.numel() // 8),)
            wide = bits.dtype == INTEGER[weight.element_size()] and bits.shape == (weight.numel(),)
            if not (wide or (bits.dtype == torch.uint8 and bits.shape == size)) or bits.device != weight.device:
                got = f"{bits.dtype} {tuple(bits.shape)} on {bits.device}"
                raise ValueError(f"weight {index}: expected a packed mask uint8 {size} on {weight.device}, got {got}")
    return bool(weights)


def is_copy_of(copy: Tensor, weight: Tensor) -> bool:
    """Whether a tensor can take the weight's values as bf16, element by element in the order of memory."""
    return copy.dtype == torch.bfloat16 and copy.device == weight.device and same_layout(copy, weight)


def _other(index: int, what: str, dtype: torch.dtype, weight: Tensor, other: Tensor) -> str:
    expected = f"{dtype} {tuple(weight.shape)}, strides {weight.stride()}, on {weight.device}"
    got = f"{other.dtype} {tuple(other.shape)}, strides {other.stride()}, on {other.device}"
    return f"the {what} of weight {index}: expected {expected}, got {got}"
