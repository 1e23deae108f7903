"""SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint at the next step boundary, and an exit status that launchers know."""

import json
import os
import signal
import threading
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

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
FAST: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.05, "validation_steps": 0}


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Iterator[None]:
    """Also where these tests run in the background, for which a shell lets SIGINT be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Send this process signals while a training batch is on its way; ``at`` counts from now on."""

    def tell(at: int, *numbers: int) -> None:
        whole, left = TrainLoader.epoch, [at]

        def telling(self: TrainLoader, epoch: int, start: int = 0) -> Iterator[Batch]:
            for batch in whole(self, epoch, start):
                left[0] -= 1
                if left[0] == -1:
                    for number in numbers:
                        os.kill(os.getpid(), number)
                yield batch

        monkeypatch.setattr(TrainLoader, "epoch", telling)

    return tell


def fit(model: nn.Module, data: Data, folder: Path | None, **recipe: Any) -> TrainResult:
    return Trainer(model, data, Recipe(**{**FAST, **recipe}), seed=0, options=RunOptions(folder=folder)).fit()


def end(result: TrainResult) -> object:
    return sha256_state(result.selection.state("last")), [entry["train_loss"] for entry in result.history]


@pytest.mark.parametrize("number", [signal.Signals[name] for name in SIGNALS], ids=SIGNALS)
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


@pytest.mark.parametrize(
    ("numbers", "status", "said"),
    [
        ([signal.SIGUSR1], 85, "SIGUSR1 asked this run to stop in epoch 1, after step 2. It is saved"),
        ([signal.SIGINT], 130, "SIGINT asked this run to stop in epoch 1, after step 2. It is saved"),
        ([signal.SIGINT, signal.SIGINT], 130, "interrupted at once. What was saved is kept, what came after is not"),
    ],
    ids=["SIGUSR1", "Ctrl-C", "Ctrl-C twice"],
)
def test_the_command_line_says_how_it_ended_and_goes_on_when_started_again(
    numbers: list[signal.Signals], status: int, said: str, tmp_path: Path, told: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    network = ["model.name=resnet10t", "model.kwargs={channels: [4, 6, 8, 10], stem_width: 4}"]
    data = ["data.name=digits", "data.resize=28", "data.fraction=0.1"]
    short = ["recipe.epochs=1", "recipe.batch_size=32", "evaluation.steps=1", "evaluation.images=20"]
    command = ["pretrain", "--quiet", *network, *data, *short]

    def sha256(folder: str) -> str:
        return json.loads((tmp_path / folder / "result.json").read_text())["sha256"]

    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    told(1, *numbers)
    assert main([*command, "--out", str(tmp_path / "parts")]) == status
    err = capsys.readouterr().err
    assert said in err and "run the same command again" in err
    assert any(tmp_path.glob("parts/checkpoint/step-*")) == (len(numbers) == 1)
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


def test_the_second_ctrl_c_interrupts_at_once_and_the_first_says_so() -> None:
    said, heard = list[str](), threading.Event()

    def say(text: str) -> None:
        said.append(text)
        heard.set()

    with pytest.raises(KeyboardInterrupt), listening() as outer, listening(say=say) as inner:
        os.kill(os.getpid(), signal.SIGINT)
        assert heard.wait(10) and len(said) == 1 and "Once more" in said[0]
        assert outer() == inner() == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("it went on")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with listening() as which:
        assert which() is None


def test_the_first_ctrl_c_after_another_signal_is_not_the_second() -> None:
    with pytest.raises(Preempted), listening() as which:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert which() == "SIGTERM"
        raise Preempted


def test_in_the_background_ctrl_c_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with listening() as which:
        os.kill(os.getpid(), signal.SIGINT)
        assert which() is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
