"""What the engine has in work: the images in a batch, and those that wait for the real model's verdict."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_robust.attacks.procedure import Rows, Task


@dataclass
class Slots:
    """The images in work: their position in the task, the run they are in, and the state of their attack.

    Attributes:
        seen: passes of each kind in this slot: how often ``see`` and ``look`` evaluated the image, int64 [n, 2].
        margin: the smallest in this slot, [n].
    """

    at: Tensor
    run: Tensor
    task: Task
    rows: Rows
    seen: Tensor
    margin: Tensor

    def __len__(self) -> int:
        return len(self.at)

    def select(self, index: Tensor | slice) -> Slots:
        """Return the slots at ``index``."""
        rows = {name: value[index] for name, value in self.rows.items()}
        columns = (column[index] for column in (self.at, self.run, self.seen, self.margin))
        at, run, seen, margin = columns
        return Slots(at, run, self.task.select(index), rows, seen, margin)

    @staticmethod
    def join(parts: list[Slots]) -> Slots:
        """Return all slots of the parts, of which there is one at least."""
        if len(parts) == 1:
            return parts[0]
        task = Task(*(torch.cat(columns) for columns in zip(*(part.task for part in parts), strict=True)))
        rows = {name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows}
        at, run, seen, margin = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("at", "run", "seen", "margin")
        )
        return Slots(at, run, task, rows, seen, margin)


@dataclass
class Candidates:
    """Images that may fool the model, with what it takes to go on where they do not.

    Attributes:
        slots: state after the image.
        images: [n, ...].
        step: int64 [n], the image's number among those shown.
        hit: bool [n], whether it fooled the copy; otherwise it is the last one of its run, not evaluated yet.
        over: bool [n], whether the run is over.
    """

    slots: Slots
    images: Tensor
    step: Tensor
    hit: Tensor
    over: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def without_copies(self) -> Candidates:
        """Return the candidates once for each image, where a row went twice."""
        order = self.slots.at.argsort(stable=True)
        once = torch.ones_like(self.hit)
        once[1:] = self.slots.at[order[1:]] != self.slots.at[order[:-1]]
        index = order[once].sort().values
        columns = (getattr(self, name)[index] for name in ("images", "step", "hit", "over"))
        return Candidates(self.slots.select(index), *columns)

    @staticmethod
    def join(parts: list[Candidates]) -> Candidates:
        """Return all candidates of the parts, of which there is one at least."""
        columns = (torch.cat([getattr(part, name) for part in parts]) for name in ("images", "step", "hit", "over"))
        return Candidates(Slots.join([part.slots for part in parts]), *columns)
