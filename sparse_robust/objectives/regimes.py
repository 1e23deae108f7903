"""Training regimes: standard, fast adversarial and PGD adversarial training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.attacks import FGSM, PGD
from sparse_robust.errors import unknown
from sparse_robust.seeding import derive_seed


@dataclass(frozen=True)
class Objective:
    """Cross-entropy on the batch, or on adversarial examples crafted from it.

    Attributes:
        attack: crafts the training examples; None trains on the clean ones.
        eps: radius of the training attack, in pixel units of the [0, 1] range.
        label_smoothing: in [0, 1); the attack itself always maximises the plain cross-entropy.
    """

    attack: PGD | None = None
    eps: float = 0.0
    label_smoothing: float = 0.0

    def __call__(
        self, model: nn.Module, target: nn.Module, x: Tensor, y: Tensor, ids: Tensor, *, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Return the scalar loss with its graph, and the logits [n, classes] it was taken from.

        Args:
            model: what is trained (possibly a distributed wrapper: its forward is called once).
            target: what is attacked: the same network without the wrapper, so that no collective is issued.
            seed: varies the attack's random start; with the sample ids it determines the noise.
        """
        if self.attack is not None:
            x = replace(self.attack, seed=seed)(target, x, y, eps=self.eps, ids=ids)
        logits = model(x)
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing), logits

    def epoch_seed(self, seed: int, epoch: int) -> int:
        """Return the attack seed of an epoch: the same image gets new noise in each."""
        return derive_seed("training-attack", seed, epoch)


@dataclass(frozen=True)
class Regime:
    """A named way to train: what it is, where it comes from, and how its attack is built from a recipe's numbers."""

    name: str
    description: str
    source: str
    attack: Callable[..., PGD | None]


def _no_attack(**_: object) -> None:
    return None


def _fast(*, norm: str, step_size: str | float | None, mode: str, **_: object) -> PGD:
    return FGSM(norm=norm, step_size=step_size, random_start=True, mode=mode)


def _adversarial(*, norm: str, steps: int, step_size: str | float | None, mode: str) -> PGD:
    return PGD(norm=norm, steps=steps, step_size=step_size, random_start=True, mode=mode)


REGIMES: dict[str, Regime] = {
    regime.name: regime
    for regime in (
        Regime("standard", "cross-entropy on clean images", "empirical risk minimisation", _no_attack),
        Regime(
            "fast",
            "one FGSM step from a random start, step 1.25 eps",
            "Wong, Rice, Kolter: Fast is better than free (2020)",
            _fast,
        ),
        Regime(
            "adversarial",
            "cross-entropy on the last iterate of PGD from a random start",
            "Madry et al.: Towards deep learning models resistant to adversarial attacks (2018)",
            _adversarial,
        ),
    )
}


def build_objective(
    regime: str,
    *,
    eps: float,
    norm: str = "Linf",
    steps: int = 10,
    step_size: str | float | None = None,
    mode: str = "eval",
    label_smoothing: float = 0.0,
) -> Objective:
    """Return the objective of a regime by name.

    Raises:
        UsageError: for an unknown regime, norm, mode or step size; the message lists what there is.
    """
    if regime not in REGIMES:
        raise unknown("regime", regime, REGIMES)
    attack = REGIMES[regime].attack(norm=norm, steps=steps, step_size=step_size, mode=mode)
    return Objective(attack=attack, eps=eps if attack is not None else 0.0, label_smoothing=label_smoothing)
