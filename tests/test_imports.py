"""The shape of the project, read from its sources: which way imports run, and what stays out of the library."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "kernels" / "sparse_robust_kernels"
LIBRARY = ROOT / "sparse_robust"

# From the bottom up. A part imports parts of lower layers, and parts of its own layer as long as no circle comes of it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("sparse_robust_kernels",),
    ("_version", "_env", "errors", "files", "seeding"),
    ("masks", "attacks"),
    ("pruning", "models", "data", "objectives"),
    ("training", "tickets", "evaluation"),
    ("study", "bench"),
    ("cli", "cli_study", "cli_ticket"),
    ("__init__", "__main__"),
)
LAYER_OF = {part: layer for layer, parts in enumerate(LAYERS) for part in parts}

# What `import sparse_robust` may not bring along: each is slow to import, or needs the network, or is an extra.
HEAVY = {"timm", "torchvision", "accelerate", "datasets", "matplotlib", "transformers", "jsonargparse", "tensorboard"}

# Reading a value back waits for the device, which also forbids capture in a graph. Selection returns numbers to the
# caller, so it has to wait; nothing else below does.
READS_BACK = {"select"}


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def part_of(path: Path) -> str:
    """The part of the project that a source file belongs to: a name in `LAYERS`."""
    if path.is_relative_to(KERNELS):
        return "sparse_robust_kernels"
    return path.relative_to(LIBRARY).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def walk_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Like ast.walk, without the blocks that only type checkers read."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield from walk_run_time(child)


def imports_in(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) of every import in a file of `package`, those inside functions too.

    Relative ones are resolved. `from a import b` gives "a.b", because b may be a module.
    """
    for node in walk_run_time(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted module) of every import in one of our source files."""
    root = KERNELS.parent if path.is_relative_to(KERNELS) else ROOT
    return imports_in(parse(path), path.relative_to(root).parts[:-1])


def edges() -> Iterator[tuple[str, str, str]]:
    """Yield (part, imported part, place) over the whole project."""
    for path in [*sources(KERNELS), *sources(LIBRARY)]:
        for line, module in imported(path):
            top, _, rest = module.partition(".")
            place = f"{path.relative_to(ROOT)}:{line}"
            if top == "sparse_robust_kernels":
                yield part_of(path), top, place
            elif top == "sparse_robust":
                target = rest.split(".")[0]
                yield part_of(path), target if target in LAYER_OF else "__init__", place


def faults(graph: list[tuple[str, str, str]]) -> list[str]:
    """Every import that runs upwards, and every circle inside a layer."""
    found = [
        f"{place}: {part} imports {target}, which lies above it"
        for part, target, place in graph
        if LAYER_OF[target] > LAYER_OF[part]
    ]
    beside: dict[str, set[str]] = {}
    for part, target, _ in graph:
        if part != target and LAYER_OF[part] == LAYER_OF[target]:
            beside.setdefault(part, set()).add(target)
    for start in beside:
        reached, front = set(), [start]
        while front:
            for target in beside.get(front.pop(), ()):
                if target not in reached:
                    reached.add(target)
                    front.append(target)
        if start in reached:
            found.append(f"{start} imports itself through {', '.join(sorted(reached - {start}))}")
    return found


def test_every_part_has_a_layer() -> None:
    parts = {part_of(path) for path in sources(LIBRARY)}
    assert parts <= set(LAYER_OF), f"give these a place in LAYERS: {sorted(parts - set(LAYER_OF))}"


def test_imports_run_one_way() -> None:
    assert faults(list(edges())) == []


def test_a_reversed_edge_and_a_circle_are_seen() -> None:
    assert faults([("masks", "pruning", "here"), ("pruning", "masks", "there")]) == [
        "here: masks imports pruning, which lies above it"
    ]
    circle = [("training", "tickets", ""), ("tickets", "evaluation", ""), ("evaluation", "training", "")]
    assert len(faults(circle)) == 3
    assert faults([("training", "tickets", ""), ("training", "training", ""), ("errors", "_version", "")]) == []


def test_relative_and_nested_imports_are_seen() -> None:
    code = "from . import a\nfrom ..pruning.b import c\ndef f():\n    import sparse_robust.study\n"
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sparse_robust.cli\n"
    found = {module for _, module in imports_in(ast.parse(code + for_types), ("sparse_robust", "masks"))}
    expected = {"sparse_robust.masks.a", "sparse_robust.pruning.b.c", "sparse_robust.study"}
    assert found == expected | {"typing.TYPE_CHECKING"}


def test_nothing_imports_tests_or_benchmarks() -> None:
    places = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in [*sources(KERNELS), *sources(LIBRARY)]
        for line, module in imported(path)
        if module.split(".")[0] in {"tests", "benchmarks", "conftest", "examples"}
    ]
    assert places == []


def test_kernels_need_torch_and_triton_alone() -> None:
    allowed = {"torch", "triton", "sparse_robust_kernels", "__future__"} | set(sys.stdlib_module_names)
    places = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in sources(KERNELS)
        for line, module in imported(path)
        if module.split(".")[0] not in allowed
    ]
    assert places == []


def test_no_package_is_called_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "transformers probes for a package of that name"
    assert not (LIBRARY / "kernels").exists()


def test_environment_is_read_in_one_place() -> None:
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*sources(KERNELS), *sources(LIBRARY)]
        if path != LIBRARY / "_env.py"
        for node in ast.walk(parse(path))
        if (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"})
        or (isinstance(node, ast.alias) and node.name in {"environ", "getenv"})
    ]
    assert places == [], "read environment variables in sparse_robust/_env.py"


def test_attacks_and_kernels_never_wait_for_the_device() -> None:
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*sources(LIBRARY / "attacks"), *sources(KERNELS)]
        if not READS_BACK & set(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"item", "tolist"}
        and not node.args
    ]
    assert places == []


def test_the_library_prints_nothing() -> None:
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*sources(KERNELS), *sources(LIBRARY)]
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"print", "breakpoint"}
    ]
    assert places == [], "the command line writes through its console, everything else logs or returns"


def modules_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


@pytest.mark.parametrize("package", ["sparse_robust", "sparse_robust_kernels"])
def test_importing_the_package_is_light(package: str) -> None:
    brought = (modules_after(f"import {package}") - modules_after("import torch")) & HEAVY
    assert brought == set(), "import these where they are used"
