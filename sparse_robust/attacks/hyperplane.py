"""The nearest points of a hyperplane, inside the box of valid pixels, in Linf, L2 and L1.

A point has to gain ``gap`` along w. Coordinate i can move by ``room`` (to the wall of the box that w points at) and
gains |w_i| on the way. In Linf and L2 the smallest move is min(level * rate, room), with rate 1 and |w|: the gain
grows with the level, piecewise linear and concave, so Newton's method from level 0 approaches the root from below and
meets it after a few of its many pieces. In L1 the coordinates with the largest |w| are used up first.

Source of the problem: Croce and Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack
(2020), section 2.2, who solve it by sorting and bisection.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_ROUNDS = 24  # Each divides (gap left) * (slope) by 4 at least; the rounds needed are about 5, rarely more than 12.


def to_hyperplane(points: Tensor, w: Tensor, gap: Tensor, *, norm: str) -> Tensor:
    """Return the smallest moves of points onto their hyperplanes, such that they stay in the box [0, 1].

    Where the hyperplane does not meet the box the move ends in the corner nearest to it, in the sense of w. Coordinates
    with w = 0 do not move. Every row is computed on its own, and nothing is read back from a GPU.

    Args:
        points: [..., d], float32 or float64, in [0, 1].
        w: [..., d], finite normals of any length; they broadcast against the points.
        gap: [...], finite: by how much <w, point> has to grow, negative if it has to shrink.
        norm: what is smallest: ``Linf``, ``L2`` or ``L1``.

    Returns:
        Moves [..., d]: <w, move> = gap, up to rounding.
    """
    scale = w.abs().amax(-1, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    weight, gain = w.abs() / scale, gap.abs()[..., None] / scale
    direction = w.sign() * gap.sign()[..., None]
    room = (direction.clamp_min(0) - points).abs()
    if norm == "L1":
        return direction * _greedy(weight, room, gain)
    return direction * fill(weight, room, gain, rate=weight if norm == "L2" else torch.ones_like(weight))


def fill(weight: Tensor, room: Tensor, gain: Tensor, *, rate: Tensor) -> Tensor:
    """Return min(level * rate, room) with the level at which <weight, that> = gain, by Newton's method.

    Arguments broadcast, are finite and 0 or more; ``gain`` is [..., 1]. Where there is no such level it is the room.
    """
    slopes, full, most = weight * rate, weight * room, torch.finfo(room.dtype).max
    level = torch.zeros_like(room[..., :1])
    for _ in range(_ROUNDS):
        # 1 or 0, in floating point: multiplying is several times faster on a CPU than torch.where.
        free = (level * rate).lt_(room)
        slope = (slopes * free).sum(-1, keepdim=True)
        rest = gain - (full - full * free).sum(-1, keepdim=True)
        higher = torch.where(slope > 0, rest / slope, most).clamp_max(most).maximum(level)
        # A row at its root stays there, so stopping changes nothing. On a GPU asking would cost more than it saves.
        if level.device.type == "cpu" and torch.equal(higher, level):
            break
        level = higher
    return torch.minimum(level * rate, room)


def _greedy(weight: Tensor, room: Tensor, gain: Tensor) -> Tensor:
    """Return moves that use up the room of one coordinate after the other, by falling weight, until the gain is met."""
    weight, order = weight.sort(dim=-1, descending=True, stable=True)
    order = order.expand_as(room)
    room = room.gather(-1, order)
    before = F.pad((weight * room).cumsum(-1)[..., :-1], (1, 0))
    # What rounding leaves of the gain must not drive coordinates of tiny weight to the wall: a little less is enough.
    left = (gain * (1 - 4 * torch.finfo(room.dtype).eps) - before).clamp_min(0)
    moved = torch.minimum(left / weight.clamp_min(torch.finfo(room.dtype).tiny), room)
    return torch.zeros_like(room).scatter(-1, order, moved)
