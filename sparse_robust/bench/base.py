"""The same operations at another git revision, timed in turn with those of the working tree."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparse_robust.bench.harness import OPERATIONS, select
from sparse_robust.bench.records import duration
from sparse_robust.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

SAMPLE_SECONDS = 0.05


@dataclass(frozen=True)
class Comparison:
    """Our route of one case here and at the base, in seconds of one call, round by round; or why there is none."""

    operation: str
    case: str
    here: tuple[float, ...] = field(default=())
    there: tuple[float, ...] = field(default=())
    failure: str = ""

    def ratio(self) -> tuple[float, float, float]:
        """Return the 20 %, 50 % and 80 % quantiles over the rounds of time here / time there."""
        low, median, high = np.quantile(np.array(self.here) / np.array(self.there), [0.2, 0.5, 0.8])
        return float(low), float(median), float(high)


def compare(
    ref: str,
    names: Sequence[str] | None = None,
    *,
    root: str | Path,
    device: str = "cpu",
    scale: str = "full",
    samples: int = 12,
) -> Iterator[Comparison]:
    """Time our route of each case here and at revision ``ref``, in turn (A, B, B, A, ...), a process for each.

    Args:
        ref: any name git knows a commit by.
        names: operations; None means all of the working tree.
        root: the checkout that holds the working tree.

    Raises:
        UsageError: for an unknown operation or revision, or where ``root`` is no git checkout.
    """
    chosen = [operation.name for operation in select(OPERATIONS, names)]
    root = Path(root).resolve()
    commit = _commit(root, ref)
    return _compare(root, commit, chosen, device, scale, samples)


def _compare(
    root: Path, commit: str, names: Sequence[str], device: str, scale: str, samples: int
) -> Iterator[Comparison]:
    with ExitStack() as stack:
        base = stack.enter_context(_unpacked(root, commit))
        sides = ((root, "here"), (base, "at the base"))
        here, there = (stack.enter_context(_side(folder, where, device, scale)) for folder, where in sides)
        for name in names:
            try:
                yield from _cases(here, there, name, samples)
            except _SideError as error:  # there is nobody left to compare with
                yield Comparison(name, "", failure=str(error))
                return


def _cases(here: _Side, there: _Side, name: str, samples: int) -> Iterator[Comparison]:
    """Compare the cases of an operation one by one, as long as both sides have the same."""
    opened = [side.ask("open", name) for side in (here, there)]
    if any("error" in reply for reply in opened):
        yield Comparison(name, "", failure=_failure(*opened))
        return
    while True:
        ours, theirs = here.ask("next", True), there.ask("next", True)
        if "end" in ours and "end" in theirs:
            return
        if ours.get("case") != theirs.get("case"):
            wanted, got = (repr(reply.get("case", "no case")) for reply in (ours, theirs))
            yield Comparison(name, ours.get("case", ""), failure=f"here comes {wanted}, at the base {got}")
            return
        if "error" in ours or "error" in theirs:
            yield Comparison(name, ours["case"], failure=_failure(ours, theirs))
        else:
            yield Comparison(name, ours["case"], *_rounds(here, there, ours, theirs, samples))


def _rounds(
    here: _Side, there: _Side, ours: Any, theirs: Any, samples: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    calls = max(1, math.ceil(SAMPLE_SECONDS / max(ours["seconds"], theirs["seconds"], 1e-9)))
    taken: dict[_Side, list[float]] = {here: [], there: []}
    for index in range(samples):
        for side in (here, there) if index % 2 == 0 else (there, here):
            taken[side].append(side.ask("sample", calls)["seconds"])
    return tuple(taken[here]), tuple(taken[there])


def _failure(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    sides = (("here", ours), ("at the base", theirs))
    return "; ".join(f"{where}: {reply['error']}" for where, reply in sides if "error" in reply)


class _SideError(Exception):
    """A worker process ended."""


class _Side:
    """A worker process: `sparse_robust.bench.side` over the package of one folder."""

    def __init__(self, process: subprocess.Popen[str], where: str) -> None:
        self.process, self.where = process, where

    def ask(self, what: str, argument: object) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps({what: argument}) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise _SideError(f"{self.where}: the process ended with status {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply


@contextmanager
def _side(folder: Path, where: str, device: str, scale: str) -> Iterator[_Side]:
    program = Path(__file__).with_name("side.py")
    command = [sys.executable, str(program), str(folder), device, scale, str(torch.get_num_threads())]
    process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield _Side(process, where)
    finally:
        process.kill()
        process.communicate()


def _git(root: Path, *words: str) -> bytes:
    return subprocess.run(["git", "-C", str(root), *words], capture_output=True, check=True, timeout=60).stdout


def _commit(root: Path, ref: str) -> str:
    """Return the hash of a revision."""
    try:
        _git(root, "rev-parse", "--git-dir")
    except (OSError, subprocess.SubprocessError) as error:
        raise UsageError(
            f"a base is a git revision, and {root} is no git checkout. Clone the repository, and run this from there."
        ) from error
    try:
        return _git(root, "rev-parse", "--verify", "--end-of-options", f"{ref}^{{commit}}").decode().strip()
    except subprocess.SubprocessError as error:
        raise UsageError(f"git knows no commit {ref!r} in {root}. Name a branch, a tag or a hash.") from error


@contextmanager
def _unpacked(root: Path, commit: str) -> Iterator[Path]:
    """Unpack a revision's files into a folder of its own; the checkout and git's own files stay as they are."""
    with tempfile.TemporaryDirectory(prefix="sparse-robust-base-") as folder:
        files = _git(root, "archive", "--format=tar", commit)
        with tarfile.open(fileobj=io.BytesIO(files)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def comparison_table(comparisons: Sequence[Comparison], ref: str) -> Table:
    """Lay comparisons out for a terminal."""
    from rich.table import Table

    shown = Table(title=f"Working tree against {ref}: our route, time here / time there", title_justify="left")
    for heading in ("operation", "case", "there", "here", "ratio", "20 % .. 80 %"):
        shown.add_column(heading, justify="left" if heading in ("operation", "case") else "right")
    for each in comparisons:
        if each.failure:
            shown.add_row(each.operation, each.case, "-", "-", "-", each.failure, style="red")
            continue
        low, median, high = each.ratio()
        there, here = (duration(float(np.median(times))) for times in (each.there, each.here))
        shown.add_row(each.operation, each.case, there, here, f"{median:.3f}", f"{low:.3f} .. {high:.3f}")
    return shown
