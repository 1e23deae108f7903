"""FSDP2 on 2 and 3 processes: masks, enforcement and attacks, each check of one launch a test."""

from __future__ import annotations

import pytest

from tests.distributed.shard_ranks import launch, names

SCRIPT = "shard_fsdp_checks.py"
pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module", params=[2, 3], ids=lambda ranks: f"{ranks}ranks")
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return launch(SCRIPT, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.acceptance("double-win", "A-7", "A-12", "A-38")
@pytest.mark.parametrize("name", names(SCRIPT))
def test_fsdp(name: str, outcome: dict[str, list[str]]) -> None:
    for rank, found in enumerate(outcome[name]):
        assert found == "ok", f"on rank {rank}:\n{found}"
