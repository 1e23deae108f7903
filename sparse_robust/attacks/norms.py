"""The norms of a budget: how each starts, steps, projects and measures. One record a norm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparse_robust.attacks.l1 import L1_START_SPARE, l1_norm, l1_start, l1_step, project_l1_box
from sparse_robust_kernels.pgd_step import (
    L2_START_SPARE,
    l2_random_start,
    l2_start,
    l2_step,
    linf_project,
    linf_random_start,
    linf_start,
    linf_step,
)
from sparse_robust_kernels.rng import philox_uniform

# Relative room that L2 steps leave below eps, so that the rounding of x + delta and of the norm does not cross it.
L2_ROOM = 2.0**-18


@dataclass(frozen=True)
class Norm:
    """What a `Budget` delegates to. Images are [n, ...], ``eps``, ``lo`` and ``hi`` are keyword arguments.

    Attributes:
        start: (x, uniform [n, numel + spare]) -> images, exactly inside.
        random_start: (x, ids, key=, stream=) -> the same of numbers that are drawn on the way.
        step: (x_adv, x, grad, step_size) -> images.
        project: (x_adv, x) -> images, exactly inside.
        measure: perturbation [n, ...] -> its norm [n].
        spare: uniform numbers a start takes beyond one an element.
    """

    start: Callable[..., Tensor]
    random_start: Callable[..., Tensor]
    step: Callable[..., Tensor]
    project: Callable[..., Tensor]
    measure: Callable[[Tensor], Tensor]
    spare: int = 0


def largest_not_above(value: float, dtype: torch.dtype) -> float:
    """Return the largest number of float32 or float64 that is not above ``value``."""
    if dtype == torch.float64:
        return value
    rounded = np.float32(value)
    return float(rounded if float(rounded) <= value else np.nextafter(rounded, np.float32(-np.inf)))


def _linf_norm(delta: Tensor) -> Tensor:
    return delta.abs().flatten(1).amax(1)


def _l2_norm(delta: Tensor) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), dim=1)


def _l2_start(x: Tensor, uniform: Tensor, *, eps: float, lo: float, hi: float) -> Tensor:
    start = l2_start(x, uniform, eps=eps * (1 - L2_ROOM), lo=lo, hi=hi)
    return _l2_project(start, x, eps=eps, lo=lo, hi=hi)


def _l2_random_start(
    x: Tensor, ids: Tensor, *, key: int | Tensor, stream: int | Tensor, eps: float, lo: float, hi: float
) -> Tensor:
    start = l2_random_start(x, ids, key=key, stream=stream, eps=eps * (1 - L2_ROOM), lo=lo, hi=hi)
    return _l2_project(start, x, eps=eps, lo=lo, hi=hi)


def _l1_random_start(
    x: Tensor, ids: Tensor, *, key: int | Tensor, stream: int | Tensor, eps: float, lo: float, hi: float
) -> Tensor:
    uniform = philox_uniform(ids, x.shape[1:].numel() + L1_START_SPARE, key=key, stream=stream)
    return l1_start(x, uniform, eps=eps, lo=lo, hi=hi)


def _l2_step(x_adv: Tensor, x: Tensor, grad: Tensor, *, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    return l2_step(x_adv, x, grad, step_size=step_size, eps=eps * (1 - L2_ROOM), lo=lo, hi=hi)


def _l2_project(x_adv: Tensor, x: Tensor, *, eps: float, lo: float, hi: float) -> Tensor:
    """Clip to the box, then return the nearest points of the ball; points inside come back bit for bit.

    Each perturbation that is too long is scaled and added with rounding towards x, so that no element is longer than
    its scaled value and the measured norm, which is monotone in the elements, not above that of the scaled
    perturbation. What can be left is the error of the norm itself: the second and third round give it more room.
    """
    limit = largest_not_above(eps, x.dtype)
    x_adv = x_adv.clamp(lo, hi)
    for room in (L2_ROOM, 2.0**-9, 0.5):
        delta = x_adv - x
        norm = _l2_norm(delta).view(-1, *[1] * (x.dim() - 1))
        if x.device.type == "cpu" and not (norm > limit).numpy().any():  # as after nearly every step; nothing waits
            break
        scaled = delta * (eps * (1 - room) / norm).nan_to_num(0.0, posinf=0.0)  # norms below 3e-39 have no inverse
        shorter = x + scaled
        outward = (shorter - x).abs() > scaled.abs()
        shorter = torch.where(outward, torch.nextafter(shorter, x), shorter)
        x_adv = torch.where(norm > limit, shorter, x_adv)
    return x_adv


NORMS: dict[str, Norm] = {
    "Linf": Norm(linf_start, linf_random_start, linf_step, linf_project, _linf_norm),
    "L2": Norm(_l2_start, _l2_random_start, _l2_step, _l2_project, _l2_norm, spare=L2_START_SPARE),
    "L1": Norm(l1_start, _l1_random_start, l1_step, project_l1_box, l1_norm, spare=L1_START_SPARE),
}
