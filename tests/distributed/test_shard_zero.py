"""DeepSpeed's ZeRO-1, 2 and 3 on 2 processes: masks, enforcement and attacks, each check of one launch a test."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.distributed.shard_ranks import launch, names

SCRIPT = "shard_zero_checks.py"
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs DeepSpeed (make test-distributed installs it)"),
]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return launch(SCRIPT, 2, tmp_path_factory.mktemp("ranks"), DS_ACCELERATOR="cpu")


@pytest.mark.acceptance("double-win", "A-12", "A-38")
@pytest.mark.parametrize("name", names(SCRIPT))
def test_zero(name: str, outcome: dict[str, list[str]]) -> None:
    for rank, found in enumerate(outcome[name]):
        assert found == "ok", f"on rank {rank}:\n{found}"
