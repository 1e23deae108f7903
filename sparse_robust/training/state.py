"""Where a run is, and what it has to remember of itself: all that a checkpoint holds besides model and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_robust.masks import Masks
from sparse_robust.training.agree import gathered
from sparse_robust.training.guard import CatastrophicOverfittingGuard
from sparse_robust.training.hooks import Remembered, Stateful
from sparse_robust.training.selection import Selection, State
from sparse_robust.training.trainee import Trainee


@dataclass
class RunState:
    """The progress of a run. `pack` and `unpack` are the whole of what a checkpoint says about it.

    Attributes:
        trainee: its moving average and, where a hook may have replaced them, its masks are remembered, too.
        parts: further pieces that remember something, by name.
        guard: the guard against catastrophic overfitting, or None.
        totals: sums over this epoch's images so far: losses, correct predictions, images; on the device, so that no
            step waits for them.
        epoch: the one that is going on, from 0 on.
        step: batches of it that are done.
        before_fall: weights to go back to when the guard trips.
        seconds: wall time of earlier starts.
    """

    trainee: Trainee
    parts: dict[str, Stateful] = field(default_factory=dict)
    guard: CatastrophicOverfittingGuard | None = None
    selection: Selection = field(default_factory=Selection)
    history: list[dict[str, Any]] = field(default_factory=list)
    epoch: int = 0
    step: int = 0
    before_fall: State = field(default_factory=dict)
    seconds: float = 0.0
    stopped_by_guard: bool = False

    def __post_init__(self) -> None:
        self.totals = self._no_totals()

    def next_epoch(self) -> None:
        """Begin the next epoch."""
        self.epoch, self.step, self.totals = self.epoch + 1, 0, self._no_totals()

    def _no_totals(self) -> Tensor:
        device = self.trainee.accelerator.device
        return torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        """Return what JSON can say, tensors by name, and the tensors that differ from rank to rank.

        Every rank has to call it.
        """
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        progress = {
            "epoch": self.epoch,
            "step": self.step,
            "totals": gathered(self.trainee.accelerator, self.totals.tolist()),
            "history": self.history,
            "seconds": self.seconds,
            "stopped_by_guard": self.stopped_by_guard,
            "guard_previous": self.guard.previous if self.guard else None,
            "chosen": self.selection.to_json(),
            "attacked": self.trainee.target.describe(),
            "parts": {
                name: {k: v for k, v in part.items() if not isinstance(v, Tensor)} for name, part in parts.items()
            },
        }
        return progress, dict(self._tensors(parts)), dict(self._own())

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers of this rank: running statistics are its own until the end of an epoch."""
        if self.trainee.accelerator.num_processes > 1:
            for name, module in self.trainee.modules().items():
                yield from _under(name, dict(module.named_buffers()))

    def _tensors(self, parts: dict[str, Remembered]) -> Iterator[tuple[str, Tensor]]:
        for at, state in self.selection.states.items():
            yield from _under(f"kept/{at}", state)
        yield from _under("before_fall", self.before_fall)
        if self.trainee.ema is not None:
            yield from _under("ema", self.trainee.ema.module.state_dict())
        if self.trainee.masks is not None and self.parts:
            yield from _under("masks", self.trainee.masks.tensors())
        for name, part in parts.items():
            yield from _under(f"part/{name}", {k: v for k, v in part.items() if isinstance(v, Tensor)})

    def unpack(self, progress: dict[str, Any], tensors: dict[str, Tensor], own: dict[str, Tensor]) -> None:
        """Be what `pack` described, perhaps on another number of ranks; then ``own`` is of no use."""
        accelerator = self.trainee.accelerator
        self.epoch, self.step = progress["epoch"], progress["step"]
        totals = self.totals.new_tensor(progress["totals"])
        same_ranks = len(totals) == accelerator.num_processes
        if same_ranks:
            self.totals = totals[accelerator.process_index]
        elif accelerator.is_main_process:
            self.totals = totals.sum(0)
        self.history, self.seconds = progress["history"], progress["seconds"]
        self.stopped_by_guard = progress["stopped_by_guard"]
        self.trainee.target.remember(progress["attacked"])
        if self.guard is not None:
            self.guard.previous = progress["guard_previous"]
        self.before_fall = _below("before_fall", tensors)
        if self.trainee.ema is not None:
            self.trainee.ema.module.load_state_dict(_below("ema", tensors))
        epochs = {chosen["epoch"] for chosen in progress["chosen"].values()}
        self.selection.restore(progress["chosen"], {at: _below(f"kept/{at}", tensors) for at in epochs})
        packed = _below("masks", tensors)
        if packed and self.trainee.masks is not None:
            self.trainee.set_masks(Masks.from_packed(packed, self.trainee.masks.shapes()))
        for name, module in self.trainee.modules().items() if same_ranks else ():
            for buffer, tensor in _below(name, own).items():
                module.get_buffer(buffer).copy_(tensor)
        for name, part in self.parts.items():
            part.load_state_dict({**progress["parts"].get(name, {}), **_below(f"part/{name}", tensors)})


def _under(head: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{head}/{name}", tensor.detach().cpu()) for name, tensor in tensors.items())


def _below(head: str, tensors: dict[str, Tensor]) -> State:
    start = head + "/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
