"""Single runs of the command line: one stage in one folder, described by a typed configuration."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparse_robust.data import DataSpec
from sparse_robust.errors import FileError, SparseRobustError, UsageError
from sparse_robust.files import canonical_json, ensure_writable, read_json, sha256_file, write_json, write_text
from sparse_robust.models import load_model, load_state, read_model_file
from sparse_robust.study import stages
from sparse_robust.study.cells import describe
from sparse_robust.study.config import EvaluationConfig, FinderConfig, PretrainConfig
from sparse_robust.study.context import Context
from sparse_robust.study.evaluation_run import EvaluateRun
from sparse_robust.study.landscape_run import TRAJECTORY, LandscapeRun, path_files
from sparse_robust.study.load import read_spec, to_plain
from sparse_robust.study.network import NetworkConfig
from sparse_robust.study.preflight import check_network, data_here
from sparse_robust.study.scoring import check_like, with_attack
from sparse_robust.tickets import Ticket, ticket_file
from sparse_robust.training import Recipe
from sparse_robust.training.trajectory import Trajectory


@dataclass(frozen=True, kw_only=True)
class PretrainRun:
    """``sparse-robust pretrain``: train a network from scratch, from timm's weights or from a checkpoint."""

    model: NetworkConfig
    data: DataSpec
    recipe: Recipe | None = None
    checkpoint: str | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recipe is None and self.checkpoint is None and not self.model.pretrained:
            raise UsageError(
                "say where the weights come from: recipe.* trains from scratch (recipe.regime=fast, for example), "
                "checkpoint=FILE reads a file, model.pretrained=true takes timm's published weights."
            )

    def check(self, *, trust_pickle: bool = False) -> None:
        """Check, before anything is computed, that names are known, and that files are there and fit each other."""
        check_network(self.model, data_here(self.data))
        if self.checkpoint is not None:
            load_state(self.checkpoint, trust_pickle=trust_pickle)

    def execute(self, folder: Path, context: Context) -> dict[str, Any]:
        """Run it in ``folder``."""
        config = PretrainConfig(recipe=self.recipe, checkpoint=self.checkpoint, pretrained=self.model.pretrained)
        return stages.pretrain(
            self.model,
            self.data,
            config,
            self.evaluation,
            seed=self.seed,
            folder=folder,
            context=context,
            label=folder.name,
        )


@dataclass(frozen=True, kw_only=True)
class FindRun:
    """``sparse-robust find``: draw tickets from pre-trained weights."""

    weights: str
    """The weights.safetensors of a pretrain run."""
    data: DataSpec
    find: FinderConfig = field(default_factory=lambda: FinderConfig(method="oneshot"))
    like: str | None = None
    """Folder of the find run whose per-layer counts are copied, by a random or oneshot finder."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Its PGD makes the batches of an adversarial score, unless the finder has an attack or an adversarial recipe."""
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "find", with_attack(self.find, self.evaluation))
        if self.like is not None:
            check_like(self.find)

    def check(self, *, trust_pickle: bool = False) -> None:
        """Check, before anything is computed, that names are known, and that files are there."""
        data_here(self.data)
        read_model_file(self.weights)
        if self.like is not None:
            for k in range(1, self.find.rounds + 1):
                Ticket.load(stages.ticket_file(Path(self.like), k))

    def execute(self, folder: Path, context: Context) -> dict[str, Any]:
        """Run it in ``folder``."""
        like = Path(self.like) if self.like is not None else None
        return stages.find(
            Path(self.weights),
            self.data,
            self.find,
            seed=self.seed,
            folder=folder,
            context=context,
            label=folder.name,
            like=like,
        )


@dataclass(frozen=True, kw_only=True)
class TransferRun:
    """``sparse-robust transfer``: fine-tune a ticket (or the dense network) on a downstream task."""

    weights: str
    """The weights.safetensors the ticket was drawn from."""
    ticket: str | None = None
    """A ticket file, or a folder with one; None transfers the dense network."""
    data: DataSpec
    recipe: Recipe = Recipe()
    evaluation: EvaluationConfig = EvaluationConfig()
    trajectory: bool = False
    """Keep the network after every epoch, for ``sparse-robust landscape``."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ticket is not None:
            object.__setattr__(self, "ticket", str(ticket_file(Path(self.ticket))))

    def check(self, *, trust_pickle: bool = False) -> None:
        """Check, before anything is computed, that names are known, and that files are there and fit each other."""
        data, model = data_here(self.data), load_model(self.weights)
        if self.ticket is not None:
            Ticket.load(self.ticket).require_base(read_model_file(self.weights).sha256)
        if data is not None:
            stages.fit_to(model, data, self.seed)

    def execute(self, folder: Path, context: Context) -> dict[str, Any]:
        """Run it in ``folder``."""
        ticket = Path(self.ticket) if self.ticket is not None else None
        return stages.transfer(
            Path(self.weights), ticket, self.data, self.recipe, self.evaluation,
            seed=self.seed, folder=folder, context=context, label=folder.name,
            hooks=[Trajectory(folder / TRAJECTORY)] if self.trajectory else (),
        )  # fmt: skip


Run = PretrainRun | FindRun | TransferRun | EvaluateRun | LandscapeRun
SPEC, RESULT = "spec.yaml", "result.json"
RUNS: dict[str, type[Run]] = {
    "pretrain": PretrainRun,
    "find": FindRun,
    "transfer": TransferRun,
    "evaluate": EvaluateRun,
    "landscape": LandscapeRun,
}


def outcome(run: Run, row: dict[str, Any]) -> str:
    """Return a run's result in a line: what was found, or the accuracies and the attack they are under."""
    if isinstance(run, FindRun):
        return f"{len(row['tickets'])} tickets, up to {row['tickets'][-1]['sparsity']:.2f} % sparse"
    if isinstance(run, LandscapeRun):
        return "loss at the final weights: " + ", ".join(f"{p['title']} {p['final_loss']:.4f}" for p in row["panels"])
    how = f"{run.evaluation.describe()}; {row['test_images']} test images"
    return f"SA {row['sa']:.2f} %  RA {row['ra']:.2f} %  ({how})"


def _inputs(run: Run) -> dict[str, str]:
    """Return the sha256 of the files a run reads: the same path may hold something else tomorrow.

    Raises:
        FileError: for a file that cannot be read.
    """
    paths = [getattr(run, name, None) for name in ("weights", "ticket", "checkpoint", "parent")]
    paths += getattr(run, "sources", ())
    if isinstance(run, LandscapeRun):
        paths += [str(point) for folder in run.runs for point in path_files(Path(folder))]
    found = {}
    for path in filter(None, paths):
        try:
            if Path(path).is_file():
                found[path] = sha256_file(path)
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    return found


def run_name(run: Run) -> str:
    """Return a run's name: its verb and 8 digits of the sha256 of everything it was told."""
    verb = next(name for name, kind in RUNS.items() if isinstance(run, kind))
    return f"{verb}-{hashlib.sha256(canonical_json(describe(run)).encode()).hexdigest()[:8]}"


def described(run: Run, folder: Path) -> dict[str, Any]:
    """Return what ``spec.yaml`` says of a run, after a look at the one that the folder may hold.

    Raises:
        UsageError: if the folder holds a run with another configuration. Where that has no result yet and training
            would be the same, another evaluation is none: a mistake there must not cost the training.
        FileError: if what the folder holds cannot be read, or an input file cannot.
    """
    spec = {"kind": type(run).__name__, **to_plain(run), "inputs": _inputs(run)}
    if not (folder / SPEC).exists():
        return spec
    there = read_spec(folder / SPEC)
    changed = sorted(key for key in {*there, *spec} if canonical_json(there.get(key)) != canonical_json(spec.get(key)))
    corrected = changed == ["evaluation"] and isinstance(run, PretrainRun | TransferRun)
    if changed and not (corrected and not (folder / RESULT).exists()):
        raise UsageError(
            f"{folder} holds a run with another configuration or other input files (different: "
            f"{', '.join(changed)}). Choose another --out, or delete that folder."
        )
    return spec


def execute(run: Run, folder: Path, context: Context) -> dict[str, Any]:
    """Run in ``folder``, or return the result that is there already.

    Raises:
        UsageError, FileError: as `described`.
    """
    spec, recorded, result = described(run, folder), folder / SPEC, folder / RESULT
    if recorded.exists() and result.exists():
        found: dict[str, Any] = read_json(result)
        return found

    def begin() -> None:
        ensure_writable(folder)
        write_text(recorded, yaml.safe_dump(spec, sort_keys=False))

    context.on_main(begin)
    try:
        row = {"kind": type(run).__name__, **run.execute(folder, context)}
    except SparseRobustError:
        # What never began leaves no trace, so that the command may be put right and given again.
        if context.accelerator.is_main_process and {path.name for path in folder.iterdir()} == {recorded.name}:
            recorded.unlink()
        raise
    context.on_main(lambda: write_json(result, row))
    context.on_main(lambda: stages.remove_checkpoints(folder))
    return row
