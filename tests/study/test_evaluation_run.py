"""`sparse-robust evaluate`: every part of it, on a small network and few images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparse_robust import create_model, prune
from sparse_robust.cli import main
from sparse_robust.evaluation import read_evaluation
from sparse_robust.models import save_model

DATA = ["data.name=digits", "data.resize=28"]
TINY = {"channels": (4, 6, 8, 10), "stem_width": 4}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that is half pruned, with random weights that tell some digits apart."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=10, in_chans=1, **TINY)
    prune(model, sparsity=0.5).apply_(model)
    for name in ("first", "second"):
        (folder / name).mkdir()
        save_model(model, folder / name / "weights.safetensors")
        with torch.no_grad():
            model.fc.weight.mul_(-1)
    return folder / "first" / "weights.safetensors"


def evaluate(*words: str) -> int:
    return main(["evaluate", "--quiet", *words])


@pytest.mark.slow
def test_everything_at_once(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, other = tmp_path / "out", weights.parent.parent / "second" / "weights.safetensors"
    words = [
        "--out", str(out), f"weights={weights}", *DATA, "--attacks", "pgd,square", "--eps", "0.01,0.03",
        "evaluation.images=40", "evaluation.steps=3", "--alarms", "--corruptions", f"sources=[{other}]",
        f"parent={other}", "--attack-precision", "bf16",
    ]  # fmt: skip
    assert evaluate(*words) == 0
    shown = capsys.readouterr().out
    for text in (
        "fooled the copy",
        "pgd-3",
        "square",
        "robust accuracy",
        "large-eps",
        "transfer",
        "defocus_blur",
        "crafted on",
        "second",
    ):
        assert text in shown
    row, measured = json.loads((out / "result.json").read_text()), read_evaluation(out / "verdicts.csv")
    assert len(measured) == row["test_images"] == 40 and row["sa"] == measured.sa and row["ra"] == measured.ra
    assert [point["eps"] for point in row["curve"]] == [0.01, 0.03]
    assert {alarm["name"] for alarm in row["alarms"]} >= {
        "large-eps",
        "more-steps",
        "black-box",
        "transfer",
        "stochastic",
    }
    assert len(row["corruptions"]["by_corruption"]) == 15 and set(row["transfer"]["accuracy"]) == {"weights", "second"}
    record = json.loads((out / "record.json").read_text())
    assert record["threat_model"] == "Linf" and record["eps"] == "0.03" and record["images"] == 40
    assert 0.49 < record["sparsity"] < 0.51 and len(record["ticket"]) == 64
    assert record["robust_acc"] == f"{row['ra']:.2f}" and "autoattack_acc" not in record
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert evaluate(*words) == 0  # what is done is shown again, and not done again
    assert capsys.readouterr().out == shown and {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_an_interrupted_command_goes_on(weights: Path, tmp_path: Path) -> None:
    words = [f"weights={weights}", *DATA, "--attacks", "pgd,apgd-ce", "--eps", "0.03", "evaluation.images=24"]
    assert evaluate("--out", str(tmp_path / "whole"), *words) == 0
    assert evaluate("--out", str(tmp_path / "part"), *words) == 0
    file = tmp_path / "part" / "verdicts.csv"
    rows = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(rows[:10]))
    (tmp_path / "part" / "result.json").unlink()
    assert evaluate("--out", str(tmp_path / "part"), *words) == 0
    assert file.read_bytes() == (tmp_path / "whole" / "verdicts.csv").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--attacks", "pgd,autoatack"], "Did you mean 'autoattack'"),
        (["--eps", "8"], "did you mean '8/255'"),
        (["--eps", "0.1,x"], "such as '8/255'"),
        (["evaluation.precision=fp8"], "fp32"),
        (["evaluation.keep=best"], "first"),
        (["data.name=fashion-mnist-source", "data.channels=3"], "1-channel images"),
    ],
)
def test_wrong_words_are_named(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert evaluate("--out", str(tmp_path), f"weights={weights}", *DATA, *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_overrides_may_stand_between_the_options(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", *DATA, "--dry-run", f"weights={weights}", "--norm", "L2", "evaluation.eps=0.5"]) == 0
    shown = capsys.readouterr().out
    assert "norm: L2" in shown and "eps: 0.5" in shown
    with pytest.raises(SystemExit):
        main(["evaluate", *DATA, "--dry-run", "nonsense"])
    with pytest.raises(SystemExit):
        main(["doctor", "a=1"])
