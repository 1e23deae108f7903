"""The two sides of a comparison: this package and pyautoattack, each counted by hooks on the same model."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.parity.networks import Subject, path_of
from sparse_robust.errors import SparseRobustError

CACHE = Path(__file__).resolve().parent / "cache"
ENSEMBLE = "standard"
ATTACKS = ("apgd-ce", "apgd-t", "fab-t", "square", ENSEMBLE)
QUERIES = 5000
"""Queries of the Square attack in the standard protocol."""


class NotThereError(SparseRobustError):
    """What is to be measured does not exist in this version of the package."""


@dataclass(frozen=True)
class Task:
    """One attack, or the ensemble, on one network within one budget."""

    norm: str
    eps: float
    attack: str
    queries: int = QUERIES
    batch: int = 250
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What one side found.

    Attributes:
        robust: one entry an image: classified correctly without and under the attack.
        clean: images classified correctly without an attack.
        forward: images that passed the model, forwards.
        backward: the same backwards, to the input.
        largest: largest perturbation of an image that was broken, as a share of eps.
        seconds: wall time.
        cpu_seconds: processor time of this process, which other work on the machine touches less.
    """

    robust: list[bool]
    clean: int
    forward: int
    backward: int
    largest: float
    seconds: float
    cpu_seconds: float


@dataclass
class Passes:
    """Images that went through a model."""

    forward: int = 0
    backward: int = 0


@contextmanager
def counting(model: nn.Module) -> Iterator[Passes]:
    """Count the passes through a model and through copies made of it inside the block (they copy its hooks)."""
    passes = Passes()

    def before(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0]
        passes.forward += len(x)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return arguments
        x = x.view_as(x)  # a node of its own: its hook runs once for this pass, however often x is shown

        def after(grad: Tensor) -> None:
            passes.backward += len(grad)

        x.register_hook(after)
        return x, *arguments[1:]

    handle = model.register_forward_pre_hook(before)
    try:
        yield passes
    finally:
        handle.remove()


@dataclass
class Took:
    """What a block took."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextmanager
def timing(device: torch.device) -> Iterator[Took]:
    """Measure a block, the device's work included."""
    took = Took()
    wall, processor = time.perf_counter(), time.process_time()
    yield took
    if device.type == "cuda":
        torch.cuda.synchronize()
    took.seconds, took.cpu_seconds = time.perf_counter() - wall, time.process_time() - processor


def ours(subject: Subject, task: Task) -> Outcome:
    """Run this package's `evaluate` with the attack of its standard ensemble that has the task's name.

    Raises:
        NotThereError: if this version has no AutoAttack.
    """
    from sparse_robust.evaluation import evaluate

    model, x, y = subject.model, subject.x, subject.y
    attacks, ids = our_attacks(task), torch.arange(len(y), device=y.device)
    loader = list(zip(*(tensor.split(task.batch) for tensor in (x, y, ids)), strict=True))
    with counting(model) as passes, timing(x.device) as took:
        found = evaluate(model, loader, attacks=attacks, eps=task.eps)
    return Outcome(
        robust=found.per_image.robust_correct.tolist(),
        clean=int(found.per_image.clean_correct.sum()),
        # A replica that does not carry the hooks is seen only by the package's own count.
        forward=max(passes.forward, found.counts["forward"]),
        backward=max(passes.backward, found.counts["backward"]),
        largest=float(getattr(found.per_image, task.norm.lower()).max()) / task.eps,
        seconds=took.seconds,
        cpu_seconds=took.cpu_seconds,
    )


def our_attacks(task: Task) -> tuple[Any, ...]:
    """Return the attacks of our standard ensemble that a task asks for.

    Raises:
        NotThereError: if this version has no AutoAttack.
    """
    try:
        from sparse_robust.attacks import autoattack
    except ImportError as error:
        raise NotThereError("sparse_robust.attacks has no autoattack: nothing of ours can be compared.") from error
    attacks: tuple[Any, ...] = autoattack(ENSEMBLE, norm=task.norm, seed=task.seed)
    attacks = tuple(a if a.name != "square" else replace(a, n_queries=task.queries) for a in attacks)
    chosen = tuple(a for a in attacks if task.attack in (ENSEMBLE, a.name))
    if not chosen:
        raise NotThereError(f"{task.attack!r} is not among our {', '.join(a.name for a in attacks)}.")
    return chosen


def reference(subject: Subject, task: Task) -> Outcome:
    """Run pyautoattack, with the hyper-parameters of its standard version for a single attack too."""
    x, y = subject.x, subject.y
    attacker = reference_attacker(subject.model, task, x.device)
    with counting(subject.model) as passes, timing(x.device) as took:
        adversarial, predicted = attacker.run_standard_evaluation(x, y, batch_size=task.batch)
    with torch.no_grad():
        clean = int(sum((subject.model(part).argmax(1) == labels).sum() for part, labels in _parts(x, y, task.batch)))
    order = {"Linf": float("inf"), "L2": 2.0, "L1": 1.0}[task.norm]
    norms = torch.linalg.vector_norm((adversarial - x).double().flatten(1), ord=order, dim=1)
    return Outcome(
        robust=(predicted == y).tolist(),
        clean=clean,
        forward=passes.forward,
        backward=passes.backward,
        largest=float(norms.max()) / task.eps,
        seconds=took.seconds,
        cpu_seconds=took.cpu_seconds,
    )


def reference_attacker(model: nn.Module, task: Task, device: torch.device) -> Any:
    """Return a pyautoattack.AutoAttack for a task; its warnings are silenced."""
    import pyautoattack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    attacker = pyautoattack.AutoAttack(
        model, norm=task.norm, eps=task.eps, version="standard", seed=task.seed, device=device
    )
    attacker.square.n_queries = task.queries
    if task.attack != ENSEMBLE:
        attacker.attacks_to_run = [task.attack]
    return attacker


def remembered(subject: Subject, task: Task) -> Outcome:
    """Return the reference's outcome, from the cache if exactly this was run before."""
    path = _cached(subject, task)
    if path.exists():
        return Outcome(**json.loads(path.read_text()))
    outcome = reference(subject, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(outcome)))
    partial.replace(path)
    return outcome


def is_remembered(subject: Subject, task: Task) -> bool:
    """Return whether `remembered` would answer at once."""
    return _cached(subject, task).exists()


def version_of(package: str) -> str:
    """Return a package's version, an empty text if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cached(subject: Subject, task: Task) -> Path:
    network = hashlib.sha256(path_of(subject.network).read_bytes()).hexdigest()
    device = subject.x.device.type
    what = [network, len(subject.y), asdict(task), device, version_of("pyautoattack"), torch.__version__]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return CACHE / f"{subject.network.name}-{task.norm}-{task.attack}-{len(subject.y)}-{digest[:16]}.json"


def _parts(x: Tensor, y: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(batch), y.split(batch), strict=True)
