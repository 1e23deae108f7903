"""Leases: one owner at a time, none lost, whoever is killed or falls asleep on the way."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sparse_robust.errors import FileError
from sparse_robust.study import leases
from sparse_robust.study.leases import Lease, LeaseLost, Owner, Watch, claim, holder

FORK = multiprocessing.get_context("fork")


def elsewhere(seconds: float = 60.0, **changes: object) -> Owner:
    """An owner on another machine, of whom nothing but the lease file can be seen."""
    return replace(Owner.me(seconds), **{"host": "elsewhere", "process": "another-boot/1/2", **changes})


def age(lease: Lease, seconds: float) -> None:
    """Make the last sign of life so old."""
    touched = os.stat(lease.path).st_mtime - seconds
    os.utime(lease.path, (touched, touched))


def test_one_holds_it_until_it_is_released(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    lease = claim(tmp_path, "cell", Owner.me(), watch)
    assert lease is not None and claim(tmp_path, "cell", Owner.me(), watch) is None
    assert claim(tmp_path, "other", Owner.me(), watch) is not None
    seen = holder(tmp_path, "cell", watch)
    assert seen is not None and seen.owner == lease.owner and not seen.free and seen.quiet < 5
    lease.release()
    assert claim(tmp_path, "cell", Owner.me(), watch) is not None
    with pytest.raises(LeaseLost):
        lease.renew()


def test_released_and_finished_leases_are_free_and_numbers_are_not_used_twice(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    for generation in (1, 2, 3):
        lease = claim(tmp_path, "cell", Owner.me(), watch)
        assert lease is not None and lease.generation == generation
        assert [path.name for path in tmp_path.iterdir()] == [f"cell.{generation:06d}.lease"]
        lease.release()
    lease = claim(tmp_path, "cell", Owner.me(), watch)
    assert lease is not None
    lease.finish()
    assert list(tmp_path.iterdir()) == [] and holder(tmp_path, "cell", watch) is None


def test_a_dead_owner_of_this_machine_is_known_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sparse_robust.study.leases import *; f = Path(sys.argv[1]);"
        "claim(f, 'cell', Owner.me(3600.0), Watch(f)); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=-1, stdout=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    watch = Watch(tmp_path)
    assert claim(tmp_path, "cell", Owner.me(), watch) is None
    process.kill()
    for _ in range(500):  # not waited for yet: a process that is only to be reaped is dead, too
        if (lease := claim(tmp_path, "cell", Owner.me(), watch)) is not None:
            break
        time.sleep(0.01)
    assert lease is not None and lease.generation == 2
    process.communicate()


def test_the_number_of_a_process_may_be_used_again(tmp_path: Path) -> None:
    boot, namespace, start = Owner.me().process.split("/")
    earlier = replace(Owner.me(3600.0), process=f"{boot}/{namespace}/{int(start) - 1}")
    watch = Watch(tmp_path)
    assert claim(tmp_path, "cell", earlier, watch) is not None
    assert claim(tmp_path, "cell", Owner.me(), watch) is not None, "an earlier process had our number; it has ended"


@pytest.mark.parametrize("process", ["another-boot/1/2", ""])
def test_an_owner_that_cannot_be_seen_is_given_its_time(
    tmp_path: Path, process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    watch = Watch(tmp_path)
    lease = claim(tmp_path, "cell", elsewhere(60.0, process=process, pid=2**22 + 1), watch)
    assert lease is not None
    age(lease, 50)
    assert claim(tmp_path, "cell", Owner.me(), watch) is None
    age(lease, 61 - 50)
    assert claim(tmp_path, "cell", Owner.me(), watch) is None, "seen too old only once: perhaps a machine woke up"
    now[0] += 19
    assert claim(tmp_path, "cell", Owner.me(), watch) is None
    lease.renew()
    age(lease, 61)
    now[0] += 2
    assert claim(tmp_path, "cell", Owner.me(), watch) is None, "there was a sign of life in between"
    now[0] += 21
    taken = claim(tmp_path, "cell", Owner.me(), watch)
    assert taken is not None and taken.generation == 2
    for act in (lease.check, lease.renew, lease.fence):
        with pytest.raises(LeaseLost, match="gone to another worker"):
            act()
    lease.release()  # changes nothing: it is not ours
    lease.finish()
    taken.check()
    taken.fence()
    assert taken.generation == 3
    taken.check()


def test_the_owner_s_own_promise_counts_and_renewing_keeps_it(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    lease = claim(tmp_path, "cell", elsewhere(0.6), watch)
    assert lease is not None
    with lease.kept():
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            assert claim(tmp_path, "cell", Owner.me(), watch) is None
            time.sleep(0.02)
    deadline = time.monotonic() + 5
    while (taken := claim(tmp_path, "cell", Owner.me(), watch)) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert taken is not None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"seconds": "soon", "pid": 0}', "\0" * 40])
def test_a_lease_that_cannot_be_read_is_held_for_the_usual_time(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(leases.time, "monotonic", lambda: now[0])
    file = tmp_path / "cell.000007.lease"
    file.write_text(content)
    watch = Watch(tmp_path)
    assert claim(tmp_path, "cell", Owner.me(), watch) is None
    old = file.stat().st_mtime - leases.LEASE_SECONDS - 1
    os.utime(file, (old, old))
    assert claim(tmp_path, "cell", Owner.me(), watch) is None
    now[0] += leases.LEASE_SECONDS
    lease = claim(tmp_path, "cell", Owner.me(), watch)
    assert lease is not None and lease.generation == 8


def test_what_one_saw_long_ago_gives_it_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claimant whose listing is out of date creates a number that is past, and withdraws."""
    watch = Watch(tmp_path)
    first = claim(tmp_path, "cell", Owner.me(), watch)
    assert first is not None
    first.release()
    outdated = holder(tmp_path, "cell", watch)
    second = claim(tmp_path, "cell", Owner.me(), watch)
    assert second is not None
    second.release()
    third = claim(tmp_path, "cell", Owner.me(), watch)
    assert third is not None and [p.name for p in tmp_path.iterdir()] == ["cell.000003.lease"]
    monkeypatch.setattr(leases, "holder", lambda *_: outdated)
    assert claim(tmp_path, "cell", Owner.me(), watch) is None
    third.check()
    assert [p.name for p in tmp_path.iterdir()] == ["cell.000003.lease"]


def test_of_several_who_see_it_free_at_the_same_time_one_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(tmp_path)
    released = claim(tmp_path, "cell", Owner.me(), watch)
    assert released is not None
    released.release()
    for seen in (holder(tmp_path, "cell", watch), None):
        folder = tmp_path if seen is not None else tmp_path / "new"
        with monkeypatch.context() as all_see:
            all_see.setattr(leases, "holder", lambda *_, seen=seen: seen)
            claims = [claim(folder, "cell", Owner.me(), watch) for _ in range(3)]
        first, *others = claims
        assert first is not None and others == [None, None]
        first.check()


def test_a_full_disk_leaves_no_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    watch = Watch(tmp_path)
    monkeypatch.setattr(leases.os, "fsync", full)
    with pytest.raises(FileError, match="No space left"):
        claim(tmp_path, "cell", Owner.me(), watch)
    assert list(tmp_path.iterdir()) == []


class Leases(RuleBasedStateMachine):
    """Any order of claims, releases, losses of time, fences and ends by several workers, against a model: the token
    of the one that may work."""

    @initialize()
    def begin(self) -> None:
        from tempfile import mkdtemp

        self.folder = Path(mkdtemp())
        self.watches = [Watch(self.folder) for _ in range(3)]
        self.held: list[Lease | None] = [None] * 3  # what each worker believes to hold
        self.rightful: str | None = None
        self.overdue = False
        self.highest = 0
        self.done = False

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @precondition(lambda self: not self.done)
    @rule(worker=st.integers(0, 2))
    def claim(self, worker: int) -> None:
        if self.held[worker] is not None:
            return
        lease = claim(self.folder, "cell", elsewhere(), self.watches[worker])
        assert (lease is not None) == (self.rightful is None or self.overdue)
        if lease is not None:
            assert lease.generation > self.highest
            self.held[worker], self.rightful, self.overdue = lease, lease.owner.token, False
            self.highest = lease.generation

    @precondition(lambda self: self.rightful is not None)
    @rule()
    def time_passes(self) -> None:
        lease = next(one for one in self.held if one is not None and one.owner.token == self.rightful)
        age(lease, 1000)
        for watch in self.watches:
            holder(self.folder, "cell", watch)
            watch._seen = {path: (touched, when - 1000) for path, (touched, when) in watch._seen.items()}
        self.overdue = True

    @rule(worker=st.integers(0, 2), act=st.sampled_from(["check", "renew", "fence"]))
    def act(self, worker: int, act: str) -> None:
        lease = self.held[worker]
        if lease is None:
            return
        if lease.owner.token == self.rightful:
            getattr(lease, act)()
            self.overdue &= act == "check"
            self.highest = max(self.highest, lease.generation)
        else:
            with pytest.raises(LeaseLost):
                getattr(lease, act)()

    @rule(worker=st.integers(0, 2))
    def release(self, worker: int) -> None:
        lease = self.held[worker]
        if lease is None:
            return
        lease.release()
        if lease.owner.token == self.rightful:
            self.rightful, self.overdue = None, False
        self.held[worker] = None

    @rule(worker=st.integers(0, 2))
    def finish(self, worker: int) -> None:
        lease = self.held[worker]
        if lease is None or lease.owner.token != self.rightful:
            return
        lease.fence()
        lease.finish()
        self.done, self.rightful, self.held[worker] = True, None, None

    @invariant()
    def the_files_say_so(self) -> None:
        if not hasattr(self, "done"):
            return
        files = list(self.folder.glob("*.lease"))
        assert len(files) <= 1
        if self.rightful is not None:
            assert json.loads(files[0].read_text())["token"] == self.rightful


TestAnyOrder = Leases.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=30)


def work(folder: Path, cells: list[str], seed: int, seconds: float, pause: float = 0.004) -> None:
    """Do every cell: enter it, leave it, write its result under a fence. Now and then fall asleep in the middle."""
    watch, chance = Watch(folder), random.Random(seed)
    while left := [cell for cell in cells if not (folder / cell / "result").exists()]:
        chance.shuffle(left)
        for cell in left:
            lease = claim(folder / cell, "cell", Owner.me(seconds), watch)
            if lease is None:
                continue
            if (folder / cell / "result").exists():
                lease.finish()
                continue
            with lease.kept():
                inside = folder / cell / f"inside-{os.getpid()}-{threading.get_ident()}"
                inside.touch()
                others = [path for path in (folder / cell).glob("inside-*") if path != inside and alive(path)]
                if others:
                    (folder / "overlap").write_text(f"{inside} {others}")
                time.sleep(chance.uniform(0, pause))
                inside.unlink()
                if chance.random() < 0.1:
                    lease.release()
                    continue
                try:
                    lease.fence()
                except LeaseLost:
                    continue
                with open(folder / cell / "result", "x") as file:  # fails if it was written before
                    file.write(str(os.getpid()))
            lease.finish()


def alive(path: Path) -> bool:
    pid = int(path.name.split("-")[1])
    return leases._process(pid) != ""


def test_threads_and_processes_do_every_cell_once(tmp_path: Path) -> None:
    cells = [f"cell-{index}" for index in range(40)]

    def in_threads(seed: int) -> None:
        threads = [threading.Thread(target=work, args=(tmp_path, cells, seed + i, 60.0)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    processes = [FORK.Process(target=in_threads, args=(10 * index,)) for index in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert not (tmp_path / "overlap").exists()
    assert all((tmp_path / cell / "result").exists() for cell in cells)
    assert not list(tmp_path.rglob("*.lease"))
    by = Counter((tmp_path / cell / "result").read_text() for cell in cells)
    assert len(by) > 1, "only one process did anything"


def test_who_is_killed_while_claiming_blocks_for_moments_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "UNWRITTEN_SECONDS", 0.3)
    watch, owner = Watch(tmp_path), Owner.me()
    for name, content in (("killed", b""), ("newer", b'{"format": 9}\n'), ("damaged", b"\xff\x00")):
        (tmp_path / f"{name}.000001.lease").write_bytes(content)
        assert claim(tmp_path, name, owner, watch) is None
    time.sleep(0.5)
    taken = claim(tmp_path, "killed", owner, watch)
    assert taken is not None and taken.generation == 2
    for name in ("newer", "damaged"):
        assert claim(tmp_path, name, owner, watch) is None, "somebody wrote it and may renew it"

    def overtaken(handle: int) -> None:  # between creating the file and writing it was slow
        monkeypatch.undo()
        (tmp_path / "slow.000002.lease").write_text("")

    monkeypatch.setattr(os, "fsync", overtaken)
    assert claim(tmp_path, "slow", owner, watch) is None
    assert not (tmp_path / "slow.000001.lease").exists()


def test_killed_workers_lose_nothing(tmp_path: Path) -> None:
    cells, chance = [f"cell-{index}" for index in range(60)], random.Random(0)
    for cell in cells:
        (tmp_path / cell).mkdir()
    slow = 0.05  # seconds a cell, at most: so that the cells outlast the kills on any machine
    processes = [FORK.Process(target=work, args=(tmp_path, cells, index, 60.0, slow)) for index in range(4)]
    for process in processes:
        process.start()
    killed = 0
    for round_ in range(25):
        time.sleep(chance.uniform(0.005, 0.03))
        victim = chance.randrange(len(processes))
        if processes[victim].is_alive():
            os.kill(processes[victim].pid, signal.SIGKILL)  # type: ignore[arg-type]
            killed += 1
        processes[victim].join()
        processes[victim] = FORK.Process(target=work, args=(tmp_path, cells, 100 + round_, 60.0, slow))
        processes[victim].start()
    for process in processes:
        process.join(60)
    assert killed > 5 and [process.exitcode for process in processes] == [0] * 4
    assert not (tmp_path / "overlap").exists()
    assert all((tmp_path / cell / "result").exists() for cell in cells)


def test_a_sleeper_does_not_write_when_it_wakes_up(tmp_path: Path) -> None:
    """Stopped longer than its lease lasts, in the middle of a cell; another one takes over and finishes."""
    code = (
        "import sys, time; from pathlib import Path; from sparse_robust.study.leases import *; f = Path(sys.argv[1])\n"
        "lease = claim(f, 'cell', Owner.me(0.9), Watch(f))\n"
        "with lease.kept():\n"
        "    print('held', flush=True); sys.stdin.readline()\n"
        "    try: lease.fence(); print('wrote', flush=True)\n"
        "    except LeaseLost: print('lost', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=-1, stdout=-1, text=True)
    assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == "held\n"
    watch = Watch(tmp_path)
    process.send_signal(signal.SIGSTOP)
    deadline = time.monotonic() + 20
    while (lease := claim(tmp_path, "cell", Owner.me(), watch)) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lease is not None, "a stopped process counts as quiet, though it is there"
    process.send_signal(signal.SIGCONT)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "lost\n"
    process.communicate()
    lease.check()
