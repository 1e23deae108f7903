"""How a phase is trained: one frozen value with every number that matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from timm.optim import get_optimizer_info, list_optimizers

from sparse_robust.attacks import Budget, parse_eps
from sparse_robust.errors import UsageError, unknown
from sparse_robust.objectives import REGIMES, Objective, build_objective
from sparse_robust.training.crafting import CHOICES, attack_mode_of
from sparse_robust.training.devices import DIST_BN
from sparse_robust.training.hooks import replays_of

ATTACK_MODES = ("eval", "train", "train_frozen")
SCHEDULES = ("constant", "multistep", "cosine", "one_cycle", "piecewise_linear")
WARMED_UP = ("constant", "multistep", "cosine")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training recipe. Radii and step sizes are in pixel units of the [0, 1] range and may be text such as
    ``8/255``."""

    regime: str = "standard"
    """How it trains: standard, fast, n-fgsm, adversarial, rgd, free, trades, mart."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 128
    """Images per optimizer step over all devices together, before accumulation."""
    accumulate: int = 1
    """Batches whose gradients are added up before a step."""

    optimizer: str = "momentum"
    """Any optimizer of timm by its name there: momentum is SGD as the papers use it, sgd its Nesterov form, adamw,
    ..., also behind ``lookahead_``."""
    lr: float = 0.1
    """Peak learning rate. Unused by piecewise_linear, whose points are absolute."""
    momentum: float = 0.9
    """Momentum of the SGD family, in [0, 1); other optimizers keep their own defaults."""
    weight_decay: float = 5e-4
    """Weight decay, on every parameter unless decay_norms is false."""
    decay_norms: bool = True
    """Whether biases and normalisation parameters decay as well."""
    clip_grad: float | None = None
    """Largest global gradient norm (survivors only, when there is a mask); None leaves gradients alone."""

    schedule: str = "one_cycle"
    """constant, multistep, cosine, one_cycle or piecewise_linear; evaluated at every update."""
    milestones: tuple[float, ...] = ()
    """Epochs at which multistep multiplies the rate by gamma, in their order."""
    gamma: float = 0.1
    """Factor of multistep."""
    points: tuple[tuple[float, float], ...] = ()
    """(epoch, learning rate) pairs of piecewise_linear."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from zero, for constant, multistep and cosine; not more than there are."""

    eps: str | float = "8/255"
    """Radius of the training and validation attacks."""
    norm: str = "Linf"
    """Norm of the attacks."""
    steps: int = 10
    """Steps of the training attack (adversarial, rgd, trades, mart)."""
    step_size: str | float | None = None
    """Step of the training attack; None means 2.5 eps / steps, for a single step 1.25 eps (fast) or eps (n-fgsm,
    free), and for rgd one that fits each image's gradient."""
    random_start: bool | None = None
    """Whether the attack of fast, adversarial and rgd starts at a random point of the ball; None is as published: at
    random, but rgd at the image."""
    attack_mode: str = "train_frozen"
    """Batch normalisation while crafting training examples: eval, train (running statistics move too) or
    train_frozen. trades and mart craft in eval mode, as published; free has no crafting of its own."""
    beta: float | None = None
    """Weight of the second term of trades and mart; None means the published 6 and 5."""
    replays: int = 8
    """free: updates that every batch makes; the run makes so many times fewer passes over the images."""
    awp: float = 0.0
    """Adversarial regimes: size of the adversarial weight perturbation, relative to each layer's norm. Published are
    0.01, and 0.005 for trades."""

    attack_replica: str = "auto"
    """Whether training attacks act on a frozen replica of the network (folded batch norms in mode eval, channels last,
    bf16 under bf16 training, one CUDA graph): auto, always or never."""
    channels_last: bool = True
    """Whether convolutions hold their weights with channels last while they train, as the libraries below want them.
    Sharded weights stay as they are, and so does a network that does not take it."""
    dist_bn: str = "broadcast"
    """Batch normalisation over several ranks: broadcast (each its own images, running statistics of rank 0), reduce
    (their average) or sync (all images of the step; GPUs)."""
    deterministic: bool = False
    """Only deterministic algorithms; slower on GPUs."""

    label_smoothing: float = 0.0
    """Mass spread over the other classes, in [0, 1)."""
    mixup: float = 0.0
    """standard: alpha of mixup; 0 is off."""
    cutmix: float = 0.0
    """standard: alpha of CutMix; 0 is off. With both, every batch gets one of them."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights; when set, the average is validated and kept."""

    validate_every: int = 1
    """Epochs between validations; the last epoch is always validated. 0: no validation, the last state is kept."""
    validate_from: int = 0
    """First epoch (counted from 0) that is validated."""
    validation_steps: int = 20
    """PGD steps of the robust validation; 0 validates on clean images only."""
    validation_step_size: str | float | None = None
    """Step of the validation attack; None means 2.5 eps / steps."""
    guard: bool = True
    """For single-step regimes (fast, n-fgsm, free): stop at catastrophic overfitting and go back to the epoch before
    it."""
    guard_drop: float = 0.20
    """Fall of the PGD-5 accuracy on a fixed training batch, from one epoch to the next, that trips the guard; in
    [0, 1)."""

    extra: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the timm optimizer."""

    def __post_init__(self) -> None:
        known = {"regime": REGIMES, "schedule": SCHEDULES, "attack_mode": ATTACK_MODES}
        for name, values in {**known, "attack_replica": CHOICES, "dist_bn": DIST_BN}.items():
            if getattr(self, name) not in values:
                raise unknown(name, str(getattr(self, name)), values)
        self._check_optimizer()
        least_of = {"epochs": 1, "batch_size": 1, "accumulate": 1, "steps": 1}
        for name, least in {**least_of, "validate_every": 0, "validate_from": 0, "validation_steps": 0}.items():
            if getattr(self, name) < least:
                raise UsageError(f"recipe.{name} must be at least {least}, got {getattr(self, name)}.")
        below = {"lr": math.inf, "weight_decay": math.inf, "gamma": math.inf, "warmup_epochs": math.inf}
        for name, limit in {**below, "label_smoothing": 1.0, "momentum": 1.0, "guard_drop": 1.0}.items():
            if not 0 <= getattr(self, name) < limit:
                raise UsageError(f"recipe.{name} must be in [0, {limit}), got {getattr(self, name)}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UsageError(f"recipe.ema_decay must lie between 0 and 1, got {self.ema_decay}.")
        if self.clip_grad is not None and not self.clip_grad > 0:
            raise UsageError(f"recipe.clip_grad must be above 0, got {self.clip_grad}. null leaves gradients alone.")
        object.__setattr__(self, "milestones", _in_order("milestones", self.milestones))
        object.__setattr__(self, "points", _checked_points(self.points))
        self._check_schedule()
        if self.validation_step_size is not None:
            parse_eps(self.validation_step_size)
        Budget(self.norm, self.radius)
        mode = attack_mode_of(self.objective())
        if self.dist_bn == "sync" and mode not in (None, "eval"):
            raise UsageError(
                f"recipe.dist_bn sync with attack_mode {mode}: every pass of the attack would wait for all ranks. Use "
                "attack_mode eval."
            )

    def _check_optimizer(self) -> None:
        name, known = self.optimizer.lower().removeprefix("lookahead_"), [*map(str, list_optimizers())]
        if name not in known:
            raise unknown("optimizer", self.optimizer, known)
        if get_optimizer_info(name).second_order:
            raise UsageError(
                f"recipe.optimizer {self.optimizer!r} needs second derivatives, which training does not take: use "
                "another."
            )

    def _check_schedule(self) -> None:
        if self.schedule == "piecewise_linear" and len(self.points) < 2:
            raise UsageError(
                "schedule piecewise_linear needs recipe.points: at least two (epoch, learning rate) pairs."
            )
        if self.schedule == "multistep" and not self.milestones:
            raise UsageError(
                "schedule multistep needs recipe.milestones: the epochs at which the rate falls. constant has none."
            )
        if self.schedule in WARMED_UP and self.warmup_epochs > self.epochs:
            raise UsageError(
                f"recipe.warmup_epochs must not exceed recipe.epochs, {self.epochs}, got {self.warmup_epochs}: the "
                "rate would never reach recipe.lr."
            )

    @property
    def radius(self) -> float:
        """The attack radius as a number."""
        return parse_eps(self.eps)

    def objective(self, num_classes: int = 0) -> Objective:
        """Build the objective of this recipe's regime; only mixing needs the number of classes."""
        return build_objective(
            self.regime,
            eps=self.radius,
            norm=self.norm,
            steps=self.steps,
            step_size=self.step_size,
            random_start=self.random_start,
            mode=self.attack_mode,
            label_smoothing=self.label_smoothing,
            beta=self.beta,
            replays=self.replays,
            awp=self.awp,
            mixup=self.mixup,
            cutmix=self.cutmix,
            num_classes=num_classes,
        )

    def in_passes(self) -> Recipe:
        """Return the recipe with its epochs counted in passes over the images.

        Where the regime makes m updates of every batch (free), m epochs of the recipe are one pass: so it costs what
        others cost, and its learning rates follow the same course (Shafahi et al., 2019).
        """
        m = replays_of(self.objective())
        if m == 1:
            return self
        return replace(
            self,
            epochs=-(-self.epochs // m),
            milestones=tuple(epoch / m for epoch in self.milestones),
            points=tuple((epoch / m, lr) for epoch, lr in self.points),
            warmup_epochs=self.warmup_epochs / m,
            validate_every=-(-self.validate_every // m),
            validate_from=self.validate_from // m,
        )


def _in_order(name: str, epochs: Sequence[float]) -> tuple[float, ...]:
    if list(epochs) != sorted(epochs) or not all(0 <= epoch < math.inf for epoch in epochs):
        raise UsageError(f"recipe.{name} must be in the order of their epochs, from 0 on, got {list(epochs)}.")
    return tuple(epochs)


def _checked_points(points: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
    pairs = tuple((float(epoch), float(lr)) for epoch, lr in points)
    _in_order("points", [epoch for epoch, _ in pairs])
    if not all(0 <= lr < math.inf for _, lr in pairs):
        raise UsageError(f"recipe.points must have learning rates in [0, inf), got {pairs}.")
    return pairs
