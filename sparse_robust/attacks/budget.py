"""What an attack may change: a ball of radius eps around each image, cut by the box of valid pixels."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

from sparse_robust.attacks.norms import NORMS, largest_not_above
from sparse_robust.errors import UsageError, unknown

# A radius up to this, in widths of the box, was almost surely meant for another norm. Common L2 radii start at 0.14
# (36/255). Common L1 radii start at 5, and common L2 ones mostly end at 1: less than one pixel from black to white.
_SMALL = {"L2": 0.1, "L1": 1.0}
_COMMON = {"L2": "0.5 to 3", "L1": "5 to 255"}


def parse_eps(value: str | float, norm: str | None = None, width: float = 1.0) -> float:
    """Return a radius or step size as a float.

    Args:
        value: a number, or text such as ``8/255``, ``0.5/255`` or ``0.03``.
        norm: where it is a radius: its norm. An Linf radius may not exceed the width of the box.
        width: hi - lo of the box.

    Raises:
        UsageError: if it is not a number, NaN, infinite, negative, or too large for the norm.
    """
    number = _number(value)
    if not math.isfinite(number) or number < 0:
        raise UsageError(f"eps and step sizes are finite and 0 or more, got {value!r}.")
    if norm == "Linf" and number > width:
        raise UsageError(
            f"an Linf eps of {value!r} exceeds the width {width:g} of the pixel range; pixels are in [0, 1] here: "
            f"did you mean '{number:g}/255'?"
        )
    return number


def _number(value: str | float) -> float:
    try:
        if isinstance(value, str):
            numerator, _, denominator = value.partition("/")
            return float(numerator) / (float(denominator) if "/" in value else 1.0)
        if isinstance(value, Real) and not isinstance(value, bool):
            return float(value)
    except (ValueError, ZeroDivisionError):
        pass
    raise UsageError(f"eps and step sizes are numbers, or text such as '8/255' or '0.03'; got {value!r}.")


@dataclass(frozen=True)
class Budget:
    """The set {x' : norm(x' - x) <= eps, lo <= x' <= hi} around every image x of a batch.

    In Linf it is the interval [max(x - eps, lo), min(x + eps, hi)], with bounds computed in the precision of x; in L2
    and L1 the points whose norm, as `measure` computes it, is at most eps. All hold exactly for what `project` returns.

    Attributes:
        norm: ``Linf``, ``L2`` or ``L1``.
        eps: radius, in units of the images; text such as ``8/255`` is read. It has to be given.
        lo, hi: the box; images lie in it.
    """

    norm: str = "Linf"
    eps: float = math.nan
    lo: float = 0.0
    hi: float = 1.0

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        if not self.lo < self.hi:
            raise UsageError(f"the box needs lo < hi, got [{self.lo}, {self.hi}].")
        object.__setattr__(self, "eps", parse_eps(self.eps, self.norm, self.hi - self.lo))
        if 0 < self.eps <= _SMALL.get(self.norm, 0.0) * (self.hi - self.lo):
            warnings.warn(
                f"an {self.norm} eps of {self.eps:.4g} has the size of another norm's: it bounds the length of the "
                f"whole perturbation, not of each pixel. Common {self.norm} radii are {_COMMON[self.norm]}.",
                stacklevel=3,
            )

    def noise_size(self, x: Tensor) -> int:
        """Return how many uniform numbers `start` takes for each image of x [n, ...]."""
        return x.flatten(1).shape[1] + NORMS[self.norm].spare

    def start(self, x: Tensor, uniform: Tensor) -> Tensor:
        """Return a random point of the ball around each image, uniform but for what the box cuts off; inside both.

        Args:
            x: images [n, ...], float32 or float64.
            uniform: float32 [n, noise_size(x)] in [0, 1).
        """
        return NORMS[self.norm].start(x, uniform.flatten(1), eps=self.eps, lo=self.lo, hi=self.hi)

    def random_start(self, x: Tensor, ids: Tensor, *, key: int | Tensor, stream: int | Tensor) -> Tensor:
        """Return `start` with the numbers of `philox_uniform`; kernels draw them on the way, without a tensor of them.

        Args:
            x: images [n, ...], float32 or float64.
            ids, key, stream: of the numbers: int64 [n] sample ids, 64 bits (or an int64 tensor that holds them), and
                32 bits or int64 [n].
        """
        start = NORMS[self.norm].random_start
        return start(x, ids, key=key, stream=stream, eps=self.eps, lo=self.lo, hi=self.hi)

    def step(self, x_adv: Tensor, grad: Tensor, x: Tensor, step_size: float) -> Tensor:
        """Return x_adv moved by step_size along the steepest ascent of the norm, back inside ball and box.

        The gradient's sign in Linf, its direction in L2, the signs of its largest elements in L1 (see `l1_step`). Zero
        and NaN gradients move nothing.
        """
        return NORMS[self.norm].step(x_adv, x, grad, step_size=step_size, eps=self.eps, lo=self.lo, hi=self.hi)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the nearest images inside ball and box, exactly; what is inside comes back bit for bit.

        In L2 they are the nearest to the images as clipped to the box: what is in the box is projected along a line.
        """
        return NORMS[self.norm].project(x_adv, x, eps=self.eps, lo=self.lo, hi=self.hi)

    def measure(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the norm of each perturbation x_adv - x, [n], in the precision of the images.

        In Linf it can exceed eps by the rounding of this difference although x_adv is inside; `contains` is exact.
        """
        return NORMS[self.norm].measure(x_adv - x)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return bool [n]: whether each image is inside ball and box, with no tolerance."""
        in_box = ((x_adv >= self.lo) & (x_adv <= self.hi)).flatten(1).all(1)
        if self.norm == "Linf":
            return in_box & (self.project(x_adv, x) == x_adv).flatten(1).all(1)
        return in_box & (self.measure(x_adv, x) <= largest_not_above(self.eps, x.dtype))
