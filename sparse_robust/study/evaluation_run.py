"""The single run that only measures: everything `sparse-robust evaluate` can find out about a weights file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from sparse_robust.attacks import parse_eps
from sparse_robust.bench import machine
from sparse_robust.data import Data, DataSpec, eval_loader
from sparse_robust.errors import UsageError
from sparse_robust.evaluation import Evaluation
from sparse_robust.evaluation.alarms import Alarm, run_alarms
from sparse_robust.evaluation.console import EvaluationProgress
from sparse_robust.evaluation.corruptions import corruption_accuracy
from sparse_robust.evaluation.record import make_record, robust_at, write_record
from sparse_robust.evaluation.transfer import transfer_matrix
from sparse_robust.masks import Masks
from sparse_robust.models import check_input_size, load_model, spec_of
from sparse_robust.study.config import EvaluationConfig
from sparse_robust.study.context import Context
from sparse_robust.study.preflight import data_here
from sparse_robust.tickets import Ticket, ticket_file, zero_masks

VERDICTS, RECORD = "verdicts.csv", "record.json"
ALARM_IMAGES = 200
"""So many images, evenly spaced over the file, are enough for the alarms."""


@dataclass(frozen=True, kw_only=True)
class EvaluateRun:
    """``sparse-robust evaluate``: clean and robust accuracy of a weights file, on the test images."""

    weights: str
    """A weights file written by pretrain or transfer."""
    data: DataSpec
    evaluation: EvaluationConfig = EvaluationConfig()
    curve: tuple[str | float, ...] = ()
    """More radii: the robust accuracy at each of them."""
    alarms: bool = False
    """Measure what would show that the robustness is not real."""
    corruptions: bool = False
    """Measure accuracy under the 15 common corruptions."""
    sources: tuple[str, ...] = ()
    """More weights files: attack each of them, and show the images to all (black-box transfer)."""
    parent: str | None = None
    """The weights file of the dense network, for the alarm that compares attacks on it."""
    ticket: str | None = None
    """The ticket of the weights, or a folder with one; without it, weights that are exactly zero count as pruned."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "curve", tuple(self.curve))
        object.__setattr__(self, "sources", tuple(self.sources))
        for eps in self.curve:
            parse_eps(eps, self.evaluation.norm)
        if self.ticket is not None:
            object.__setattr__(self, "ticket", str(ticket_file(Path(self.ticket))))

    def check(self, *, trust_pickle: bool = False) -> None:
        """Check, before anything is computed, that the data and the files are there and fit each other."""
        data = data_here(self.data)
        for path in (self.weights, *self.sources, *([self.parent] if self.parent is not None else [])):
            _load(path, data)
        if self.ticket is not None:
            Ticket.load(self.ticket)

    def execute(self, folder: Path, context: Context) -> dict[str, Any]:
        """Run it in ``folder``: its verdict file is where an interrupted evaluation goes on."""
        data = context.data(self.data)
        model = self._model(self.weights, data, context)
        sources = {name: self._model(path, data, context) for name, path in _named(self.sources).items()}
        parent = None if self.parent is None else self._model(self.parent, data, context)
        started, how = time.monotonic(), self.evaluation
        with EvaluationProgress(context.progress.enabled, console=context.progress.console) as shown:
            measured = context.evaluate(
                model, data, how, eps=[how.eps, *self.curve], file=folder / VERDICTS, check=True, on_progress=shown
            )
        row: dict[str, Any] = {
            "sa": measured.sa,
            "ra": 100 * robust_at(measured)[how.radius],
            "test_images": len(measured),
            "passes": measured.counts,
            "flips": measured.flips,
            "norm": how.norm,
            "curve": [{"eps": eps, "ra": 100 * robust} for eps, robust in measured.curve],
            "attacks": [
                {"attack": name, "eps": eps, "ra": 100 * robust}
                for (name, eps), robust in zip(measured.stages, measured.robust_after, strict=True)
            ],
        }
        loader = self._loader(data, context)
        alarms: Sequence[Alarm] = ()
        if self.alarms:
            alarms = self._alarms(model, parent, data, measured, context)
            row["alarms"] = [asdict(alarm) for alarm in alarms]
        if self.corruptions:
            row["corruptions"] = corruption_accuracy(model, loader, seed=how.seed).to_dict()
        if sources:
            together = {"weights": model, **sources}
            row["transfer"] = transfer_matrix(together, loader, how.published(), how.radius).to_dict()
        row["seconds"] = time.monotonic() - started
        context.on_main(lambda: self._record(folder, model, data, measured, alarms, context))
        return row

    def _model(self, path: str, data: Data, context: Context) -> nn.Module:
        return _load(path, data).to(context.accelerator.device).eval()

    def _loader(self, data: Data, context: Context, limit: int | None = None) -> Any:
        accelerator, how = context.accelerator, self.evaluation
        return eval_loader(
            data.test, how.batch_size, device=accelerator.device, workers=context.workers, limit=limit or how.images,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip

    def _alarms(
        self, model: nn.Module, parent: nn.Module | None, data: Data, measured: Evaluation, context: Context
    ) -> tuple[Alarm, ...]:
        how = self.evaluation
        images = min(ALARM_IMAGES, how.images or ALARM_IMAGES)
        loader = self._loader(data, context, limit=images)
        autoattack = measured if any(name.startswith("autoattack") for name in how.attacks) else None
        return run_alarms(
            model, loader, how.radius, norm=how.norm, dense_parent=parent, autoattack=autoattack, images=images,
            data=data.name, seed=how.seed,
        )  # fmt: skip

    def _record(
        self,
        folder: Path,
        model: nn.Module,
        data: Data,
        measured: Evaluation,
        alarms: Sequence[Alarm],
        context: Context,
    ) -> None:
        how = self.evaluation
        record = make_record(
            measured, model, name=Path(self.weights).parent.name or self.weights, dataset=data.name,
            date=datetime.now(UTC).isoformat(timespec="seconds"), norm=how.norm, eps=how.radius,
            version="standard" if how.attacks == ("autoattack",) else None, masks=self._masks(model),
            flags=[alarm.sentence for alarm in alarms if alarm.raised],
            machine=machine(context.accelerator.device),
        )  # fmt: skip
        write_record(folder / RECORD, record)

    def _masks(self, model: nn.Module) -> Masks | None:
        if self.ticket is not None:
            return Ticket.load(Path(self.ticket)).masks
        return zero_masks(model)


def _load(path: str, data: Data | None) -> nn.Module:
    """Return the network of a weights file, which must be one for this data set, where that is known."""
    model = load_model(path)
    if data is None:
        return model
    if spec_of(model).num_classes != data.num_classes:
        raise UsageError(
            f"{path} tells {spec_of(model).num_classes} classes apart and {data.name} has {data.num_classes}: "
            "transfer it to this data set first."
        )
    check_input_size(model, *data.size)
    return model


def _named(paths: Sequence[str]) -> dict[str, str]:
    """Return files by a short name: that of their folder, or the path where folders share a name."""
    names = [Path(path).parent.name for path in paths]
    return {name if name and names.count(name) == 1 else path: path for name, path in zip(names, paths, strict=True)}
