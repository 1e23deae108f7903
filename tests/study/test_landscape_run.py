"""`sparse-robust landscape`: from transfers that kept their paths to one picture and its numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from sparse_robust.cli import main
from sparse_robust.data import DataSpec, eval_loader, load_data
from sparse_robust.models import load_model

TINY = ["model.name=resnet10t", "model.kwargs={channels: [4, 6, 8, 10], stem_width: 4}"]
DATA = ["data.name=digits", "data.resize=28", "data.fraction=0.1", "data.validation=50"]
QUICK = ["evaluation.steps=1", "evaluation.images=20"]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a transfer of a ticket, of three epochs."""
    home = tmp_path_factory.mktemp("landscape")
    train = ["recipe.lr=0.05", "recipe.validate_every=0", "recipe.epochs=1"]
    assert main(["pretrain", "--out", str(home / "theta"), *TINY, *DATA, *QUICK, *train]) == 0
    weights = f"weights={home / 'theta' / 'weights.safetensors'}"
    found = ["find.method=oneshot", "find.sparsities=[0.8]"]
    assert main(["find", "--out", str(home / "tickets"), weights, *DATA, *found]) == 0
    ticket = f"ticket={home / 'tickets' / 'tickets' / 'k01.safetensors'}"
    options = [weights, ticket, *DATA, *QUICK, *train[:-1], "recipe.epochs=3", "trajectory=true"]
    assert main(["transfer", "--out", str(home / "moved"), *options]) == 0
    return home / "moved"


@pytest.mark.slow
@pytest.mark.acceptance("double-win", "A-36")
def test_nine_runs_make_three_rows_of_three(moved: Path, tmp_path: Path) -> None:
    runs = [shutil.copytree(moved, tmp_path / f"run-{number}") for number in range(9)]
    named = f"runs=[{', '.join(map(str, runs))}]"
    assert main(["landscape", "--out", str(tmp_path / "out"), named, "grid=5", "images=40"]) == 0
    panels = json.loads((tmp_path / "out" / "result.json").read_text())["panels"]
    assert [panel["title"] for panel in panels] == [run.name for run in runs]
    assert (tmp_path / "out" / "landscape.svg").stat().st_size > 10_000
    picture = np.asarray(Image.open(tmp_path / "out" / "landscape.png").convert("RGB"))
    assert 0.8 < picture.shape[1] / picture.shape[0] < 1.3 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 20
    for panel in panels:
        assert panel["path"][-1] == [0.0, 0.0] and len(panel["path"]) == 4 and panel["images"] == 40

    # Validation was off, so the weights that the transfer kept are the last ones: the loss in the centre is theirs.
    model, data = load_model(moved / "weights.safetensors").eval(), load_data(DataSpec(name="digits", resize=28))
    batches = list(eval_loader(data.test, 500, limit=40))
    with torch.no_grad():
        total = sum(float(F.cross_entropy(model(b.x).double(), b.y, reduction="sum")) for b in batches)
    assert panels[0]["final_loss"] == total / 40


def test_statistics_may_settle_and_directions_be_random(moved: Path, tmp_path: Path) -> None:
    losses = {}
    for name, options in {"plain": [], "settled": ["rebn=true"], "random": ["directions=random"]}.items():
        arguments = ["landscape", "--out", str(tmp_path / name), f"runs=[{moved}]", "grid=3", "images=40", *options]
        assert main(arguments) == 0
        panel = json.loads((tmp_path / name / "result.json").read_text())["panels"][0]
        losses[name] = panel["losses"]
        assert bool(panel["path"]) == (name != "random")
    assert len({json.dumps(found) for found in losses.values()}) == 3


def test_what_is_no_transfer_with_a_path_is_named(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*arguments: str) -> str:
        capsys.readouterr()
        # The same folder for all: what never began does not keep the next command out.
        assert main(["landscape", "--out", str(tmp_path / "out"), *arguments]) == 2
        return capsys.readouterr().err

    assert "holds no path of training" in complaint(f"runs=[{moved.parent / 'theta'}]")
    assert "name the folders of transfers" in complaint("runs=[]")
    assert "pca or random, got 'pcs'" in complaint(f"runs=[{moved}]", "directions=pcs")
    unfinished = shutil.copytree(moved, tmp_path / "unfinished")
    (unfinished / "result.json").unlink()
    assert "no finished run" in complaint(f"runs=[{unfinished}]")
    other = shutil.copytree(moved, tmp_path / "other")
    spec = other / "spec.yaml"
    spec.write_text(spec.read_text().replace("TransferRun", "PretrainRun"))
    assert "landscapes are drawn of transfers" in complaint(f"runs=[{other}]")
