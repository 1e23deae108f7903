"""A file that a study names is part of its cells' names by what it contains."""

import json
import os
from pathlib import Path

import pytest

from sparse_robust.errors import UsageError
from sparse_robust.files import sha256_file
from sparse_robust.study import inputs
from sparse_robust.study.cells import cell_name, study_cells
from sparse_robust.study.config import StudyConfig
from sparse_robust.study.inputs import INPUTS, Inputs
from sparse_robust.study.load import build, read_config
from sparse_robust.study.runner import Study
from tests.study.mini import MINI

# As they were before a file could be named by its content.
KNOWN = {"pretrain-AT-dd151b48", "find-AT-imp-at-da9a3802", "transfer-STD-random-k03-fashion-10pct-ST-s0-a45c4f54"}


def naming(file: Path | str) -> StudyConfig:
    return build(StudyConfig, read_config("quickstart", [f"pretrain.AT={{checkpoint: {file}}}"]))


def names(config: StudyConfig) -> dict[str, str]:
    return {cell.slug: cell_name(cell) for cell in study_cells(config)}


def test_content_names_a_cell_and_the_path_does_not(tmp_path: Path) -> None:
    first, copy = tmp_path / "first.pt", tmp_path / "copy.pt"
    first.write_bytes(b"weights")
    copy.write_bytes(b"weights")
    before = names(naming(first))
    assert names(naming(copy)) == before
    first.write_bytes(b"others!")
    after = names(naming(first))
    changed = {slug for slug in before if before[slug] != after[slug]}
    assert changed == {slug for slug in before if slug.split("-")[1] == "AT"}, "what was drawn from it, no more"


def test_a_study_without_files_keeps_its_names() -> None:
    assert set(names(build(StudyConfig, MINI)).values()) >= KNOWN


def test_a_folder_is_named_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a").write_text("1")
    before = Inputs().identity(str(folder))
    (folder / "a").rename(folder / "b")
    assert before.startswith("sha256:") and Inputs().identity(str(folder)) not in (before, str(folder))


def test_a_digest_is_kept_until_size_or_time_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def digest(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr(inputs, "_digest", digest)
    file = tmp_path / "w.pt"
    file.write_bytes(b"weights")
    known = Inputs(tmp_path)
    first = known.identity(str(file))
    assert known.identity(str(file)) == first == f"sha256:{sha256_file(file)}"
    known.save()
    assert Inputs(tmp_path).identity(str(file)) == first and len(read) == 1
    os.utime(file, (1, 1))
    assert Inputs(tmp_path).identity(str(file)) == first and len(read) == 2
    file.unlink()
    assert Inputs(tmp_path).identity(str(file)) == first, "deleted since, and still known"
    (tmp_path / INPUTS).write_text("[]")
    assert Inputs(tmp_path).identity(str(file)) == str(file), "a damaged record is no record"


def test_what_names_no_file_is_its_own_identity() -> None:
    assert Inputs().identity("hf-hub:somebody/something") == "hf-hub:somebody/something"


def test_a_study_keeps_the_digests_and_refuses_a_missing_file(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    with pytest.raises(UsageError, match=r"pretrain.AT.checkpoint .*w\.pt does not exist"):
        Study(naming(file), tmp_path / "out").prepare({})
    file.write_bytes(b"weights")
    study = Study(naming(file), tmp_path / "out")
    study.prepare({})
    assert json.loads((tmp_path / "out" / INPUTS).read_text())[str(file)][1] == sha256_file(file)
    file.unlink()
    later = Study(naming(file), tmp_path / "out")
    later.prepare({})
    assert [cell_name(cell) for cell in later.cells] == [cell_name(cell) for cell in study.cells]
