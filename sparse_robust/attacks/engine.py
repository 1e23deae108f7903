"""The one loop that every attack runs in: continuous batching over images.

A batch is a set of slots. An image keeps its slot until it is fooled or its attack is over, and the next one takes it,
so the model always works on full batches of images that still need work. Verdicts come from the real model, in full
precision and eval mode, whatever copy of it the images were crafted on: what fools the copy alone goes on where it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_robust.attacks.context import Model, attack_context
from sparse_robust.attacks.losses import margin
from sparse_robust.attacks.passes import Passes, keep_freed_memory
from sparse_robust.attacks.procedure import Procedure, Rows, Seen, Task, where_row
from sparse_robust.attacks.slots import Candidates, Slots

KEEP: dict[str, str] = {
    "first": "the first image that fools the model; the image is done then",
    "last": "the last one of a run, or the row's best (the published protocol of PGD)",
    "smallest": "the smallest one of all runs",
}

Done = Callable[["Outcome", Tensor], None]
"""Called with the outcome so far and the positions, int64, of the images that have just been finished."""


def default_chunk(x: Tensor) -> int:
    """Return the number of images a batch, unless one is given; it enters the bits of verdicts.

    On a CPU 256 of images up to 32 x 32 in grey, 128 up to 64 x 64 in colour and 32 above, which is where small
    networks are fastest and large ones fit; elsewhere 256.

    Args:
        x: images [n, ...].
    """
    if x.device.type != "cpu" or x[:1].numel() <= 32 * 32:
        return 256
    return 128 if x[:1].numel() <= 3 * 64 * 64 else 32


@dataclass
class Outcome:
    """What an attack did to each image of a task; [n] each.

    Attributes:
        images: [n, ...], the image that fooled the model, else the last one tried.
        fooled: bool, whether the real model is fooled by it.
        step: int64, how many images the attack had shown the model before that one; -1 where it did not succeed.
        margin: how far the model is from being fooled, in logits: on the image that fooled it, as the real model sees
            it; where none did, the smallest that the attack saw.
        forward, backward, queries: int64, passes spent on the image; see `Counts`.
        candidates, rejected: how many images fooled the copy, and how many of these not the real model.
    """

    images: Tensor
    fooled: Tensor
    step: Tensor
    margin: Tensor
    forward: Tensor
    backward: Tensor
    queries: Tensor
    candidates: int = 0
    rejected: int = 0

    @staticmethod
    def untouched(task: Task) -> Outcome:
        """Return the outcome before anything was done."""
        zero = torch.zeros_like(task.y)
        far = torch.full((len(zero),), torch.inf, dtype=task.logits.dtype, device=zero.device)
        return Outcome(task.x.clone(), zero.bool(), zero - 1, far, zero.clone(), zero.clone(), zero.clone())


class Engine:
    """Runs attacks on one model.

    Args:
        model: what is attacked; every verdict is its answer in eval mode.
        chunk: images a batch, at least 2; see `default_chunk`.
        craft: what gradients and queries go to, a copy of the model that may round differently; the model itself if
            None.
        mode: what batch norm does while crafting, see `attack_context`. Outside of ``eval`` an image's result depends
            on its batch, and batches are not padded.
        eot_iter: passes averaged wherever the model is evaluated, for models with randomness of their own.
    """

    def __init__(
        self,
        model: Model,
        chunk: int,
        *,
        craft: Model | None = None,
        mode: str = "eval",
        eot_iter: int = 1,
    ) -> None:
        keep_freed_memory()
        self.chunk, self.mode, self.eot_iter = chunk, mode, eot_iter
        self.model, self.copy = model, model if craft is None else craft
        self.real = Passes(model, self.chunk, eot_iter=eot_iter)
        self.crafting = Passes(self.copy, self.chunk, eot_iter=eot_iter, pad=mode == "eval")

    def logits(self, images: Tensor) -> Tensor:
        """Return the real model's answer to any number of images."""
        with attack_context(self.model, "eval"):
            return self.real.logits(images)

    def run(
        self,
        procedure: Procedure,
        task: Task,
        *,
        targeted: bool = False,
        keep: str = "first",
        done: Done | None = None,
    ) -> Outcome:
        """Attack every image of a task.

        Args:
            task: any number of images; only ``chunk`` of them are in work at a time.
            targeted: the labels are classes to reach, not to leave.
            keep: a key of `KEEP`, which images count.
            done: see `Done`.
        """
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.copy is not self.model:
                stack.enter_context(attack_context(self.model, "eval"))
            stack.enter_context(attack_context(self.copy, self.mode))
            return _Run(self, procedure, task, targeted, keep, done).finish()


class _Run:
    """One attack on one task: the queue, the slots, the candidates and the outcome."""

    def __init__(
        self, engine: Engine, procedure: Procedure, task: Task, targeted: bool, keep: str, done: Done | None
    ) -> None:
        self.engine, self.procedure, self.task = engine, procedure, task
        self.targeted, self.keep, self.done = targeted, keep, done
        self.outcome = Outcome.untouched(task)
        self.shown = torch.zeros_like(task.y)
        self.smallest = torch.full_like(self.outcome.margin, torch.inf)
        at = torch.arange(len(task.y), device=task.y.device)
        self.fresh: deque[tuple[Tensor, Tensor]] = deque([(at, torch.zeros_like(at))] if len(at) else [])
        self.returned: deque[Slots] = deque()
        self.candidates: list[Candidates] = []
        device = task.y.device
        self.reads_back = device.type == "cpu"  # where it waits for nothing
        self.kinds = torch.eye(2, dtype=torch.int64, device=device)

    def finish(self) -> Outcome:
        slots = self.refill(None)
        while slots is not None or self.candidates:
            if slots is not None:
                slots = self.advance(slots)
            if sum(map(len, self.candidates)) >= min(self.engine.chunk, 0 if slots is None else len(slots)):
                self.confirm()
            slots = self.refill(slots)
        return self.outcome

    def refill(self, slots: Slots | None) -> Slots | None:
        """Fill the free slots, with images that come back from confirmation and with runs to begin."""
        parts = [] if slots is None else [slots]
        free = self.engine.chunk - sum(map(len, parts))
        while free > 0 and (self.returned or self.fresh):
            if self.returned:
                part = self.returned.popleft()
                if len(part) > free:
                    self.returned.appendleft(part.select(slice(free, None)))
                    part = part.select(slice(free))
            else:
                at, run = self.fresh.popleft()
                if len(at) > free:
                    self.fresh.appendleft((at[free:], run[free:]))
                at, run, task = at[:free], run[:free], self.task.select(at[:free])
                part = self.unseen(Slots(at, run, task, self.procedure.start(task, run), at, at))
            parts.append(part)
            free -= len(part)
        if not parts:
            return None
        slots = Slots.join(parts)
        # Sums over a single long row may be split among threads, and then round differently: a row alone goes twice.
        return slots if len(slots) > 1 else slots.select(torch.zeros(2, dtype=torch.int64, device=slots.at.device))

    def unseen(self, slots: Slots) -> Slots:
        """Return the slots with nothing seen in them."""
        slots.seen = slots.at.new_zeros(len(slots), 2)
        slots.margin = self.smallest.new_full((len(slots),), torch.inf)
        return slots

    def advance(self, slots: Slots) -> Slots | None:
        """Evaluate the model at every slot, move on, and take out what is fooled or over."""
        still = getattr(self.procedure, "still", False)
        none = torch.zeros_like(slots.at, dtype=torch.bool)
        found = Candidates(slots, slots.rows["shown"], slots.at, none, ~none if still else none)
        if not still:
            self.move(slots, found)
        out = found.hit | found.over
        if not bool(out.any()):
            return found.slots
        gone, kept = out.nonzero().flatten(), (~out).nonzero().flatten()
        leaving, hit = found.slots.select(gone), found.hit[gone]
        images = where_row(hit, found.images[gone], self.last_image(leaving.rows))
        step = torch.where(hit, found.step[gone], leaving.seen.sum(1)) + self.shown[leaving.at]
        self.bill(leaving)
        self.candidates.append(Candidates(self.unseen(leaving), images, step, hit, found.over[gone]))
        return found.slots.select(kept) if len(kept) else None

    def bill(self, slots: Slots) -> None:
        """Add what was seen in slots to the outcome of their images."""
        outcome, at, times = self.outcome, slots.at, self.engine.eot_iter
        (steps, looks), every = slots.seen.unbind(1), slots.seen.sum(1)
        outcome.forward[at] += times * every
        outcome.queries[at] += times * (looks if self.procedure.gradient else every)
        if self.procedure.gradient:
            outputs = slots.task.logits.shape[1] if getattr(self.procedure, "jacobian", False) else 1
            outcome.backward[at] += times * outputs * steps
        outcome.margin[at] = torch.fmin(outcome.margin[at], slots.margin)
        self.shown[at] += every

    def move(self, slots: Slots, found: Candidates) -> None:
        """Let the procedure take one step, and note in ``found`` what fools the copy on the way."""
        step, looked = self.kinds
        seen = self.see(slots)
        self.note(slots, slots.rows["shown"], seen.logits, found, step)

        def look(images: Tensor) -> Tensor:
            logits = self.engine.crafting.logits(images)
            self.note(slots, images, logits, found, looked)
            return logits

        rows, found.over = self.procedure.advance(slots.task, slots.rows, seen, look)
        found.slots = Slots(slots.at, slots.run, slots.task, rows, slots.seen, slots.margin)

    def see(self, slots: Slots) -> Seen:
        shown, procedure = slots.rows["shown"], self.procedure

        def losses(logits: Tensor) -> Tensor:
            return procedure.losses(logits, slots.task, slots.rows)

        if getattr(procedure, "jacobian", False):
            return self.engine.crafting.jacobians(shown)
        if procedure.gradient:
            return self.engine.crafting.gradients(shown, losses)
        logits = self.engine.crafting.logits(shown)
        return Seen(logits, losses(logits), shown.new_empty(0))

    def note(self, slots: Slots, images: Tensor, logits: Tensor, found: Candidates, kind: Tensor) -> None:
        """Remember the first image that fools the copy inside the budget, the smallest margin, and that it was seen."""
        margin = self.margin(logits, slots.task.y)
        if not self.procedure.inside:
            inside = self.procedure.budget.contains(images, slots.task.x)
            margin = torch.where(inside, margin, torch.inf)
        slots.margin = torch.fmin(slots.margin, margin)
        # Nothing fools the copy with a margin above 0: most steps end here. NaN is not above 0.
        if self.keep == "first" and not (self.reads_back and bool((margin > 0).all())):
            new = self.fools(logits, slots.task.y) & ~found.hit
            if not self.procedure.inside:
                new &= inside
            found.images = where_row(new, images, found.images)
            found.step = torch.where(new, slots.seen.sum(1), found.step)
            found.hit = found.hit | new
        slots.seen = slots.seen + kind

    def confirm(self) -> None:
        """Ask the real model about all candidates: they are done, go on where they were, or begin their next run."""
        found, self.candidates = Candidates.join(self.candidates).without_copies(), []
        outcome, slots, times = self.outcome, found.slots, self.engine.eot_iter
        at, x, y = slots.at, slots.task.x, slots.task.y
        logits = self.engine.logits(found.images)
        outcome.forward[at] += times
        outcome.queries[at] += times
        self.shown[at[~found.hit]] += 1
        margin, inside = self.margin(logits, y), self.inside(found.images, x)
        fooled = self.fools(logits, y) & inside
        outcome.candidates += int(found.hit.sum())
        outcome.rejected += int((found.hit & ~fooled).sum())

        won = fooled
        if self.keep == "smallest":
            size = self.procedure.budget.measure(found.images, x).to(self.smallest.dtype)
            won = fooled & (size < self.smallest[at])
            self.smallest[at[won]] = size[won]
        outcome.fooled[at[won]] = True
        outcome.images[at[won]] = found.images[won]
        outcome.step[at[won]] = found.step[won]
        outcome.margin[at[won]] = margin[won]

        open_ = ~fooled
        again = open_ & found.hit & ~found.over
        if bool(again.any()):
            self.returned.append(slots.select(again))
        unseen = open_ & found.hit & found.over
        if bool(unseen.any()):
            rest = slots.select(unseen)
            images, step = self.last_image(rest.rows), self.shown[rest.at]
            self.candidates.append(
                Candidates(rest, images, step, torch.zeros_like(rest.at, dtype=torch.bool), found.over[unseen])
            )
        ended = ~found.hit if self.keep == "smallest" else ~found.hit & open_
        following = ended & (slots.run + 1 < self.procedure.runs)
        if bool(following.any()):
            self.fresh.append((at[following], slots.run[following] + 1))
        lost = ended & ~following & ~outcome.fooled[at]
        seen = torch.where(inside, margin, torch.inf)[lost]
        outcome.margin[at[lost]] = torch.fmin(outcome.margin[at[lost]], seen)
        outcome.images[at[lost]] = where_row(inside, found.images, x)[lost]
        finished = fooled & ~following | ended & ~following
        if self.done is not None and bool(finished.any()):
            self.done(outcome, at[finished])

    def last_image(self, rows: Rows) -> Tensor:
        return rows["shown"] if self.keep == "first" or "best" not in rows else rows["best"]

    def inside(self, images: Tensor, x: Tensor) -> Tensor:
        if self.procedure.inside:
            return torch.ones(len(x), dtype=torch.bool, device=x.device)
        return self.procedure.budget.contains(images, x)

    def margin(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return how far each image is from success in logits; positive where it does not succeed."""
        towards = margin(logits, y).to(self.outcome.margin.dtype)
        return towards if self.targeted else -towards

    def fools(self, logits: Tensor, y: Tensor) -> Tensor:
        """Return bool [n]: whether the prediction is what the attack wants. NaN logits predict nothing."""
        reached, broken = logits.argmax(1) == y, logits.isnan().any(1)
        return reached & ~broken if self.targeted else ~reached | broken
