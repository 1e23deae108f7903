"""What is going on in a study folder right now: who works on what, what failed, and what waits for what."""

from __future__ import annotations

from dataclasses import dataclass

from sparse_robust.study.cells import cell_name, needs
from sparse_robust.study.leases import Holder, Watch, holder
from sparse_robust.study.runner import CELL, Study
from sparse_robust.study.workers import Failure


@dataclass(frozen=True)
class Activity:
    """The unfinished cells of a study, in its order.

    Attributes:
        held: those under a lease, and who holds it; one that is no longer alive is taken over by the next worker.
        failed: those whose last try ended with an error; the next run tries them again.
        ready: those that could be run at once.
        waiting: those that need an earlier one first.
    """

    held: dict[str, Holder]
    failed: dict[str, Failure]
    ready: tuple[str, ...]
    waiting: tuple[str, ...]


def activity(study: Study) -> Activity:
    """Look at a study's folder; nothing in it is changed."""
    watch = Watch(study.folder, touch=False)
    pending = {cell_name(cell): cell for cell in study.pending()}
    held, failed, ready, waiting = dict[str, Holder](), dict[str, Failure](), list[str](), list[str]()
    for name, cell in pending.items():
        folder = study.cell_folder(cell)
        found, failure = holder(folder, CELL, watch), Failure.read(folder)
        if found is not None and not (found.owner is not None and found.owner.released):
            held[name] = found
        elif any(cell_name(need) in pending for need in needs(cell)):
            waiting.append(name)
        elif failure is not None:
            failed[name] = failure
        else:
            ready.append(name)
    return Activity(held, failed, tuple(ready), tuple(waiting))
