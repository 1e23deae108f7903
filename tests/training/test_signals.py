"""SIGTERM and SIGUSR1: a checkpoint at the next step boundary, and an exit status that launchers know."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sparse_robust.cli import main
from sparse_robust.data import Batch, Data
from sparse_robust.data.loaders import TrainLoader
from sparse_robust.files import sha256_state
from sparse_robust.training import Preempted, Recipe, RunOptions, Trainer, TrainResult
from sparse_robust.training.signals import listening

FAST: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.05, "validation_steps": 0}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Send this process a signal while a training batch is on its way; ``at`` counts from now on."""

    def tell(at: int, number: int) -> None:
        whole, left = TrainLoader.epoch, [at]

        def telling(self: TrainLoader, epoch: int, start: int = 0) -> Iterator[Batch]:
            for batch in whole(self, epoch, start):
                if left[0] == 0:
                    os.kill(os.getpid(), number)
                left[0] -= 1
                yield batch

        monkeypatch.setattr(TrainLoader, "epoch", telling)

    return tell


def fit(model: nn.Module, data: Data, folder: Path | None, **recipe: Any) -> TrainResult:
    return Trainer(model, data, Recipe(**{**FAST, **recipe}), seed=0, options=RunOptions(folder=folder)).fit()


def end(result: TrainResult) -> object:
    return sha256_state(result.selection.state("last")), [entry["train_loss"] for entry in result.history]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize(("accumulate", "done"), [(1, 2), (3, 3)], ids=["one batch a step", "three"])
def test_a_signal_saves_at_the_next_boundary_and_the_run_goes_on_from_there(
    number: signal.Signals, accumulate: int, done: int, tiny: Callable[..., nn.Module], digits: Data, tmp_path: Path,
    told: Callable[..., None],
) -> None:  # fmt: skip
    whole = end(fit(tiny(), digits, None, accumulate=accumulate))
    before = signal.getsignal(number)
    told(1, number)
    with pytest.raises(Preempted, match=rf"{number.name} .*epoch 1, after step {done}\."):
        fit(tiny(), digits, tmp_path, accumulate=accumulate)
    assert signal.getsignal(number) is before
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [f"step-{done:010d}"]
    assert end(fit(tiny(), digits, tmp_path, accumulate=accumulate)) == whole


def test_the_command_line_exits_with_85_and_goes_on_when_started_again(
    tmp_path: Path, told: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    network = ["model.name=resnet10t", "model.kwargs={channels: [4, 6, 8, 10], stem_width: 4}"]
    data = ["data.name=digits", "data.resize=28", "data.fraction=0.1"]
    short = ["recipe.epochs=1", "recipe.batch_size=32", "evaluation.steps=1", "evaluation.images=20"]
    command = ["pretrain", "--quiet", *network, *data, *short]

    def sha256(folder: str) -> str:
        return json.loads((tmp_path / folder / "result.json").read_text())["sha256"]

    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    told(1, signal.SIGUSR1)
    assert main([*command, "--out", str(tmp_path / "parts")]) == 85
    assert "run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "parts" / "result.json").exists()
    assert main([*command, "--out", str(tmp_path / "parts")]) == 0
    assert sha256("parts") == sha256("whole")


def test_a_signal_that_comes_too_late_is_known_to_the_next_run() -> None:
    with listening() as which:
        assert which() is None
        os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(Preempted), listening() as which:
        assert which() == "SIGUSR1"
        raise Preempted
    with listening() as which:
        assert which() is None


def test_without_a_folder_signals_are_left_alone(
    tiny: Callable[..., nn.Module], digits: Data, told: Callable[..., None]
) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        told(1, signal.SIGUSR1)
        fit(tiny(), digits, None, epochs=1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]
