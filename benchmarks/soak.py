"""Kill the workers of a study again and again: python -m benchmarks.soak [--kills 25] [--workers 2] [--minutes 15].

First the study runs undisturbed, by one worker. Then it runs by several, and at random moments, spread over the study,
one of them (now and then all) is killed with SIGKILL and started again. Results, tickets and report must be the same,
byte for byte, timings aside. The figures are appended to benchmarks/results/soak.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparse_robust.bench import machine, machine_line

HERE = Path(__file__).resolve().parent
ALL_AT_ONCE = 0.2
"""Share of the kills that hit every worker."""
LONGEST_WAIT = 3.0
"""Up to so many seconds after the study has come far enough, a kill strikes."""
LEFT = ("*.lease", ".*.tmp", "checkpoint*", "round-*", "failure.json")
"""What a finished study must not hold."""


@dataclass
class Soak:
    """What happened."""

    kills: int = 0
    resumed: int = 0
    """Kills that struck while a checkpoint was there."""
    seconds: float = 0.0
    finished: bool = False
    faults: list[str] = field(default_factory=list)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill the workers of a study again and again.")
    parser.add_argument("--config", type=Path, default=HERE / "soak.yaml", help="the study; default: %(default)s")
    parser.add_argument("--kills", type=int, default=25, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=15.0, help="give up after so long; default: %(default)s")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: a new one")
    parser.add_argument("--record", type=Path, default=HERE / "results" / "soak.csv", help="default: %(default)s")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    deadline = time.monotonic() + 60 * given.minutes
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        plain, out = Path(folder, "plain"), Path(folder, "out")
        print(machine_line(machine()), f"seed {seed}", sep="; ", flush=True)
        seconds = undisturbed(given.config, plain, deadline)
        print(f"undisturbed, one worker: {len(rows(plain))} cells in {seconds:.0f} s", flush=True)
        soak = disturbed(given.config, out, kills=given.kills, workers=given.workers, seed=seed, deadline=deadline)
        if soak.finished:
            soak.faults += differences(out, plain) + leftovers(out)
        if soak.kills < given.kills or not soak.finished:
            soak.faults.append(f"only {soak.kills} of {given.kills} kills within {given.minutes:g} minutes")
        cells = len(rows(plain))
    verdict = "identical" if not soak.faults else "; ".join(soak.faults)
    print(f"{soak.kills} kills ({soak.resumed} with a checkpoint to go on from) in {soak.seconds:.0f} s: {verdict}")
    append(
        given.record,
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"), "study": given.config.stem, "cells": cells,
            "workers": given.workers, "kills": soak.kills, "resumed": soak.resumed, "seed": seed,
            "seconds_plain": round(seconds, 1), "seconds": round(soak.seconds, 1), "verdict": verdict,
            "load": round(os.getloadavg()[0], 2), **asdict(machine()),
        },
    )  # fmt: skip
    return 1 if soak.faults else 0


def command(config: Path, out: Path) -> list[str]:
    """Return the command line of a worker."""
    return [
        sys.executable,
        "-m",
        "sparse_robust",
        "study",
        "run",
        "--config",
        str(config),
        "--out",
        str(out),
        "--quiet",
    ]


def undisturbed(config: Path, out: Path, deadline: float) -> float:
    """Run the study by one worker, and return the seconds it took."""
    began = time.monotonic()
    subprocess.run(command(config, out), check=True, timeout=max(deadline - began, 1))
    return time.monotonic() - began


def disturbed(config: Path, out: Path, *, kills: int, workers: int, seed: int, deadline: float) -> Soak:
    """Run the study by several workers that are killed and started again, to its end or the deadline."""
    soak, chance, began = Soak(), random.Random(seed), time.monotonic()
    start = [*command(config, out)]
    running = [subprocess.Popen(start, start_new_session=True) for _ in range(workers)]
    try:
        while soak.kills < kills and _wait_for_moment(config, out, soak.kills / (kills + 1), chance, running, deadline):
            victims = range(workers) if chance.random() < ALL_AT_ONCE else [chance.randrange(workers)]
            soak.resumed += any(out.glob("cells/*/checkpoint*")) or any(out.glob("cells/*/round-*/checkpoint*"))
            for victim in victims:
                _kill(running[victim])
                running[victim] = subprocess.Popen(start, start_new_session=True)
            soak.kills += 1
        codes = [worker.wait(max(deadline - time.monotonic(), 1)) for worker in running]
        soak.finished = True
        soak.faults += [f"a worker ended with status {code}" for code in codes if code]
    except subprocess.TimeoutExpired:
        pass
    finally:
        for worker in running:
            _kill(worker)
    soak.seconds = time.monotonic() - began
    return soak


def _wait_for_moment(
    config: Path, out: Path, share: float, chance: random.Random, running: Sequence[Any], deadline: float
) -> bool:
    """Wait until that share of the cells is done, and a little longer; return whether there is still work."""
    cells: list[str] = []
    while time.monotonic() < deadline and any(worker.poll() is None for worker in running):
        if not cells and (out / "study.json").exists():
            cells = json.loads((out / "study.json").read_text())["cells"]
        if cells and sum((out / "cells" / name / "result.json").exists() for name in cells) >= share * len(cells):
            time.sleep(chance.uniform(0, LONGEST_WAIT))
            return any(worker.poll() is None for worker in running)
        time.sleep(0.02)
    return False


def _kill(worker: subprocess.Popen[bytes]) -> None:
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


# What makes two study folders the same


def rows(out: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a study's cells, by name."""
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(out.glob("cells/*/result.json"))}


def without_timings(value: Any) -> Any:
    """Return a result without the seconds it took."""
    if isinstance(value, dict):
        return {key: without_timings(item) for key, item in value.items() if key != "seconds"}
    return [without_timings(item) for item in value] if isinstance(value, list) else value


def report(out: Path) -> Any:
    """Return what a study's report says, apart from how long things took."""
    said = json.loads((out / "report" / "report.json").read_text())
    del said["time"], said["config"]
    said["figures"] = [figure["name"] for figure in said["figures"]]  # captions tell times
    return without_timings(said)


def differences(mine: Path, theirs: Path) -> list[str]:
    """Return what two finished studies do not have in common, timings aside."""
    return cell_differences(mine, theirs) + ([] if report(mine) == report(theirs) else ["report"])


def cell_differences(mine: Path, theirs: Path) -> list[str]:
    """Return the results, tickets and pictures that two studies do not have in common, timings aside."""
    a, b = rows(mine), rows(theirs)
    found = sorted({*a} ^ {*b})
    found += [name for name in {*a} & {*b} if without_timings(a[name]) != without_timings(b[name])]
    # The rows hold the sha256 of the weights; their files list what they know of themselves in any order.
    for pattern in ("cells/*/tickets/*.safetensors", "cells/*/examples.safetensors"):
        files = [{file.relative_to(out): file.read_bytes() for file in out.glob(pattern)} for out in (mine, theirs)]
        found += [str(name) for name in {*files[0]} | {*files[1]} if files[0].get(name) != files[1].get(name)]
    return found


def leftovers(out: Path) -> list[str]:
    """Return the files of a finished study that only an unfinished one needs."""
    return sorted(f"{file.relative_to(out)} is left" for pattern in LEFT for file in out.rglob(pattern))


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line to the record; the file and its header are made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or path.stat().st_size == 0
    with open(path, "a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
