"""Leases: files that say who works on something, renewed while the owner lives and taken over when it does not.

A lease is the file ``NAME.GENERATION.lease``; the highest generation counts. Generation g is held until its owner
releases it, is seen to have ended (same machine), or has not renewed it for the time it promised. Then g + 1 may be
created, with O_EXCL, so exactly one process gets it, and numbers are never used twice while something is to be done.
An owner that slept through its time finds a higher generation and learns that it lost; before it writes what counts it
creates its own next generation (`Lease.fence`), which only the current owner can.

What is assumed of the file system: O_EXCL creates once (local ones, NFS from version 3 on, Lustre, GPFS, BeeGFS do),
and a process sees a folder's entries after its own creation there. No hard links, locks or common clocks are needed:
the age of a lease is the difference of two times that the file system wrote.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from sparse_robust.errors import FileError, SparseRobustError
from sparse_robust.files import parse_json

LEASE_SECONDS = 90.0
"""An owner that has renewed its lease within this time counts as alive."""
RENEWALS = 6
"""So often within that time a lease is renewed."""
UNWRITTEN_SECONDS = 5.0
"""A lease in which nothing is written for so long is that of a process that ended as it claimed it. One that was only
slow finds a higher generation when it has written, and that it lost."""


class LeaseLost(SparseRobustError, RuntimeError):
    """The lease has another owner by now: what was done under it must not be written."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Who holds a lease. ``process`` names the process on its machine beyond reuse of its number; "" is unknown."""

    host: str
    pid: int
    process: str
    token: str
    since: str
    seconds: float
    released: bool = False

    @classmethod
    def me(cls, seconds: float = LEASE_SECONDS) -> Owner:
        """Describe this process, with a token of its own."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        pid, token = os.getpid(), secrets.token_hex(8)
        return cls(
            host=socket.gethostname(), pid=pid, process=_process(pid), token=token, since=now, seconds=float(seconds)
        )

    @property
    def dead(self) -> bool:
        """Whether the owner is known to have ended: only told of processes that this one could see."""
        here = _process(os.getpid()).rpartition("/")[0]
        return bool(here) and self.process.rpartition("/")[0] == here and _process(self.pid) != self.process


@dataclass(frozen=True)
class Holder:
    """The newest lease on something, as others see it.

    Attributes:
        owner: who holds it; None while that is not written yet, or not readable.
        written: whether anything is.
        quiet: seconds since the last sign of life, as the file system counts them.
        watched: seconds for which the one who asks has seen no sign of life.
    """

    owner: Owner | None
    generation: int
    quiet: float
    watched: float
    written: bool = True

    @property
    def free(self) -> bool:
        """Whether the next generation may be claimed."""
        return self.ended or (self.expired and self.watched >= self.seconds * 2 / RENEWALS)

    @property
    def alive(self) -> bool:
        """Whether somebody is believed to work under it."""
        return not self.ended and not self.expired

    @property
    def ended(self) -> bool:
        """Whether the owner has given it back, or is known to have ended."""
        return self.owner is not None and (self.owner.released or self.owner.dead)

    @property
    def expired(self) -> bool:
        """Whether the owner has been quiet for too long. After a machine woke up, or its clock was set, everybody has
        for a moment: that alone is no reason to take a lease over."""
        return self.quiet > self.seconds

    @property
    def seconds(self) -> float:
        """The time that the owner promised to renew within."""
        if not self.written:
            return UNWRITTEN_SECONDS
        return LEASE_SECONDS if self.owner is None else self.owner.seconds


class Watch:
    """What one process sees of the leases in a folder and below, over time.

    The clock is that of the file system: a file without a name in the folder, touched when asked. Who only wants to
    look (``touch=False``) takes this machine's, which may differ.
    """

    def __init__(self, folder: Path, touch: bool = True) -> None:
        try:
            self._probe = tempfile.TemporaryFile(dir=folder) if touch else None  # noqa: SIM115 - kept open
        except OSError as error:
            raise FileError(f"cannot write into {folder}: {error.strerror or error}.") from error
        self._seen: dict[Path, tuple[float, float]] = {}

    def look(self, path: Path, touched: float) -> tuple[float, float]:
        """Return, for a file touched at that time: its age by the clock that wrote it, and for how long we know."""
        now = time.monotonic()
        if path not in self._seen or self._seen[path][0] != touched:
            self._seen[path] = touched, now
        return max(self._clock() - touched, 0.0), now - self._seen[path][1]

    def _clock(self) -> float:
        if self._probe is None:
            return time.time()
        os.utime(self._probe.fileno())
        return os.fstat(self._probe.fileno()).st_mtime


@dataclass
class Lease:
    """A lease that this process holds; see `claim`. Its methods may be called from several threads."""

    folder: Path
    name: str
    generation: int
    owner: Owner
    _mutex: threading.RLock = field(default_factory=threading.RLock, repr=False)
    _sure: float = field(default_factory=lambda: _awake(), repr=False)

    @property
    def path(self) -> Path:
        """The file."""
        return _path(self.folder, self.name, self.generation)

    def check(self) -> None:
        """Raise `LeaseLost` unless this is the newest lease, and still ours."""
        with self._mutex:
            newest, owner = max(_generations(self.folder, self.name), default=0), None
            if newest == self.generation:
                with suppress(FileNotFoundError):
                    owner = _read(self.path)[0]
            if owner is None or owner.token != self.owner.token:
                raise LeaseLost(
                    f"the lease {self.path} has gone to another worker: this one gave no sign of life for more than "
                    f"{self.owner.seconds:g} s, or somebody deleted it. What it did for this cell is dropped."
                )

    def confirm(self) -> None:
        """As `check`, but without asking the file system while nobody can have taken the lease; cheap in a loop."""
        if _awake() - self._sure > self.owner.seconds / 2:
            self.check()

    def renew(self) -> None:
        """Give a sign of life.

        Raises:
            LeaseLost: if somebody else holds it by now.
            OSError: if the file system does not answer; the lease may still be ours.
        """
        with self._mutex:
            began = _awake()
            self.check()
            os.utime(self.path)
            self._sure = began

    def fence(self) -> None:
        """Begin a new generation of our own. Only the current owner can, so whoever comes through may write a result.

        Raises:
            LeaseLost: if somebody else holds it by now.
        """
        with self._mutex:
            self.check()
            if not _create(self.folder, self.name, self.generation + 1, self.owner):
                raise LeaseLost(f"the lease {self.path} has gone to another worker. What was done under it is dropped.")
            self.generation += 1

    def release(self) -> None:
        """Let anybody claim it at once."""
        with self._mutex, suppress(LeaseLost, OSError):
            self.check()
            with open(self.path, "r+", encoding="utf-8") as file:
                file.write(_text(replace(self.owner, released=True)))
                file.truncate()
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> None:
        """Remove every trace: what it was for is done, and whoever claims it will see that."""
        with self._mutex, suppress(OSError):
            _unlink(self.folder, self.name, up_to=self.generation)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Renew the lease in a thread as long as the block runs."""
        stop = threading.Event()

        def renew() -> None:
            while not stop.wait(self.owner.seconds / RENEWALS):
                try:
                    self.renew()
                except LeaseLost:
                    return  # the block finds out when it is about to write
                except OSError:
                    continue  # a server that is away for a moment

        thread = threading.Thread(target=renew, name=f"lease of {self.path}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def claim(folder: Path, name: str, owner: Owner, watch: Watch) -> Lease | None:
    """Take the lease ``name`` in ``folder``, or return None while somebody else holds it or was quicker.

    Who gets it looks again whether there is anything left to do: the one before may have finished it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = holder(folder, name, watch)
    if found is not None and not found.free:
        return None
    generation = 1 if found is None else found.generation + 1
    owner = replace(owner, since=datetime.now(UTC).isoformat(timespec="seconds"), token=secrets.token_hex(8))
    return Lease(folder, name, generation, owner) if _create(folder, name, generation, owner) else None


def holder(folder: Path, name: str, watch: Watch) -> Holder | None:
    """Return who holds the lease ``name`` in ``folder``, or None where nobody ever claimed it."""
    generation = max(_generations(folder, name), default=0)
    if generation == 0:
        return None
    path = _path(folder, name, generation)
    try:
        owner, touched, written = _read(path)
    except FileNotFoundError:  # finished or taken over since we looked
        return Holder(None, generation, 0.0, 0.0)
    return Holder(owner, generation, *watch.look(path, touched), written=written)


def _create(folder: Path, name: str, generation: int, owner: Owner) -> bool:
    """Create a generation; return False where another process was quicker."""
    path = _path(folder, name, generation)
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(_text(owner))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise FileError(f"cannot write {path}: {error.strerror or error}.") from error
    if max(_generations(folder, name), default=0) > generation:
        path.unlink(missing_ok=True)  # what we had seen was long out of date
        return False
    _unlink(folder, name, up_to=generation - 1)
    return True


def _generations(folder: Path, name: str) -> list[int]:
    pattern = re.compile(rf"{re.escape(name)}\.(\d+)\.lease")
    try:
        return [int(found[1]) for entry in os.listdir(folder) if (found := pattern.fullmatch(entry))]
    except FileNotFoundError:
        return []


def _path(folder: Path, name: str, generation: int) -> Path:
    return folder / f"{name}.{generation:06d}.lease"


def _unlink(folder: Path, name: str, up_to: int) -> None:
    for generation in sorted(_generations(folder, name)):  # the newest last: it is the one that counts
        if generation <= up_to:
            _path(folder, name, generation).unlink(missing_ok=True)


def _text(owner: Owner) -> str:
    return json.dumps(asdict(owner)) + "\n"


def _read(path: Path) -> tuple[Owner | None, float, bool]:
    """Return what a lease file says, when it was last touched, and whether it says anything. Opening it makes NFS ask
    the server for all of that."""
    with open(path, "rb") as file:
        touched, content = os.fstat(file.fileno()).st_mtime, file.read()
    try:
        record = parse_json(content.decode())
        owner = Owner(**{**record, "pid": int(record["pid"]), "seconds": float(record["seconds"])})
    except (TypeError, ValueError, KeyError):
        return None, touched, bool(content)
    return owner, touched, True


def _awake() -> float:
    """Return seconds that also pass while the machine sleeps, where the system counts them."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _process(pid: int) -> str:
    """Return boot, namespace and start time of a running process, or "" where that cannot be told (or it ended)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
        status = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        state, start = status[0].decode(), int(status[19])
    except (OSError, IndexError, ValueError):
        return ""
    return "" if state in "ZX" else f"{boot}/{namespace}/{start}"
