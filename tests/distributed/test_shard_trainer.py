"""Whole training runs under FSDP2 and DeepSpeed, on 2 processes: the same weights as under DDP, and exact resume."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.distributed.shard_ranks import launch, names

SCRIPT = "shard_trainer_checks.py"
KINDS = {"fsdp2": ("fsdp2",), "deepspeed": ("zero2", "zero3")}
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module", params=KINDS)
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    if request.param == "deepspeed" and find_spec("deepspeed") is None:
        pytest.skip("needs DeepSpeed (make test-distributed installs it)")
    environment = {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"}
    return launch(SCRIPT, 2, tmp_path_factory.mktemp("ranks"), *KINDS[request.param], **environment)


@pytest.mark.acceptance("double-win", "A-37", "A-38")
@pytest.mark.parametrize("name", names(SCRIPT))
def test_training(name: str, outcome: dict[str, list[str]]) -> None:
    for rank, found in enumerate(outcome[name]):
        assert found == "ok", f"on rank {rank}:\n{found}"
