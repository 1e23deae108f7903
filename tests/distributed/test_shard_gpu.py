"""The launch files that shard, on the GPUs of this machine: the same ticket as on one, and nearly the same training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_robust.masks import Masks
from tests.distributed.shard_ranks import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.distributed, pytest.mark.slow]

NEEDED = {"fsdp2": (), "zero2": ("deepspeed", "transformers"), "zero3": ("deepspeed", "transformers")}
NETWORK = ["model.name=resnet10t", "model.kwargs={channels: [16, 24, 32, 64], stem_width: 16}"]
DATA = ["data.name=digits", "data.resize=28", "data.fraction=0.3"]
TRAIN = (
    "{epochs: 2, lr: 0.05, batch_size: 64, regime: adversarial, eps: 0.1, steps: 2, validate_every: 0, clip_grad: 1.0}"
)
SEARCH = [*DATA, "find.rounds=2", f"find.recipe={TRAIN}"]


def launch(file: str, ranks: int, *words: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/{file}.yaml"]
    precision = [] if file.startswith("zero") else ["--mixed_precision", "no"]
    command += ["--num_processes", str(ranks), *precision, "--main_process_port", "0", "-m", "sparse_robust", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-4000:]


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to search from, and the tickets that one GPU finds."""
    pytest.importorskip("jsonargparse", reason="needs jsonargparse: pip install 'jsonargparse[signatures]'")
    folder = tmp_path_factory.mktemp("base")
    quick = ["recipe.epochs=1", "recipe.regime=standard", "evaluation.steps=1", "evaluation.eps=0.1"]
    launch("one_gpu", 1, "pretrain", "--quiet", "--out", str(folder / "theta"), *NETWORK, *DATA, *quick)
    weights = f"weights={folder / 'theta' / 'weights.safetensors'}"
    launch("one_gpu", 1, "find", "--quiet", "--out", str(folder / "find"), weights, *SEARCH)
    return folder


@pytest.mark.parametrize("file", NEEDED)
def test_tickets_found_in_shards_are_those_of_one_gpu(file: str, base: Path, tmp_path: Path) -> None:
    missing = [package for package in NEEDED[file] if find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: pip install 'sparse-robust[deepspeed]'")
    weights = f"weights={base / 'theta' / 'weights.safetensors'}"
    launch(file, torch.cuda.device_count(), "find", "--quiet", "--out", str(tmp_path / "find"), weights, *SEARCH)
    first, second = (
        [Masks.load(folder / "find" / "tickets" / f"k0{k}.safetensors") for k in (1, 2)] for folder in (base, tmp_path)
    )
    assert first[0] == second[0]  # cut before any training
    assert first[1].count() == second[1].count() and first[1].iou(second[1]) > 0.9
    assert result(tmp_path / "find").keys() == result(base / "find").keys()
