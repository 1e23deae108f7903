"""Which epoch is kept: the best by validation, the earlier one on ties, and always the last."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]


def on_cpu(state: State) -> State:
    """Return copies on the CPU, contiguous as files hold them."""
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


@dataclass(frozen=True)
class Selected:
    """An epoch that is kept, with its validation accuracies in percent (None where none was measured)."""

    epoch: int
    val_sa: float | None = None
    val_ra: float | None = None


class Selection:
    """Keeps the weights of the epochs with the best validation SA, the best validation RA, and the last one.

    The states are copies on the CPU. ``best_sa`` and ``best_ra`` share one copy when they are the same epoch.
    """

    def __init__(self) -> None:
        self.chosen: dict[str, Selected] = {}
        self.states: dict[int, State] = {}

    def offer(
        self, epoch: int, state: State, *, val_sa: float | None = None, val_ra: float | None = None, last: bool = False
    ) -> None:
        """Consider the weights after ``epoch``; ``last`` also records them as the last ones."""
        candidate = Selected(epoch, val_sa, val_ra)
        names = ["last"] if last else []
        for name, value in (("best_sa", val_sa), ("best_ra", val_ra)):
            if value is None:
                continue
            best = self.chosen.get(name)
            best_value = None if best is None else (best.val_sa if name == "best_sa" else best.val_ra)
            if best_value is None or value > best_value:
                names.append(name)
        if names:
            self.states[epoch] = on_cpu(state)
        self.chosen.update(dict.fromkeys(names, candidate))
        kept = {selected.epoch for selected in self.chosen.values()}
        self.states = {at: tensors for at, tensors in self.states.items() if at in kept}

    def state(self, name: str) -> State:
        """Return the weights kept under ``best_sa``, ``best_ra`` or ``last``."""
        return self.states[self.chosen[name].epoch]

    def to_json(self) -> dict[str, Any]:
        """Return what was chosen, without the weights."""
        return {name: asdict(selected) for name, selected in self.chosen.items()}

    def restore(self, chosen: dict[str, Any], states: dict[int, State]) -> None:
        """Set from what `to_json` gave and the weights by epoch."""
        self.chosen = {name: Selected(**value) for name, value in chosen.items()}
        self.states = states
