"""Hooks: they see dense gradients, replace masks, and are part of what a run resumes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_robust.data import Data
from sparse_robust.errors import UsageError
from sparse_robust.files import sha256_state
from sparse_robust.masks import Masks
from sparse_robust.pruning import prune
from sparse_robust.training import Hook, Preempted, Recipe, RunOptions, Trainer, TrainResult
from sparse_robust.training.trainee import Trainee
from sparse_robust.training.trajectory import Trajectory

FAST = {"epochs": 2, "batch_size": 32, "lr": 0.05, "validation_steps": 0, "ema_decay": 0.8}


class Rotate(Hook):
    """Every other update, drops the first weight of each layer that is alive and grows the first that is not."""

    name = "rotate"

    def __init__(self) -> None:
        self.updates: list[int] = []
        self.largest = torch.zeros(())
        self.dense: list[bool] = []

    def before_update(self, trainee: Trainee, update: int) -> None:
        assert trainee.masks is not None
        gradients = {name: parameter.grad for name, parameter in trainee.inner.named_parameters()}
        pruned = [gradients[name][~trainee.masks[name]] for name in trainee.masks.names()]
        self.dense.append(any(bool(part.any()) for part in pruned))

    def after_update(self, trainee: Trainee, update: int) -> None:
        assert trainee.masks is not None
        self.updates.append(update)
        weights = dict(trainee.inner.named_parameters())
        self.largest = torch.maximum(self.largest, weights[trainee.masks.names()[0]].detach().abs().max())
        if update % 2:
            return
        moved = {}
        for name in trainee.masks.names():
            keep = trainee.masks[name].flatten()
            dropped, grown = int(keep.nonzero()[0]), int((~keep).nonzero()[0])
            keep[dropped], keep[grown] = False, True
            moved[name] = keep.view(trainee.masks[name].shape)
        trainee.set_masks(Masks.from_bools(moved))
        for name in moved:
            assert (weights[name].detach().flatten()[~moved[name].flatten()] == 0).all()

    def state_dict(self) -> dict[str, object]:
        return {"updates": self.updates, "largest": self.largest}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.updates, self.largest = list(state["updates"]), state["largest"]  # type: ignore[call-overload,assignment]


def fit(model: nn.Module, data: Data, hook: Hook, folder: Path | None = None) -> TrainResult:
    options = RunOptions(folder=folder)
    return Trainer(
        model, data, Recipe(**FAST), seed=0, masks=prune(model, 0.5), options=options, hooks=[hook]
    ).fit()  # fmt: skip


def test_masks_that_change_are_held_and_resumed(
    tiny: Callable[..., nn.Module], digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, model = Rotate(), tiny()
    started = prune(model, 0.5)
    whole = fit(model, digits, first)
    steps = -(-len(digits.train) // 32)
    assert first.updates == list(range(1, 2 * steps + 1)) and all(first.dense)
    assert whole.masks is not None and whole.masks != started and whole.masks.count() == started.count()
    for state in (model.state_dict(), whole.selection.state("last")):
        for name in whole.masks.names():
            assert (state[name][~whole.masks[name]] == 0).all()

    class Stopped(Rotate):
        def after_update(self, trainee: Trainee, update: int) -> None:
            super().after_update(trainee, update)
            if update == steps + 1:
                monkeypatch.setattr("sparse_robust.training.signals._unheeded", ["SIGTERM"])

    with pytest.raises(Preempted):
        fit(tiny(), digits, Stopped(), tmp_path)
    monkeypatch.undo()
    again = Rotate()
    resumed = fit(tiny(), digits, again, tmp_path)
    assert again.updates == first.updates and torch.equal(again.largest, first.largest)
    assert resumed.masks == whole.masks
    assert sha256_state(resumed.selection.state("last")) == sha256_state(whole.selection.state("last"))


def test_the_path_of_a_run_is_kept_and_resumed(
    tiny: Callable[..., nn.Module], digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, steps = tiny(), -(-len(digits.train) // 32)
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = prune(model, 0.5)
    fit(model, digits, Trajectory(tmp_path / "whole"))
    points = {path.stem: load_file(path) for path in sorted((tmp_path / "whole").iterdir())}
    assert list(points) == ["000", "001", "002"]
    for name, parameter in model.named_parameters():
        keep = masks[name] if name in masks else torch.ones_like(begun[name], dtype=torch.bool)
        assert torch.equal(points["000"][name], begun[name] * keep)
        assert torch.equal(points["002"][name], parameter)
        assert all(not state[name][~keep].any() for state in points.values())
    assert points["001"].keys() == model.state_dict().keys()

    class Stopped(Trajectory):
        def after_update(self, trainee: Trainee, update: int) -> None:
            super().after_update(trainee, update)
            if update == steps + 1:
                monkeypatch.setattr("sparse_robust.training.signals._unheeded", ["SIGTERM"])

    with pytest.raises(Preempted):
        fit(tiny(), digits, Stopped(tmp_path / "torn"), tmp_path / "run")
    monkeypatch.undo()
    fit(tiny(), digits, Trajectory(tmp_path / "torn"), tmp_path / "run")
    for point in points:
        torn, whole = (tmp_path / kind / f"{point}.safetensors" for kind in ("torn", "whole"))
        assert torn.read_bytes() == whole.read_bytes()


def test_hooks_need_names_of_their_own(tiny: Callable[..., nn.Module], digits: Data) -> None:
    model = tiny()
    for hooks in ([Hook(), Hook()], [type("Named", (Hook,), {"name": "objective"})()]):
        with pytest.raises(UsageError, match="names of their own"):
            Trainer(model, digits, Recipe(**FAST), seed=0, masks=prune(model, 0.5), hooks=hooks)


def test_replays_and_accumulation_exclude_each_other(tiny: Callable[..., nn.Module], digits: Data) -> None:
    recipe = Recipe(**{**FAST, "regime": "free", "replays": 2, "accumulate": 2, "eps": 0.1})
    with pytest.raises(UsageError, match="accumulate is 2, and this regime makes 2 updates"):
        Trainer(tiny(), digits, recipe, seed=0)


def test_weights_around_the_loss_are_put_back_before_the_update(
    tiny: Callable[..., nn.Module], digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An objective that takes its loss at other weights and puts them back trains as one that never moved them, save
    # for the gradients, which are those of the other place.
    from contextlib import contextmanager

    from sparse_robust.training import step

    order: list[str] = []
    take = Trainee.update

    @contextmanager
    def around(objective: object, model: nn.Module):  # type: ignore[no-untyped-def]
        order.append("in")
        yield
        assert all(parameter.grad is not None for parameter in model.parameters())
        order.append("out")

    def update(self: Trainee) -> Tensor | None:
        order.append("update")
        return take(self)  # type: ignore[func-returns-value]

    monkeypatch.setattr(step, "around", around)
    monkeypatch.setattr(Trainee, "update", update)
    Trainer(tiny(), digits, Recipe(**{**FAST, "epochs": 1}), seed=0).fit()
    assert order == ["in", "out", "update"] * -(-len(digits.train) // 32)
