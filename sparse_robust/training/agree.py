"""What the ranks of a run must agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from sparse_robust.training.options import TrainingError

if TYPE_CHECKING:
    from accelerate import Accelerator


def gathered(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return the value of every rank, in their order; every rank has to call it."""
    return list(gather_object([value])) if accelerator.num_processes > 1 else [value]


def require_same(accelerator: Accelerator, what: str, value: str) -> None:
    """Check that all ranks hold the same; every rank has to call it.

    Raises:
        TrainingError: on every rank, naming those that differ from rank 0.
    """
    values = gathered(accelerator, value)
    differ = [rank for rank, other in enumerate(values) if other != values[0]]
    if differ:
        shown = "; ".join(f"rank {rank} has {values[rank] or 'none'}" for rank in [0, *differ[:4]])
        more = f"; and {len(differ) - 4} more" if len(differ) > 4 else ""
        raise TrainingError(
            f"the ranks do not have the same {what}: {shown}{more}. Give all ranks the same files and the same version "
            "of the package; nothing has been trained."
        )


class Beat(NamedTuple):
    """What the ranks know of each other at the end of a step.

    Attributes:
        stop: one of them was told to stop.
        save: the main process finds it time for a checkpoint.
        broken: the ranks whose loss was not finite, at the step ``where`` (epoch, step).
    """

    stop: bool = False
    save: bool = False
    broken: tuple[int, ...] = ()
    where: tuple[int, int] = (0, 0)


class Pulse:
    """A few numbers that the ranks add up after every step, so that all of them stop, save or fail at the same one.

    On a GPU the host does not wait for the step that was just queued: it learns of a step after the next one.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._sent: tuple[Tensor, tuple[int, int], torch.cuda.Event] | None = None

    def beat(self, loss: Tensor, where: tuple[int, int], *, stop: bool, save: bool) -> Beat:
        """Tell the others, and return what is known; every rank has to call it after every step.

        Args:
            loss: of this rank at this step, a scalar on the device.
            where: epoch and step.
            stop: this process was told to stop.
            save: it is time for a checkpoint; of the main process it counts.
        """
        accelerator = self.accelerator
        # Made and filled there: sent from here, it would wait for the step.
        flags = torch.zeros(2 + accelerator.num_processes, dtype=torch.float32, device=accelerator.device)
        flags[0].fill_(float(stop))
        flags[1].fill_(float(save and accelerator.is_main_process))
        flags[2 + accelerator.process_index] = (~torch.isfinite(loss)).to(flags)
        if accelerator.num_processes > 1:
            flags = accelerator.reduce(flags, "sum")
        if flags.device.type != "cuda":
            return _read(flags, where)
        sent, self._sent = self._sent, self._send(flags, where)
        if sent is None:
            return Beat()
        sent[2].synchronize()
        return _read(sent[0], sent[1])

    def _send(self, flags: Tensor, where: tuple[int, int]) -> tuple[Tensor, tuple[int, int], torch.cuda.Event]:
        host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
        host.copy_(flags, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return host, where, event


def _read(flags: Tensor, where: tuple[int, int]) -> Beat:
    stop, save, *broken = flags.tolist()
    return Beat(stop > 0, save > 0, tuple(rank for rank, flag in enumerate(broken) if flag > 0), where)
