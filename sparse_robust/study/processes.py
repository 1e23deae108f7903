"""Several workers on this machine: each a process of its own, on a GPU of its own where there are any."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import torch

from sparse_robust._env import child_environment, visible_gpus

FORWARDED = (signal.SIGTERM, signal.SIGUSR1)
"""What asks this process to end, and is passed on: the workers checkpoint and free their cells."""


def command(arguments: Sequence[str]) -> list[str]:
    """Return the command line that runs ``sparse-robust`` with these arguments in this environment."""
    return [sys.executable, "-m", "sparse_robust", *arguments]


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``count`` workers with the same arguments to their end; return the exit status of the run.

    A worker that is killed loses nothing: the others take its cell over. Signals that ask for an end reach all of them:
    this process passes them on, but for Ctrl-C, which the terminal sends to the workers, too.
    """
    workers = [subprocess.Popen(command(arguments), env=environment(index, count)) for index in range(count)]
    with _forwarding(workers):
        codes = [worker.wait() for worker in workers]
    return status(codes)


def environment(index: int, count: int) -> dict[str, str]:
    """Return the environment of worker ``index``: a share of the cores, and one of the visible GPUs in turn."""
    gpus = visible_gpus() or [str(gpu) for gpu in range(torch.cuda.device_count())]
    own = {"CUDA_VISIBLE_DEVICES": gpus[index % len(gpus)]} if gpus else {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return child_environment(own, defaults={"OMP_NUM_THREADS": str(max(cores // count, 1))})


def status(codes: Sequence[int]) -> int:
    """Return one exit status for several workers. Those that a signal killed have left their work to the others."""
    ended = [code for code in codes if code >= 0]
    return max(ended, default=1)


@contextmanager
def _forwarding(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    def forward(number: int, _: FrameType | None) -> None:
        for worker in workers:
            worker.send_signal(number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: None)  # they have it from the terminal
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
