"""Signals that ask a run to make room: it saves a checkpoint at the next step boundary and ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


_unheeded: list[str] = []


@contextmanager
def listening(wanted: bool = True) -> Iterator[Callable[[], str | None]]:
    """Catch SIGTERM and SIGUSR1 for the length of a block; what it gives says which one came, or None.

    The handlers that were there come back afterwards. A signal that came too late in a block to be acted on is known
    to the next one from its beginning, unless the block ends with an exception. Python delivers signals to the main
    thread alone: in another one, or where it is not ``wanted``, nothing is caught.
    """

    def note(number: int, frame: FrameType | None) -> None:
        _unheeded.append(signal.Signals(number).name)

    def name() -> str | None:
        return _unheeded[0] if _unheeded else None

    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield name
    except BaseException:
        _unheeded.clear()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
