"""What the command line shows of configurations and studies."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Column, Table

from sparse_robust.data import DataSpec, check_data_name, load_data
from sparse_robust.errors import SparseRobustError
from sparse_robust.evaluation import read_evaluation
from sparse_robust.evaluation.console import curve_table, evaluation_table
from sparse_robust.study.activity import Activity, activity
from sparse_robust.study.cells import Cell, FindCell, cell_name
from sparse_robust.study.config import StudyConfig
from sparse_robust.study.estimate import Cost, cell_cost, pass_flops
from sparse_robust.study.evaluation_run import VERDICTS
from sparse_robust.study.load import build, to_plain
from sparse_robust.study.network import NetworkConfig
from sparse_robust.study.preflight import check_network
from sparse_robust.study.report.words import duration
from sparse_robust.study.results import load_results
from sparse_robust.study.runner import Study

GPU_RATE, CORE_RATE = 6e13, 1e11
"""Floating-point operations a second to plan with. Of an H100-class GPU in mixed precision: 2,500 images/s of a
ResNet-50 at 224 x 224, forward and backward; an assumption. Of one core of an AMD EPYC: what the presets for small
networks came to, images that left early counted in."""

LISTED = 400


def show_configuration(value: Any, console: Console | None = None) -> None:
    """Print a configuration, complete with its defaults, as YAML."""
    (console or Console()).print(
        yaml.safe_dump(to_plain(value), sort_keys=False), markup=False, highlight=False, end=""
    )


def dry_run(study: Study, console: Console | None = None) -> None:
    """Print the configuration, the cells with their state, and an estimate of the work.

    Raises:
        UsageError: for names that are not known, and what else would stop every run of this study. Data and
            checkpoints may be elsewhere: what is not here is said.
    """
    console = console or Console()
    sizes = _all_sizes(study)
    show_configuration(study.config, console)
    pending = set(map(cell_name, study.pending()))
    for cell in study.cells[:LISTED]:
        console.print(
            f"{'to do' if cell_name(cell) in pending else 'done':<6} {cell_name(cell)}", markup=False, highlight=False
        )
    if len(study.cells) > LISTED:
        console.print(f"... and {len(study.cells) - LISTED} more")
    table = Table(
        "cells",
        "number",
        "to do",
        "training passes",
        "evaluation passes",
        title="work, in forward+backward passes of an image",
    )
    total, flops, absent = Cost(0, 0), 0, {spec.name for spec, size in sizes.items() if size is None}
    for kind in ("pretrain", "find", "transfer"):
        cells = [cell for cell in study.cells if cell.kind == kind]
        train = evaluation = 0
        counted = [(cell, size) for cell in cells if (size := sizes[_data_of(cell)]) is not None]
        for cell, size in counted:
            cost = cell_cost(cell, *size.split)
            train, evaluation = train + cost.train, evaluation + cost.evaluation
            flops += cost.passes * size.flops
        total = Cost(total.train + train, total.evaluation + evaluation)
        todo = sum(cell_name(cell) in pending for cell in cells)
        passes = (_passes(number, len(counted), len(cells)) for number in (train, evaluation))
        table.add_row(kind, str(len(cells)), str(todo), *passes)
    console.print(table)
    if absent:
        console.print(f"not counted, because the data is not here: {', '.join(sorted(absent))}", highlight=False)
    if missing := study.missing_checkpoints():
        console.print(f"checkpoints that are not here: {', '.join(missing.values())}", markup=False, highlight=False)
    if not total.passes:
        return
    console.print(
        f"{total.passes / 1e6:,.1f} M passes at the most (attacks spare images that are fooled already), "
        f"{flops / 1e12:,.0f} TFLOP: {duration(flops / CORE_RATE)} of a CPU core, or {duration(flops / GPU_RATE)} of a "
        f"GPU that computes {GPU_RATE / 1e12:.0f} TFLOP/s, which one might plan with for a ResNet-50 at 224 x 224.",
        highlight=False,
    )


def _passes(number: int, counted: int, cells: int) -> str:
    """Return a number of passes, with a question mark for cells whose data is not here to be counted."""
    known = f"{number / 1e6:,.2f} M" if counted or not cells else ""
    return " + ".join(filter(None, (known, "?" if counted < cells else "")))


def status(folder: Path, console: Console | None = None) -> None:
    """Print what of a study is done, who works on what, what failed and what waits."""
    console = console or Console()
    results = load_results(folder)
    done = {"pretrain": len(results.pretrain), "find": len(results.find), "transfer": len(results.transfer)}
    waiting = Counter(name.partition("-")[0] for name in results.pending)
    table = Table(
        "cells",
        "done",
        "to do",
        title=f"{results.name}: {sum(done.values())} of {sum(done.values()) + len(results.pending)} cells",
    )
    for kind, count in done.items():
        table.add_row(kind, str(count), str(waiting[kind]))
    console.print(table)
    for name, problem in results.problems.items():
        console.print(f"{name}: {problem}", markup=False, highlight=False)
    if results.pending:
        try:
            found = activity(Study(build(StudyConfig, results.config), folder))
        except SparseRobustError:  # written by another version: the results are read all the same
            console.print(f"next: {results.pending[0]}", highlight=False)
        else:
            _show_activity(found, console)


def _show_activity(found: Activity, console: Console) -> None:
    if found.held:
        table = Table(Column("cell", overflow="fold"), "worker", "since (UTC)", "last sign of life", title="at work")
        for name, held in found.held.items():
            owner = held.owner
            who = f"{owner.pid} on {owner.host}" if owner is not None else "unknown"
            since = owner.since[:19].replace("T", " ") if owner is not None else ""
            quiet = f"{held.quiet:.0f} s ago" + ("" if held.alive else ": gone, the next worker takes over")
            table.add_row(name, who, since, quiet)
        console.print(table)
    for name, failure in found.failed.items():
        where = f" ({failure.where}, {failure.time})" if failure.where else ""
        console.print(f"failed: {name}: {failure.error}{where}", markup=False, highlight=False)
    if found.ready:
        console.print(f"next: {found.ready[0]}, {len(found.ready)} could be run now", highlight=False)
    if found.waiting:
        console.print(f"waiting for earlier cells: {len(found.waiting)}", highlight=False)
    if any(held.alive for held in found.held.values()):
        console.print("more workers may join: start the same command again, here or on another machine.")
    else:
        console.print("go on with the command that started it.")


def show_evaluation(folder: Path, row: dict[str, Any], console: Console | None = None) -> None:
    """Print what `sparse-robust evaluate` found: a table for every part that was asked for."""
    console = console or Console()
    measured = replace(read_evaluation(folder / VERDICTS), flips=row["flips"])
    console.print(evaluation_table(measured, norm=row["norm"]))
    if len(row["curve"]) > 1:
        console.print(curve_table(measured))
    for alarm in row.get("alarms", ()):
        mark = "[bold red]ALARM[/]" if alarm["raised"] else "[green]quiet[/]"
        console.print(f"{mark}  {alarm['name']}: {alarm['sentence']}", highlight=False)
    if "corruptions" in row:
        console.print(_corruptions_table(row["corruptions"]))
    if "transfer" in row:
        console.print(_transfer_table(row["transfer"]))


def _corruptions_table(found: dict[str, Any]) -> Table:
    title = f"accuracy in % under corruption, by severity; mean {100 * found['mean']:.2f}"
    table = Table(Column("corruption", no_wrap=True), title=title, title_justify="left")
    severities = list(found["by_severity"])
    for severity in severities:
        table.add_column(severity, justify="right")
    for name, levels in found["accuracy"].items():
        table.add_row(name, *(f"{100 * levels[severity]:.1f}" for severity in severities))
    table.add_section()
    table.add_row("mean", *(f"{100 * value:.1f}" for value in found["by_severity"].values()))
    return table


def _transfer_table(found: dict[str, Any]) -> Table:
    title = f"accuracy in % of the columns on images crafted on the rows ({found['attack']})"
    table = Table("crafted on", *found["clean"], title=title, title_justify="left")
    table.add_row("nothing", *(f"{100 * value:.1f}" for value in found["clean"].values()))
    for source, targets in found["accuracy"].items():
        table.add_row(source, *(f"{100 * value:.1f}" for value in targets.values()))
    return table


def _data_of(cell: Cell) -> DataSpec:
    if isinstance(cell, FindCell):
        return cell.pretrain.data
    return cell.data


class _Sizes(NamedTuple):
    split: tuple[int, int, int]
    flops: int


def _all_sizes(study: Study) -> dict[DataSpec, _Sizes | None]:
    """Return the sizes of all data sets of a study; None for those that are not here."""
    model, source = study.config.model, study.config.source
    specs = dict.fromkeys([source, *map(_data_of, study.cells)])
    for spec in specs:
        check_data_name(spec)
    check_network(model)
    return {spec: _sizes(spec, model, fixed=spec == source) for spec in specs}


def _sizes(spec: DataSpec, model: NetworkConfig, *, fixed: bool) -> _Sizes | None:
    """Return the sizes of a data set's splits, and what a pass of one image costs; None where it is not here. A network
    that is ``fixed`` to it has its classes and channels."""
    try:
        data = load_data(spec)
    except (OSError, ImportError):  # a FileError is an OSError
        return None
    network = model.for_data(data) if fixed else model.spec()
    flops = pass_flops(network, (data.in_chans, *data.size))
    return _Sizes((len(data.train), len(data.validation), len(data.test)), flops)
