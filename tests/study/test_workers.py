"""Workers of one study folder: every cell once, in an order that works, whatever happens to some of them."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from sparse_robust.cli import main
from sparse_robust.errors import FileError, UsageError
from sparse_robust.study import workers
from sparse_robust.study.cells import Cell, cell_name, describe, needs
from sparse_robust.study.config import StudyConfig
from sparse_robust.study.console import status
from sparse_robust.study.context import Context
from sparse_robust.study.leases import LeaseLost, Owner, Watch, claim, holder
from sparse_robust.study.load import build
from sparse_robust.study.runner import CELL, Study
from sparse_robust.study.workers import CellsFailed, Outcome, Worker, report_once, report_stamp
from sparse_robust.training import Preempted
from tests.study.mini import MINI, TINY, cell_differences, differences, rows, write_config

FORK = multiprocessing.get_context("fork")
ALONE = SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)


class Quick(Study):
    """A study whose cells only say that they were run: each takes some milliseconds and fails if told to."""

    def __init__(self, folder: Path, act: Callable[[str, Context], object] = lambda name, context: None) -> None:
        super().__init__(build(StudyConfig, MINI), folder)
        self.act = act

    def run_cell(self, cell: Cell, context: Context) -> dict[str, Any]:
        name = cell_name(cell)
        for need in needs(cell):
            assert self.result_file(need).exists(), f"{name} came before {cell_name(need)}"
        context.guard()
        inside = self.cell_folder(cell) / "inside"
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.mkdir()  # fails if somebody is in there already
        try:
            self.act(name, context)
        finally:
            inside.rmdir()
        with open(self.folder / "runs", "a") as file:  # short lines are appended in one piece
            file.write(f"{name}\n")
        evaluation = describe(getattr(cell, "evaluation", None))
        return {"kind": "pretrain", "theta": name, "sa": 1.0, "ra": 0.0, "seconds": 0.0, "evaluation": evaluation}

    def ran(self) -> list[str]:
        return (self.folder / "runs").read_text().split() if (self.folder / "runs").exists() else []


def worker(study: Study, **options: Any) -> Worker:
    study.prepare({"cpu": "this one"})
    options = {"poll_seconds": 0.01, **options}
    return Worker(study, Context(accelerator=ALONE), **options)  # type: ignore[arg-type]


def names(study: Study) -> list[str]:
    return [cell_name(cell) for cell in study.cells]


def test_one_worker_runs_everything_in_order_and_leaves_no_lease(tmp_path: Path) -> None:
    study = Quick(tmp_path)
    outcome = worker(study).work()
    assert study.ran() == outcome.ran == names(study) and not outcome.failed and not study.pending()
    assert not list(tmp_path.rglob("*.lease")) and not list(tmp_path.rglob("*.tmp"))
    assert worker(study).work() == Outcome() and len(study.ran()) == len(study.cells)


def test_several_workers_share_the_cells(tmp_path: Path) -> None:
    chance = random.Random()

    def work(seed: int) -> None:
        chance.seed(seed)
        outcome = worker(Quick(tmp_path, lambda *_: time.sleep(chance.uniform(0, 0.02)))).work()
        outcome.raise_failures()
        (tmp_path / f"share-{seed}").write_text(str(len(outcome.ran)))

    processes = [FORK.Process(target=work, args=(seed,)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    study = Quick(tmp_path)
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(study.ran()) == sorted(names(study)), "each cell once, not more, not less"
    assert sum(int((tmp_path / f"share-{seed}").read_text()) > 0 for seed in range(4)) > 1
    assert not list(tmp_path.rglob("*.lease"))


def test_a_failed_cell_stops_nobody_else_and_is_retried_by_the_next_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = [True]
    tried: list[str] = []

    def act(name: str, _: Context) -> None:
        if name.startswith("find-AT-imp-st"):
            tried.append(name)
            if broken[0]:
                raise ValueError("no such thing\nand more")

    study = Quick(tmp_path, act)
    outcome = worker(study).work()
    (name,) = outcome.failed
    behind = [n for n in names(study) if "-AT-imp-st-k" in n or n.startswith("find-AT-random")]
    behind += [n for n in names(study) if "-AT-random-k" in n]
    assert sorted(outcome.blocked) == sorted(behind) and len(tried) == 1
    assert set(outcome.ran) == {*names(study)} - {name, *behind}
    with pytest.raises(CellsFailed, match=rf"1 cell failed; {len(behind)} more wait.*\n  {name}: ValueError: no such"):
        outcome.raise_failures()
    failure = json.loads((study.folder / "cells" / name / "failure.json").read_text())
    assert "ValueError: no such thing" in failure["error"] and any("act" in line for line in failure["trace"])
    console = Console(width=200)
    status(tmp_path, console)
    said = capsys.readouterr().out
    assert f"failed: {name}: ValueError: no such thing" in said and f"earlier cells: {len(behind)}" in said

    assert list(worker(study).work().failed) == [name] and len(tried) == 2, "another run tries it again, once"
    broken[0] = False
    outcome = worker(study).work()
    assert sorted(outcome.ran) == sorted([name, *behind]) and not outcome.failed
    assert not list(tmp_path.rglob("failure.json"))


def test_workers_of_one_run_try_a_broken_cell_once(tmp_path: Path) -> None:
    def act(name: str, _: Context) -> None:
        if name.startswith("pretrain-AT"):
            with open(tmp_path / "tries", "a") as file:
                file.write("x")
            raise UsageError("never works")

    first, second = (worker(Quick(tmp_path, act), run="together") for _ in range(2))
    assert first.work().failed and second.work().failed
    late = worker(Quick(tmp_path, act), run="together")  # began after the failure
    assert late.work().failed and (tmp_path / "tries").read_text() == "x"
    other = worker(Quick(tmp_path, act))
    assert next(iter(other.work().failed.values())).error == "never works"
    assert (tmp_path / "tries").read_text() == "xx"


@pytest.mark.parametrize("error", [Preempted("saved"), KeyboardInterrupt(), FileError("full"), SystemExit(3)])
def test_what_stops_a_worker_frees_its_cell_at_once(tmp_path: Path, error: BaseException) -> None:
    if isinstance(error, FileError):
        error.__cause__ = OSError(28, "No space left on device")

    def act(name: str, _: Context) -> None:
        raise error

    study = Quick(tmp_path, act)
    with pytest.raises(type(error)):
        worker(study).work()
    assert not list(tmp_path.rglob("failure.json"))
    found = holder(study.cell_folder(study.cells[0]), CELL, Watch(tmp_path))
    assert found is not None and found.ended and found.owner is not None and found.owner.released
    assert len(worker(Quick(tmp_path)).work().ran) == len(study.cells)


@pytest.fixture
def ctrl_c_is_heard() -> Iterator[None]:
    """Also where these tests run in the background, for which a shell lets SIGINT be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_is_heard")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_between_two_cells_ends_the_worker(tmp_path: Path, number: signal.Signals, status: int) -> None:
    before = signal.getsignal(number)
    study = Quick(tmp_path, lambda *_: os.kill(os.getpid(), number))
    with pytest.raises(Preempted, match=number.name) as told:
        worker(study).work()
    assert told.value.exit_status == status
    assert len(study.ran()) == 1, "the cell that could not be saved in the middle was finished first"
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_a_second_ctrl_c_ends_the_worker_in_the_middle_of_a_cell(tmp_path: Path) -> None:
    study = Quick(tmp_path, lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    with pytest.raises(KeyboardInterrupt):
        worker(study).work()
    assert not study.ran() and len(worker(Quick(tmp_path)).work().ran) == len(study.cells)


def test_who_lost_its_lease_writes_nothing_and_goes_on(tmp_path: Path) -> None:
    """As after a long sleep: meanwhile another worker has taken the cell over, and finishes it later."""
    thieves: list[threading.Timer] = []

    def act(name: str, context: Context) -> None:
        if name.startswith("pretrain-AT") and not thieves:
            folder = study.folder / "cells" / name
            mine = next(folder.glob("*.lease"))
            os.utime(mine, (1, 1))
            watch = Watch(tmp_path)
            holder(folder, CELL, watch)
            watch._seen = {path: (touched, when - 1000) for path, (touched, when) in watch._seen.items()}
            theirs = claim(folder, CELL, replace(Owner.me(), process="another/machine/1"), watch)
            assert theirs is not None
            thieves.append(threading.Timer(0.3, theirs.release))
            thieves[0].start()

    study = Quick(tmp_path, act)
    outcome = worker(study).work()
    assert not outcome.failed and not study.pending()
    counts = Counter(study.ran())
    assert sorted(counts.values()) == [1] * (len(study.cells) - 1) + [2]
    assert not list(tmp_path.rglob("*.lease"))


def test_a_lost_lease_stops_the_writing_of_a_stage(tmp_path: Path) -> None:
    lease = claim(tmp_path, CELL, Owner.me(), Watch(tmp_path))
    assert lease is not None
    context = Context(accelerator=ALONE, guard=lease.confirm)  # type: ignore[arg-type]
    context.on_main((tmp_path / "first").touch)
    lease.path.unlink()
    lease._sure -= 1000  # a long time without a confirmation
    with pytest.raises(LeaseLost):
        context.on_main((tmp_path / "second").touch)
    assert (tmp_path / "first").exists() and not (tmp_path / "second").exists()


def test_a_worker_with_nothing_to_do_says_so_and_may_leave(tmp_path: Path) -> None:
    study, said = Quick(tmp_path), list[str]()
    waiting = worker(study, idle_seconds=0.05)
    others = [claim(study.cell_folder(cell), CELL, Owner.me(), Watch(tmp_path)) for cell in study.cells[:2]]
    assert all(others)
    waiting.progress = SimpleNamespace(task=waiting.progress.task, say=said.append)  # type: ignore[assignment]
    outcome = waiting.work()
    assert outcome.running == names(study)[:2] and outcome.blocked == names(study)[2:] and not outcome.ran
    assert len(said) == 1 and "waiting: other workers are running pretrain-" in said[0] and "and 1 more" in said[0]


def test_status_says_who_works_on_what(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = Quick(tmp_path)
    worker(study)
    watch = Watch(tmp_path)
    study.finish(study.cells[0], study.run_cell(study.cells[0], Context(accelerator=ALONE)))  # type: ignore[arg-type]
    first, second = (cell for cell in study.cells if cell.slug.startswith("find-STD-imp"))
    alive = claim(study.cell_folder(first), CELL, Owner.me(), watch)
    gone = claim(study.cell_folder(second), CELL, replace(Owner.me(60.0), host="far-away", process=""), watch)
    assert alive is not None and gone is not None
    os.utime(gone.path, (1, 1))
    status(tmp_path, Console(width=200))
    said = capsys.readouterr().out
    assert f"{os.getpid()} on" in said and "on far-away" in said and said.count("gone, the next worker takes over") == 1
    assert "next: pretrain-AT-" in said and "could be run now" in said and "more workers may join" in said
    assert {path.name for path in tmp_path.iterdir()} == {"cells", "runs", "study.json", "study.yaml"}


def test_another_study_cannot_join_while_somebody_works(tmp_path: Path) -> None:
    study = Quick(tmp_path)
    worker(study)
    lease = claim(study.cell_folder(study.cells[0]), CELL, Owner.me(), Watch(tmp_path))
    assert lease is not None
    other = Study(build(StudyConfig, {**MINI, "seeds": [5]}), tmp_path)
    with pytest.raises(UsageError, match=rf"process {os.getpid()} on .* is running pretrain-.*another --out"):
        other.prepare({})
    Study(build(StudyConfig, {**MINI, "lease_seconds": 9}), tmp_path).prepare({})
    lease.release()
    other.prepare({})
    assert json.loads((tmp_path / "study.json").read_text())["config"]["seeds"] == [5]


def test_the_report_is_written_once_by_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.02)
    study, written = Quick(tmp_path), list[int]()
    worker(study).work()

    def write() -> Path:
        time.sleep(0.05)
        written.append(1)
        pending = [{"cell": cell_name(cell)} for cell in study.pending()]
        page = tmp_path / "report" / "report.json"
        page.parent.mkdir(exist_ok=True)
        page.write_text(json.dumps({"cells": {"pending": pending}}))
        return page

    def leave(before: float | None) -> None:
        report_once(study, write, before)

    for expected in (1, 2):  # a second run writes it anew: perhaps with another criterion
        before = report_stamp(study)
        threads = [threading.Thread(target=leave, args=(before,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(written) == expected
    assert not list(tmp_path.glob("*.lease"))
    before = report_stamp(study)
    (tmp_path / "report" / "report.json").write_text('{"cells": {"pending": [{"cell": "something"}]}}')
    assert report_once(study, write, before) is not None, "the one there did not have all results"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert (
        main(["study", "run", "--config", str(write_config(folder, TINY)), "--out", str(folder / "out"), "--quiet"])
        == 0
    )
    return folder / "out"


def command(config: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "sparse_robust", "study", "run", "--config", str(config), "--out", str(out), *more]


@pytest.mark.slow
@pytest.mark.acceptance("double-win", "A-41")
def test_two_processes_leave_what_one_leaves(finished: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        command(write_config(tmp_path, TINY), tmp_path / "out", "--processes", "2"), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("report: ") == 1 and "found" in run.stderr
    assert differences(tmp_path / "out", finished) == []
    assert not list((tmp_path / "out").rglob("*.lease"))


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_is_heard")
def test_ctrl_c_ends_several_processes_which_go_on_later(finished: Path, tmp_path: Path) -> None:
    """As a terminal does it: SIGINT to the command and its workers alike. Each saves what it trains."""
    changes = {"checkpoint_seconds": 1000}
    words = command(write_config(tmp_path, TINY, **changes), tmp_path / "out", "--no-report", "--processes", "2")
    run = subprocess.Popen(words, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("out/cells/transfer-*/*.lease"))) < 2 and run.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(run.pid, signal.SIGINT)
    said = run.communicate()[1]
    assert run.returncode == 130, said
    assert said.count("error: ") == 2 and "Traceback" not in said and said.count("SIGINT") == 2
    assert not list(tmp_path.rglob("failure.json"))
    assert subprocess.run(words).returncode == 0
    assert cell_differences(tmp_path / "out", finished) == []


@pytest.mark.slow
def test_a_worker_that_is_told_to_stop_goes_on_where_it_was(finished: Path, tmp_path: Path) -> None:
    """SIGTERM in the middle of a training: a checkpoint, status 85, a free cell; the next one goes on from there."""
    changes = {"checkpoint_seconds": 1000}
    started = command(write_config(tmp_path, TINY, **changes), tmp_path / "out", "--quiet", "--no-report")
    process = subprocess.Popen(started)
    while not (lease := list(tmp_path.glob("out/cells/transfer-*/*.lease"))) and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.3)
    process.terminate()
    assert process.wait() == Preempted.exit_status
    folder = lease[0].parent
    found = holder(folder, CELL, Watch(tmp_path))
    assert found is None or found.ended
    assert main(["study", "status", "--out", str(tmp_path / "out")]) == 0
    assert subprocess.run(started).returncode == 0
    assert cell_differences(tmp_path / "out", finished) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_are_one_worker(tmp_path: Path) -> None:
    out, config = tmp_path / "out", write_config(tmp_path, TINY)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = command(config, out, "--quiet", "--no-report")[1:]
    run = subprocess.run(
        [*torchrun, *words], env={**os.environ, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert len(rows(out)) == 6 and {row["processes"] for row in rows(out).values()} == {2}
    assert not list(out.rglob("*.lease"))
