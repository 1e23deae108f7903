"""Runs a study: every cell that has no result yet, in order; what is done stays done."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from sparse_robust.errors import FileError
from sparse_robust.files import ensure_writable, read_json, write_json, write_text
from sparse_robust.study import stages
from sparse_robust.study.cells import Cell, FindCell, PretrainCell, cell_name, describe, study_cells
from sparse_robust.study.config import StudyConfig
from sparse_robust.study.context import Context
from sparse_robust.study.estimate import parameter_count
from sparse_robust.study.load import to_plain

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sparse_robust.training.progress import ProgressReporter

RESULT = "result.json"
STUDY = "study.json"
SEEDS = (
    "Pre-training and tickets are made once; the seeds vary the transfer (new head, order of the images, attack "
    "noise), so every spread shown is that of the transfer."
)


class Study:
    """A study and its folder: ``study.yaml``, ``study.json``, ``cells/<name>/{spec.yaml,result.json,log.jsonl}``,
    ``report/``."""

    def __init__(self, config: StudyConfig, folder: str | Path, *, trust_pickle: bool = False) -> None:
        self.config, self.folder, self.trust_pickle = config, Path(folder), trust_pickle
        self.cells = study_cells(config)

    def cell_folder(self, cell: Cell) -> Path:
        """Return the folder that is a cell's state."""
        return self.folder / "cells" / cell_name(cell)

    def result_file(self, cell: Cell) -> Path:
        """Return where a cell's result stands once it is done."""
        return self.cell_folder(cell) / RESULT

    def pending(self) -> list[Cell]:
        """Return the cells that are still to be run. Pre-trained weights with another evaluation are evaluated
        again."""
        return [cell for cell in self.cells if not self._is_done(cell)]

    def _is_done(self, cell: Cell) -> bool:
        file = self.result_file(cell)
        if not file.exists():
            return False
        return not isinstance(cell, PretrainCell) or read_json(file).get("evaluation") == describe(cell.evaluation)

    def prepare(self, machine: dict[str, Any]) -> None:
        """Write down what the study is."""
        plain = to_plain(self.config)
        if not self.pending() and (self.folder / STUDY).exists():
            machine = read_json(self.folder / STUDY)["machine"]  # the one that the results come from
        write_text(self.folder / "study.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
        names = [cell_name(cell) for cell in self.cells]
        write_json(
            self.folder / STUDY,
            {"name": self.config.name, "config": plain, "machine": machine, "cells": names, "notes": [SEEDS]},
        )

    def run(
        self,
        accelerator: Accelerator,
        progress: ProgressReporter,
        *,
        machine: dict[str, Any],
    ) -> None:
        """Run what is not done yet. Kill it at any moment and call it again: it goes on from there.

        Raises:
            FileError: if the folder cannot be written, too little space is left, or another process runs this study.
        """
        lock = FileLock(self.folder / ".lock", timeout=0)
        if accelerator.is_main_process:
            ensure_writable(self.folder, need_bytes=self._disk_bytes())
            try:
                lock.acquire()
            except Timeout as error:
                raise FileError(
                    f"another process is running the study in {self.folder}. Wait for it, or choose another --out."
                ) from error
            self.prepare(machine)
        try:
            self._run(accelerator, progress)
        finally:
            lock.release()

    def _run(self, accelerator: Accelerator, progress: ProgressReporter) -> None:
        accelerator.wait_for_everyone()
        context = Context(
            accelerator=accelerator, progress=progress, workers=self.config.workers, project=self.config.name,
            checkpoint_seconds=self.config.checkpoint_seconds, keep_weights=self.config.keep_weights,
            eval_batch_size=self.config.evaluation.batch_size, trust_pickle=self.trust_pickle,
        )  # fmt: skip
        task = progress.task(self.config.name, len(self.cells))
        pending = self.pending()
        for cell in self.cells:
            if cell not in pending:  # left behind by a kill just after the result was written
                context.on_main(partial(stages.remove_checkpoints, self.cell_folder(cell)))
        task.advance(len(self.cells) - len(pending))
        if len(pending) < len(self.cells):
            done = len(self.cells) - len(pending)
            rest = "going on with the rest" if pending else "nothing is left to run"
            progress.say(f"{done} of {len(self.cells)} cells are done already; {rest}.")
        for cell in pending:
            result = self.run_cell(cell, context)
            context.on_main(partial(self._finish, cell, result))
            progress.say(summary(result))
            task.advance()
        task.close()

    def run_cell(self, cell: Cell, context: Context) -> dict[str, Any]:
        """Run one cell, whose predecessors are done, and return its result row."""
        folder = self.cell_folder(cell)
        context.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        shared: dict[str, Any] = {"seed": cell.seed, "folder": folder, "context": context}
        labels: dict[str, Any]
        if isinstance(cell, PretrainCell):
            labels = {"theta": cell.theta}
            row = stages.pretrain(cell.model, cell.data, cell.config, cell.evaluation, label=cell.theta, **shared)
        elif isinstance(cell, FindCell):
            labels = {"theta": cell.pretrain.theta, "finder": cell.finder}
            like = self.cell_folder(cell.like) if cell.like is not None else None
            row = stages.find(
                self._weights(cell.pretrain), cell.pretrain.data, cell.config, like=like,
                label=f"{cell.pretrain.theta} {cell.finder}", **shared,
            )  # fmt: skip
            for ticket in row["tickets"]:
                ticket["file"] = str((folder / ticket["file"]).relative_to(self.folder))
        else:
            labels = {
                "theta": cell.pretrain.theta, "finder": cell.finder, "k": cell.k, "target": cell.target,
                "fraction": cell.data.fraction, "regime": cell.regime,
            }  # fmt: skip
            ticket = stages.ticket_file(self.cell_folder(cell.find), cell.k) if cell.find is not None else None
            row = stages.transfer(
                self._weights(cell.pretrain), ticket, cell.data, cell.recipe, cell.evaluation,
                label=cell.slug.replace("-", " "), **shared,
            )  # fmt: skip
        how = {"precision": context.accelerator.mixed_precision, "processes": context.accelerator.num_processes}
        return {"kind": cell.kind, **labels, **row, **how}

    def _weights(self, cell: PretrainCell) -> Path:
        return self.cell_folder(cell) / stages.WEIGHTS

    def _finish(self, cell: Cell, result: dict[str, Any]) -> None:
        folder = self.result_file(cell).parent
        write_text(folder / "spec.yaml", yaml.safe_dump({"kind": cell.kind, **describe(cell)}, sort_keys=False))
        write_json(folder / RESULT, {"cell": cell_name(cell), **result})
        stages.remove_checkpoints(folder)

    def _disk_bytes(self) -> int:
        weights = 4 * parameter_count(self.config)
        return weights * (len(self.config.pretrain) + 8) + 60_000 * len(self.cells)


def summary(result: dict[str, Any]) -> str:
    """Return one line on a result, for the progress display."""
    if result["kind"] == "find":
        tickets = result["tickets"]
        return (
            f"found   {result['theta']:<4} {result['finder']:<10} {len(tickets)} tickets, "
            f"up to {tickets[-1]['sparsity']:.2f} % sparse  ({result['seconds']:.0f} s)"
        )
    if result["kind"] == "pretrain":
        return (
            f"trained {result['theta']:<4} SA {result['sa']:5.1f}  RA {result['ra']:5.1f}  ({result['seconds']:.0f} s)"
        )
    ticket = "dense" if result["k"] == 0 else f"{result['finder']} k={result['k']}"
    where = f"{result['target']}" + ("" if result["fraction"] == 1 else f" {100 * result['fraction']:g} %")
    return (
        f"moved   {result['theta']:<4} {ticket:<14} -> {where} by {result['regime']}, seed {result['seed']}: "
        f"SA {result['sa']:5.1f}  RA {result['ra']:5.1f}  ({result['seconds']:.0f} s)"
    )
