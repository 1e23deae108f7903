"""The projected gradient step in plain torch: the meaning of the operations, and their CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import register
from sparse_robust_kernels.rng.reference import philox_uniform

LARGEST_HIDDEN = 1e30
"""A hidden perturbation stays below it, far from where single precision overflows."""


@register("pgd_step.linf_step", "reference", compiles=True)
def linf_step(x_adv: Tensor, x: Tensor, grad: Tensor, *, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.linf_step`."""
    return linf_project(torch.add(x_adv, grad.sign().to(x.dtype), alpha=step_size), x, eps=eps, lo=lo, hi=hi)


@register("pgd_step.linf_project", "reference", compiles=True)
def linf_project(x_adv: Tensor, x: Tensor, *, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.linf_project`."""
    return x_adv.clamp((x - eps).clamp_(min=lo), (x + eps).clamp_(max=hi))


@register("pgd_step.linf_step_normalized", "reference", compiles=True)
def linf_step_normalized(
    x_adv: Tensor, x: Tensor, grad: Tensor, mean: Tensor, std: Tensor, *,
    step_size: float, eps: float, lo: float, hi: float, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `sparse_robust_kernels.pgd_step.linf_step_normalized`."""
    stepped = linf_step(x_adv, x, grad, step_size=step_size, eps=eps, lo=lo, hi=hi)
    fed = (stepped - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    return stepped, fed.to(dtype, memory_format=torch.channels_last)


@register("pgd_step.rgd_step", "reference", compiles=True)
def rgd_step(
    hidden: Tensor, x: Tensor, grad: Tensor, *, step_size: float | Tensor, eps: float, lo: float, hi: float
) -> tuple[Tensor, Tensor]:
    """See `sparse_robust_kernels.pgd_step.rgd_step`."""
    size = step_size.view(-1, *[1] * (x.dim() - 1)) if isinstance(step_size, Tensor) else step_size
    # Product and sum are rounded one after the other, as in `linf_start`.
    move = size * grad.to(x.dtype).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    hidden = (hidden + move).clamp_(-LARGEST_HIDDEN, LARGEST_HIDDEN)
    return hidden, linf_project(x + hidden, x, eps=eps, lo=lo, hi=hi)


@register("pgd_step.linf_start", "reference", compiles=True)
def linf_start(x: Tensor, uniform: Tensor, *, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.linf_start`."""
    # Product and sum are rounded one after the other: add's alpha would fuse them on some devices and not on others.
    noise = (2 * uniform - 1).view(x.shape).to(x.dtype) * eps
    return linf_project(x + noise, x, eps=eps, lo=lo, hi=hi)


@register("pgd_step.linf_random_start", "reference", compiles=True)
def linf_random_start(
    x: Tensor, ids: Tensor, *, key: int | Tensor, stream: int | Tensor, eps: float, lo: float, hi: float
) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.linf_random_start`."""
    uniform = philox_uniform(ids, x.shape[1:].numel(), key=key, stream=stream)
    return linf_start(x, uniform, eps=eps, lo=lo, hi=hi)


@register("pgd_step.l2_step", "reference", compiles=True)
def l2_step(x_adv: Tensor, x: Tensor, grad: Tensor, *, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.l2_step`."""
    moved = x_adv + _direction(grad.to(x.dtype)) * step_size
    delta = moved - x
    norm = _norm(delta)
    return torch.where(norm > eps, x + delta * (eps / norm), moved).clamp_(lo, hi)


@register("pgd_step.l2_start", "reference", compiles=True)
def l2_start(x: Tensor, uniform: Tensor, *, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.l2_start`."""
    # Normal numbers by the inverse of their distribution; 2**-24 centres the grid, which keeps erfinv finite.
    normal = torch.erfinv((2 * uniform - 1) + 2.0**-24)
    point = (normal / _norm(normal))[:, : x.flatten(1).shape[1]]
    return (x + point.reshape(x.shape).to(x.dtype) * eps).clamp_(lo, hi)


@register("pgd_step.l2_random_start", "reference", compiles=True)
def l2_random_start(
    x: Tensor, ids: Tensor, *, key: int | Tensor, stream: int | Tensor, eps: float, lo: float, hi: float
) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.l2_random_start`."""
    uniform = philox_uniform(ids, x.shape[1:].numel() + 2, key=key, stream=stream)
    return l2_start(x, uniform, eps=eps, lo=lo, hi=hi)


def _direction(grad: Tensor) -> Tensor:
    grad = grad.nan_to_num()  # NaN becomes 0, infinity the largest number
    largest = grad.abs().flatten(1).amax(1).view(-1, *[1] * (grad.dim() - 1))
    scaled = torch.where(largest > 0, grad / largest, 0.0)
    return scaled / _norm(scaled).clamp_(min=1)  # the norm is 1 or more, or everything is 0


def _norm(tensor: Tensor) -> Tensor:
    # Flattened first, so that the order of the sum does not depend on the memory format.
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1).view(-1, *[1] * (tensor.dim() - 1))
