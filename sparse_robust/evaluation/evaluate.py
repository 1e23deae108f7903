"""Clean and robust accuracy over a loader, every image counted once."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_robust.attacks import Budget, EngineAttack, Model, Square, parse_eps
from sparse_robust.attacks.engine import Engine, Outcome, default_chunk
from sparse_robust.attacks.inputs import Inputs, check_labels, check_no_nan, prepare
from sparse_robust.attacks.norms import NORMS
from sparse_robust.attacks.procedure import Task
from sparse_robust.attacks.replica import Replica, make_replica
from sparse_robust.errors import UsageError
from sparse_robust.evaluation.diagnose import diagnose, require_sound
from sparse_robust.evaluation.result import Evaluation, Progress, summarise
from sparse_robust.evaluation.streaming import batches, device_of, gather
from sparse_robust.evaluation.verdicts import CLEAN_WRONG, UNBROKEN, VerdictFile, Verdicts
from sparse_robust.files import sha256_state

PRECISIONS = ("fp32", "bf16")

# Images that are held at a time: enough for full batches until the last few, within this many bytes.
_WINDOW_CHUNKS, _WINDOW_BYTES = 16, 1 << 28

# Images that the checks before an evaluation look at.
_LOOKED_AT = 64


@dataclass(frozen=True)
class Stage:
    """An attack at a radius; stages are tried in turn, on what the ones before have left."""

    attack: EngineAttack
    eps: float

    def describe(self) -> dict[str, Any]:
        """Return what its verdicts depend on, as JSON values."""
        settings: dict[str, Any] = asdict(self.attack) if is_dataclass(self.attack) else {}
        return {"attack": self.attack.name, "eps": f"{self.eps:.9g}", "kind": type(self.attack).__name__, **settings}


def evaluate(
    model: Model,
    loader: Iterable[Any],
    attacks: Sequence[EngineAttack] | None = None,
    eps: str | float | Sequence[str | float] = 0.0,
    *,
    file: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    precision: str = "fp32",
    replica: bool = True,
    chunk: int | None = None,
    window: int | None = None,
    check: bool = True,
    seconds: float = 30.0,
    on_progress: Callable[[Progress], None] | None = None,
    on_images: Callable[[Tensor, Tensor], None] | None = None,
) -> Evaluation:
    """Measure clean accuracy and accuracy under each attack; an image counts as robust if every attack fails on it.

    The model is put in eval mode and given back as it was. Attacks run in the order of what an image costs them, each
    on the images that are still classified correctly; several radii run in ascending order, and what is broken at one
    counts as broken at the larger ones. Attacks work on a folded copy of the model, and every verdict is the answer of
    the model itself, in fp32. Verdicts do not depend on the batches, the order or the number of ranks.

    In a distributed run with a sharded loader (``loader.world > 1``) the shards are merged, so all ranks return the
    same.

    Args:
        model: maps images [n, C, H, W] in [0, 1] to logits [n, classes]; an nn.Module or any function.
        loader: yields (x, y) or (x, y, ids); ids default to 0, 1, ... in the order of the loader. It is streamed: at no
            time are more than ``window`` images held.
        attacks: what to try, for example ``autoattack("standard")``; None measures clean accuracy alone.
        eps: radius for all of them: a number, or text such as ``8/255``; several give a robustness curve.
        file: verdict file (CSV), written as the evaluation goes; one that was interrupted goes on from it, and ends
            with the same file.
        about: what else the verdicts depend on (the data set's name, ...), JSON values kept in the file's header.
        precision: ``fp32`` or ``bf16``: how attacks look for candidates.
        replica: False attacks the model itself instead of a folded copy.
        chunk: images evaluated at a time; None chooses by device and size. It enters the last bits of the verdicts.
        window: images held at a time; None chooses by their size.
        check: look at the first images for what makes an evaluation worthless (probabilities instead of logits,
            normalising twice, ...): errors are raised, anything else is warned of.
        seconds: shortest time between two writes of the file.
        on_progress: called as images are finished.
        on_images: called with (sample ids, images) whenever images have fooled the model.

    Raises:
        UsageError: for a loader that yields nothing, an empty list of attacks and any other wrong argument; for a file
            of another evaluation.
        FileError: for a damaged file.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    if attacks is not None and not attacks:
        raise UsageError(
            "evaluate got an empty list of attacks, under which everything is robust. Give one, such as PGD(steps=20), "
            "or leave attacks out to measure clean accuracy alone."
        )
    if (chunk is not None and chunk < 2) or (window is not None and window < 1):
        raise UsageError(f"chunk must be at least 2 and window at least 1 image, got {chunk} and {window}.")
    run = _Evaluation(model, loader, attacks or (), eps, precision, replica, chunk, window, check)
    run.on_progress, run.on_images = on_progress, on_images
    cudnn = torch.backends.cudnn
    exact = cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False)
    with torch.no_grad(), exact:
        windows = run.windows()
        first = next(windows, None)
        if first is not None:
            run.open(file, about or {}, seconds)
            run.begin(first)
            with evaluating(model):
                for inputs in itertools.chain([first], windows):
                    run.process(inputs)
    return run.result()


@contextmanager
def evaluating(model: object) -> Iterator[None]:
    """Run a block with every submodule in eval mode; the flags come back as they were, submodule by submodule."""
    if not isinstance(model, nn.Module):
        yield
        return
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


class _Evaluation:
    """One evaluation at work: its settings, and the verdicts of this rank so far."""

    on_progress: Callable[[Progress], None] | None = None
    on_images: Callable[[Tensor, Tensor], None] | None = None

    def __init__(
        self, model: Model, loader: Iterable[Any], attacks: Sequence[EngineAttack], eps: Any, precision: str,
        replica: bool, chunk: int | None, window: int | None, check: bool,
    ) -> None:  # fmt: skip
        self.model, self.loader, self.attacks = model, loader, tuple(attacks)
        self.radii = _radii(eps, self.attacks)
        self.precision, self.replica, self.window, self.check = precision, replica, window, check
        self.chunk = chunk or 0  # until the images are known
        self.stages = _stages(self.attacks, self.radii)
        self.copy: Replica | None = None
        self.file: VerdictFile | None = None
        self.known = Verdicts.empty()
        self.rows: list[Verdicts] = []
        self.flips = {"candidates": 0, "rejected": 0}
        self.finished = self.seen = self.clean_correct = self.robust = 0
        self.credit = 0.0
        cost = torch.tensor([0.0, *(stage.attack.passes(10) for stage in self.stages)])
        self.spent = cost.cumsum(0) / cost.sum().clamp(min=1)

    def open(self, path: str | Path | None, about: Mapping[str, Any], seconds: float) -> None:
        """Read what an interrupted evaluation has left behind."""
        if path is None:
            return
        header = {
            **about,
            "stages": [stage.describe() for stage in self.stages],
            "model": _digest(self.model),
            "precision": self.precision,
            "replica": self.replica,
            "chunk": self.chunk,
        }
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        world = getattr(self.loader, "world", 1)
        self.file = VerdictFile(path, header, seconds=seconds, rank=rank if world > 1 else 0, world=world)
        self.known = self.file.load()

    def windows(self) -> Iterator[Inputs]:
        """Yield the images of the loader, a window at a time."""
        held: list[Inputs] = []
        for x, y, ids in batches(self.loader, device_of(self.model)):
            self.chunk = self.chunk or default_chunk(x)
            held.append(Inputs(x, y, ids))
            if sum(len(part.x) for part in held) >= self._window_size(x):
                yield _joined(held)
                held = []
        if held:
            yield _joined(held)

    def begin(self, inputs: Inputs) -> None:
        """Look at the first images, and make the copy."""
        first = inputs.select(slice(_LOOKED_AT))
        if self.check:
            gradients = any(not isinstance(stage.attack, Square) for stage in self.stages)
            findings = diagnose(self.model, first.x, first.y, ids=first.ids, needs_grad=gradients)
            require_sound(findings)
            for finding in findings:
                warnings.warn(finding.sentence, stacklevel=3)
        first = prepare(*first, Budget("Linf", 1.0), wait=True)
        if self.stages and (self.replica or self.precision != "fp32"):
            self.copy = make_replica(self.model, first.x, precision=self.precision)

    def process(self, inputs: Inputs) -> None:
        """Settle the images of a window: what they are without an attack, then stage by stage."""
        x, y, ids = inputs = prepare(*inputs, Budget("Linf", 1.0), wait=True)
        logits = self._engine(1).logits(x)
        check_labels(y, logits)
        check_no_nan(logits, ids)
        table = _Table(inputs, logits, self.known)
        self.rows.append(table.rows)
        self.seen += len(x)
        self.clean_correct += int(table.rows.clean_correct.sum())
        self.robust += int(table.rows.robust_correct.sum())
        self._note(table, torch.arange(len(x)), "clean")
        for number, stage in enumerate(self.stages):
            todo = ((table.rows.broken_by == UNBROKEN) & (table.rows.next_stage <= number)).nonzero().flatten()
            if len(todo):
                self._try(stage, number, Task(*inputs, logits), todo, table)

    def _try(self, stage: Stage, number: int, task: Task, todo: Tensor, table: _Table) -> None:
        there = todo.to(task.y.device)

        def done(outcome: Outcome, at: Tensor) -> None:
            where = todo[at.cpu()]
            fooled = table.settle(number, where, outcome, at, task.x[there[at]])
            self.robust -= int(fooled.sum())
            if self.on_images is not None and bool(fooled.any()):
                self.on_images(table.rows.id[where][fooled], outcome.images[at[fooled.to(at.device)]])
            self._note(table, where, stage.attack.name)

        part, attack = task.select(there), stage.attack
        procedure = attack.prepare(Budget(attack.norm, stage.eps), task.logits.shape[1])
        outcome = self._engine(attack.eot_iter, attack.mode).run(procedure, part, keep=attack.keep, done=done)
        self.flips["candidates"] += outcome.candidates
        self.flips["rejected"] += outcome.rejected

    def _engine(self, eot_iter: int, mode: str = "eval") -> Engine:
        craft = self.copy if mode == "eval" else None
        return Engine(self.model, self.chunk, craft=craft, mode=mode, eot_iter=eot_iter)

    def _note(self, table: _Table, where: Tensor, stage: str) -> None:
        """Record rows that have changed."""
        rows = table.rows.select(where)
        self.finished += int(rows.done(len(self.stages)).sum())
        credit = torch.where(rows.done(len(self.stages)), 1.0, self.spent[rows.next_stage])
        self.credit += float((credit - table.credit[where]).sum())
        table.credit[where] = credit
        if self.file is not None:
            self.file.update(rows)
        if self.on_progress is not None:
            total = getattr(self.loader, "images", None)
            share = None if not total else min(1.0, self.credit / total)
            self.on_progress(Progress(stage, self.finished, total, self.seen, self.clean_correct, self.robust, share))

    def _window_size(self, x: Tensor) -> int:
        if self.window is not None:
            return self.window
        fitting = _WINDOW_BYTES // max(1, x[0].numel() * x.element_size())
        return max(2 * self.chunk, min(_WINDOW_CHUNKS * self.chunk, fitting))

    def result(self) -> Evaluation:
        """Merge the ranks and sum up."""
        rows, flips = Verdicts.concat(self.rows), dict(self.flips)
        if getattr(self.loader, "world", 1) > 1:
            parts = gather((rows, flips))
            rows = Verdicts.concat([part for part, _ in parts])
            flips = {name: sum(part[name] for _, part in parts) for name in flips}
        if not len(rows):
            raise UsageError("evaluate got a loader that yields no batch; expected at least one image.")
        rows = rows.sort()
        if len(torch.unique(rows.id)) != len(rows):
            raise UsageError(
                "some sample ids came twice: the shards of a distributed evaluation overlap, or the loader repeats "
                "images."
            )
        if self.file is not None:
            self.file.finish(rows)
        return summarise(rows, [(stage.attack.name, stage.eps) for stage in self.stages], flips)


class _Table:
    """The verdicts of a window, changed in place as its images are settled."""

    def __init__(self, inputs: Inputs, logits: Tensor, known: Verdicts) -> None:
        ids, y, logits = inputs.ids.cpu(), inputs.y.cpu(), logits.cpu()
        prediction, zero, none = logits.argmax(1), torch.zeros_like(y), torch.zeros(len(y))
        own = logits.gather(1, y[:, None])[:, 0]
        others = logits.scatter(1, y[:, None], float("-inf")).amax(1)
        self.rows = Verdicts(
            ids, y, prediction, torch.where(prediction == y, UNBROKEN, CLEAN_WRONG), zero - 1, zero.clone(),
            none, none.clone(), none.clone(), (own - others).float(), zero + 1, zero.clone(), zero + 1,
        )  # fmt: skip
        self.credit = torch.zeros(len(y))
        if len(known):
            self._recall(known)

    def _recall(self, known: Verdicts) -> None:
        place = torch.searchsorted(known.id, self.rows.id).clamp(max=len(known) - 1)
        there = known.id[place] == self.rows.id
        changed = there & (known.label[place] != self.rows.label)
        if bool(changed.any()):
            raise UsageError(
                f"the verdict file has other labels for the sample ids {self.rows.id[changed][:5].tolist()}: it "
                "belongs to other data. Name another file, or delete that one."
            )
        for name, column in self.rows.columns().items():
            column[there] = getattr(known, name)[place[there]]

    def settle(self, stage: int, where: Tensor, outcome: Outcome, at: Tensor, x: Tensor) -> Tensor:
        """Write down what a stage did to the images at ``where``, [k]; return bool [k], which were fooled.

        Args:
            at: their positions in the outcome.
            x: the clean images, [k, ...].
        """
        rows, fooled = self.rows, outcome.fooled[at].cpu()
        delta = outcome.images[at] - x
        for name, norm in (("linf", "Linf"), ("l2", "L2"), ("l1", "L1")):
            size = NORMS[norm].measure(delta).float().cpu()
            getattr(rows, name)[where] = torch.where(fooled, size, 0.0)
        margin = outcome.margin[at].float().cpu()
        rows.margin[where] = torch.where(fooled, margin, torch.minimum(rows.margin[where], margin))
        rows.broken_by[where] = torch.where(fooled, stage, UNBROKEN)
        rows.step[where] = outcome.step[at].cpu()
        rows.next_stage[where] = stage + 1
        for name in ("forward", "backward", "queries"):
            getattr(rows, name)[where] += getattr(outcome, name)[at].cpu()
        return fooled


def _radii(eps: Any, attacks: Sequence[EngineAttack]) -> list[float]:
    given = list(eps) if isinstance(eps, Sequence) and not isinstance(eps, str) else [eps]
    if not given:
        raise UsageError("evaluate got an empty list of eps; give at least one.")
    radii = sorted({parse_eps(value) for value in given})
    for attack in attacks:
        if attack.aimed:
            raise UsageError(f"{attack.name} aims at given classes: evaluate takes untargeted attacks.")
        for radius in radii:
            Budget(attack.norm, radius)
    return radii


def _stages(attacks: Sequence[EngineAttack], radii: Sequence[float]) -> list[Stage]:
    ordered = sorted(attacks, key=lambda attack: attack.passes(10))
    return [Stage(attack, radius) for radius in radii for attack in ordered]


def _joined(parts: list[Inputs]) -> Inputs:
    return parts[0] if len(parts) == 1 else Inputs(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _digest(model: Model) -> str:
    """Return what tells one model from another: its weights, or the name of a function."""
    if isinstance(model, nn.Module):
        return sha256_state(model.state_dict())
    name = getattr(model, "__qualname__", type(model).__qualname__)
    return hashlib.sha256(f"{getattr(model, '__module__', '')}.{name}".encode()).hexdigest()
