"""A run that is cut off and started again ends as the one that was not."""

import functools
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from sparse_robust.data import Batch, Data
from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import sha256_state
from sparse_robust.pruning import prune
from sparse_robust.training import Recipe, RunOptions, Trainer, TrainResult
from sparse_robust.training.checkpoint import MANIFEST, PROGRESS

BASE: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.05, "eps": 0.1, "validation_steps": 1}
RUNS: dict[str, dict[str, Any]] = {
    "standard": {"regime": "standard"},
    "fast-ema-masked": {"regime": "fast", "ema_decay": 0.9, "attack_mode": "eval"},
    "adversarial-accumulated-adamw-masked": {
        "regime": "adversarial", "steps": 2, "accumulate": 2, "optimizer": "adamw", "attack_mode": "train",
    },
}  # fmt: skip
Make = Callable[..., nn.Module]


class Killed(Exception):
    pass


def run(
    make: Make,
    data: Data,
    folder: Path,
    which: str = "standard",
    *,
    die_after: int | None = None,
    every: int = 1,
    seen: list[int] | None = None,
    **recipe: Any,
) -> TrainResult:
    """Train; with ``die_after`` stop dead after so many steps of this start, as a killed process does.

    ``seen`` gets the steps of this start, counted over the whole run.
    """
    model = make()
    masks = prune(model, 0.7) if "masked" in which else None
    options = RunOptions(folder=folder, checkpoint_steps=every)
    trainer = Trainer(model, data, Recipe(**{**BASE, **RUNS[which], **recipe}), seed=0, masks=masks, options=options)
    whole, left = trainer.train_batches.epoch, [die_after]

    def cut_off(epoch: int, start: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(whole(epoch, start), start=start):
            if left[0] == 0:
                raise Killed
            left[0] = left[0] and left[0] - 1
            if seen is not None:
                seen.append(epoch * len(trainer.train_batches) + step)
            yield batch

    trainer.train_batches.epoch = cut_off  # type: ignore[method-assign]
    return trainer.fit()


def fingerprint(result: TrainResult) -> tuple[Any, ...]:
    history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.history]
    states = {name: sha256_state(result.selection.state(name)) for name in result.selection.chosen}
    return history, states, result.selection.to_json(), result.stopped_by_guard, result.how


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed here are runs, not machines: what is written need not reach the disk."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.fixture(scope="module")
def whole(tiny: Make, digits: Data, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, ...]]:
    """What an uninterrupted run ends with, by the name of the run."""

    @functools.cache
    def ends_with(which: str) -> tuple[Any, ...]:
        return fingerprint(run(tiny, digits, tmp_path_factory.mktemp("whole"), which, every=10**6))

    return ends_with


@pytest.mark.acceptance("double-win", "A-37")
@pytest.mark.parametrize("which", RUNS)
@settings(max_examples=3, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.integers(0, 7), min_size=1, max_size=3), every=st.integers(1, 2))
def test_killed_at_any_steps(
    which: str, kills: list[int], every: int, tiny: Make, digits: Data, tmp_path: Path, whole: Callable[[str], object]
) -> None:
    shutil.rmtree(tmp_path, ignore_errors=True)
    for die_after in kills:  # counted from each start on; a run may end before
        try:
            run(tiny, digits, tmp_path, which, die_after=die_after, every=every)
        except Killed:
            continue
    assert fingerprint(run(tiny, digits, tmp_path, which, every=every)) == whole(which)


def test_killed_at_the_boundary_of_an_epoch(
    tiny: Make, digits: Data, tmp_path: Path, whole: Callable[[str], object]
) -> None:
    steps, seen = -(-len(digits.train) // BASE["batch_size"]), list[int]()
    with pytest.raises(Killed):
        run(tiny, digits, tmp_path, die_after=steps)
    assert fingerprint(run(tiny, digits, tmp_path, seen=seen)) == whole("standard")
    assert seen == list(range(steps, 2 * steps))  # neither the last step nor the validation is done again


def test_killed_after_the_last_step_it_still_knows_what_was_attacked(
    tiny: Make, digits: Data, tmp_path: Path, whole: Callable[[str], tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    which, seen = "fast-ema-masked", list[int]()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_end_epoch", end_of_last_epoch_kills(Trainer._end_epoch))
        run(tiny, digits, tmp_path, which)
    result = run(tiny, digits, tmp_path, which, seen=seen)
    assert seen == []
    assert result.how["attack"]["replica"]
    assert fingerprint(result) == whole(which)


def end_of_last_epoch_kills(end: Callable[..., None]) -> Callable[..., None]:
    def end_epoch(trainer: Trainer, task: Any) -> None:
        if trainer.state.epoch + 1 == trainer.recipe.epochs:
            raise Killed
        end(trainer, task)

    return end_epoch


def stop_after(steps: int, tiny: Make, digits: Data, folder: Path) -> list[Path]:
    """Kill a run after so many steps; returns its checkpoints, oldest first."""
    with pytest.raises(Killed):
        run(tiny, digits, folder, die_after=steps)
    return sorted((folder / "checkpoint").iterdir())


def test_the_two_newest_are_kept(tiny: Make, digits: Data, tmp_path: Path) -> None:
    assert [path.name for path in stop_after(5, tiny, digits, tmp_path)] == ["step-0000000004", "step-0000000005"]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def flip_all_of_the_manifest(file: Path) -> None:
    file.write_text(file.read_text().replace(PROGRESS, "../" + PROGRESS))


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "flipped weights": ("model.safetensors", flip),
    "torn optimizer": ("optimizer.bin", lambda file: file.write_bytes(file.read_bytes()[:-100])),
    "flipped progress": (PROGRESS, flip),
    "lost random state": ("random_states_0.pkl", Path.unlink),
    "flipped manifest": (MANIFEST, flip),
    "edited manifest": (MANIFEST, flip_all_of_the_manifest),
    "empty manifest": (MANIFEST, lambda file: file.write_text("{}")),
    "lost manifest": (MANIFEST, Path.unlink),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    kind: str, tiny: Make, digits: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, damage = DAMAGE[kind]
    before, newest = stop_after(4, tiny, digits, tmp_path)
    damage(newest / name)
    seen: list[int] = []
    with pytest.raises(Killed):
        run(tiny, digits, tmp_path, die_after=1, seen=seen)
    assert str(newest) in caplog.text and f"{before.name}, the one before it" in caplog.text
    assert seen == [3]


def test_only_damaged_ones_start_the_run_over_with_the_same_end(
    tiny: Make, digits: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture, whole: Callable[[str], object]
) -> None:
    for path in stop_after(4, tiny, digits, tmp_path):
        flip(path / "model.safetensors")
    seen: list[int] = []
    assert fingerprint(run(tiny, digits, tmp_path, seen=seen)) == whole("standard")
    assert seen[0] == 0 and "the run starts over" in caplog.text


def test_what_a_crash_leaves_half_written_is_passed_over_and_removed(
    tiny: Make, digits: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, newest = stop_after(3, tiny, digits, tmp_path)
    newest.rename(newest.with_suffix(".old"))  # a crash between the two renames of a replacement
    torn = newest.with_name("step-0000000004.new")
    torn.mkdir()
    (torn / PROGRESS).write_text('{"epo')
    seen: list[int] = []
    with pytest.raises(Killed):
        run(tiny, digits, tmp_path, die_after=1, seen=seen)
    assert seen == [3] and not caplog.records
    left = sorted(path.name for path in newest.parent.iterdir())
    assert left == ["step-0000000003", "step-0000000004"]


def test_a_full_disk_is_an_error_and_the_checkpoint_before_stays(
    tiny: Make, digits: Data, tmp_path: Path, whole: Callable[[str], object]
) -> None:
    kept = stop_after(3, tiny, digits, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # writes beyond fail, as on a full disk
    try:
        with pytest.raises(
            FileError, match=rf"cannot write the checkpoint .*step-0000000004.*{kept[1].name}.*unchanged"
        ):
            run(tiny, digits, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted((tmp_path / "checkpoint").iterdir()) == kept  # nothing half written takes up the room
    assert fingerprint(run(tiny, digits, tmp_path)) == whole("standard")


def test_the_guard_remembers_what_it_saw_before(tiny: Make, digits: Data) -> None:
    first, second = (Trainer(tiny(), digits, Recipe(**{**BASE, "regime": "fast"}), seed=0) for _ in range(2))
    assert first.state.guard is not None and second.state.guard is not None
    first.state.guard.trips(0.45)
    first.state.before_fall = first.trainee.kept_state()
    second.state.unpack(*first.state.pack())
    assert second.state.guard.trips(0.2)
    assert sha256_state(second.state.before_fall) == sha256_state(first.state.before_fall)


def test_the_checkpoint_of_another_run_is_refused(tiny: Make, digits: Data, tmp_path: Path) -> None:
    stop_after(1, tiny, digits, tmp_path)
    with pytest.raises(UsageError, match="belongs to another run"):
        run(tiny, digits, tmp_path, lr=0.06)
