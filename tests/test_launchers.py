"""The same commands under launchers: one process by accelerate launch, two by torchrun, and trackers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparse_robust.cli import main
from sparse_robust.masks import Masks

NETWORK = ["model.name=resnet10t", "model.kwargs={channels: [4, 6, 8, 10], stem_width: 4}"]
DATA = ["data.name=digits", "data.resize=28", "data.fraction=0.1"]
QUICK = ["recipe.epochs=1", "recipe.regime=fast", "recipe.eps=0.1", "evaluation.steps=1", "evaluation.eps=0.1"]


def command(out: Path, *more: str) -> list[str]:
    return ["pretrain", "--quiet", "--out", str(out), *NETWORK, *DATA, *QUICK, *more]


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


@pytest.mark.slow
def test_accelerate_launch_runs_the_same_thing(tmp_path: Path) -> None:
    assert main(command(tmp_path / "plain")) == 0
    launched = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "-m", "sparse_robust"]
    subprocess.run([*launched, *command(tmp_path / "launched")], check=True, capture_output=True)
    assert result(tmp_path / "launched")["sha256"] == result(tmp_path / "plain")["sha256"]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.acceptance("double-win", "A-31", "A-38")
def test_two_ranks_count_every_image_once_and_find_the_same_tickets(tmp_path: Path) -> None:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def on_two(*arguments: str) -> None:
        subprocess.run([*torchrun, "-m", "sparse_robust", *arguments], check=True, env=environment, capture_output=True)

    on_two(*command(tmp_path / "two", "evaluation.images=57"))
    assert main(command(tmp_path / "one", "evaluation.images=57")) == 0
    one, two = result(tmp_path / "one"), result(tmp_path / "two")
    assert one["test_images"] == two["test_images"] == 57
    losses = [run["history"][0]["train_loss"] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)  # local batch statistics differ, all else is the same

    weights = f"weights={tmp_path / 'one' / 'weights.safetensors'}"
    search = [
        "find",
        "--quiet",
        weights,
        *DATA,
        "find.rounds=2",
        "find.recipe={epochs: 1, lr: 0.01, validate_every: 0}",
    ]
    on_two(*search, "--out", str(tmp_path / "find-two"))
    assert main([*search, "--out", str(tmp_path / "find-one")]) == 0
    first = [Masks.load(tmp_path / run / "tickets" / "k01.safetensors") for run in ("find-one", "find-two")]
    assert first[0] == first[1]
    second = [Masks.load(tmp_path / run / "tickets" / "k02.safetensors") for run in ("find-one", "find-two")]
    assert second[0].count() == second[1].count()

    shown = ["evaluate", "--quiet", weights, *DATA, "evaluation.steps=3", "evaluation.eps=0.1", "evaluation.images=57"]
    on_two(*shown, "--out", str(tmp_path / "evaluate-two"))
    assert main([*shown, "--out", str(tmp_path / "evaluate-one")]) == 0
    measured = [result(tmp_path / run) for run in ("evaluate-one", "evaluate-two")]
    assert (measured[0]["sa"], measured[0]["ra"]) == (measured[1]["sa"], measured[1]["ra"])


def test_processes_that_do_not_see_each_other_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sparse_robust import cli

    monkeypatch.setattr(cli, "launched_processes", lambda: 2)
    assert main(command(tmp_path / "run")) == 2
    assert "ACCELERATE_USE_CPU=true" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(command(tmp_path / "run", "--tracker", "tensorboard")) == 0
    (events,) = (tmp_path / "run" / "trackers").rglob("events.out.*")
    found = EventAccumulator(str(events))
    found.Reload()
    recorded = found.Scalars("train_loss")[0].value
    assert recorded == pytest.approx(result(tmp_path / "run")["history"][0]["train_loss"], rel=1e-6)
