"""The L1 ball around an image, cut by the box: uniform starts, sparse steps, and the exact projection.

Images are ``[n, ...]`` in float32 or float64 and lie in the box ``[lo, hi]``; norms are taken per image over all its
elements. Rows are independent, memory is linear in the size of the batch, and nothing is read back from a device.

Projection, step and selection each depend on one number an image, a threshold. It is found by halving an interval: from
a thousand elements on that is faster than a sort on a CPU; it needs no running sums, and ties have no order.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# A uniform point of the L1 ball needs one number more than it has elements; see `l1_start`.
L1_START_SPARE = 1

# Fraction of the elements that a step moves: the 99th percentile of Tramer and Boneh's code, and foolbox's default.
STEP_FRACTION = 0.01

# Relative room that projections leave below eps, for the rounding of differences and for sums in another order.
L1_ROOM = 2.0**-22

# Thresholds are found to 2**-40 of the largest element of a row.
_HALVINGS = 40


def l1_norm(delta: Tensor) -> Tensor:
    """Return the L1 norm of perturbations [n, ...], [n], summed in float64."""
    return delta.abs().flatten(1).sum(1, dtype=torch.float64).to(delta.dtype)


def project_l1_box(point: Tensor, x: Tensor, eps: float | Tensor, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """Return the nearest points, in Euclidean distance, of the L1 balls around x cut by the box.

    Every element of the perturbation is shortened by a threshold t >= 0 and cut at the box, where t is the least at
    which the norm is at most eps (Croce and Hein, Mind the box: l1-APGD for sparse adversarial attacks on image
    classifiers, 2021; they sort break points to find t).

    The result obeys the contract of `Budget.project`: ``l1_norm(z - x) <= eps`` with no tolerance, z in the box, and a
    point that does both comes back bit for bit. The norm may fall short of eps by what rounding towards x takes.

    Args:
        point: [n, ...], anything but NaN; infinite elements count as the largest finite number.
        x: centres [n, ...], in the box.
        eps: radius; or float32 or float64 [n], one an image.
    """
    radius = eps.double() if isinstance(eps, Tensor) else eps
    clipped = point.clamp(lo, hi)
    inside = l1_norm(clipped - x).double() <= radius

    centre = x.flatten(1)
    delta = point.flatten(1).double() - centre
    upwards = delta > 0
    room = torch.where(upwards, hi - centre, centre - lo)  # to the box, as `l1_norm` would measure it
    far = delta.abs_().clamp_(max=torch.finfo(x.dtype).max)  # infinity minus itself would be NaN
    exact = _soft_threshold(far, room.double(), radius * (1 - L1_ROOM))

    # No element may end up longer than exact: sums are monotone in their elements, so the norm holds as it is measured.
    length = exact.to(x.dtype)
    length = torch.where(length > exact, torch.nextafter(length, torch.zeros_like(length)), length)
    moved = centre + torch.where(upwards, length, -length)
    moved = torch.where((moved - centre).abs() > length, torch.nextafter(moved, centre), moved)
    bound = torch.full_like(centre, lo).masked_fill_(upwards, hi)
    moved = torch.where(length == room, bound, moved)
    return torch.where(inside.view(-1, *[1] * (x.dim() - 1)), clipped, moved.view(x.shape))


def _soft_threshold(length: Tensor, room: Tensor, radius: float | Tensor) -> Tensor:
    """Return min(max(length - t, 0), room), [n, d] in float64, with the least t at which rows sum to at most radius."""
    part = torch.empty_like(length)

    def shorten(threshold: Tensor) -> Tensor:
        torch.sub(length, threshold, out=part).clamp_(min=0)
        return torch.minimum(part, room, out=part)

    _, threshold = _least(lambda t: shorten(t).sum(1) <= radius, length.amax(1))
    return shorten(threshold)


def l1_start(x: Tensor, uniform: Tensor, *, eps: float, lo: float, hi: float) -> Tensor:
    """Return a uniform point of the L1 ball around each image, projected into the box.

    Of d + 1 exponential numbers divided by their sum, any d are uniform in the simplex {v >= 0, sum(v) <= 1} (Devroye,
    Non-uniform random variate generation, 1986, chapter V); with random signs, in the ball.

    Args:
        uniform: float32 [n, numel + 1] in [0, 1); each gives the sign and the exponential number of one element.
    """
    centred = (2 * uniform - 1) + 2.0**-24  # symmetric, and neither 0 nor +-1
    laplace = -centred.sign() * torch.log1p(-centred.abs())
    direction = (laplace / l1_norm(laplace)[:, None])[:, : x.flatten(1).shape[1]]
    return project_l1_box(x + direction.reshape(x.shape).to(x.dtype) * eps, x, eps, lo, hi)


def l1_step(x_adv: Tensor, x: Tensor, grad: Tensor, *, step_size: float, eps: float, lo: float, hi: float) -> Tensor:
    """Return x_adv moved by step_size, in L1 length, along the signs of the largest gradient elements, and projected.

    The sparse step of Tramer and Boneh, Adversarial training and robustness for multiple perturbations (2019), who move
    the largest `STEP_FRACTION` of the elements by equal lengths, and pass over those at the box. Here an element moves
    by that length or as far as the box lets it, and what is left of the step goes to the next largest elements: else
    the largest ones, which each projection takes back from the box a little, would use up all steps for nothing.
    """
    grad = grad.to(x.dtype).nan_to_num()  # NaN becomes 0, infinity the largest number
    size = grad.abs().flatten(1)
    part = torch.empty_like(size)
    share = step_size / math.ceil(STEP_FRACTION * size.shape[1])
    room = torch.where(grad > 0, hi - x_adv, x_adv - lo).flatten(1).clamp_(0, share)
    low, high = _least(lambda t: torch.gt(size, t, out=part).mul_(room).sum(1) <= step_size, size.amax(1))
    largest = (size > high) * room
    others = (size > low) * room - largest
    left = step_size - largest.sum(1, keepdim=True)
    length = largest + others * (left / others.sum(1, keepdim=True)).clamp_(max=1).nan_to_num_()
    return project_l1_box(x_adv + grad.sign() * length.view(x.shape), x, eps, lo, hi)


def sparse_sign(grad: Tensor, count: Tensor) -> Tensor:
    """Return the signs of each row's ``count`` largest elements by magnitude, and zeros elsewhere.

    All elements as large as the last of these count, zeros and NaN never.

    Args:
        grad: [n, ...], float32 or float64.
        count: int64 [n], 1 or more.
    """
    grad = grad.nan_to_num()
    size = grad.abs().flatten(1)
    part = torch.empty_like(size)
    low, _ = _least(lambda t: torch.gt(size, t, out=part).sum(1) < count, size.amax(1))
    return torch.where((size > low).view(grad.shape), grad.sign(), 0.0)


def _least(holds: Callable[[Tensor], Tensor], most: Tensor) -> tuple[Tensor, Tensor]:
    """Return the ends, [n, 1] each, of a short interval in which a monotone condition begins to hold.

    Args:
        holds: numbers [n, 1] -> bool [n]; true at ``most``, and above every number at which it is true.
        most: [n], 0 or more.

    Returns:
        A number at which it does not hold, or 0; and one at which it does, at most most / 2**40 or a rounding above.
    """
    high = most[:, None]
    low = torch.zeros_like(high)
    for _ in range(_HALVINGS):
        middle = low / 2 + high / 2
        true = holds(middle)[:, None]
        low, high = torch.where(true, low, middle), torch.where(true, middle, high)
    return low, high
