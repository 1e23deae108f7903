"""Workers of a study on a cluster: an array job of Slurm (through submitit), or tasks of Ray.

Both only start workers; what these do and in which order they settle among themselves in the study's folder, which all
machines must see under the same path.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_robust.errors import UsageError, unknown
from sparse_robust.study.processes import command
from sparse_robust.training.options import Preempted

ENGINES = ("slurm", "ray")
REQUEUES = 10_000
"""How often a job may run out of its time: until the study is done."""
STOPPED_SECONDS = 600.0
"""Longer than clusters usually let a job live that they have told to end."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each worker is given.

    Attributes:
        processes: number of workers.
        gpus: GPUs of a worker; with more than one, it is a launch of so many ranks.
        cpus: cores of a worker; None leaves it to the engine.
        memory_gb: memory of a worker; None leaves it to the engine.
        minutes: Slurm: time limit of a job, which is started again until the study is done.
        signal_seconds: Slurm: so long before the limit the worker is told to save a checkpoint.
        extra: Slurm: more options of sbatch by name, such as partition or account. Ray: of its remote tasks.
    """

    processes: int
    gpus: int = 0
    cpus: int | None = None
    memory_gb: float | None = None
    minutes: int = 24 * 60
    signal_seconds: int = 180
    extra: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("processes", "minutes", "signal_seconds"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}.")
        if self.gpus < 0:
            raise UsageError(f"--gpus must be at least 0, got {self.gpus}.")


class WorkerJob:
    """One worker as a job: a process of its own, which is told when the job's time is over.

    It is pickled by the engine and called on the machine where it runs.
    """

    def __init__(self, arguments: Sequence[str], gpus: int = 0, folder: str | None = None) -> None:
        self.command, self.folder = _launch(arguments, gpus), folder or os.getcwd()
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> str:
        """Run the worker to its end.

        Raises:
            RuntimeError: if it ended with an error; its output says which.
        """
        # Slurm signals every process of a job; what is meant for submitit must not kill the worker.
        self.process = subprocess.Popen(self.command, cwd=self.folder, preexec_fn=_ignore_engine)  # noqa: PLW1509
        code = self._wait()
        if code == Preempted.exit_status:
            self.requeue()
            return "started again"
        if code != 0:
            raise RuntimeError(
                f"the worker ended with status {code}; what it said is above: {shlex.join(self.command)}"
            )
        return "done"

    def requeue(self) -> None:
        """The worker was told to stop, not by us, and has saved its state. Leave the rest to Slurm: it is about to end
        a job that is cancelled, and to requeue one that is preempted. If it does neither, have the job started again.
        """
        time.sleep(STOPPED_SECONDS)
        signal.raise_signal(signal.SIGUSR2)  # as before the time limit: submitit calls `checkpoint` and requeues

    def checkpoint(self) -> Any:
        """End the worker, which saves its state, and say what to run when the job is started again (for submitit)."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None and self.process.returncode is None:
            os.kill(self.process.pid, signal.SIGUSR1)
            self._wait()
        self.process = None
        return DelayedSubmission(self)

    def _wait(self) -> int:
        assert self.process is not None
        # Popen.wait holds a lock that the signal handler, which waits too, would wait for.
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return self.process.wait()


class RayJob(WorkerJob):
    """One worker as a task of Ray, which runs it again on another machine if this one is lost."""

    def requeue(self) -> None:
        """Start it again."""
        self()


def submit(engine: str, arguments: Sequence[str], folder: Path, resources: Resources) -> list[str]:
    """Start workers with these arguments; return the names of the jobs. With Ray, wait until they are done.

    Args:
        engine: slurm or ray.
        arguments: those of ``sparse-robust study run``.
        folder: the study's folder; job files and logs go to ``folder/jobs``.
        resources: what each worker gets.

    Raises:
        UsageError: if the engine is unknown or not there, or refuses an option.
    """
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    run = {"slurm": submit_slurm, "ray": submit_ray}[engine]
    return run(arguments, folder, resources)


def submit_slurm(arguments: Sequence[str], folder: Path, resources: Resources) -> list[str]:
    """Submit an array job that Slurm starts again after its time limit, a preemption or the loss of a node."""
    try:
        import submitit
    except ImportError as error:
        raise UsageError("--engine slurm needs submitit: pip install 'sparse-robust[slurm]'.") from error
    if shutil.which("sbatch") is None:
        raise UsageError("--engine slurm needs sbatch, and there is none here: run it where you submit your jobs.")
    executor = submitit.SlurmExecutor(folder=folder / "jobs", max_num_timeout=REQUEUES)
    options: dict[str, Any] = {
        "job_name": folder.name, "time": resources.minutes, "signal_delay_s": resources.signal_seconds,
        "cpus_per_task": resources.cpus, "gpus_per_node": resources.gpus or None,
        "mem": None if resources.memory_gb is None else f"{round(1024 * resources.memory_gb)}MB",
        "array_parallelism": resources.processes, "stderr_to_stdout": True, "wckey": "",
        "additional_parameters": {"requeue": True, **{k.replace("_", "-"): v for k, v in resources.extra.items()}},
    }  # fmt: skip
    executor.update_parameters(**{name: value for name, value in options.items() if value is not None})
    try:
        with executor.batch():
            jobs = [executor.submit(WorkerJob(arguments, resources.gpus)) for _ in range(resources.processes)]
    except submitit.core.utils.FailedJobError as error:
        raise UsageError(f"Slurm refused the job: {error}") from error
    return [str(job.job_id) for job in jobs]


def submit_ray(arguments: Sequence[str], folder: Path, resources: Resources) -> list[str]:
    """Run workers as tasks of the Ray cluster that RAY_ADDRESS names, or of one on this machine, to their end."""
    try:
        import ray
    except ImportError as error:
        raise UsageError("--engine ray needs Ray: pip install 'sparse-robust[ray]'.") from error
    options: dict[str, Any] = {"num_gpus": resources.gpus, "max_retries": -1, "name": folder.name, **resources.extra}
    if resources.cpus is not None:
        options["num_cpus"] = resources.cpus
    if resources.memory_gb is not None:
        options["memory"] = int(resources.memory_gb * 2**30)
    ray.init(ignore_reinit_error=True, include_dashboard=False)
    try:
        start = ray.remote(RayJob.__call__).options(**options)
        tasks = [start.remote(RayJob(arguments, resources.gpus)) for _ in range(resources.processes)]
        try:
            ray.get(tasks)
        except ray.exceptions.RayTaskError as error:
            raise UsageError(f"a worker failed: {error.cause}") from error
        return [task.hex() for task in tasks]
    finally:
        ray.shutdown()


def _launch(arguments: Sequence[str], gpus: int) -> list[str]:
    if gpus < 2:
        return command(arguments)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(gpus)]
    return [*launcher, "--main_process_port", "0", "-m", "sparse_robust", *arguments]


def _ignore_engine() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
