"""On a GPU: the captured replica, what the host learns one step late, and resuming bit for bit."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_robust.data import Batch, Data
from sparse_robust.files import sha256_state
from sparse_robust.pruning import prune
from sparse_robust.training import Preempted, Recipe, RunOptions, Trainer, TrainingError, TrainResult

pytestmark = pytest.mark.gpu
FAST: dict[str, Any] = {
    "regime": "adversarial", "steps": 3, "attack_mode": "eval", "epochs": 2, "batch_size": 32, "lr": 0.05, "eps": 0.1,
    "validation_steps": 1, "deterministic": True,
}  # fmt: skip


def make(model: nn.Module, data: Data, folder: Path | None = None, **recipe: Any) -> Trainer:
    options = RunOptions(folder=folder)
    return Trainer(model, data, Recipe(**{**FAST, **recipe}), seed=0, masks=prune(model, 0.5), options=options)


def end(result: TrainResult) -> object:
    return sha256_state(result.selection.state("last")), [entry["train_loss"] for entry in result.history]


@pytest.mark.parametrize("mode", ["eval", "train_frozen"])
def test_the_replica_is_captured_and_trains_as_the_network_itself(
    mode: str, tiny: Callable[..., nn.Module], digits: Data
) -> None:
    runs = [make(tiny(), digits, attack_mode=mode, attack_replica=choice).fit() for choice in ("auto", "never")]
    assert runs[0].how["attack"]["replica"] and runs[0].how["attack"]["captured"]
    losses = [[entry["train_loss"] for entry in run.history] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_stopped_and_resumed_it_ends_with_the_same_bits(
    tiny: Callable[..., nn.Module], digits: Data, tmp_path: Path
) -> None:
    whole = end(make(tiny(), digits).fit())
    run = make(tiny(), digits, tmp_path)
    batches = run.train_batches.epoch

    def telling(epoch: int, start: int = 0) -> Iterator[Batch]:
        for step, batch in enumerate(batches(epoch, start), start=start):
            if step == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    run.train_batches.epoch = telling  # type: ignore[method-assign]
    with pytest.raises(Preempted, match="epoch 1, after step 3"):  # known after the step that follows the next one
        run.fit()
    assert end(make(tiny(), digits, tmp_path).fit()) == whole


def test_a_loss_that_is_no_number_is_noticed_a_step_later(tiny: Callable[..., nn.Module], digits: Data) -> None:
    run = make(tiny(), digits)
    taken = run.stepper.__class__.__call__
    steps: list[int] = []

    class Broken(type(run.stepper)):  # type: ignore[misc]
        def __call__(self, batch: Batch, **where: Any) -> torch.Tensor:
            steps.append(where["step"])
            sums = taken(self, batch, **where)
            return sums * float("nan") if where["step"] == 1 else sums

    run.stepper.__class__ = Broken
    with pytest.raises(TrainingError, match="not finite in epoch 1, step 2"):
        run.fit()
    assert steps == [0, 1, 2]
