"""A study and its folder: what its cells are, which are done, and how one is run; what is done stays done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import ensure_writable, read_json, write_json, write_text
from sparse_robust.study import stages
from sparse_robust.study.cells import Cell, FindCell, PretrainCell, cell_name, describe, study_cells
from sparse_robust.study.config import StudyConfig
from sparse_robust.study.context import Context
from sparse_robust.study.estimate import parameter_count
from sparse_robust.study.inputs import Inputs
from sparse_robust.study.leases import Watch, holder
from sparse_robust.study.load import to_plain

RESULT, FAILURE, STUDY = "result.json", "failure.json", "study.json"
CELL = "cell"
"""Name of the leases in a cell's folder."""
SEEDS = (
    "Pre-training and tickets are made once; the seeds vary the transfer (new head, order of the images, attack "
    "noise), so every spread shown is that of the transfer."
)


class Study:
    """A study and its folder: ``study.yaml``, ``study.json``, ``cells/<name>/{spec.yaml,result.json,log.jsonl}``,
    ``report/``."""

    def __init__(self, config: StudyConfig, folder: str | Path, *, trust_pickle: bool = False) -> None:
        self.config, self.folder, self.trust_pickle = config, Path(folder), trust_pickle
        self.inputs = Inputs(self.folder)
        self.cells = study_cells(config, self.inputs.identity)

    def cell_folder(self, cell: Cell) -> Path:
        """Return the folder that is a cell's state."""
        return self.folder / "cells" / cell_name(cell)

    def result_file(self, cell: Cell) -> Path:
        """Return where a cell's result stands once it is done."""
        return self.cell_folder(cell) / RESULT

    def pending(self) -> list[Cell]:
        """Return the cells that are still to be run. Pre-trained weights with another evaluation are evaluated
        again."""
        return [cell for cell in self.cells if not self.is_done(cell)]

    def is_done(self, cell: Cell) -> bool:
        """Return whether a cell has its result."""
        file = self.result_file(cell)
        if not file.exists():
            return False
        return not isinstance(cell, PretrainCell) or read_json(file).get("evaluation") == describe(cell.evaluation)

    def prepare(self, machine: dict[str, Any]) -> None:
        """Write down what the study is, unless that is there already: ``machine`` is the one it was begun on.

        Raises:
            FileError: if the folder cannot be written, or has too little space.
            UsageError: if others are at work in this folder on another study, or a checkpoint file is missing.
        """
        ensure_writable(self.folder, need_bytes=self._disk_bytes())
        self._require_checkpoints()
        plain = to_plain(self.config)
        names = [cell_name(cell) for cell in self.cells]
        study = {"name": self.config.name, "config": plain, "machine": machine, "cells": names, "notes": [SEEDS]}
        there = self._written()
        if there is not None and (there.get("cells") != names or self._evaluation(there) != self._evaluation(study)):
            self._require_nobody_at(there)
        elif there is not None and any(self.result_file(cell).exists() for cell in self.cells):
            study["machine"] = there.get("machine", machine)
        if study != there:
            write_text(self.folder / "study.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
            write_json(self.folder / STUDY, study)
        self.inputs.save()

    def _written(self) -> dict[str, Any] | None:
        try:
            there = read_json(self.folder / STUDY)
        except FileError:
            return None
        return there if isinstance(there, dict) else None

    @staticmethod
    def _evaluation(study: dict[str, Any]) -> Any:
        config = study.get("config")
        return config.get("evaluation") if isinstance(config, dict) else None

    def _require_nobody_at(self, there: dict[str, Any]) -> None:
        watch = Watch(self.folder)
        for name in there.get("cells", ()):
            found = holder(self.folder / "cells" / name, CELL, watch)
            if found is not None and found.owner is not None and found.alive:
                raise UsageError(
                    f"a worker (process {found.owner.pid} on {found.owner.host}) is running {name} in {self.folder}, "
                    "which belongs to another configuration. Wait for it, or choose another --out."
                )

    def missing_checkpoints(self) -> dict[str, str]:
        """Return the checkpoint files that are not here, by the pre-training that wants them."""
        cells = [cell for cell in self.cells if isinstance(cell, PretrainCell) and cell.config.checkpoint is not None]
        named = {cell.theta: cell.content for cell in cells if cell.content == cell.config.checkpoint}
        return {theta: path for theta, path in named.items() if path and Path(path).suffix and ":" not in path}

    def _require_checkpoints(self) -> None:
        for theta, path in self.missing_checkpoints().items():
            raise UsageError(f"pretrain.{theta}.checkpoint {path} does not exist (from {Path.cwd()}).")

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

    def finish(self, cell: Cell, result: dict[str, Any]) -> None:
        """Write a cell's result: from here on it is done."""
        folder = self.cell_folder(cell)
        write_text(folder / "spec.yaml", yaml.safe_dump({"kind": cell.kind, **describe(cell)}, sort_keys=False))
        write_json(folder / RESULT, {"cell": cell_name(cell), **result})
        self.tidy(cell)

    def tidy(self, cell: Cell) -> None:
        """Delete what only an unfinished cell needs, and what interrupted writes left."""
        folder = self.cell_folder(cell)
        (folder / FAILURE).unlink(missing_ok=True)
        stages.remove_checkpoints(folder)
        for rest in folder.rglob(".*.tmp"):
            rest.unlink(missing_ok=True)

    def _disk_bytes(self) -> int:
        # A run in progress has up to three checkpoints, the third being written, of at most five copies of the weights:
        # present, best, moving average and two of the optimizer's.
        weights = 4 * parameter_count(self.config)
        return weights * (len(self.config.pretrain) + 3 * 5) + 60_000 * len(self.cells)


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
