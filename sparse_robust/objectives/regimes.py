"""Training regimes by name: what each minimises, where it was published, what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparse_robust.attacks import FGSM, PGD, RGD, parse_eps
from sparse_robust.attacks.iterated import IteratedAttack
from sparse_robust.errors import UsageError, unknown
from sparse_robust.objectives.crafting import NFGSM, NearPGD
from sparse_robust.objectives.free import FreeObjective
from sparse_robust.objectives.losses import Loss, cross_entropy, mart, trades
from sparse_robust.objectives.mixing import Mixing
from sparse_robust.objectives.objective import Objective
from sparse_robust.objectives.weights import WeightPerturbation


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of a regime. Radii and steps are in pixel units of the [0, 1] range.

    Attributes:
        eps: radius of the training attack.
        norm: Linf, L2 or L1; n-fgsm, free and rgd know Linf alone.
        steps: of the attack, where the regime does not fix them.
        step_size: None is the regime's own: 2.5 eps / steps, of one step 1.25 eps (fast) or eps (n-fgsm, free), and of
            rgd one that fits each image's gradient, see `RGD`.
        random_start: whether the attack starts at a random point of the ball, for fast, adversarial and rgd; None is
            as published: at random, but rgd at the image.
        mode: batch norm while crafting, see `attack_context`; trades and mart craft in ``eval``, as published.
        label_smoothing: mass spread over all classes by the cross-entropy; attacks maximise the plain one.
        beta: weight of the second term of trades and mart; None is the published one, 6 and 5.
        replays: of free, updates a batch.
        awp: relative size of the adversarial weight perturbation; 0 is none.
        mixup, cutmix: alphas, for standard; 0 is off.
        num_classes: needed for mixing.
    """

    eps: float
    norm: str = "Linf"
    steps: int = 10
    step_size: str | float | None = None
    random_start: bool | None = None
    mode: str = "eval"
    label_smoothing: float = 0.0
    beta: float | None = None
    replays: int = 8
    awp: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    num_classes: int = 0

    def __post_init__(self) -> None:
        if self.replays < 1:
            raise UsageError(f"replays must be at least 1, got {self.replays}.")
        for name in ("awp", "mixup", "cutmix", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{name} must be 0 or more, got {value}.")

    def perturbation(self) -> WeightPerturbation | None:
        """Return the weight perturbation that is asked for, if any."""
        return WeightPerturbation(self.awp) if self.awp else None

    def starts_at_random(self, published: bool = True) -> bool:
        """Return whether an attack that may start at the image or at random does the latter."""
        return published if self.random_start is None else self.random_start

    def pgd(self, kind: type[PGD], **options: Any) -> PGD:
        """Return an attack of these numbers."""
        return kind(norm=self.norm, step_size=self.step_size, **{"mode": self.mode, **options})


@dataclass(frozen=True)
class Regime:
    """A named way to train.

    Attributes:
        name: how it is asked for.
        description: one sentence.
        source: where it was published.
        build: makes its objective from the numbers of a recipe.
        steps: gradients that crafting an image takes, of so many steps asked for.
        images: images that the loss passes through the network, for each one of the batch.
        single_step: its attack is a single step, so catastrophic overfitting is watched for.
    """

    name: str
    description: str
    source: str
    build: Callable[[Settings], Objective]
    steps: Callable[[int], int]
    images: int = 1
    single_step: bool = False

    def passes(self, steps: int, awp: bool = False) -> int:
        """Return the forward and backward passes that an update costs for each image."""
        return self.steps(steps) + self.images * (2 if awp else 1)


def _standard(given: Settings) -> Objective:
    if given.awp:
        raise UsageError("awp is an option of the adversarial regimes; set it to 0 for standard.")
    mixing = Mixing(given.mixup, given.cutmix, given.num_classes) if given.mixup or given.cutmix else None
    return Objective(loss=partial(cross_entropy, label_smoothing=given.label_smoothing), mixing=mixing)


def _attacking(given: Settings, attack: IteratedAttack, loss: Callable[..., Any], **options: float) -> Objective:
    _no_mixing(given)
    taken: Loss = partial(loss, label_smoothing=given.label_smoothing, **options)
    return Objective(loss=taken, attack=attack, eps=given.eps, perturbation=given.perturbation())


def _fast(given: Settings) -> Objective:
    return _attacking(given, given.pgd(FGSM, random_start=given.starts_at_random()), cross_entropy)


def _n_fgsm(given: Settings) -> Objective:
    return _attacking(given, given.pgd(NFGSM), cross_entropy)


def _adversarial(given: Settings) -> Objective:
    return _attacking(given, given.pgd(PGD, steps=given.steps, random_start=given.starts_at_random()), cross_entropy)


def _rgd(given: Settings) -> Objective:
    step_size = "auto" if given.step_size is None else given.step_size
    attack = RGD(
        norm=given.norm, steps=given.steps, step_size=step_size, mode=given.mode,
        random_start=given.starts_at_random(published=False),
    )  # fmt: skip
    return _attacking(given, attack, cross_entropy)


def _trades(given: Settings) -> Objective:
    attack = given.pgd(NearPGD, steps=given.steps, loss="kl", mode="eval")
    return _attacking(given, attack, trades, beta=6.0 if given.beta is None else given.beta)


def _mart(given: Settings) -> Objective:
    attack = given.pgd(NearPGD, steps=given.steps, mode="eval")
    return _attacking(given, attack, mart, beta=5.0 if given.beta is None else given.beta)


def _free(given: Settings) -> Objective:
    _no_mixing(given)
    if given.norm != "Linf":
        raise UsageError(f"the regime free is defined for the norm Linf, got {given.norm!r}. Use adversarial.")
    return FreeObjective(
        loss=partial(cross_entropy, label_smoothing=given.label_smoothing),
        eps=given.eps,
        perturbation=given.perturbation(),
        replays=given.replays,
        step_size=given.eps if given.step_size is None else parse_eps(given.step_size),
    )


def _none(steps: int) -> int:
    return 0


def _one(steps: int) -> int:
    return 1


def _all(steps: int) -> int:
    return steps


def _no_mixing(given: Settings) -> None:
    if given.mixup or given.cutmix:
        raise UsageError("mixup and cutmix are options of the regime standard alone; set them to 0.")


REGIMES: dict[str, Regime] = {
    regime.name: regime
    for regime in (
        Regime("standard", "Cross-entropy on clean images.", "empirical risk minimisation", _standard, _none),
        Regime(
            "fast",
            "Cross-entropy after one FGSM step of 1.25 eps from a random start in the ball (FGSM-RS).",
            "Wong, Rice, Kolter: Fast is better than free (2020)",
            _fast,
            _one,
            single_step=True,
        ),
        Regime(
            "n-fgsm",
            "Cross-entropy after one FGSM step of eps from noise of 2 eps, without clipping the perturbation.",
            "de Jorge et al.: Make some noise: reliable and efficient single-step adversarial training (2022)",
            _n_fgsm,
            _one,
            single_step=True,
        ),
        Regime(
            "adversarial",
            "Cross-entropy on the last iterate of PGD from a random start (PGD-AT).",
            "Madry et al.: Towards deep learning models resistant to adversarial attacks (2018)",
            _adversarial,
            _all,
        ),
        Regime(
            "rgd",
            "Cross-entropy on the last iterate of raw gradient descent, clipped only where the network sees it.",
            "Yang et al.: Rethinking PGD attack: is sign function necessary? (2023)",
            _rgd,
            _all,
        ),
        Regime(
            "free",
            "Cross-entropy, every batch several times, under a perturbation that each backward pass moves (Free-AT).",
            "Shafahi et al.: Adversarial training for free! (2019)",
            _free,
            _none,
            single_step=True,
        ),
        Regime(
            "trades",
            "Clean cross-entropy, and 6 times the KL divergence to the prediction under a KL attack.",
            "Zhang et al.: Theoretically principled trade-off between robustness and accuracy (2019)",
            _trades,
            _all,
            images=2,
        ),
        Regime(
            "mart",
            "Boosted adversarial cross-entropy, and 5 times the KL divergence where the clean answer is unsure.",
            "Wang et al.: Improving adversarial robustness requires revisiting misclassified examples (2020)",
            _mart,
            _all,
            images=2,
        ),
    )
}
"""Every regime, by name."""


_STARTS = ("fast", "adversarial", "rgd")
"""Regimes whose attack may start at the image or at random."""


def build_objective(regime: str, **settings: Any) -> Objective:
    """Return the objective of a regime by name; ``settings`` are the fields of `Settings`.

    Raises:
        UsageError: for an unknown regime, norm, mode or step size, or an option that is not the regime's.
    """
    if regime not in REGIMES:
        raise unknown("regime", regime, REGIMES)
    given = Settings(**settings)
    if given.random_start is not None and regime not in _STARTS:
        raise UsageError(
            f"random_start is an option of the regimes {', '.join(_STARTS)}; leave it out for {regime}, whose start is "
            "as published."
        )
    return REGIMES[regime].build(given)
