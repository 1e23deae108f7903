"""What a study is: typed values that a YAML file fills."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sparse_robust.attacks import PGD, Budget, EngineAttack, autoattack, parse_eps
from sparse_robust.attacks.autoattack import MEMBERS, VERSIONS, member
from sparse_robust.data import DataSpec
from sparse_robust.errors import UsageError, unknown
from sparse_robust.evaluation import PRECISIONS
from sparse_robust.pruning import survivors
from sparse_robust.pruning.dynamic import METHODS, Dynamics
from sparse_robust.study.network import NetworkConfig
from sparse_robust.study.scoring import ScoreAttack, check_finder
from sparse_robust.training import Recipe

ATTACKS = ("pgd", "autoattack", *(f"autoattack-{version}" for version in VERSIONS), *MEMBERS)
FINDERS = ("imp", "oneshot", "random", *METHODS)
REWINDS = ("pretrained", "initial", "lr")
NO_IDENTITY = {"identity": False}
"""Marks fields that say how something is done and not what: they do not enter the name of a cell."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How robust accuracy is measured: attacks in eval mode, verdicts in fp32, every test image once."""

    attacks: tuple[str, ...] = ("pgd",)
    """What is tried: pgd (set below), autoattack, autoattack-plus, autoattack-rand, or single attacks by name."""
    eps: str | float = "8/255"
    """Radius, in pixel units of the [0, 1] range."""
    norm: str = "Linf"
    """Norm of the attacks: Linf, L2 or L1."""
    steps: int = 20
    """PGD steps."""
    step_size: str | float | None = None
    """Size of a PGD step; None means 2.5 eps / steps."""
    n_restarts: int = 1
    """Random restarts of PGD; an image counts as robust if none succeeds."""
    keep: str = "first"
    """PGD: first, an image is fooled if any iterate fools the model; last, only if the last one does (as published)."""
    seed: int = 0
    """Seed of the attacks' noise: the same for every model that is compared."""
    precision: str = "fp32"
    """fp32, or bf16: attacks look for candidates in bf16, and fp32 confirms them."""
    images: int | None = None
    """So many of the test images, evenly spaced over the file; None for all."""
    batch_size: int = field(default=500, metadata=NO_IDENTITY)
    """Images per evaluation batch; it does not change the verdicts."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", tuple(self.attacks))
        if not self.attacks:
            raise UsageError(f"evaluation.attacks is empty; known: {', '.join(ATTACKS)}.")
        if self.precision not in PRECISIONS:
            raise unknown("evaluation precision", self.precision, PRECISIONS)
        if self.images is not None and self.images < 1:
            raise UsageError(f"evaluation.images must be at least 1, or null for all test images, got {self.images}.")
        if self.batch_size < 1:
            raise UsageError(f"evaluation.batch_size must be at least 1, got {self.batch_size}.")
        Budget(self.norm, self.radius)
        self.build()

    def build(self) -> tuple[EngineAttack, ...]:
        """Build the attacks.

        Raises:
            UsageError: for an unknown name, or an attack that does not know the norm.
        """
        built: list[EngineAttack] = []
        for name in self.attacks:
            if name not in ATTACKS:
                raise unknown("attack", name, ATTACKS)
            if name == "pgd":
                built.append(self.attack())
            elif name.startswith("autoattack"):
                version = name.partition("-")[2] or "standard"
                built.extend(autoattack(version, norm=self.norm, seed=self.seed))
            else:
                built.append(member(name, norm=self.norm, seed=self.seed))
        return tuple(built)

    def attack(self) -> PGD:
        """Build PGD as it is set here."""
        return PGD(
            norm=self.norm, steps=self.steps, step_size=self.step_size, n_restarts=self.n_restarts, keep=self.keep,
            seed=self.seed,
        )  # fmt: skip

    def published(self) -> PGD:
        """Build the same PGD in its published form, where the last iterate counts: its images transfer best."""
        return replace(self.attack(), keep="last")

    @property
    def radius(self) -> float:
        """The radius as a number."""
        return parse_eps(self.eps)

    def describe(self) -> str:
        """Return the measurement in a few words, such as ``PGD-20, Linf eps 8/255``."""
        named = [self.attack().name.upper() if name == "pgd" else name for name in self.attacks]
        return f"{' + '.join(named)}, {self.norm} eps {self.eps}"


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One set of pre-trained weights: trained by a recipe, or read from a checkpoint."""

    recipe: Recipe | None = None
    """Training recipe on the source task; None takes the weights as they come."""
    checkpoint: str | None = field(default=None, metadata=NO_IDENTITY)
    """A weights file to start from. What it contains is part of a cell's name, its path is not."""
    pretrained: bool = False
    """Start from timm's published weights of the model."""

    def __post_init__(self) -> None:
        if self.recipe is None and self.checkpoint is None and not self.pretrained:
            raise UsageError("a pretrain entry needs a recipe, a checkpoint, or pretrained: true.")
        if self.checkpoint is not None and self.pretrained:
            raise UsageError("a pretrain entry starts from a checkpoint or from pretrained weights, not from both.")


@dataclass(frozen=True, kw_only=True)
class FinderConfig:
    """One way to find tickets."""

    method: str = "imp"
    """imp (iterative magnitude pruning with rewinding), oneshot, random, or, with masks that change while the network
    trains: gradual, set, rigl, granet (every ticket is a run of its own, from the pre-trained weights)."""
    rounds: int = 15
    """Number of tickets; round k has pruned k times."""
    rate: float = 0.2
    """Share of the remaining weights that each round removes."""
    sparsities: tuple[float, ...] = ()
    """Share of all prunable weights that is gone in each ticket, ascending, such as [0.8, 0.9, 0.95]; in place of
    rounds and rate."""
    score: str = "magnitude"
    """imp and oneshot: what is kept, by `SCORES`: magnitude, snip, grasp, synflow, taylor, fisher, movement, hydra."""
    score_on: str = "clean"
    """Whether scores with data see training images of the source clean or adversarial."""
    score_attack: ScoreAttack | None = None
    """What makes them adversarial; None takes the attack of an adversarial recipe below, else of the evaluation."""
    score_images: int = 1024
    """So many training images, evenly spaced over the file, are shown to a score."""
    score_batch: int = 128
    """Images per batch."""
    score_options: dict[str, float] = field(default_factory=dict)
    """Options of the score, such as temperature (grasp) or epochs and lr (hydra, movement)."""
    scope: str = "global"
    """How the weights that stay are shared among layers: global (one ranking), layerwise, uniform, erk, or custom. What
    set, rigl and granet begin with: global stands for erk there, as published."""
    densities: dict[str, float] = field(default_factory=dict)
    """scope custom: densities of layers, by name or pattern; the other layers share the rest."""
    pattern: str = "unstructured"
    """Which weights go together: unstructured, N:M (2:4), block:RxC, channel. Early rounds that would keep more than
    N of M keep that."""
    recipe: Recipe | None = None
    """IMP: training on the source task between two cuts; gradual, set, rigl, granet: the training of each ticket."""
    like: str | None = None
    """random and oneshot: the finder whose per-layer counts are copied; None goes by the scope."""
    stem: bool = True
    """Whether the first convolution is pruned."""
    head: bool = False
    """Whether the classifier is pruned."""
    exclude: tuple[str, ...] = ()
    """Weights that are never pruned: names or patterns."""
    rewind: str = "pretrained"
    """IMP: what all is put back to after each cut: pretrained; initial (the untrained network); step:K (the weights
    after K updates of dense training from the pre-trained ones); lr (nothing: only the learning rate begins anew)."""
    every: int = 100
    """gradual, set, rigl, granet: updates of the weights between changes of the masks."""
    drop: float | None = None
    """set, rigl, granet: share of each layer's connections that a change exchanges at first; None: as published."""
    window: tuple[float, float] | None = None
    """gradual, set, rigl, granet: from and until when masks change, in shares of the run; None: as published."""
    start_density: float | None = None
    """gradual, granet: share of the weights that is kept at first; None: as published, 1 and 0.5."""

    def __post_init__(self) -> None:
        if self.method not in FINDERS:
            raise unknown("find method", self.method, FINDERS)
        self._check_rewind()
        self._check_dynamics()
        self._check_sparsities()
        if self.rounds < 1:
            raise UsageError(f"find.rounds must be at least 1, got {self.rounds}.")
        if not 0 < self.rate < 1:
            raise UsageError(f"find.rate must lie between 0 and 1, got {self.rate}.")
        if self.method == "imp" and self.rounds > 1 and self.recipe is None:
            raise UsageError("find method imp needs a recipe: how the source task is trained between two cuts.")
        check_finder(self)
        object.__setattr__(self, "exclude", tuple(self.exclude))

    def _check_sparsities(self) -> None:
        if not self.sparsities:
            return
        object.__setattr__(self, "sparsities", tuple(self.sparsities))
        object.__setattr__(self, "rounds", len(self.sparsities))
        if (
            sorted(set(self.sparsities)) != list(self.sparsities)
            or not 0 <= self.sparsities[0] <= self.sparsities[-1] < 1
        ):
            raise UsageError(
                "find.sparsities must ascend within [0, 1): shares, not percentages (90 % is 0.9). "
                f"Got {list(self.sparsities)}."
            )

    def kept(self, total: int, k: int) -> int:
        """Return how many of ``total`` weights ticket ``k`` keeps, by `sparsities` or else by `rate`."""
        return survivors(total, self.sparsities[k - 1], 1) if self.sparsities else survivors(total, self.rate, k)

    def _check_rewind(self) -> None:
        if self.rewind == "pretrained":
            return
        if self.method != "imp":
            raise UsageError(f"find.rewind is for method imp; {self.method} rewinds nothing.")
        if self.rewind not in REWINDS and self.rewind_step is None:
            raise unknown("find.rewind", self.rewind, (*REWINDS, "step:K with K updates, such as step:500"))

    def _check_dynamics(self) -> None:
        if self.method not in METHODS:
            if (self.every, self.drop, self.window, self.start_density) != (100, None, None, None):
                raise UsageError(
                    f"find.every, drop, window and start_density are for {', '.join(METHODS)}; {self.method} has no "
                    "use for them."
                )
            return
        self.dynamics()
        if self.recipe is None:
            raise UsageError(f"find method {self.method} needs a recipe: how the source task is trained.")
        if (self.score, self.pattern, self.like) != ("magnitude", "unstructured", None):
            raise UsageError(
                f"find method {self.method} prunes single weights by magnitude: find.score, pattern and like are not "
                "for it."
            )

    @property
    def rewind_step(self) -> int | None:
        """The update whose weights are rewound to, if it is one."""
        found = re.fullmatch(r"step:([1-9]\d*)", self.rewind)
        return int(found[1]) if found else None

    @property
    def trains(self) -> bool:
        """Whether it trains on the source task."""
        return self.method == "imp" or self.method in METHODS

    def dynamics(self) -> Dynamics:
        """Build how masks change, of a method that does that."""
        return Dynamics(
            method=self.method, every=self.every, drop=self.drop, window=self.window, start=self.start_density
        )


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """A downstream task and how tickets are transferred to it."""

    data: DataSpec
    """The data set."""
    recipes: dict[str, Recipe]
    """One recipe a transfer regime; ST and AT are what the verdict compares."""
    fractions: tuple[float, ...] | None = None
    """Shares of the training images that are used, one transfer each; None means data.fraction alone."""
    rounds: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By finder, the rounds whose tickets are transferred, where that differs from the study's."""

    def __post_init__(self) -> None:
        if self.fractions is not None:
            object.__setattr__(self, "fractions", tuple(self.fractions))
            if self.data.fraction != 1:
                raise UsageError(f"a target takes data.fraction ({self.data.fraction:g}) or fractions, not both.")
            if not self.fractions or len(set(self.fractions)) != len(self.fractions):
                raise UsageError(f"fractions must name each share once, got {self.fractions}.")
        object.__setattr__(self, "rounds", {name: tuple(rounds) for name, rounds in self.rounds.items()})
        if not self.recipes:
            raise UsageError("a target needs at least one transfer recipe, for example recipes: {ST: ..., AT: ...}.")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study: the grid is pretrain x (dense + find x rounds) x targets x fractions x recipes x seeds."""

    name: str
    """Short name; results go to runs/NAME unless --out says otherwise."""
    description: str = ""
    """What the study is for, in a sentence; the report prints it."""
    model: NetworkConfig
    """The network."""
    source: DataSpec
    """The task of the pre-training."""
    pretrain: dict[str, PretrainConfig]
    """Pre-trainings by label, such as STD, FAT, AT."""
    find: dict[str, FinderConfig]
    """Finders by label."""
    targets: dict[str, TargetConfig]
    """Downstream tasks by label."""
    rounds: tuple[int, ...]
    """Rounds whose tickets are transferred."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How robust accuracy is measured."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the transfers. Pre-training and tickets are made once, with seed 0: the spread is that of the
    transfer."""
    checkpoint_seconds: float = 60.0
    """Wall time between checkpoints inside a run."""
    lease_seconds: float = 90.0
    """A worker that has given no sign of life for so long has lost its cell to the next one that asks."""
    workers: int = 0
    """Loader processes of large data sets."""
    keep_weights: bool = False
    """Keep the transferred weights, to evaluate them again later."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", tuple(self.rounds))
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if not (self.pretrain and self.find and self.targets and self.seeds):
            raise UsageError("a study needs at least one entry each of pretrain, find, targets and seeds.")
        if not self.checkpoint_seconds >= 0:
            raise UsageError(f"study.checkpoint_seconds must be at least 0, got {self.checkpoint_seconds}.")
        if not self.lease_seconds > 0:
            raise UsageError(f"study.lease_seconds must be above 0, got {self.lease_seconds}.")
        if len(set(self.seeds)) != len(self.seeds):
            raise UsageError(f"study.seeds holds a seed twice: {self.seeds}.")
        self._check_labels()
        for label, finder in self.find.items():
            self._check_like(label, finder)
        for label, target in self.targets.items():
            for finder_label in target.rounds:
                if finder_label not in self.find:
                    raise unknown(f"finder in targets.{label}.rounds", finder_label, self.find)
            for finder_label, finder in self.find.items():
                rounds = self.rounds_of(label, finder_label)
                if len(set(rounds)) != len(rounds):
                    raise UsageError(f"the rounds of {finder_label} for {label} name one twice: {rounds}.")
                beyond = [k for k in self.rounds_of(label, finder_label) if not 1 <= k <= finder.rounds]
                if beyond:
                    raise UsageError(
                        f"targets.{label} transfers round {beyond[0]} of {finder_label}, which has rounds "
                        f"1..{finder.rounds}. "
                        f"Raise find.{finder_label}.rounds or leave that round out."
                    )

    def _check_labels(self) -> None:
        regimes = [regime for target in self.targets.values() for regime in target.recipes]
        for label in (self.name, *self.pretrain, *self.find, *self.targets, *regimes):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", label):
                raise UsageError(f"{label!r} cannot be a label: it becomes a folder's name (letters, digits, . _ + -).")

    def _check_like(self, label: str, finder: FinderConfig) -> None:
        if finder.like is None:
            return
        if finder.like not in self.find:
            raise unknown(f"finder in find.{label}.like", finder.like, self.find)
        pattern = self.find[finder.like]
        if pattern.like is not None or pattern.rounds < finder.rounds:
            raise UsageError(
                f"find.{label} copies the layer counts of {finder.like}, which must not copy others itself and "
                f"must have "
                f"at least its {finder.rounds} rounds."
            )

    def rounds_of(self, target: str, finder: str) -> tuple[int, ...]:
        """Return the rounds of ``finder`` that are transferred to ``target``."""
        overrides: Mapping[str, tuple[int, ...]] = self.targets[target].rounds
        return overrides.get(finder, self.rounds)
