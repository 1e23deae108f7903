"""One step of projected gradient ascent on a batch of images, and the random start before the first.

Images are ``[n, ...]`` and lie in the box ``[lo, hi]``; norms are taken per sample over all its elements. The kernels
take float32 images that are contiguous or channels-last, and gradients of up to 32 bits; what else there is runs as
plain torch. They work in the storage order of ``x`` and copy what is stored in another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_robust_kernels._dispatch import resolve
from sparse_robust_kernels.pgd_step import reference as _reference  # noqa: F401  (registers itself)
from sparse_robust_kernels.pgd_step.layout import unfit
from sparse_robust_kernels.rng import check_counter

__all__ = [
    "L2_START_SPARE",
    "l2_random_start",
    "l2_start",
    "l2_step",
    "linf_project",
    "linf_random_start",
    "linf_start",
    "linf_step",
    "linf_step_normalized",
    "rgd_step",
]

# A uniform point of the L2 ball needs two numbers more than it has elements; see `l2_start`.
L2_START_SPARE = 2

# Channels that one program of the normalising kernel goes through.
_MOST_CHANNELS = 16


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
    stepped: Tensor = resolve("pgd_step.linf_step", backend, x.device, unfit=unfit(x, grad))(
        x_adv, x, grad, step_size=step_size, eps=eps, lo=lo, hi=hi
    )
    return stepped


def linf_step_normalized(
    x_adv: Tensor,
    x: Tensor,
    grad: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    step_size: float,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the images of `linf_step`, and ``(images - mean) / std`` as ``dtype``, channels last, for a model.

    Args:
        x_adv, x, grad: ``[n, C, H, W]``.
        mean, std: ``[C]``, of the images' type.
        dtype: bfloat16, float16 or float32; rounded once, to nearest.
    """
    _check(x_adv, x, grad, step_size=step_size, eps=eps, lo=lo, hi=hi)
    if x.dim() != 4:
        raise ValueError(f"images to normalise are [n, C, H, W], got {tuple(x.shape)}")
    for name, tensor in (("mean", mean), ("std", std)):
        if tensor.shape != x.shape[1:2] or tensor.dtype != x.dtype or tensor.device != x.device:
            raise ValueError(
                f"{name} must be {x.dtype} ({x.shape[1]},) on {x.device}, got {tensor.dtype} {tuple(tensor.shape)} "
                f"on {tensor.device}"
            )
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"a model is fed bfloat16, float16 or float32, got {dtype}")
    reason = unfit(x, grad) or (f"more than {_MOST_CHANNELS} channels" if x.shape[1] > _MOST_CHANNELS else "")
    both: tuple[Tensor, Tensor] = resolve("pgd_step.linf_step_normalized", backend, x.device, unfit=reason)(
        x_adv, x, grad, mean, std, step_size=step_size, eps=eps, lo=lo, hi=hi, dtype=dtype
    )
    return both


def linf_project(
    x_adv: Tensor, x: Tensor, *, eps: float, lo: float = 0.0, hi: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Return ``clip(x_adv, max(x - eps, lo), min(x + eps, hi))``: the nearest point of ball and box, in any norm."""
    _check(x_adv, x, eps=eps, lo=lo, hi=hi)
    projected: Tensor = resolve("pgd_step.linf_project", backend, x.device, unfit=unfit(x))(
        x_adv, x, eps=eps, lo=lo, hi=hi
    )
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


def linf_random_start(
    x: Tensor,
    ids: Tensor,
    *,
    key: int | Tensor,
    stream: int | Tensor,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return ``linf_start(x, philox_uniform(ids, numel, key=key, stream=stream))``; a kernel draws as it goes.

    Args:
        ids, key, stream: of the numbers, as for `philox_uniform`: int64 ``[n]``, 64 bits or an int64 tensor, 32 bits
            or int64 ``[n]``.
    """
    _check(x, x, eps=eps, lo=lo, hi=hi)
    _check_ids(x, ids, key, stream)
    started: Tensor = resolve("pgd_step.linf_random_start", backend, x.device, unfit=unfit(x))(
        x, ids, key=key, stream=stream, eps=eps, lo=lo, hi=hi
    )
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

    The kernels sum in another order than the reference, and in the storage order of ``x``: equal up to rounding.
    """
    _check(x_adv, x, grad, step_size=step_size, eps=eps, lo=lo, hi=hi)
    stepped: Tensor = resolve("pgd_step.l2_step", backend, x.device, unfit=unfit(x, grad))(
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


def l2_random_start(
    x: Tensor,
    ids: Tensor,
    *,
    key: int | Tensor,
    stream: int | Tensor,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Return ``l2_start(x, philox_uniform(ids, numel + 2, key=key, stream=stream))``, up to rounding.

    Args:
        ids, key, stream: of the numbers, as for `linf_random_start`.
    """
    _check(x, x, eps=eps, lo=lo, hi=hi)
    _check_ids(x, ids, key, stream)
    started: Tensor = resolve("pgd_step.l2_random_start", backend, x.device, unfit=unfit(x))(
        x, ids, key=key, stream=stream, eps=eps, lo=lo, hi=hi
    )
    return started


def rgd_step(
    hidden: Tensor,
    x: Tensor,
    grad: Tensor,
    *,
    step_size: float | Tensor,
    eps: float,
    lo: float = 0.0,
    hi: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return ``h = hidden + step_size * grad``, which no ball holds, and ``x + h`` clipped to ball and box.

    A step of raw gradient descent (Yang et al., Rethinking PGD attack: is sign function necessary?, 2023). Elements of
    the gradient that are not finite count as 0, and h stays within 1e30 on either side.

    Args:
        hidden: the perturbation so far, like ``x``.
        step_size: one number, or one for each sample: ``[n]``, of the images' type.
    """
    _check(hidden, x, grad, eps=eps, lo=lo, hi=hi)
    if isinstance(step_size, Tensor):
        if step_size.shape != x.shape[:1] or step_size.dtype != x.dtype or step_size.device != x.device:
            raise ValueError(
                f"step_size must be a number or {x.dtype} ({len(x)},) on {x.device}, got {step_size.dtype} "
                f"{tuple(step_size.shape)} on {step_size.device}"
            )
    elif not step_size >= 0:
        raise ValueError(f"step_size must be 0 or more, got {step_size}")
    both: tuple[Tensor, Tensor] = resolve("pgd_step.rgd_step", backend, x.device, unfit=unfit(x, grad))(
        hidden, x, grad, step_size=step_size, eps=eps, lo=lo, hi=hi
    )
    return both


def _check(x_adv: Tensor, x: Tensor, grad: Tensor | None = None, *, lo: float, hi: float, **sizes: float) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x_adv.dtype != x.dtype or x.dim() < 2:
        raise ValueError(
            f"images are float32 or float64 [n, ...], got x {x.dtype} {tuple(x.shape)} and x_adv {x_adv.dtype}"
        )
    for name, tensor in (("x_adv", x_adv), ("grad", grad)):
        if tensor is not None and tensor is not x and (tensor.shape != x.shape or tensor.device != x.device):
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


def _check_ids(x: Tensor, ids: Tensor, key: int | Tensor, stream: int | Tensor) -> None:
    check_counter(ids, key, stream)
    if len(ids) != len(x) or ids.device != x.device:
        raise ValueError(f"{len(ids)} ids on {ids.device}, but {len(x)} images on {x.device}")
