"""One step of projected gradient ascent on a batch of images, and the random start before the first.

Images are ``[n, ...]`` and lie in the box ``[lo, hi]``; norms are taken per sample over all its elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import resolve
from sparse_robust_kernels.pgd_step import reference as _reference  # noqa: F401  (registers itself)

__all__ = ["L2_START_SPARE", "l2_start", "l2_step", "linf_project", "linf_start", "linf_step"]

# A uniform point of the L2 ball needs two numbers more than it has elements; see `l2_start`.
L2_START_SPARE = 2


def linf_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    step_size: float,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return ``clip(x_adv + step_size * sign(grad), max(x - eps, lo), min(x + eps, hi))``.

    sign(0) and sign(NaN) are 0. ``grad`` may have a lower precision than the images, which are float32 or float64.
    """
    _check(x_adv, x, grad, step_size=step_size, eps=eps, lo=lo, hi=hi)
    stepped: Tensor = resolve("pgd_step.linf_step", backend, x.device)(
        x_adv, x, grad, step_size=step_size, eps=eps, lo=lo, hi=hi
    )
    return stepped


def linf_project(
    x_adv: Tensor, x: Tensor, *, eps: float, lo: float = 0.0, hi: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Return ``clip(x_adv, max(x - eps, lo), min(x + eps, hi))``: the nearest point of ball and box, in any norm."""
    _check(x_adv, x, eps=eps, lo=lo, hi=hi)
    projected: Tensor = resolve("pgd_step.linf_project", backend, x.device)(x_adv, x, eps=eps, lo=lo, hi=hi)
    return projected


def linf_start(
    x: Tensor, uniform: Tensor, *, eps: float, lo: float = 0.0, hi: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Return a uniform point of the Linf ball around ``x``, clipped to the box.

    Args:
        uniform: float32 ``[n, numel]`` in [0, 1), for example from `philox_uniform`.
    """
    _check(x, x, eps=eps, lo=lo, hi=hi)
    _check_uniform(x, uniform, spare=0)
    started: Tensor = resolve("pgd_step.linf_start", backend, x.device)(x, uniform, eps=eps, lo=lo, hi=hi)
    return started


def l2_step(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    step_size: float,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return ``clip(x + d * min(1, eps / |d|), lo, hi)`` with ``d = x_adv + step_size * grad / |grad| - x``.

    Projects first and clips then; clipping only shortens the perturbation. A point inside the ball is clipped alone,
    without the detour over d. NaN elements of the gradient count as 0, and a gradient of zeros gives no step. The
    gradient is scaled by its largest element before its norm is taken, so that it neither under- nor overflows. The
    rounding of the last addition may leave the result outside of the ball by some units in the last place.
    """
    _check(x_adv, x, grad, step_size=step_size, eps=eps, lo=lo, hi=hi)
    stepped: Tensor = resolve("pgd_step.l2_step", backend, x.device)(
        x_adv, x, grad, step_size=step_size, eps=eps, lo=lo, hi=hi
    )
    return stepped


def l2_start(
    x: Tensor, uniform: Tensor, *, eps: float, lo: float = 0.0, hi: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Return a uniform point of the L2 ball around ``x``, clipped to the box.

    The first n coordinates of a uniform point of the unit sphere in n + 2 dimensions are uniform in the n-ball (Voelker
    et al., Efficiently sampling vectors and coordinates from the n-sphere and n-ball, 2017).

    Args:
        uniform: float32 ``[n, numel + 2]`` in [0, 1), for example from `philox_uniform`.
    """
    _check(x, x, eps=eps, lo=lo, hi=hi)
    _check_uniform(x, uniform, spare=L2_START_SPARE)
    started: Tensor = resolve("pgd_step.l2_start", backend, x.device)(x, uniform, eps=eps, lo=lo, hi=hi)
    return started


def _check(x_adv: Tensor, x: Tensor, grad: Tensor | None = None, *, lo: float, hi: float, **sizes: float) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x_adv.dtype != x.dtype or x.dim() < 2:
        raise ValueError(
            f"images are float32 or float64 [n, ...], got x {x.dtype} {tuple(x.shape)} and x_adv {x_adv.dtype}"
        )
    for name, tensor in (("x_adv", x_adv), ("grad", grad)):
        if tensor is not None and (tensor.shape != x.shape or tensor.device != x.device):
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} on {tensor.device}, but x {tuple(x.shape)} on {x.device}"
            )
    if grad is not None and not grad.is_floating_point():
        raise ValueError(f"grad must be floating point, got {grad.dtype}")
    for name, value in sizes.items():
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    if not lo < hi:
        raise ValueError(f"the box [{lo}, {hi}] is empty")


def _check_uniform(x: Tensor, uniform: Tensor, *, spare: int) -> None:
    expected = (len(x), x.flatten(1).shape[1] + spare)
    if uniform.dtype != torch.float32 or tuple(uniform.shape) != expected or uniform.device != x.device:
        raise ValueError(
            f"expected uniform numbers float32 {expected} on {x.device}, got {uniform.dtype} {tuple(uniform.shape)} "
            f"on {uniform.device}"
        )
