"""Reads every bad file in one process of little memory, and prints what became of each: one JSON line a file.

Run as ``python -m tests.bad_files.read_all FOLDER``. An audit hook notes what a reader must not do: write or remove
files, start processes, or open connections.
"""

from __future__ import annotations

import io
import json
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_robust.errors import SparseRobustError
from sparse_robust.evaluation import read_evaluation
from sparse_robust.evaluation.verdicts import VerdictFile, read_verdicts
from sparse_robust.masks import Masks
from sparse_robust.models import import_weights, load_model, load_state, read_model_file
from sparse_robust.study.cells import cell_name
from sparse_robust.study.config import StudyConfig
from sparse_robust.study.load import build, read_config
from sparse_robust.study.results import load_results
from sparse_robust.study.runner import Study
from sparse_robust.tickets import Ticket
from sparse_robust.tickets.card import card
from sparse_robust.tickets.console import show_ticket
from tests.bad_files.corpus import corpus
from tests.bad_files.damage import SENTINEL, Case, tiny
from tests.bad_files.texts import verdict_header

SPARE = 1200 << 20
"""Bytes of address space beyond what the process has when it begins to read."""

FORBIDDEN = (
    "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.chmod",
    "os.link", "os.symlink", "os.truncate", "subprocess.Popen", "socket.connect", "shutil.",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
MODEL = tiny()


def checkpoint(path: Path) -> None:
    import_weights(MODEL, load_state(path), density=0.5, source=str(path))


def model(path: Path) -> None:
    read_model_file(path)
    load_model(path)


def ticket(path: Path) -> None:
    found = Ticket.load(path)
    assert Masks.load(path) == found.masks
    show_ticket(found, path, Console(file=io.StringIO(), width=100))
    card(found, "owner/name", {"ticket.safetensors": "0" * 64})


def configuration(path: Path) -> None:
    values = read_config(path)
    try:
        study = Study(build(StudyConfig, values), path.parent / "runs")
    except SparseRobustError as error:  # which names the key and not the file: the key may be an override's
        raise SparseRobustError(f"{path}: {error}") from error
    for cell in study.cells:
        folder = study.cell_folder(cell)
        assert folder.resolve().parent == (path.parent / "runs" / "cells").resolve(), cell_name(cell)
    assert (path.parent / "runs" / study.config.name).resolve().parent == (path.parent / "runs").resolve()


def verdicts(path: Path) -> None:
    read_verdicts(path)
    read_evaluation(path)
    VerdictFile(path, verdict_header()).load()


def study(path: Path) -> None:
    found = load_results(path.parent)
    assert not found.transfer and len(found.pending) == len(found.cells)


READERS: dict[str, Callable[[Path], None]] = {
    "checkpoint": checkpoint, "model": model, "ticket": ticket, "configuration": configuration, "verdicts": verdicts,
    "study": study,
}  # fmt: skip
NAMES = {"configuration": "bad.yaml", "verdicts": "bad.csv", "study": "study.json"}


def outcome(case: Case, path: Path) -> dict[str, Any]:
    started = time.process_time()
    try:
        READERS[case.kind](path)
        found, message = "read", ""
    except SparseRobustError as error:
        found, message = "refused", str(error)
    except BaseException:
        found, message = "crashed", traceback.format_exc()[-2000:]
    seconds = time.process_time() - started
    return {
        "kind": case.kind, "name": case.name, "sound": case.sound, "outcome": found, "message": message[:2000],
        "length": len(message), "named": path.name in message, "seconds": seconds,
    }  # fmt: skip


def peak_memory(anew: bool = False) -> int:
    """Return the most memory that this process has had since it was last asked anew, in KiB."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(folder: Path) -> None:
    cases = corpus(folder / "good")
    desk = folder / "desk"
    desk.mkdir()
    os.chdir(desk)
    done: list[str] = []
    armed, place = False, desk

    def note(what: str, file: Any) -> None:
        inside = isinstance(file, (str, Path)) and Path(file).resolve().is_relative_to(place.resolve())
        if not inside:
            done.append(what)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not armed:
            return
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING:
            note(f"opened {arguments[0]!r} to write", arguments[0])
        elif event.startswith(FORBIDDEN):
            note(f"{event} {arguments!r}"[:200], arguments[0] if arguments else None)

    for kind in READERS:  # everything that is imported on first use
        (desk / "text").write_text("x")
        outcome(Case(kind, "", b""), desk / "text")
    ticket(folder / "good" / "ticket.safetensors")
    (desk / "text").unlink()
    warnings.simplefilter("ignore")
    sys.addaudithook(watch)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + SPARE, size + SPARE))
    for index, case in enumerate(cases):
        place = desk / str(index)
        place.mkdir()
        path = place / NAMES.get(case.kind, "bad.safetensors")
        path.write_bytes(case.content)
        sys.stdout.write(json.dumps({"begin": f"{case.kind}: {case.name}"}) + "\n")
        sys.stdout.flush()
        done.clear()
        before = peak_memory(anew=True)
        armed = True
        result = outcome(case, path)
        armed = False
        result["grown_mb"] = (peak_memory() - before) / 1024
        left = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file() and file != path]
        result["wrote"] = [*done, *(name for name in left if not name.startswith("good/"))]
        result["executed"] = any(folder.rglob(SENTINEL)) or any(folder.rglob("escaped"))
        path.unlink()
        place.rmdir()
        sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
