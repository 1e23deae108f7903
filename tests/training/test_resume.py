"""A run that is cut off and started again ends as the one that was not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sparse_robust.data import Data
from sparse_robust.files import sha256_state
from sparse_robust.masks import Masks
from sparse_robust.pruning import prune
from sparse_robust.training import Recipe, RunOptions, Trainer, TrainResult
from sparse_robust.training.checkpoint import MANIFEST

BASE: dict[str, Any] = {"epochs": 3, "batch_size": 32, "lr": 0.05, "eps": 0.1, "validation_steps": 2}


class Killed(Exception):
    pass


def run(
    model: nn.Module,
    data: Data,
    folder: Path,
    recipe: dict[str, Any],
    masks: Masks | None,
    die_after: int | None = None,
) -> TrainResult:
    """Train; with ``die_after`` stop dead after so many steps of this start, as a killed process does."""
    options = RunOptions(folder=folder, checkpoint_steps=2)
    trainer = Trainer(model, data, Recipe(**{**BASE, **recipe}), seed=0, masks=masks, options=options)
    if die_after is not None:
        original, left = trainer._train_step, [die_after]

        def step(*arguments: Any) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            original(*arguments)

        trainer._train_step = step  # type: ignore[method-assign]
    return trainer.fit()


def fingerprint(result: TrainResult) -> tuple[Any, ...]:
    history = [{key: value for key, value in entry.items() if key != "seconds"} for entry in result.history]
    states = {name: sha256_state(result.selection.state(name)) for name in result.selection.chosen}
    return history, states, result.selection.to_json(), result.stopped_by_guard


@pytest.mark.acceptance("double-win", "A-37")
@pytest.mark.parametrize(
    "recipe",
    [
        {"regime": "standard"},
        {"regime": "fast", "ema_decay": 0.9},
        {"regime": "adversarial", "steps": 2, "accumulate": 2, "optimizer": "adamw", "attack_mode": "train"},
    ],
    ids=["standard", "fast-ema", "adversarial-accumulated-adamw"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_interrupted_at_any_step(
    recipe: dict[str, Any], masked: bool, tiny: Callable[..., nn.Module], digits: Data, tmp_path: Path
) -> None:
    masks = prune(tiny(), 0.7) if masked else None
    whole = run(tiny(), digits, tmp_path / "whole", recipe, masks)
    steps = -(-len(digits.train) // 32)
    for die_after in (1, steps, steps + 1):  # inside the first epoch, at its boundary, inside the next
        with pytest.raises(Killed):
            run(tiny(), digits, tmp_path / "parts", recipe, masks, die_after)
    assert fingerprint(run(tiny(), digits, tmp_path / "parts", recipe, masks)) == fingerprint(whole)


def test_a_damaged_checkpoint_is_named_and_the_run_starts_over(
    tiny: Callable[..., nn.Module], digits: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tiny(), digits, tmp_path / "whole", {}, None)
    with pytest.raises(Killed):
        run(tiny(), digits, tmp_path / "parts", {}, None, 5)
    file = tmp_path / "parts" / "checkpoint" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    again = run(tiny(), digits, tmp_path / "parts", {}, None)
    assert "model.safetensors" in caplog.text and "starts from its beginning" in caplog.text
    assert fingerprint(again) == fingerprint(whole)


def test_a_crash_between_the_renames_loses_nothing(
    tiny: Callable[..., nn.Module], digits: Data, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Killed):
        run(tiny(), digits, tmp_path, {}, None, 5)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.rename(tmp_path / "checkpoint.old")
    (tmp_path / "checkpoint.new").mkdir()
    with pytest.raises(Killed):
        run(tiny(), digits, tmp_path, {}, None, 0)
    assert (checkpoint / MANIFEST).exists() and not (tmp_path / "checkpoint.old").exists()
    assert not caplog.records
