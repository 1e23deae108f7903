"""Attacks that only training uses: the loop of PGD from other starts than a random point of the ball."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_robust.attacks import PGD, Budget
from sparse_robust.attacks.pgd import Ascent
from sparse_robust.attacks.procedure import Rows, Task, noise
from sparse_robust.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class NearPGD(PGD):
    """PGD from x plus a little Gaussian noise, as TRADES and MART craft their examples.

    Attributes:
        spread: standard deviation of the noise, in units of the images; the start is not clipped to the box, as in the
            authors' codes, and what follows is.
    """

    spread: float = 0.001

    def prepare(self, budget: Budget, classes: int) -> Ascent:
        """Return the attack within a budget."""
        return _Near(self, budget)


class _Near(Ascent):
    attack: NearPGD

    def start(self, task: Task, run: Tensor) -> Rows:
        uniform = noise(task, task.x[:1].numel(), key=self.key, stream=run).view(task.x.shape)
        # Normal numbers by the inverse of their distribution; 2**-24 centres the grid, which keeps erfinv finite.
        normal = math.sqrt(2) * torch.erfinv((2 * uniform - 1) + 2.0**-24)
        return {"shown": task.x + self.attack.spread * normal.to(task.x.dtype), "step": torch.zeros_like(run)}


@dataclass(frozen=True, kw_only=True)
class NFGSM(PGD):
    """One gradient-sign step of eps from uniform noise of twice the radius, with no ball around the result.

    Pixels stay in [0, 1]; the perturbation may reach three times eps.

    Attributes:
        noise: half the width of the noise, in radii.

    Source: de Jorge et al., Make some noise: reliable and efficient single-step adversarial training (2022).
    """

    steps: int = field(default=1, init=False)
    n_restarts: int = field(default=1, init=False)
    noise: float = 2.0

    def __post_init__(self, alpha: str | float | None) -> None:
        super().__post_init__(alpha)
        if self.norm != "Linf":
            raise UsageError(f"N-FGSM is defined for the norm Linf, got {self.norm!r}. Use the regime fast.")

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return "n-fgsm"

    def prepare(self, budget: Budget, classes: int) -> Ascent:
        """Return the attack; ``budget`` gives the radius that noise and step are multiples of."""
        return _FromNoise(self, budget)

    def _default_step_size(self, eps: float) -> float:
        return eps


class _FromNoise(Ascent):
    def __init__(self, attack: NFGSM, budget: Budget) -> None:
        width = budget.hi - budget.lo
        super().__init__(attack, replace(budget, eps=width))  # the whole box: nothing else is clipped
        self.step_size = attack.resolve_step_size(budget.eps)
        self.around = replace(budget, eps=min(attack.noise * budget.eps, width))

    def start(self, task: Task, run: Tensor) -> Rows:
        uniform = noise(task, self.around.noise_size(task.x), key=self.key, stream=run)
        return {"shown": self.around.start(task.x, uniform), "step": torch.zeros_like(run)}
