"""The registry under pytest-benchmark; see conftest.py beside this. No part of make test."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_robust.bench import Case

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

_shown: dict[int, str] = {}  # by the id of a case, which pytest holds as long as the session


def test_route(timed: tuple[str, Case, str], benchmark: Any) -> None:
    """Time one route of one case, after the gate of the case."""
    group, case, route = timed
    if id(case) not in _shown:
        _shown[id(case)] = case.gate()
    benchmark.group = group
    benchmark.extra_info.update(gate=_shown[id(case)], work=case.work, unit=case.unit)
    benchmark(case.routes[route])
