"""The Hub's formats on this machine: saved tables, parquet, folders of pictures, streams."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparse_robust.data import (
    TEST_IDS,
    VALIDATION_IDS,
    Data,
    DataSpec,
    MemorySplit,
    StreamSplit,
    eval_loader,
    load_data,
    train_loader,
)
from sparse_robust.errors import FileError, UsageError
from tests.data.pictures import picture

datasets = pytest.importorskip("datasets")

NAMES = ["ant", "bee", "cow"]


def table(
    n: int, first: int = 0, label: object = None, column: str = "label", size: tuple[int, int] = (6, 6)
) -> object:
    """``n`` pictures in three classes in turn; ``label`` gives the feature and the values of the label column."""
    feature, values = label or (datasets.ClassLabel(names=NAMES), [i % 3 for i in range(n)])  # type: ignore[misc]
    images = [picture(first + i, size) for i in range(n)]
    features = datasets.Features({"image": datasets.Image(), column: feature})
    return datasets.Dataset.from_dict({"image": images, column: values}, features=features)


def pixels(first: int, n: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(picture(first + i, (6, 6)))).permute(2, 0, 1) for i in range(n)])


@pytest.fixture(params=["saved", "parquet"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """12 training, 3 validation and 6 test pictures in one of the formats."""
    splits = {"train": table(12), "validation": table(3, 100), "test": table(6, 200)}
    if request.param == "saved":
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "set"))
    else:
        (tmp_path / "set").mkdir()
        for role, split in splits.items():
            split.to_parquet(str(tmp_path / "set" / f"{role}-00000-of-00001.parquet"))  # type: ignore[attr-defined]
    return f"hf:{tmp_path / 'set'}"


def check(data: Data) -> None:
    assert data.classes == tuple(NAMES) and data.in_chans == 3
    assert data.train.ids.tolist() == list(range(12))
    assert data.validation.ids.tolist() == [VALIDATION_IDS + i for i in range(3)]
    assert data.test.ids.tolist() == [TEST_IDS + i for i in range(6)]
    seen = list(eval_loader(data.test, 4))
    assert torch.equal(torch.cat([b.y for b in seen]), torch.arange(6) % 3)
    assert torch.equal((torch.cat([b.x for b in seen]) * 255).round().to(torch.uint8), pixels(200, 6))


def test_tables_are_read(stored: str) -> None:
    data = load_data(stored)
    assert isinstance(data.train, MemorySplit) and data.size == (6, 6)
    check(data)
    assert data.digest == load_data(stored).digest


def test_streams_are_read(stored: str) -> None:
    data = load_data(DataSpec(stored, streaming=True, resize=6, crop=1.0))
    assert isinstance(data.train, StreamSplit) and len(data.train) == 12
    check(data)
    ids = torch.cat([b.ids for b in train_loader(data, 5, seed=0).epoch(0)])
    assert sorted(ids.tolist()) == list(range(12)) and ids.tolist() != list(range(12))
    few = load_data(DataSpec(stored, streaming=True, resize=6, fraction=0.5, subset="first_n"))
    assert few.train.ids.tolist() == list(range(6)) and len(few.test) == 6
    with pytest.raises(UsageError, match=r"is streamed: only the first images of it can be taken. Set subset: first_n"):
        load_data(DataSpec(stored, streaming=True, fraction=0.5))


def test_a_stream_without_validation_gives_its_first_images(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(12), "test": table(3)}).save_to_disk(str(tmp_path))
    name = f"hf:{tmp_path}"
    with pytest.raises(UsageError, match=r"say how many of its 12 training images, the first ones, validate"):
        load_data(DataSpec(name, streaming=True, resize=6))
    data = load_data(DataSpec(name, streaming=True, resize=6, validation=4))
    assert data.validation.ids.tolist() == list(range(4)) and data.train.ids.tolist() == list(range(4, 12))
    ids = torch.cat([b.ids for b in train_loader(data, 3, seed=0).epoch(0)])
    assert sorted(ids.tolist()) == list(range(4, 12))
    batch = next(iter(eval_loader(data.train, 8)))
    assert torch.equal((batch.x * 255).round().to(torch.uint8), pixels(4, 8))


def test_a_stream_tested_on_its_validation_images(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(12), "validation": table(3, 50)}).save_to_disk(str(tmp_path))
    data = load_data(DataSpec(f"hf:{tmp_path}", streaming=True, resize=6, validation=0))
    assert (len(data.train), len(data.validation), len(data.test)) == (12, 0, 3)
    assert next(iter(eval_loader(data.test, 3))).ids.tolist() == data.test.ids.tolist()
    assert data.test.ids.tolist() == [TEST_IDS + i for i in range(3)] and list(eval_loader(data.validation, 3)) == []


def test_a_stream_that_is_cut_off_is_noticed(tmp_path: Path) -> None:
    datasets.DatasetDict({"train": table(9), "validation": table(3), "test": table(3)}).save_to_disk(str(tmp_path))
    data = load_data(DataSpec(f"hf:{tmp_path}", streaming=True, resize=6))
    assert isinstance(data.train, StreamSplit)
    whole = data.train.open
    object.__setattr__(data.train, "open", lambda skip: list(whole(skip))[:5])
    with pytest.raises(UsageError, match=r"ended after 5 of 9 images"):
        list(eval_loader(data.train, 4))


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for split, n in (("train", 10), ("test", 2)):
        for name in ("x", "y"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(n):
                picture(i, (6, 6)).save(tmp_path / split / name / f"{i}.png")
    data = load_data(f"hf:{tmp_path}")
    assert data.classes == ("x", "y") and (len(data.train), len(data.validation), len(data.test)) == (18, 2, 4)


@pytest.mark.parametrize(
    ("feature", "values", "classes"),
    [
        ("string", ["dog", "cat"] * 6, ("cat", "dog")),
        ("int64", [7, 3, 5] * 4, ("3", "5", "7")),
        ("bool", [True, False] * 6, ("False", "True")),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_labels_that_are_no_class_labels(
    tmp_path: Path, feature: str, values: list[object], classes: tuple[str, ...], streaming: bool
) -> None:
    label = (datasets.Value(feature), values)
    datasets.DatasetDict({"train": table(12, 0, label), "test": table(12, 0, label)}).save_to_disk(str(tmp_path))
    data = load_data(DataSpec(f"hf:{tmp_path}", streaming=streaming, validation=3, resize=6))
    assert data.classes == classes
    seen = torch.cat([b.y for b in eval_loader(data.test, 5)])
    assert [classes[int(y)] for y in seen] == [str(v) for v in values]


def test_columns_are_told_apart_or_asked_for(tmp_path: Path) -> None:
    both = table(12).add_column("coarse", [i % 2 for i in range(12)])  # type: ignore[attr-defined]
    both = both.cast_column("coarse", datasets.ClassLabel(names=["p", "q"])).rename_column("label", "fine")
    both.save_to_disk(str(tmp_path / "both"))
    name = f"hf:{tmp_path / 'both'}"
    message = (
        r"cannot tell the label column among image \(Image\), fine \(ClassLabel\), coarse \(ClassLabel\): set data"
    )
    with pytest.raises(UsageError, match=message):
        load_data(name)
    assert load_data(DataSpec(name, label_column="coarse")).classes == ("p", "q")
    with pytest.raises(UsageError, match=r"has no column 'corse'; it has image \(Image\)"):
        load_data(DataSpec(name, label_column="corse"))
    both.remove_columns("image").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(UsageError, match=r"cannot tell the image column among fine"):
        load_data(f"hf:{tmp_path / 'none'}")


def test_hidden_test_labels_are_no_test(tmp_path: Path) -> None:
    hidden = (datasets.ClassLabel(names=NAMES), [-1] * 6)
    splits = {"train": table(30), "validation": table(9, 50), "test": table(6, 90, hidden)}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path))
    data = load_data(f"hf:{tmp_path}")
    assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 9)


def test_labels_out_of_range(tmp_path: Path) -> None:
    few = (datasets.ClassLabel(names=NAMES), [0, 1, 2, -1, 0, 1])
    for role, split in (("train", table(12)), ("test", table(6, 0, few))):
        split.to_parquet(str(tmp_path / f"{role}.parquet"))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"1 of 6 test labels are out of range, .* image 3: expected 0..2, got -1"):
        load_data(f"hf:{tmp_path}")
    stream = load_data(DataSpec(f"hf:{tmp_path}", streaming=True, resize=6, validation=2))
    assert isinstance(stream.test, StreamSplit) and stream.test.known_labels is None, "sizes and classes are announced"
    with pytest.raises(UsageError, match=r"image 3 has the label -1, which is out of range: expected one of 3 classes"):
        list(eval_loader(stream.test, 2))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    broken = table(12).cast_column("image", datasets.Image(decode=False))  # type: ignore[attr-defined]
    broken = broken.map(lambda row, i: {"image": {"bytes": b"no", "path": None}} if i == 5 else row, with_indices=True)
    datasets.DatasetDict({"train": broken, "test": table(3)}).save_to_disk(str(tmp_path))
    with pytest.raises(UsageError, match=r"train row 5 is not a readable image"):
        load_data(DataSpec(f"hf:{tmp_path}", image_column="image"))


def test_splits_and_names_that_cannot_be(tmp_path: Path) -> None:
    datasets.DatasetDict({"a": table(3), "b": table(3)}).save_to_disk(str(tmp_path / "ab"))
    with pytest.raises(UsageError, match=r"has no train split, only a, b"):
        load_data(f"hf:{tmp_path / 'ab'}")
    with pytest.raises(FileError, match=r"hf:nobody/nothing: no folder .*nobody/nothing.*hf download --repo-type"):
        load_data("hf:nobody/nothing")


def test_a_single_split_is_divided(tmp_path: Path) -> None:
    table(30).save_to_disk(str(tmp_path))  # type: ignore[attr-defined]
    data = load_data(f"hf:{tmp_path}")
    assert (len(data.train), len(data.validation), len(data.test)) == (22, 2, 6)
