"""Launch files and jobs on a real Slurm: killed, requeued, cancelled; the results are those of one plain run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_robust.cli import main
from sparse_robust.study.config import StudyConfig
from sparse_robust.study.leases import Owner, Watch, holder
from sparse_robust.study.load import build, read_config
from sparse_robust.study.runner import CELL, Study
from tests.study.mini import TINY, differences, rows, write_config

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted((ROOT / "launch" / "slurm").glob("*.sbatch"))
WORKERS = ROOT / "launch" / "slurm" / "workers.sbatch"
NODES = ROOT / "launch" / "slurm" / "nodes.sbatch"


# What can be told without Slurm


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_launch_files_parse_and_say_how_they_are_used(file: Path) -> None:
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0
    text = file.read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?", text, re.M))
    assert "requeue" in options and options["open-mode"] == "append"
    told = re.fullmatch(r"B:(\w+)@(\d+)", options["signal"])
    assert told is not None and "trap 'over=yes; scancel --signal=TERM" in text and f"' {told[1]}" in text
    assert int(told[2]) >= 120, "enough for a checkpoint"
    assert text.index("#SBATCH") < text.index("set -uo pipefail"), "sbatch reads options up to the first command"
    assert f"#   sbatch launch/slurm/{file.name}" in text
    assert file.name in (ROOT / "docs" / "cluster.md").read_text()


def test_there_are_launch_files_for_an_array_and_for_nodes() -> None:
    assert {file.name for file in FILES} == {"workers.sbatch", "nodes.sbatch"}


def run_without_slurm(file: Path, tmp_path: Path, arguments: list[str], **environment: str) -> list[str]:
    """Run a launch file with programs that only write down how they were called."""
    for name in ("srun", "scontrol", "scancel"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\n(printf "%s|" {name} "$@" | tr "\\n" " "; echo) >> {tmp_path}/log\n')
        if name == "srun":
            script.write_text(script.read_text() + 'kill -USR1 $PPID; sleep 0.3; exit "${STATUS:-0}"\n')
        script.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "a,b", **environment}
    done = subprocess.run(["bash", file, *arguments], env={**os.environ, "PATH": path, **given}, check=False)
    assert done.returncode == int(environment.get("STATUS", 0))
    return (tmp_path / "log").read_text().splitlines()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("status", ["0", "85", "1"])
def test_told_that_the_time_is_over_they_end_the_run_and_queue_the_job_again(
    file: Path, status: str, tmp_path: Path
) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"} if file == WORKERS else {}
    said = run_without_slurm(file, tmp_path, ["--config", "a b"], STATUS=status, **array)
    job = "5_2" if file == WORKERS else "7"
    assert f"scancel|--signal=TERM|{job}.0|" in said
    assert (f"scontrol|requeue|{job}|" in said) == (status != "0"), "done is done"
    (step,) = [line for line in said if line.startswith("srun|")]
    assert "|--config|a b|" in step
    if file == WORKERS:
        assert "|study|run|" in step and step.endswith("|--run-name|slurm-5|")


# What needs one


def write(folder: Path) -> Path:
    return write_config(folder, {**TINY, "seeds": [0, 1]}, checkpoint_seconds=0.5)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    assert main(["study", "run", "--config", str(write(folder)), "--out", str(folder / "out"), "--quiet"]) == 0
    return folder / "out"


@pytest.fixture(autouse=True)
def _python_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def slurm(*words: str | Path, where: Path | None = None) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=where, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(job: str) -> str:
    return slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T")


def until(condition: Callable[[], object], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def at_work(study: Study, kind: str) -> list[Owner]:
    """The workers that hold a cell of a kind right now."""
    watch = Watch(study.folder)
    found = (holder(study.cell_folder(cell), CELL, watch) for cell in study.cells if cell.kind == kind)
    return [one.owner for one in found if one is not None and one.alive and one.owner is not None]


def study_in(folder: Path) -> Study:
    (folder / "out").mkdir(exist_ok=True)
    return Study(build(StudyConfig, read_config(write(folder))), folder / "out")


@pytest.mark.slurm
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_slurm_accepts_the_launch_files(file: Path) -> None:
    slurm("sbatch", "--test-only", "--nodes=1", file)


@pytest.mark.slurm
def test_an_array_of_workers_survives_a_kill_and_a_requeue(plain: Path, tmp_path: Path) -> None:
    study = study_in(tmp_path)
    options = ["--config", write(tmp_path), "--out", study.folder, "--quiet"]
    job = slurm("sbatch", "--parsable", "--array=0-1", "--cpus-per-task=1", WORKERS, *options, where=tmp_path)
    until(lambda: at_work(study, "transfer"))
    victim = at_work(study, "transfer")[0]
    os.kill(victim.pid, signal.SIGKILL)  # its job fails; the other worker goes on
    until(lambda: any(owner.pid != victim.pid for owner in at_work(study, "transfer")))
    other = next(owner for owner in at_work(study, "transfer") if owner.pid != victim.pid)
    running = [n for n in (f"{job}_0", f"{job}_1") if state(n) == "RUNNING"]
    until(lambda: [n for n in running if state(n) == "RUNNING"] != [f"{job}_0", f"{job}_1"])
    (survivor,) = [n for n in running if state(n) == "RUNNING"]
    slurm("scancel", "--signal=USR1", "--batch", survivor)  # as before the time limit
    until(lambda: state(survivor) == "PENDING")
    found = [one for one in at_work(study, "transfer") if one.pid == other.pid]
    assert found == [], "the cell is free before the job is queued again"
    until(lambda: state(survivor) == "COMPLETED")
    assert "Restarts=1" in slurm("scontrol", "show", "job", survivor)
    assert differences(study.folder, plain) == []


@pytest.mark.slurm
def test_submitted_workers_are_requeued_by_signal_and_by_the_administrator(plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("submitit", reason="pip install submitit")
    study = study_in(tmp_path)
    submit = ["study", "submit", "--processes", "2", "--cpus", "1", "--minutes", "60", "--quiet", "--no-report"]
    words = [*submit, "--config", str(write(tmp_path)), "--out", str(study.folder)]
    said = slurm(sys.executable, "-m", "sparse_robust", *words, where=tmp_path)
    first, second = said.split()[:2]
    until(lambda: len(at_work(study, "transfer")) == 2)
    slurm("scancel", "--signal=USR2", first)  # as before the time limit: checkpoint, and again
    until(lambda: state(first) == "PENDING")
    slurm("scontrol", "requeue", second)  # as a preemption: killed, and again
    until(lambda: state(second) == "PENDING")
    until(lambda: {state(first), state(second)} == {"COMPLETED"})
    for job in (first, second):
        assert "Restarts=1" in slurm("scontrol", "show", "job", job)
    assert main(["study", "report", "--out", str(study.folder)]) == 0
    assert differences(study.folder, plain) == []


@pytest.mark.slurm
def test_a_cancelled_job_stays_cancelled_and_frees_its_cell(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    options = ["--config", write(tmp_path), "--out", study.folder, "--quiet"]
    job = slurm("sbatch", "--parsable", "--array=0-0", "--cpus-per-task=1", WORKERS, *options, where=tmp_path)
    until(lambda: at_work(study, "transfer"))
    slurm("scancel", job)
    until(lambda: state(f"{job}_0") == "CANCELLED")
    assert at_work(study, "transfer") == []


@pytest.mark.slurm
def test_ranks_of_a_node_run_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKS_PER_NODE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    words = ["study", "run", "--config", write_config(tmp_path, TINY), "--out", tmp_path / "out", "--quiet"]
    job = slurm("sbatch", "--parsable", "--nodes=1", NODES, *words, where=tmp_path)
    until(lambda: state(job) in ("COMPLETED", "FAILED"))
    assert state(job) == "COMPLETED", (tmp_path / f"slurm-{job}.out").read_text()
    assert {row["processes"] for row in rows(tmp_path / "out").values()} == {2}


@pytest.mark.skipif(shutil.which("sbatch") is not None, reason="there is an sbatch here")
def test_without_slurm_the_error_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["study", "submit", "--processes", "2", "--config", str(write(tmp_path)), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "pip install 'sparse-robust[slurm]'" in (said := capsys.readouterr().err) or "needs sbatch" in said
