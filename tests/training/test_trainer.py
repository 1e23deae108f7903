"""The trainer: regimes, masks, selection, guard, accumulation, determinism."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_robust.attacks import PGD
from sparse_robust.data import Data
from sparse_robust.files import sha256_state
from sparse_robust.masks import Masks
from sparse_robust.pruning import prune
from sparse_robust.training import Recipe, RunOptions, Trainer, TrainingError, TrainResult
from sparse_robust.training.guard import CatastrophicOverfittingGuard


def equal_states(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return sha256_state(one) == sha256_state(other)


FAST = {"epochs": 2, "batch_size": 32, "lr": 0.05, "eps": 0.1, "validation_steps": 2}


def fit(
    model: nn.Module,
    data: Data,
    *,
    seed: int = 0,
    masks: Masks | None = None,
    folder: Path | None = None,
    **recipe: object,
) -> TrainResult:
    options = RunOptions(folder=folder)
    return Trainer(model, data, Recipe(**{**FAST, **recipe}), seed=seed, masks=masks, options=options).fit()


@pytest.mark.parametrize(("regime", "robust"), [("standard", False), ("fast", True), ("adversarial", True)])
def test_each_regime_learns(regime: str, robust: bool, tiny: Callable[..., nn.Module], digits: Data) -> None:
    result = fit(tiny(), digits, regime=regime, steps=2, epochs=20, batch_size=16, lr=0.1, eps=0.03, validate_every=5)
    losses = [entry["train_loss"] for entry in result.history]
    assert losses[-1] < 0.85 * losses[0]
    assert result.history[-1]["train_accuracy"] > 20  # chance is 10
    assert (result.history[-1]["val_ra"] is not None) == robust


@pytest.mark.acceptance("double-win", "A-41")
def test_same_seed_same_run_and_zero_is_a_seed(tiny: Callable[..., nn.Module], digits: Data) -> None:
    def run(seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        torch.rand(seed + 3)  # whatever ran before must not matter
        result = fit(tiny(), digits, seed=seed, regime="fast")
        return [entry["train_loss"] for entry in result.history], result.selection.state("last")

    first, again, other = run(0), run(0), run(1)
    assert first[0] == again[0] and equal_states(first[1], again[1])
    assert first[0] != other[0] and not equal_states(first[1], other[1])


def test_training_leaves_the_callers_random_state_alone(tiny: Callable[..., nn.Module], digits: Data) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit(tiny(), digits, epochs=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.acceptance("double-win", "A-12", "A-13")
def test_masked_training_keeps_the_mask(tiny: Callable[..., nn.Module], digits: Data) -> None:
    model = tiny()
    masks = prune(model, 0.8)
    digest = masks.digest()
    result = fit(model, digits, masks=masks, regime="adversarial", steps=2)
    for name in ("last", "best_ra"):
        state = result.selection.state(name)
        for weight in masks.names():
            pruned = state[weight][~masks[weight]]
            assert (pruned == 0).all() and not torch.signbit(pruned).any()
    assert masks.digest() == digest


@pytest.mark.acceptance("double-win", "A-20")
@pytest.mark.parametrize(
    ("regime", "mode", "per_step"),
    [("adversarial", "train", 4), ("fast", "train", 2), ("adversarial", "train_frozen", 1), ("adversarial", "eval", 1)],
)
def test_batch_norm_counter_per_step(
    regime: str, mode: str, per_step: int, tiny: Callable[..., nn.Module], digits: Data
) -> None:
    model = tiny()
    fit(model, digits, regime=regime, attack_mode=mode, steps=3, epochs=1, validation_steps=1)
    steps = -(-len(digits.train) // 32)
    assert int(model.bn1.num_batches_tracked) == per_step * steps


@pytest.mark.acceptance("double-win", "A-29")
def test_a_short_run_still_validates_its_last_epoch(tiny: Callable[..., nn.Module], digits: Data) -> None:
    result = fit(tiny(), digits, epochs=3, validate_from=45)
    assert [entry["val_sa"] is not None for entry in result.history] == [False, False, True]
    assert result.selection.chosen["best_sa"].epoch == 2


@pytest.mark.acceptance("double-win", "A-29")
def test_the_trainer_never_touches_the_test_images(
    tiny: Callable[..., nn.Module], digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    from sparse_robust.training import trainer

    original = trainer.eval_loader
    monkeypatch.setattr(trainer, "eval_loader", lambda split, *a, **k: seen.append(split) or original(split, *a, **k))
    fit(tiny(), digits, epochs=1)
    assert seen and all(split is not digits.test for split in seen)


def test_no_validation_keeps_the_last_epoch_alone(tiny: Callable[..., nn.Module], digits: Data) -> None:
    result = fit(tiny(), digits, validate_every=0)
    assert set(result.selection.chosen) == {"last"} and result.headline(adversarial=True) == "last"


@pytest.mark.acceptance("double-win", "A-26")
def test_guard_restores_the_epoch_before_the_fall(
    tiny: Callable[..., nn.Module], digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts = iter([False, True, False, False])
    monkeypatch.setattr(CatastrophicOverfittingGuard, "trips", lambda self, accuracy: next(verdicts))
    stopped = fit(tiny(), digits, regime="fast", epochs=4)
    assert stopped.stopped_by_guard and len(stopped.history) == 2
    monkeypatch.setattr(CatastrophicOverfittingGuard, "trips", lambda self, accuracy: False)
    one_epoch = Trainer(tiny(), digits, Recipe(**{**FAST, "regime": "fast", "epochs": 4}), seed=0)
    states = []
    original = one_epoch.state.selection.offer
    one_epoch.state.selection.offer = lambda epoch, state, **kw: (
        states.append({k: v.clone() for k, v in state.items()}),
        original(epoch, state, **kw),
    )[1]  # type: ignore[method-assign]
    one_epoch.fit()
    assert equal_states(stopped.selection.state("last"), states[0])
    assert stopped.selection.chosen["last"].epoch == 0


def test_accumulation_equals_one_large_batch(digits: Data) -> None:
    even = replace(digits, train=digits.train.select(torch.arange(128)))  # no uneven group at the end

    def linear() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10))

    small, large = linear(), linear()
    fit(small, even, batch_size=16, accumulate=2)
    fit(large, even, batch_size=32)
    for mine, theirs in zip(small.parameters(), large.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5)


def test_moving_average_is_what_is_kept_and_stays_masked(tiny: Callable[..., nn.Module], digits: Data) -> None:
    model = tiny()
    masks = prune(model, 0.5)
    result = fit(model, digits, masks=masks, ema_decay=0.9)
    kept = result.selection.state("last")
    assert not equal_states(kept, model.state_dict())
    assert all((kept[name][~masks[name]] == 0).all() for name in masks.names())


def test_log_and_history_agree(tiny: Callable[..., nn.Module], digits: Data, tmp_path: Path) -> None:
    result = fit(tiny(), digits, folder=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == result.history


def test_a_loss_that_is_no_number_is_an_error(tiny: Callable[..., nn.Module], digits: Data) -> None:
    with pytest.raises(TrainingError, match="not finite in epoch 1"):
        fit(tiny(), digits, lr=1e30, schedule="constant")


def test_training_attack_varies_with_the_epoch_and_repeats_with_the_seed() -> None:
    objective = Recipe(regime="adversarial", eps=0.1, steps=1).objective()
    assert isinstance(objective.attack, PGD)
    assert objective.epoch_seed(0, 1) == objective.epoch_seed(0, 1) != objective.epoch_seed(0, 2)
