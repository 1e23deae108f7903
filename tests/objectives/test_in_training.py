"""Regimes in the trainer: what a run of each keeps, resumes and costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_robust.data import Data, DataSpec, load_data
from sparse_robust.errors import UsageError
from sparse_robust.files import sha256_state
from sparse_robust.models import create_model
from sparse_robust.pruning import prune
from sparse_robust.training import Hook, Recipe, RunOptions, Trainer, TrainResult
from sparse_robust.training.schedule import learning_rate
from sparse_robust.training.trainee import Trainee

BASE: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.05, "eps": 0.1, "steps": 1, "validate_every": 0}


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(DataSpec(name="digits", resize=28, fraction=0.05, validation=60))


def tiny() -> nn.Module:
    return create_model("resnet10t", num_classes=10, in_chans=1, seed=0, channels=(4, 6, 8, 10), stem_width=4)


class Killed(Exception):
    pass


class Counter(Hook):
    """Counts updates, notes their learning rates, and kills the run after so many of this start."""

    name = "counter"

    def __init__(self, die_after: int | None = None) -> None:
        self.rates, self.left = list[float](), die_after

    def after_update(self, trainee: Trainee, update: int) -> None:
        self.rates.append(trainee.optimizer.param_groups[0]["lr"])
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                raise Killed


def fit(data: Data, folder: Path | None = None, counter: Counter | None = None, **recipe: Any) -> TrainResult:
    model = tiny()
    trainer = Trainer(
        model, data, Recipe(**{**BASE, **recipe}), seed=0, masks=prune(model, 0.5),
        options=RunOptions(folder=folder, checkpoint_steps=2), hooks=[counter or Counter()],
    )  # fmt: skip
    return trainer.fit()


@pytest.mark.parametrize(
    "recipe",
    [
        {"regime": "standard", "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.9},
        {"regime": "mart", "awp": 0.01, "ema_decay": 0.9},
        {"regime": "n-fgsm"},
    ],
    ids=["mixing", "mart-awp", "n-fgsm"],
)
def test_a_killed_run_goes_on_to_the_same_bits(recipe: dict[str, Any], digits: Data, tmp_path: Path) -> None:
    whole = fit(digits, tmp_path / "whole", **recipe)
    for die_after in (1, 4):
        with pytest.raises(Killed):
            fit(digits, tmp_path / "parts", Counter(die_after), **recipe)
    again = fit(digits, tmp_path / "parts", **recipe)
    assert sha256_state(again.selection.state("last")) == sha256_state(whole.selection.state("last"))
    assert [entry["train_loss"] for entry in again.history] == [entry["train_loss"] for entry in whole.history]


def test_free_divides_the_passes_by_its_replays(digits: Data) -> None:
    recipe = {"regime": "free", "replays": 3, "epochs": 6, "lr": 0.1, "schedule": "multistep", "milestones": [3]}
    free, plain = Counter(), Counter()
    result = fit(digits, counter=free, **recipe)
    fit(digits, counter=plain, **{**recipe, "regime": "standard"})
    assert len(result.history) == 2, "two passes over the images, three updates of each batch"
    assert len(free.rates) == len(plain.rates), "as many updates as any regime makes in so many epochs"
    assert free.rates == pytest.approx(plain.rates), "and the same course of learning rates"


def test_epochs_in_passes() -> None:
    recipe = Recipe(
        regime="free", replays=4, epochs=30, schedule="piecewise_linear", points=((0, 0), (10, 0.2), (30, 0)),
        validate_every=2, validate_from=10, warmup_epochs=2,
    )  # fmt: skip
    passes = recipe.in_passes()
    assert (passes.epochs, passes.validate_every, passes.validate_from, passes.warmup_epochs) == (8, 1, 2, 0.5)
    assert learning_rate(passes, 2.5) == pytest.approx(learning_rate(recipe, 10))
    for regime in ("standard", "trades"):
        other = Recipe(regime=regime, replays=4)
        assert other.in_passes() is other


def test_replays_and_accumulation_exclude_each_other(digits: Data) -> None:
    with pytest.raises(UsageError, match="accumulate"):
        fit(digits, regime="free", replays=2, accumulate=2)


@pytest.mark.parametrize(
    ("regime", "guarded"), [("fast", True), ("n-fgsm", True), ("free", True), ("trades", False), ("standard", False)]
)
def test_the_guard_watches_single_step_regimes(regime: str, guarded: bool, digits: Data) -> None:
    recipe = Recipe(**{**BASE, "regime": regime})
    assert (Trainer(tiny(), digits, recipe, seed=0).state.guard is not None) == guarded
    assert Trainer(tiny(), digits, Recipe(**{**BASE, "regime": regime, "guard": False}), seed=0).state.guard is None


def test_batch_norm_sees_what_the_regime_says(digits: Data) -> None:
    """Updates of the running statistics in one pass over the images: one for each set of images in the loss."""
    steps = -(-len(digits.train) // 32)
    updates = {"trades": 2, "mart": 2, "n-fgsm": 1, "free": 2}
    for regime, per_step in updates.items():
        result = fit(digits, regime=regime, epochs=1, replays=2, awp=0.01)
        counted = int(result.selection.state("last")["bn1.num_batches_tracked"])
        assert counted == per_step * steps, regime
    result = fit(digits, regime="n-fgsm", epochs=1, attack_mode="train")
    assert int(result.selection.state("last")["bn1.num_batches_tracked"]) == 2 * steps


def test_the_average_is_zero_where_weights_are_pruned(digits: Data) -> None:
    model = tiny()
    masks = prune(model, 0.7)
    recipe = Recipe(**{**BASE, "regime": "trades", "awp": 0.05, "ema_decay": 0.8})
    state = Trainer(model, digits, recipe, seed=0, masks=masks).fit().selection.state("last")
    for name in masks.names():
        assert not state[name][~masks[name]].view(torch.int32).any()
    assert any(not torch.equal(state[name], value) for name, value in model.state_dict().items()), "it is an average"
