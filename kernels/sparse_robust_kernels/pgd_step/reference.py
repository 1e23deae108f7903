"""The projected gradient step in plain torch: the meaning of the operations, and their CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import register


@register("pgd_step.linf_step", "reference")
def linf_step(x_adv: Tensor, x: Tensor, grad: Tensor, *, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.linf_step`."""
    return linf_project(torch.add(x_adv, grad.sign(), alpha=step_size), x, eps=eps, lo=lo, hi=hi)


@register("pgd_step.linf_project", "reference")
def linf_project(x_adv: Tensor, x: Tensor, *, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.linf_project`."""
    return x_adv.clamp((x - eps).clamp_(min=lo), (x + eps).clamp_(max=hi))


@register("pgd_step.linf_start", "reference")
def linf_start(x: Tensor, uniform: Tensor, *, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.linf_start`."""
    # Product and sum are rounded one after the other: add's alpha would fuse them on some devices and not on others.
    noise = (2 * uniform - 1).view(x.shape).to(x.dtype) * eps
    return linf_project(x + noise, x, eps=eps, lo=lo, hi=hi)


@register("pgd_step.l2_step", "reference")
def l2_step(x_adv: Tensor, x: Tensor, grad: Tensor, *, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.l2_step`."""
    moved = x_adv + _direction(grad.to(x.dtype)) * step_size
    delta = moved - x
    norm = _norm(delta)
    return torch.where(norm > eps, x + delta * (eps / norm), moved).clamp_(lo, hi)


@register("pgd_step.l2_start", "reference")
def l2_start(x: Tensor, uniform: Tensor, *, eps: float, lo: float, hi: float) -> Tensor:
    """See `sparse_robust_kernels.pgd_step.l2_start`."""
    # Normal numbers by the inverse of their distribution; 2**-24 centres the grid, which keeps erfinv finite.
    normal = torch.erfinv((2 * uniform - 1) + 2.0**-24)
    point = (normal / _norm(normal))[:, : x.flatten(1).shape[1]]
    return (x + point.reshape(x.shape).to(x.dtype) * eps).clamp_(lo, hi)


def _direction(grad: Tensor) -> Tensor:
    grad = grad.nan_to_num()  # NaN becomes 0, infinity the largest number
    largest = grad.abs().flatten(1).amax(1).view(-1, *[1] * (grad.dim() - 1))
    scaled = torch.where(largest > 0, grad / largest, 0.0)
    return scaled / _norm(scaled).clamp_(min=1)  # the norm is 1 or more, or everything is 0


def _norm(tensor: Tensor) -> Tensor:
    # Flattened first, so that the order of the sum does not depend on the memory format.
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1).view(-1, *[1] * (tensor.dim() - 1))
