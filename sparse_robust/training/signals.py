"""Signals that ask a run to make room: it saves a checkpoint at the next step boundary and ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
HEARD = "Ctrl-C: a training stops at its next step and saves, all else is finished first. Once more ends it at once."

_unheeded: list[str] = []


@contextmanager
def listening(wanted: bool = True, say: Callable[[str], None] | None = None) -> Iterator[Callable[[], str | None]]:
    """Catch SIGINT, SIGTERM and SIGUSR1 for the length of a block; what it gives says which one came, or None.

    A second SIGINT, as of an impatient Ctrl-C, is a KeyboardInterrupt; ``say`` tells the user so at the first. Where
    SIGINT was ignored, as in a job that a shell started in the background, it still is.

    The handlers that were there come back afterwards. A signal that came too late in a block to be acted on is known
    to the next one from its beginning, unless the block ends with an exception. Python delivers signals to the main
    thread alone: in another one, or where it is not ``wanted``, nothing is caught.
    """

    def note(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if name == "SIGINT":
            if name in _unheeded:
                raise KeyboardInterrupt
            if say is not None:  # in a thread of its own: this one may be in the middle of writing
                threading.Thread(target=say, args=(HEARD,), daemon=True).start()
        _unheeded.append(name)

    def name() -> str | None:
        return _unheeded[0] if _unheeded else None

    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    caught = [number for number in STOPPING if not (ignored and number == signal.SIGINT)]
    before = {number: signal.signal(number, note) for number in caught}
    try:
        yield name
    except BaseException:
        _unheeded.clear()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
