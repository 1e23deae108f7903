"""``sparse-robust study``: what starts workers elsewhere, and with which arguments."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_robust.errors import UsageError, unknown
from sparse_robust.study.criterion import PREDICATES, Criterion

if TYPE_CHECKING:
    from sparse_robust.study.cluster import Resources
    from sparse_robust.study.runner import Study


def add_criterion(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a win is."""
    parser.add_argument("--predicate", default="strict", help=f"what a win requires: {', '.join(PREDICATES)}")
    parser.add_argument(
        "--tolerance", type=float, default=1.0, help="in standard deviations of the dense runs (default: 1)"
    )
    parser.add_argument("--baseline", default="same", help="dense model to match: same (pre-training) or best_dense")


def criterion_of(options: argparse.Namespace) -> Criterion:
    """Return what counts as a win.

    Raises:
        UsageError: for an unknown predicate or baseline, or a tolerance out of its range.
    """
    return Criterion(predicate=options.predicate, c=options.tolerance, baseline=options.baseline)


def add_resources(parser: argparse.ArgumentParser) -> None:
    """Add what `study submit` is told about the cluster."""
    parser.add_argument("--engine", default="slurm", help="slurm (an array job) or ray (default: %(default)s)")
    parser.add_argument("--processes", type=int, required=True, help="number of workers")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each worker (default: 0)")
    parser.add_argument("--cpus", type=int, help="cores of each worker")
    parser.add_argument("--memory-gb", type=float, help="memory of each worker")
    parser.add_argument("--minutes", type=int, default=1440, help="Slurm: time limit, then it goes on in a new job")
    parser.add_argument("--signal-seconds", type=int, default=180, help="Slurm: so long before it, save a checkpoint")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="more for sbatch, such as partition=gpu"
    )


def resources(options: argparse.Namespace) -> Resources:
    """Return what each worker is given.

    Raises:
        UsageError: for an unknown engine, or a number out of its range.
    """
    from sparse_robust.study import cluster

    if options.engine not in cluster.ENGINES:
        raise unknown("engine", options.engine, cluster.ENGINES)
    given = {name: getattr(options, name) for name in ("processes", "gpus", "cpus", "memory_gb", "minutes")}
    extra = dict(_pair(text) for text in options.option)
    return cluster.Resources(**given, signal_seconds=options.signal_seconds, extra=extra)


def submit(options: argparse.Namespace, study: Study, resources: Resources) -> int:
    """Start workers of a study on a cluster, and print the names of the jobs."""
    from sparse_robust.study import cluster

    study.folder.mkdir(parents=True, exist_ok=True)
    for job in cluster.submit(options.engine, worker_arguments(options, study), study.folder.resolve(), resources):
        sys.stdout.write(f"{job}\n")
    sys.stdout.write(f"sparse-robust study status --out {study.folder}\n")
    return 0


def worker_arguments(options: argparse.Namespace, study: Study) -> list[str]:
    """Return the arguments of `study run` for workers that are started together, with the paths spelled out."""
    config = str(Path(options.config).resolve()) if Path(options.config).exists() else options.config
    arguments = ["study", "run", "--config", config, "--out", str(study.folder.resolve())]
    for name in ("tracker", "mixed_precision", "compile", "idle_minutes", "predicate", "tolerance", "baseline"):
        if getattr(options, name) is not None:
            arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("trust_pickle", "quiet", "no_report"):
        if getattr(options, name):
            arguments.append(f"--{name.replace('_', '-')}")
    run = options.run_name or f"{os.getpid()}-{time.time_ns()}"
    return [*arguments, *options.overrides, "--run-name", run]


def _pair(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"--option takes NAME=VALUE, such as partition=gpu, got {text!r}.")
    return name, value
