"""``pytest benchmarks --benchmark-only``: every route of every case on this machine's CPU, under pytest-benchmark."""

from __future__ import annotations

import pytest
import torch

from sparse_robust import bench


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparse-robust")
    group.addoption("--scale", choices=bench.SCALES, default="quick", help="sizes of the operations (default: quick)")
    group.addoption("--operation", action="append", metavar="NAME", help="only this operation; may be repeated")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each route; a case is made once and its gate taken by the first of its routes."""
    if "timed" not in metafunc.fixturenames:
        return
    names = metafunc.config.getoption("--operation") or list(bench.OPERATIONS)
    found = []
    for name in names:
        for case in bench.OPERATIONS[name].cases(torch.device("cpu"), metafunc.config.getoption("--scale")):
            for route in case.routes:
                group = f"{name}: {case.name}"
                found.append(pytest.param((group, case, route), id=f"{name}-{case.name}-{route}"))
    metafunc.parametrize("timed", found)
