"""The README's Python runs as it stands."""

import re
import runpy
from pathlib import Path

import pytest

from sparse_robust.study.config import StudyConfig
from sparse_robust.study.load import build, read_config

ROOT = Path(__file__).resolve().parent.parent


def test_the_readmes_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip() and not line.startswith("import")]) <= 5
        exec(compile(block, "README.md", "exec"), names)
    assert names["result"].images.shape == (8, 1, 28, 28)  # type: ignore[attr-defined]
    assert names["masks"].sparsity == pytest.approx(0.9, abs=1e-4)  # type: ignore[attr-defined]
    assert (tmp_path / "masks.safetensors").exists()


def test_the_code_of_the_evaluation_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.S):
        exec(compile(block, "evaluation.md", "exec"), names)
    assert len(names["result"]) == 32 and (tmp_path / "verdicts.csv").exists()  # type: ignore[arg-type]


def test_what_the_documents_link_to_is_there() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "launch" / "README.md"]:
        for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"


def test_the_examples_run_or_load(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "own_training_loop.py"), run_name="__main__")
    shown = capsys.readouterr().out
    clean = float(re.search(r"clean ([\d.]+) %", shown).group(1))  # type: ignore[union-attr]
    assert clean > 60
    zeros, numel = map(int, re.search(r"(\d+) of (\d+) prunable", shown).groups())  # type: ignore[union-attr]
    assert zeros == round(numel / 2)
    assert build(StudyConfig, read_config(ROOT / "examples" / "own_images.yaml")).name == "own-images"
