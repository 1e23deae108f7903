"""Some 500 files that are damaged, made up or hostile: each is read or refused by name, and nothing else happens.

They are all read in one process with little memory to spare, which a crash of the interpreter itself would end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("checkpoint", "model", "ticket", "configuration", "verdicts", "study")
MEMORY = 128
"""MiB that reading one file may take; the largest of them is 20 MB."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bad")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.bad_files.read_all", str(folder)],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ}, timeout=300,
    )  # fmt: skip
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    begun = [line["begin"] for line in lines if "begin" in line]
    assert run.returncode == 0, f"the process ended with {run.returncode} at {begun[-1:]}: {run.stderr[-2000:]}"
    found = [line for line in lines if "kind" in line]
    assert len(found) == len(begun)
    return found


def test_there_are_enough_of_every_kind(outcomes: list[dict[str, Any]]) -> None:
    counts = Counter(case["kind"] for case in outcomes)
    assert set(counts) == set(KINDS) and min(counts.values()) >= 30 and sum(counts.values()) >= 500


@pytest.mark.acceptance("double-win", "A-39", "A-40")
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_read_or_refused_by_name(kind: str, outcomes: list[dict[str, Any]]) -> None:
    cases = [case for case in outcomes if case["kind"] == kind]
    crashed = {case["name"]: case["message"] for case in cases if case["outcome"] == "crashed"}
    assert crashed == {}
    unnamed = {case["name"]: case["message"] for case in cases if case["outcome"] == "refused" and not case["named"]}
    assert unnamed == {}
    longest = max(cases, key=lambda case: case["length"])
    assert longest["length"] < 1500, longest


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_is_refused_and_what_is_only_odd_is_read(kind: str, outcomes: list[dict[str, Any]]) -> None:
    cases = [case for case in outcomes if case["kind"] == kind and case["sound"] is not None]
    wrong = {case["name"]: case["message"] for case in cases if case["sound"] != (case["outcome"] == "read")}
    assert wrong == {}
    assert len(cases) >= 8


def test_nothing_is_executed_and_nothing_is_written(outcomes: list[dict[str, Any]]) -> None:
    assert [case["name"] for case in outcomes if case["executed"]] == []
    assert {case["name"]: case["wrote"] for case in outcomes if case["wrote"]} == {}


def test_memory_and_time_are_bounded(outcomes: list[dict[str, Any]]) -> None:
    assert {case["name"]: case["grown_mb"] for case in outcomes if case["grown_mb"] > MEMORY} == {}
    assert {case["name"]: case["seconds"] for case in outcomes if case["seconds"] > 10} == {}


def test_the_payloads_would_work(tmp_path: Path) -> None:
    """The proof above is worth something: whoever trusts these files runs their code."""
    import pickle

    from tests.bad_files.damage import SENTINEL, Evaluated, Payload

    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        for payload in (Payload(), Evaluated()):
            pickle.loads(pickle.dumps(payload))
            assert (tmp_path / SENTINEL).is_dir()
            (tmp_path / SENTINEL).rmdir()
    finally:
        os.chdir(before)
