"""Tests that submit jobs run only where the Slurm is one to play with."""

from __future__ import annotations

import os

import pytest

NO_SLURM = "needs a Slurm of its own (as root, with apt-get: make test-slurm)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slurm") and not os.environ.get("SPARSE_ROBUST_TEST_SLURM"):
            item.add_marker(pytest.mark.skip(reason=NO_SLURM))
