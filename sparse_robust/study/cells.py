"""Cells: frozen run specifications whose names are derived from what they say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar

from sparse_robust.data import DataSpec
from sparse_robust.files import canonical_json
from sparse_robust.study.config import NO_IDENTITY, EvaluationConfig, FinderConfig, PretrainConfig, StudyConfig
from sparse_robust.study.inputs import Inputs
from sparse_robust.study.network import NetworkConfig
from sparse_robust.study.scoring import with_attack
from sparse_robust.training import Recipe


@dataclass(frozen=True, kw_only=True)
class PretrainCell:
    """Make theta_p: train the source task, or take a checkpoint, and evaluate it.

    Its name is that of the weights: another evaluation renames nothing that was drawn from them.
    """

    kind: ClassVar[str] = "pretrain"
    theta: str
    model: NetworkConfig
    data: DataSpec
    config: PretrainConfig
    evaluation: EvaluationConfig = field(metadata=NO_IDENTITY)
    seed: int = 0
    content: str | None = None
    """What the checkpoint holds that the weights are read from: its sha256. Its path does not matter."""

    @property
    def slug(self) -> str:
        """The readable part of the name."""
        return f"pretrain-{self.theta}"


@dataclass(frozen=True, kw_only=True)
class FindCell:
    """Find the tickets of all rounds from one theta_p."""

    kind: ClassVar[str] = "find"
    pretrain: PretrainCell
    finder: str
    config: FinderConfig
    like: FindCell | None = None
    seed: int = 0

    @property
    def slug(self) -> str:
        """The readable part of the name."""
        return f"find-{self.pretrain.theta}-{self.finder}"


@dataclass(frozen=True, kw_only=True)
class TransferCell:
    """Transfer one ticket (or the dense network) to a downstream task, and evaluate it."""

    kind: ClassVar[str] = "transfer"
    pretrain: PretrainCell
    find: FindCell | None
    k: int
    target: str
    data: DataSpec
    regime: str
    recipe: Recipe
    evaluation: EvaluationConfig
    seed: int

    @property
    def finder(self) -> str:
        """Label of what found the mask; ``dense`` without one."""
        return self.find.finder if self.find is not None else "dense"

    @property
    def slug(self) -> str:
        """The readable part of the name."""
        ticket = f"{self.finder}-k{self.k:02d}" if self.find is not None else "dense"
        share = "" if self.data.fraction == 1 else f"-{100 * self.data.fraction:g}pct"
        return f"transfer-{self.pretrain.theta}-{ticket}-{self.target}{share}-{self.regime}-s{self.seed}"


Cell = PretrainCell | FindCell | TransferCell
HOW = frozenset({"download", "storage"})
"""Fields of a data set that say how it is had, not what it is."""


def describe(value: Any) -> Any:
    """Return what a value says, as JSON: without fields at their defaults, so that new options do not rename old runs,
    and without those that only say how something is done."""
    if is_dataclass(value) and not isinstance(value, type):
        shown = {}
        for known in fields(value):
            item = getattr(value, known.name)
            default = known.default_factory() if known.default_factory is not MISSING else known.default
            if item != default and known.metadata.get("identity", True) and known.name not in HOW:
                shown[known.name] = describe(item)
        return shown
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [describe(item) for item in value]
    return value


def cell_name(cell: Cell) -> str:
    """Return the cell's name: a readable slug and 8 digits of the sha256 of everything it depends on."""
    digest = hashlib.sha256(canonical_json([cell.kind, describe(cell)]).encode()).hexdigest()[:8]
    return f"{cell.slug}-{digest}"


def needs(cell: Cell) -> list[Cell]:
    """Return the cells that must be done before this one can run."""
    if isinstance(cell, PretrainCell):
        return []
    before = cell.like if isinstance(cell, FindCell) else cell.find
    return [cell.pretrain, *([before] if before is not None else [])]


def study_cells(config: StudyConfig, identity: Callable[[str], str] | None = None) -> list[Cell]:
    """Return the cells of a study, each after those it needs.

    Args:
        config: the study.
        identity: says what a file contains, for the names of the cells that read it; default `Inputs.identity`.
    """
    identity = identity or Inputs().identity
    pretrains = {
        theta: PretrainCell(
            theta=theta, model=config.model, data=config.source, config=entry, evaluation=config.evaluation,
            content=None if entry.checkpoint is None else identity(entry.checkpoint),
        )
        for theta, entry in config.pretrain.items()
    }  # fmt: skip
    finds: dict[tuple[str, str], FindCell] = {}
    for theta in pretrains:
        for label in sorted(config.find, key=lambda name: config.find[name].like is not None):
            finder = with_attack(config.find[label], config.evaluation)
            like = finds[theta, finder.like] if finder.like is not None else None
            finds[theta, label] = FindCell(pretrain=pretrains[theta], finder=label, config=finder, like=like)
    return [*pretrains.values(), *finds.values(), *_transfers(config, pretrains, finds)]


def _transfers(
    config: StudyConfig, pretrains: dict[str, PretrainCell], finds: dict[tuple[str, str], FindCell]
) -> Iterator[TransferCell]:
    for seed in config.seeds:
        for label, target in config.targets.items():
            for fraction in target.fractions or (target.data.fraction,):
                data = replace(target.data, fraction=fraction)
                for theta, pretrain in pretrains.items():
                    tickets: list[tuple[FindCell | None, int]] = [(None, 0)]
                    tickets += [(finds[theta, f], k) for f in config.find for k in config.rounds_of(label, f)]
                    for find, k in tickets:
                        for regime, recipe in target.recipes.items():
                            yield TransferCell(
                                pretrain=pretrain, find=find, k=k, target=label, data=data, regime=regime,
                                recipe=recipe, evaluation=config.evaluation, seed=seed,
                            )  # fmt: skip
