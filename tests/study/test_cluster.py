"""Several workers from one command: processes of this machine, and jobs of a cluster, as far as none is needed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sparse_robust.cli import main
from sparse_robust.errors import UsageError
from sparse_robust.study import cluster, processes
from sparse_robust.study.cluster import RayJob, Resources, WorkerJob, submit
from sparse_robust.training import Preempted
from tests.study.mini import TINY, rows, write_config

SAVES = (
    "import signal, sys, time, pathlib\n"
    f"signal.signal(signal.SIGUSR1, lambda *_: (pathlib.Path('saved').touch(), sys.exit({Preempted.exit_status})))\n"
    "pathlib.Path('begun').touch()\n"
    "for _ in range(600): time.sleep(0.05)\n"
)


def test_one_status_for_several_workers() -> None:
    assert processes.status([0, 0]) == 0
    assert processes.status([0, -9]) == 0, "a killed worker's cells were run by the others"
    assert processes.status([-9, -9]) == 1
    assert processes.status([0, 1, -9]) == 1
    assert processes.status([85, 85, 0]) == 85


def test_each_process_gets_a_gpu_and_a_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    given = [processes.environment(index, 3) for index in range(3)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in given] == ["3", "GPU-abc", "3"]
    assert {one["OMP_NUM_THREADS"] for one in given} == {"2"}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 0)
    alone = processes.environment(0, 3)
    assert alone["OMP_NUM_THREADS"] == "5" and alone["CUDA_VISIBLE_DEVICES"] == ""


def test_signals_reach_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = SAVES.replace("'begun'", "sys.argv[1]").replace("'saved'", "sys.argv[1] + '-saved'")
    names = iter(("one", "two"))
    monkeypatch.setattr(processes, "command", lambda _: [sys.executable, "-c", script, str(tmp_path / next(names))])
    code = (
        "import os, signal, sys, threading, time, pathlib; f = pathlib.Path(sys.argv[1])\n"
        "while not ((f / 'one').exists() and (f / 'two').exists()): time.sleep(0.01)\n"
        "os.kill(int(sys.argv[2]), signal.SIGUSR1)\n"
    )
    sender = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(os.getpid())])
    assert processes.run_processes(2, []) == Preempted.exit_status
    assert sender.wait() == 0 and {p.name for p in tmp_path.iterdir()} == {"one", "two", "one-saved", "two-saved"}
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def job(tmp_path: Path, code: str, kind: type[WorkerJob] = WorkerJob) -> WorkerJob:
    made = kind([], folder=str(tmp_path))
    made.command = [sys.executable, "-c", code]
    return made


def test_a_job_ends_as_its_worker_does(tmp_path: Path) -> None:
    assert job(tmp_path, "")() == "done"
    with pytest.raises(RuntimeError, match="ended with status 3"):
        job(tmp_path, "raise SystemExit(3)")()


def test_a_job_that_is_told_to_stop_saves_its_worker_and_is_queued_again(tmp_path: Path) -> None:
    """In the way of submitit: its signal handler asks for a checkpoint while the job waits for the worker."""
    pytest.importorskip("submitit", reason="pip install submitit")
    made, again = job(tmp_path, SAVES), []

    def handler(*_: object) -> None:
        again.append(made.checkpoint())
        raise InterruptedError("requeued")

    before = signal.signal(signal.SIGUSR2, handler)
    try:
        pid = os.getpid()
        code = (
            "import os, pathlib, time\n"
            "while not pathlib.Path('begun').exists(): time.sleep(0.01)\n"
            f"os.kill({pid}, {int(signal.SIGUSR2)})\n"
        )
        sender = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
        with pytest.raises(InterruptedError):
            made()
        assert sender.wait() == 0
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "saved").exists() and again[0].function is made and made.process is None


def test_slurm_s_own_signal_does_not_kill_the_worker(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); open('alive', 'w')"
    assert job(tmp_path, code)() == "done" and (tmp_path / "alive").exists()


def test_a_worker_stopped_by_others_waits_for_slurm_to_end_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[object] = []
    monkeypatch.setattr(cluster.time, "sleep", said.append)
    monkeypatch.setattr(cluster.signal, "raise_signal", said.append)
    assert job(tmp_path, f"raise SystemExit({Preempted.exit_status})")() == "started again"
    assert said == [cluster.STOPPED_SECONDS, signal.SIGUSR2]


def test_a_task_of_ray_starts_its_worker_again(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; p = pathlib.Path('tries'); n = len(p.read_text()) if p.exists() else 0\n"
        f"p.write_text('x' * (n + 1)); sys.exit({Preempted.exit_status} if n < 2 else 0)"
    )
    assert job(tmp_path, code, RayJob)() == "started again" and (tmp_path / "tries").read_text() == "xxx"


def test_several_gpus_are_one_launch() -> None:
    assert WorkerJob(["study", "run"], gpus=1).command[1:] == ["-m", "sparse_robust", "study", "run"]
    words = WorkerJob(["study", "run"], gpus=4).command
    assert words[words.index("--num_processes") + 1] == "4" and words[-4:] == ["-m", "sparse_robust", "study", "run"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"processes": 0}, "processes must be at least 1, got 0"),
        ({"gpus": -1}, "gpus must"),
        ({"minutes": 0}, "minutes"),
    ],
)
def test_impossible_resources_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Resources(**{"processes": 1, **change})  # type: ignore[arg-type]


def test_engines_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="Did you mean 'slurm'"):
        submit("slurn", [], tmp_path, Resources(processes=1))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'sparse-robust\[ray\]'"):
        submit("ray", [], tmp_path, Resources(processes=1))
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UsageError, match=r"pip install 'sparse-robust\[slurm\]'"):
        submit("slurm", [], tmp_path, Resources(processes=1))
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace())
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UsageError, match="needs sbatch, and there is none here"):
        submit("slurm", [], tmp_path, Resources(processes=1))


def test_what_is_submitted_is_the_study_with_its_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []

    def remember(*given: object) -> list[str]:
        seen.append(given)
        return ["17_0"]

    monkeypatch.setattr(cluster, "submit", remember)
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, TINY)
    words = ["study", "submit", "--config", "tiny.yaml", "--out", "runs/t", "--processes", "3", "--gpus", "2"]
    more = ["--option", "partition=gpu", "--run-name", "r", "--idle-minutes", "5", "seeds=[4]"]
    assert main([*words, *more]) == 0
    (engine, arguments, folder, resources), here = seen[0], tmp_path.resolve()
    assert engine == "slurm" and folder == here / "runs" / "t"
    assert isinstance(arguments, list) and arguments[:6] == [
        "study", "run", "--config", str(here / "tiny.yaml"), "--out", str(here / "runs" / "t")
    ]  # fmt: skip
    assert {"seeds=[4]", "--idle-minutes", "5.0", "--run-name", "r"} <= set(arguments)
    assert resources == Resources(processes=3, gpus=2, extra={"partition": "gpu"})
    assert main([*words, "--option", "gpu"]) == 2


@pytest.mark.slow
def test_ray_runs_workers_on_this_machine(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="pip install ray")
    config, out = write_config(tmp_path, TINY), tmp_path / "out"
    words = ["study", "submit", "--engine", "ray", "--processes", "2", "--cpus", "1", "--quiet", "--no-report"]
    command = [sys.executable, "-m", "sparse_robust", *words, "--config", str(config), "--out", str(out)]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(rows(out)) == 6
