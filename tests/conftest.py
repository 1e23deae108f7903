"""What holds in every test: no network, one thread, fixed seeds, and a count of what could not run here."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_CACHE = tempfile.mkdtemp(prefix="sparse-robust-tests-")
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)

# Before torch, huggingface_hub and matplotlib are imported: they read these once. Processes that tests start inherit
# them.
os.environ.update(
    HF_HOME=str(Path(_CACHE, "huggingface")),
    HF_HUB_OFFLINE="1",
    TORCH_HOME=str(Path(_CACHE, "torch")),
    # Shared by the processes of pytest-xdist, and given by benchmarks/gpu.sh: compiling is most of what its tests do.
    TRITON_CACHE_DIR=os.environ.get("TRITON_CACHE_DIR", str(Path(_CACHE, "triton"))),
    CUBLAS_WORKSPACE_CONFIG=":4096:8",  # as deterministic training asks for
    WANDB_MODE="offline",
    MPLBACKEND="Agg",
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
)
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH", "")])]
)

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

try:
    import hypothesis
except ImportError:  # a bare GPU machine: the tests that need it are not collected there
    pass
else:
    # Examples are a function of the test alone, so that a failure on one machine is a failure on every machine.
    hypothesis.settings.register_profile("project", derandomize=True, deadline=None, database=None, print_blob=True)
    hypothesis.settings.load_profile("project")

NO_GPU = "needs a CUDA device (on a machine that has one: bash benchmarks/gpu.sh)"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped and why, one line a reason."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if not reasons:
        return
    terminalreporter.section(f"{sum(reasons.values())} skipped, because")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5d}  {reason}")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def poison() -> Iterator[None]:
    """Fill memory from torch.empty and its kin with NaN (the largest value for integers, True for bool).

    An operation that reads what it never wrote, or leaves a part of its output unwritten, shows it then.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
