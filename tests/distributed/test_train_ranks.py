"""Training on two processes (gloo): each check of one launch a test, and what one process has to find the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.shard_ranks import launch, names

SCRIPT = "train_checks.py"
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, launch(SCRIPT, 2, folder, ACCELERATE_USE_CPU="true", PYTHONPATH=os.environ["PYTHONPATH"])


@pytest.mark.acceptance("double-win", "A-31", "A-37", "A-38")
@pytest.mark.parametrize("name", names(SCRIPT))
def test_on_two_ranks(name: str, run: tuple[Path, dict[str, list[str]]]) -> None:
    for rank, found in enumerate(run[1][name]):
        assert found == "ok", f"on rank {rank}:\n{found}"


@pytest.mark.acceptance("double-win", "A-38")
def test_one_process_gets_the_same_weights(run: tuple[Path, dict[str, list[str]]]) -> None:
    from tests.distributed.train_checks import three_steps

    theirs, mine = load_file(run[0] / "three-steps.safetensors"), three_steps().state_dict()
    for name, weight in mine.items():  # sums of gradients are rounded in another order
        assert torch.allclose(theirs[name], weight, rtol=1e-4, atol=1e-6), (theirs[name] - weight).abs().max()
        assert torch.equal(theirs[name] == 0, weight == 0)


def test_one_process_takes_over_from_two(run: tuple[Path, dict[str, list[str]]]) -> None:
    from tests.distributed.train_checks import digits, trainer, with_batch_norm

    data = digits()
    resumed = trainer(with_batch_norm(data), data, run[0] / "handover", validate_every=1, validation_steps=0)
    (entry,) = resumed.fit().history
    whole = trainer(with_batch_norm(data), data, validate_every=1, validation_steps=0).fit().history[0]
    assert resumed.state.totals.numel() == 3
    assert entry["train_loss"] == pytest.approx(whole["train_loss"], rel=0.05)  # local statistics for two batches
    assert entry["train_loss"] != whole["train_loss"]
