"""--base: the same operation at two revisions, a process for each, in turn."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from sparse_robust import bench
from sparse_robust.bench import Comparison
from sparse_robust.bench.base import comparison_table
from sparse_robust.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]

PACKAGE = """
import os, time
from types import SimpleNamespace

def case(name, seconds, gate):
    print("to be kept apart from the answers")
    return SimpleNamespace(name=name, gate=lambda: eval(gate), routes={{"ours": lambda: time.sleep(seconds)}})

def cases(device, scale):
    assert (device.type, scale) == ("cpu", "quick")
    return (case(*each) for each in {cases!r})

OPERATIONS = {{name: SimpleNamespace(cases=cases) for name in {names!r}}}
"""

Case = tuple[str, float, str]


def git(root: Path, *words: str) -> str:
    options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *options, *words], cwd=root, check=True, capture_output=True, text=True).stdout


def write(root: Path, *cases: Case, names: tuple[str, ...] = ("select",)) -> None:
    package = root / "sparse_robust"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / "bench.py").write_text(PACKAGE.format(cases=cases, names=names))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    root.mkdir()
    git(root, "init", "-q")
    write(root, ("one", 0.01, "'same'"), ("two", 0.001, "'same'"), ("three", 0.001, "'same'"))
    git(root, "add", ".")
    git(root, "commit", "-qm", "one")
    return root


def compare(root: Path, *names: str) -> list[Comparison]:
    return list(bench.compare("HEAD", names, root=root, scale="quick", samples=3))


def test_the_working_tree_is_timed_against_a_revision(checkout: Path) -> None:
    """What can be compared is, the rest says why not, and the checkout is left as it was."""
    new = ("one", 0.04, "'same'"), ("two", 0.001, "1 / 0"), ("drei", 0.001, "'same'")
    write(checkout, *new, names=("select", "masks"))
    missing, one, two, three = compare(checkout, "masks", "select")
    assert missing.failure == "at the base: there is no such operation" and not missing.here
    assert (one.operation, one.case, one.failure) == ("select", "one", "")
    assert len(one.here) == len(one.there) == 3
    low, median, high = one.ratio()
    assert low <= median <= high and 2 < median < 6, "40 ms against 10 ms"
    assert two.case == "two" and two.failure == "here: ZeroDivisionError: division by zero" and not two.here
    assert three.failure == "here comes 'drei', at the base 'three'"
    assert git(checkout, "status", "--porcelain").split() == ["M", "sparse_robust/bench.py"]


def test_a_side_that_dies_is_said(checkout: Path) -> None:
    write(checkout, ("one", 0.001, "os._exit(3)"))
    (died,) = compare(checkout, "select")
    assert died.failure == "here: the process ended with status 3"


def test_outside_of_a_checkout_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no git checkout"):
        bench.compare("HEAD", root=tmp_path)


def test_an_unknown_revision_or_operation_is_refused(checkout: Path) -> None:
    with pytest.raises(UsageError, match="git knows no commit 'nope'"):
        bench.compare("nope", root=checkout)
    with pytest.raises(UsageError, match="git knows no commit '--all'"):
        bench.compare("--all", root=checkout)
    with pytest.raises(UsageError, match="Did you mean 'select'"):
        bench.compare("HEAD", ["slect"], root=checkout)


def test_the_table_shows_ratio_and_spread() -> None:
    good = Comparison("select", "one", here=(2.0, 4.0, 6.0), there=(2.0, 2.0, 2.0))
    console = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(comparison_table([good, Comparison("pgd", "two", failure="here: no")], "v1"))
    text = console.export_text()
    assert "2.000" in text and "1.400 .. 2.600" in text and "4 s" in text and "here: no" in text and "v1" in text


@pytest.mark.slow
def test_run_py_takes_a_base() -> None:
    """On this repository, if it is one: what is timed is the package of each side, not one of them twice."""
    if subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    command = [sys.executable, "benchmarks/run.py", "--base", "HEAD", "--only", "select", "--scale", "quick"]
    done = subprocess.run([*command, "--samples", "3"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "select, 30,000 weights: timed" in done.stdout and "Working tree against HEAD" in done.stdout
