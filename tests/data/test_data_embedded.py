"""The sets in the package: what they hold, where it comes from, and that nobody changed it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

import sparse_robust.data
from sparse_robust.data import TEST_IDS, DataSpec, embedded, load_data
from sparse_robust.data.embedded import read_embedded
from sparse_robust.data.fashion import DEBIAN_COMMAND, DEBIAN_FOLDER, find_fashion_mnist, read_fashion_mnist
from sparse_robust.errors import FileError

FOLDER = Path(sparse_robust.data.__file__).parent / "embedded"
NAMES = ("fashion-mnist-source", "fashion-mnist-target", "digits")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("fashion-mnist-source", (5400, 600, 1000)),
        ("fashion-mnist-target", (1800, 200, 1000)),
        ("digits", (1200, 197, 400)),
    ],
)
def test_sizes_and_classes(name: str, sizes: tuple[int, int, int]) -> None:
    data = load_data(name)
    splits = (data.train, data.validation, data.test)
    assert tuple(map(len, splits)) == sizes
    assert data.num_classes == 10 and data.in_chans == 1
    for split in splits:
        counts = torch.bincount(split.labels, minlength=10)
        assert int(counts.max() - counts.min()) <= (0 if name != "digits" else 6)
        assert torch.equal(split.ids, split.ids.unique())
    assert len(torch.cat([split.ids for split in splits]).unique()) == sum(sizes)


def test_source_and_target_share_no_image() -> None:
    source, target = (read_embedded(name) for name in NAMES[:2])
    for part in ("train", "test"):
        assert not set(source[f"{part}_ids"].tolist()) & set(target[f"{part}_ids"].tolist())
    assert {part: len(source[f"{part}_ids"]) for part in ("train", "test")} == {"train": 6000, "test": 1000}
    assert {part: len(target[f"{part}_ids"]) for part in ("train", "test")} == {"train": 2000, "test": 1000}


@pytest.mark.parametrize("name", NAMES[:2])
def test_embedded_images_are_those_of_the_full_set(name: str) -> None:
    if find_fashion_mnist([DEBIAN_FOLDER]) is None:
        pytest.skip(f"needs all of Fashion-MNIST: {DEBIAN_COMMAND}")
    full = dict(zip(("train", "test"), read_fashion_mnist(DEBIAN_FOLDER), strict=True))
    cut = read_embedded(name)
    for part, (images, labels) in full.items():
        ids = cut[f"{part}_ids"].long()
        assert torch.equal(cut[f"{part}_images"], images[ids])
        assert torch.equal(cut[f"{part}_labels"], labels[ids])


def test_the_tool_makes_the_same_tensors() -> None:
    if find_fashion_mnist([DEBIAN_FOLDER]) is None:
        pytest.skip(f"needs all of Fashion-MNIST: {DEBIAN_COMMAND}")
    pytest.importorskip("sklearn")
    tool = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "make_embedded_data.py"))
    for name, tensors in {**tool["fashion_cuts"](DEBIAN_FOLDER), "digits": tool["digits"]()}.items():
        kept = read_embedded(name)
        assert kept.keys() == tensors.keys()
        assert all(torch.equal(kept[key], tensors[key]) and kept[key].dtype == tensors[key].dtype for key in kept)


def test_the_full_set_has_the_same_ids() -> None:
    if find_fashion_mnist([DEBIAN_FOLDER]) is None:
        pytest.skip(f"needs all of Fashion-MNIST: {DEBIAN_COMMAND}")
    full, cut = load_data("fashion-mnist"), load_data("fashion-mnist-source")
    assert (len(full.train), len(full.validation), len(full.test)) == (55_000, 5_000, 10_000)
    assert (full.mean, full.std) == ((0.2860,), (0.3530,))
    for mine, theirs in ((cut.test, full.test), (cut.train, full.train)):
        where = {int(i): p for p, i in enumerate(theirs.ids)}
        shared = [(p, where[int(i)]) for p, i in enumerate(mine.ids) if int(i) in where]
        assert len(shared) > 900
        left, right = (torch.tensor(side) for side in zip(*shared, strict=True))
        assert torch.equal(mine.images(left), theirs.images(right))


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    theirs, cut = datasets.load_digits(), read_embedded("digits")
    ids = torch.cat([cut["train_ids"], cut["test_ids"]]).long()
    assert sorted(ids.tolist()) == list(range(1797))
    images = torch.cat([cut["train_images"], cut["test_images"]])
    assert torch.equal(images.double(), torch.from_numpy(theirs.images)[ids])
    assert torch.equal(
        torch.cat([cut["train_labels"], cut["test_labels"]]).long(), torch.from_numpy(theirs.target)[ids]
    )


def test_digits_span_the_full_range_and_can_be_resized() -> None:
    raw, data = read_embedded("digits"), load_data("digits")
    row = int((raw["test_ids"].long() + TEST_IDS == data.test.ids[5]).nonzero())
    value = raw["test_images"][row].double()
    assert torch.equal(data.test.images(torch.tensor([5]))[0, 0].double(), (value * 255 / 16 + 0.5).floor())
    pixels = data.train.images(torch.arange(len(data.train)))
    assert pixels.shape[-2:] == (8, 8) and int(pixels.min()) == 0 and int(pixels.max()) == 255
    assert len(pixels.unique()) == 17
    large = load_data(DataSpec("digits", resize=28))
    assert large.size == (28, 28) and large.test.images(torch.arange(2)).shape == (2, 1, 28, 28)
    assert large.digest != data.digest


def test_a_damaged_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "embedded"
    folder.mkdir()
    for file in ("SHA256SUMS", "digits.safetensors.xz"):
        (folder / file).write_bytes((FOLDER / file).read_bytes())
    monkeypatch.setattr(embedded.resources, "files", lambda package: tmp_path)
    read_embedded("digits")
    whole = (folder / "digits.safetensors.xz").read_bytes()
    (folder / "digits.safetensors.xz").write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(FileError, match=r"digits.safetensors.xz is damaged: SHA-256 .* Install the package again"):
        read_embedded("digits")
    with pytest.raises(FileError, match="fashion-mnist-source.safetensors.xz is missing"):
        read_embedded("fashion-mnist-source")


def test_files_are_small_and_come_with_their_licences() -> None:
    files = list(FOLDER.iterdir())
    assert sum(file.stat().st_size for file in files) < 4_000_000
    assert "Copyright (c) 2017 Zalando SE" in (FOLDER / "FASHION-MNIST-LICENSE.txt").read_text()
    digits = (FOLDER / "DIGITS-LICENSE.txt").read_text()
    assert "BSD 3-Clause" in digits and "Alpaydin" in digits and "CC BY 4.0" in digits


def test_digests_are_those_of_the_release() -> None:
    """They name the data in tickets and results: a change here makes old results incomparable."""
    digests = {name: load_data(name).digest[:16] for name in NAMES}
    assert digests == {
        "fashion-mnist-source": "3298ca95aa0ff1dd",
        "fashion-mnist-target": "cc48d8e56276542e",
        "digits": "bde93714411dbfd8",
    }
