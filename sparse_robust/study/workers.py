"""Workers: any number of processes, on any number of machines, that run the cells of one study folder together.

Each takes the next cell whose predecessors are done and that nobody holds, under a lease, and stays until the study is
done. Nobody directs them: a worker may join, leave or be killed at any moment.
"""

from __future__ import annotations

import secrets
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list

from sparse_robust.errors import FileError, SparseRobustError
from sparse_robust.files import read_json, write_json
from sparse_robust.study.cells import Cell, cell_name, needs
from sparse_robust.study.context import Context
from sparse_robust.study.leases import Lease, LeaseLost, Owner, Watch, claim, holder
from sparse_robust.study.runner import CELL, FAILURE, Study, summary
from sparse_robust.training.options import Preempted
from sparse_robust.training.signals import listening

if TYPE_CHECKING:
    from accelerate import Accelerator

    from sparse_robust.training.progress import ProgressReporter

POLL_SECONDS = 2.0
SAY_SECONDS = 60.0
TRACE_LINES = 30


class CellsFailed(SparseRobustError, RuntimeError):
    """Some cells of a study ended with an error; the others are done."""


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result. ``run`` names the run in which it was tried; each try has a ``token`` of its own."""

    error: str
    run: str
    token: str
    where: str = ""
    time: str = ""
    trace: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: BaseException, run: str, owner: Owner) -> Failure:
        """Describe an error that was just raised here."""
        trace = "".join(traceback.format_exception(error)).splitlines()[-TRACE_LINES:]
        said = str(error).strip() or "no message"
        text = said if isinstance(error, SparseRobustError) else f"{type(error).__name__}: {said}"
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(text, run, secrets.token_hex(8), f"process {owner.pid} on {owner.host}", now, tuple(trace))

    @classmethod
    def read(cls, folder: Path) -> Failure | None:
        """Return what a cell's folder says about its last failure, if there was one since its last result."""
        try:
            said = read_json(folder / FAILURE)
            return cls(**{**said, "trace": tuple(said["trace"])})
        except (FileError, TypeError, KeyError):
            return None


@dataclass
class Outcome:
    """What a worker saw when it left.

    Attributes:
        ran: the cells that it finished.
        failed: cells without a result, and why.
        blocked: cells that wait for a failed one.
        running: cells that others hold; only for a worker that left early.
    """

    ran: list[str] = field(default_factory=list)
    failed: dict[str, Failure] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)

    def raise_failures(self) -> None:
        """Raise `CellsFailed` naming what failed, if anything did."""
        if self.failed:
            lines = [f"  {name}: {failure.error.splitlines()[0]}" for name, failure in self.failed.items()]
            behind = f"; {len(self.blocked)} more wait for them" if self.blocked else ""
            raise CellsFailed(
                f"{len(self.failed)} cell{'s' * (len(self.failed) > 1)} failed{behind}:\n" + "\n".join(lines) + "\n"
                "failure.json in their folders holds more. Run the same command again to retry."
            )


class Worker:
    """One launch: a process, or the ranks of a group, of which the first claims and the others follow.

    Args:
        study: the study, prepared.
        context: with what stages are run.
        run: name of the run; a failure is not retried within the run it occurred in. By default the run is this worker.
        idle_seconds: leave when there was nothing to do for so long; None stays until the study is done.
        poll_seconds: how often a waiting worker looks.
    """

    def __init__(
        self,
        study: Study,
        context: Context,
        *,
        run: str | None = None,
        idle_seconds: float | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self.study, self.context, self.progress = study, context, context.progress
        self.idle_seconds, self.poll_seconds = idle_seconds, poll_seconds
        self.owner = Owner.me(study.config.lease_seconds)
        self.run_name = run or self.owner.token
        self.names = [cell_name(cell) for cell in study.cells]
        self.needs = [[self.names.index(cell_name(need)) for need in needs(cell)] for cell in study.cells]
        self.outcome = Outcome()
        self.done: set[int] = set()
        self._idle_since: float | None = None
        self._said = -SAY_SECONDS
        self._told_to_stop: Callable[[], str | None] = lambda: None
        if context.accelerator.is_main_process:
            self.watch = Watch(study.folder)
            self.retried = self._failures_of_earlier_runs()

    def work(self) -> Outcome:
        """Run cells until there is nothing left to do.

        What a worker is stopped by (Ctrl-C, a signal that asks to checkpoint, a disk that is full) passes through, and
        its cell is free at once for the next one. A cell's own error is recorded, and the others go on.
        """
        task = self.progress.task(self.study.config.name, len(self.study.cells))
        try:
            with listening(say=self.progress.say) as self._told_to_stop:
                self._greet(task.advance)
                while (step := self._next()) is not None:
                    index, lease = step
                    if index is None:
                        time.sleep(self.poll_seconds)
                    else:
                        self._run(index, lease)
                    task.advance(len(self.done) - task.done)
        finally:
            task.close()
        return self.outcome

    # What to do next: decided by the first rank

    def _next(self) -> tuple[int | None, Lease | None] | None:
        """Return the next cell and our lease on it, (None, None) to wait, or None at the end."""
        lease: Lease | None = None
        said: list[Any] = [None, None, None]
        accelerator = self.context.accelerator
        if accelerator.is_main_process:
            try:
                if (name := self._told_to_stop()) is not None:
                    raise Preempted.by(name, f"told to stop by {name}, between two cells. Start it again to go on.")
                word, index, lease = self._decide()
                said = [word, index, sorted(self.done)]
            except BaseException:
                self._tell(["end", None, []])  # the others must not wait for ever
                raise
        said = self._tell(said)
        self.done = set(said[2])
        return None if said[0] == "end" else (said[1], lease)

    def _tell(self, said: list[Any]) -> list[Any]:
        return broadcast_object_list(said) if self.context.accelerator.num_processes > 1 else said

    def _decide(self) -> tuple[str, int | None, Lease | None]:
        running, blocked, failed = list[str](), list[str](), dict[str, Failure]()
        for index, cell in enumerate(self.study.cells):
            if index in self.done or self._sees_done(index):
                continue
            name, folder = self.names[index], self.study.cell_folder(cell)
            if not self.done.issuperset(self.needs[index]):
                blocked.append(name)
            elif (failure := self._failure_of_this_run(folder)) is not None:
                failed[name] = failure
            elif (lease := claim(folder, CELL, self.owner, self.watch)) is None:
                running.append(name)
            elif self._sees_done(index):  # the one before us finished it
                lease.finish()
            elif self._failure_of_this_run(folder) is not None:
                lease.release()
                running.append(name)  # look again
            else:
                self._idle_since = None
                return "run", index, lease
        self.outcome.running, self.outcome.blocked, self.outcome.failed = running, blocked, failed
        if not running or self._is_tired():
            return "end", None, None
        self._say_waiting(running, blocked)
        return "wait", None, None

    def _sees_done(self, index: int) -> bool:
        if self.study.is_done(self.study.cells[index]):
            self.done.add(index)
        return index in self.done

    def _is_tired(self) -> bool:
        now = time.monotonic()
        self._idle_since = now if self._idle_since is None else self._idle_since
        return self.idle_seconds is not None and now - self._idle_since >= self.idle_seconds

    def _failures_of_earlier_runs(self) -> set[str]:
        """Return the tokens of the failures that are there already: these are tried again."""
        found = (Failure.read(self.study.cell_folder(cell)) for cell in self.study.cells)
        return {failure.token for failure in found if failure is not None and failure.run != self.run_name}

    def _failure_of_this_run(self, folder: Path) -> Failure | None:
        failure = Failure.read(folder)
        return None if failure is None or failure.token in self.retried else failure

    # Running a cell: done by all ranks

    def _run(self, index: int, lease: Lease | None) -> None:
        cell, context = self.study.cells[index], self.context
        context.guard = lease.confirm if lease is not None else _nobody_asks
        try:
            if lease is None:  # not the first rank
                self.study.run_cell(cell, context)
                context.on_main(_nobody_asks)
                return
            with lease.kept():
                result = self.study.run_cell(cell, context)
                lease.fence()
                context.on_main(lambda: self.study.finish(cell, result))
            lease.finish()
            self.done.add(index)
            self.outcome.ran.append(self.names[index])
            self.progress.say(summary(result))
        except LeaseLost as error:
            if context.accelerator.num_processes > 1:
                raise
            self.progress.say(f"{self.names[index]}: {error}")
        except Exception as error:
            if isinstance(error, Preempted) or _is_the_machine(error):
                raise
            self._fail(index, lease, error)
        finally:
            context.guard = _nobody_asks
            if lease is not None:
                lease.release()

    def _fail(self, index: int, lease: Lease | None, error: Exception) -> None:
        folder = self.study.cell_folder(self.study.cells[index])
        failure = Failure.of(error, self.run_name, self.owner)
        with suppress(LeaseLost):
            if lease is not None:
                lease.check()
            write_json(folder / FAILURE, {**vars(failure), "trace": list(failure.trace)})
            self.progress.say(f"failed  {self.names[index]}: {failure.error}")
        if self.context.accelerator.num_processes > 1 or isinstance(error, torch.AcceleratorError):
            raise error  # the other ranks, or the device, are no longer in a known state

    # What is said

    def _greet(self, advance: Callable[[int], None]) -> None:
        if not self.context.accelerator.is_main_process:
            return
        for index, cell in enumerate(self.study.cells):
            if self._sees_done(index) and holder(self.study.cell_folder(cell), CELL, self.watch) is not None:
                self._tidy(cell)
        advance(len(self.done))
        if self.done:
            rest = "going on with the rest" if len(self.done) < len(self.names) else "nothing is left to run"
            self.progress.say(f"{len(self.done)} of {len(self.names)} cells are done already; {rest}.")

    def _tidy(self, cell: Cell) -> None:
        """Delete what was left by a kill just after the result was written."""
        lease = claim(self.study.cell_folder(cell), CELL, self.owner, self.watch)
        if lease is not None:
            self.study.tidy(cell)
            lease.finish()

    def _say_waiting(self, running: list[str], blocked: list[str]) -> None:
        now = time.monotonic()
        if now - self._said >= SAY_SECONDS:
            self._said = now
            behind = f"; {len(blocked)} wait for earlier ones" if blocked else ""
            others = f"{running[0]}" + (f" and {len(running) - 1} more" if len(running) > 1 else "")
            self.progress.say(f"waiting: other workers are running {others}{behind}.")


def run_study(
    study: Study,
    accelerator: Accelerator,
    progress: ProgressReporter,
    *,
    machine: dict[str, Any],
    run: str | None = None,
    idle_seconds: float | None = None,
    report: Callable[[], Path] | None = None,
) -> Outcome:
    """Be a worker of a study until it is done: kill it at any moment and call it again, and it goes on from there.

    Args:
        study: the study.
        accelerator: the devices of this launch, which are one worker together.
        progress: where progress is shown.
        machine: what the results are made on, for the record.
        run: see `Worker`.
        idle_seconds: see `Worker`.
        report: writes the report and returns its page; called by the worker that finishes last.

    Raises:
        FileError: if the folder cannot be written, or too little space is left.
        UsageError: if others are at work in the folder on another study.
    """
    before = report_stamp(study)
    if accelerator.is_main_process:
        study.prepare(machine)
    accelerator.wait_for_everyone()
    config = study.config
    context = Context(
        accelerator=accelerator, progress=progress, workers=config.workers, project=config.name,
        checkpoint_seconds=config.checkpoint_seconds, keep_weights=config.keep_weights,
        eval_batch_size=config.evaluation.batch_size, trust_pickle=study.trust_pickle,
    )  # fmt: skip
    outcome = Worker(study, context, run=run, idle_seconds=idle_seconds).work()
    if accelerator.is_main_process and report is not None and not outcome.running:
        page = report_once(study, report, before)
        if page is not None:
            progress.say(f"report: {page}")
    accelerator.wait_for_everyone()
    return outcome


def report_once(study: Study, write: Callable[[], Path], before: float | None) -> Path | None:
    """Let one of the workers that leave a study write its report; the last one does, if no earlier one has all of it.

    Args:
        study: the study.
        write: writes the report and returns its page.
        before: `report_stamp` when the worker began: a report that was there already is written anew.

    Returns:
        The page if it was written here, else None.
    """
    watch, owner = Watch(study.folder), Owner.me(study.config.lease_seconds)
    while (lease := claim(study.folder, "report", owner, watch)) is None:
        time.sleep(min(POLL_SECONDS, study.config.lease_seconds / 4))
    try:
        with lease.kept():
            if report_stamp(study) != before and _report_has_all(study):
                return None
            return write()
    finally:
        lease.finish()


def report_stamp(study: Study) -> float | None:
    """Return what tells one report from the next, or None where there is none."""
    try:
        return (study.folder / "report" / "report.json").stat().st_mtime_ns
    except OSError:
        return None


def _report_has_all(study: Study) -> bool:
    try:
        pending = read_json(study.folder / "report" / "report.json")["cells"]["pending"]
        return {entry["cell"] for entry in pending} == {cell_name(cell) for cell in study.pending()}
    except (FileError, KeyError, TypeError):
        return False


def _nobody_asks() -> None:
    """Guard of a rank that holds no lease."""


def _is_the_machine(error: BaseException | None) -> bool:
    """Whether the trouble is a disk that takes nothing more: every other cell would fail on it, too."""
    import errno

    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            return True
        error = error.__cause__ or error.__context__
    return False
