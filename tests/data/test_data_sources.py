"""Readers: folders, torchvision, Fashion-MNIST, tensors; and what they say when something is wrong."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from sparse_robust import _env
from sparse_robust.data import (
    TEST_IDS,
    VALIDATION_IDS,
    Data,
    DataSpec,
    MemorySplit,
    ReaderSplit,
    data_from_tensors,
    data_sources,
    eval_loader,
    fashion,
    load_data,
)
from sparse_robust.data.folder import folder_source
from sparse_robust.data.idx import read_idx
from sparse_robust.data.torchvision_sets import SETS
from sparse_robust.errors import FileError, UsageError
from tests.data.pictures import picture


def everything(split: MemorySplit | ReaderSplit) -> torch.Tensor:
    return split.images(torch.arange(len(split)))


class TestNames:
    def test_unknown_names_list_what_there_is_and_the_nearest(self) -> None:
        with pytest.raises(UsageError, match=r"unknown data set 'fashon-mnist'. Did you mean 'fashion-mnist'.*digits"):
            load_data("fashon-mnist")
        with pytest.raises(UsageError, match=r"unknown torchvision data set 'CIFAR-10'. Did you mean 'CIFAR10'"):
            load_data("torchvision:CIFAR-10")
        with pytest.raises(UsageError, match=r"unknown data set 'torchvison:CIFAR10'. Did you mean 'torchvision:"):
            load_data("torchvison:CIFAR10")
        with pytest.raises(UsageError, match=r"unknown data set 'folder:'"):
            load_data("folder:")

    def test_every_name_is_listed(self) -> None:
        names = set(data_sources())
        assert {"digits", "fashion-mnist", "fashion-mnist-source", "fashion-mnist-target"} <= names
        assert {"torchvision:CIFAR10", "hf:NAME", "folder:PATH"} <= names

    def test_streaming_is_for_the_hub(self) -> None:
        with pytest.raises(UsageError, match=r"only hf: data sets are streamed, got 'digits'"):
            load_data(DataSpec("digits", streaming=True))


class TestFolder:
    def test_three_subfolders(self, picture_folder: Callable[..., Path]) -> None:
        data = load_data(f"folder:{picture_folder({'train': 4, 'val': 2, 'test': 3})}")
        assert data.classes == ("cat", "dog") and data.in_chans == 3 and data.size == (8, 8)
        assert data.train.ids.tolist() == list(range(8)) and data.train.labels.tolist() == [0] * 4 + [1] * 4
        assert data.validation.ids.tolist() == [VALIDATION_IDS + i for i in range(4)]
        assert data.test.ids.tolist() == [TEST_IDS + i for i in range(6)]
        assert isinstance(data.train, MemorySplit), "small pictures of one size go into memory"
        second = torch.from_numpy(np.array(picture(1))).permute(2, 0, 1)
        assert torch.equal(everything(data.train)[1], second)
        with pytest.raises(UsageError, match=r"has validation images of its own: leave data validation unset"):
            load_data(DataSpec(data.name, validation=2))

    def test_without_a_test_folder_validation_is_the_test(self, picture_folder: Callable[..., Path]) -> None:
        data = load_data(DataSpec(f"folder:{picture_folder({'training': 10, 'valid': 2})}", validation=4))
        assert (len(data.train), len(data.validation), len(data.test)) == (16, 4, 4)
        assert torch.bincount(data.validation.labels).tolist() == [2, 2]
        assert data.test.ids.tolist() == [TEST_IDS + i for i in range(4)]

    def test_one_folder_is_split_in_proportion(self, picture_folder: Callable[..., Path]) -> None:
        root = picture_folder({"": 20})
        data, again = load_data(f"folder:{root}"), load_data(f"folder:{root}")
        splits = (data.train, data.validation, data.test)
        assert [len(s) for s in splits] == [29, 3, 8] and torch.bincount(data.test.labels).tolist() == [4, 4]
        assert torch.bincount(data.validation.labels).min() == 1
        used = torch.cat([data.train.ids, data.validation.ids, data.test.ids - TEST_IDS])
        assert used.sort().values.tolist() == list(range(40)) and data.digest == again.digest

    def test_large_pictures_stay_on_disk(self, picture_folder: Callable[..., Path]) -> None:
        root = picture_folder({"train": 3, "val": 1, "test": 1}, size=None)
        data = load_data(DataSpec(f"folder:{root}", resize=32))
        assert isinstance(data.train, ReaderSplit) and data.size == (32, 32)
        assert load_data(f"folder:{root}").size == (224, 224)
        stored = load_data(DataSpec(f"folder:{root}", resize=32, storage="memory"))
        assert isinstance(stored.train, MemorySplit)
        for split, other in ((stored.train, data.train), (stored.test, data.test)):
            assert torch.equal(everything(split), everything(other))

    def test_grey_pictures_and_channels(self, picture_folder: Callable[..., Path]) -> None:
        root = picture_folder({"": 5}, mode="L")
        assert load_data(f"folder:{root}").in_chans == 1
        colour = load_data(DataSpec(f"folder:{root}", channels=3))
        assert colour.in_chans == 3 and len(colour.mean) == 3
        pixels = everything(colour.train)
        assert torch.equal(pixels[:, 0], pixels[:, 2])

    def test_one_odd_size_keeps_all_splits_alike(self, picture_folder: Callable[..., Path]) -> None:
        root = picture_folder({"train": 3, "val": 1, "test": 1})
        picture(9, (9, 8)).save(root / "test" / "cat" / "000.png")
        data = load_data(DataSpec(f"folder:{root}", resize=8))
        assert {split.view for split in (data.train, data.validation, data.test)} == {data.train.view}

    def test_phone_pictures_are_turned(self, picture_folder: Callable[..., Path]) -> None:
        root = picture_folder({"": 3})
        path, image = root / "cat" / "000.jpg", Image.new("RGB", (20, 10))
        exif = image.getexif()
        exif[0x0112] = 6  # a quarter turn
        image.save(path, exif=exif)
        (root / "cat" / "000.png").unlink()
        split = folder_source(str(root)).train
        assert isinstance(split, ReaderSplit) and split.native(0).shape == (3, 20, 10)

    @pytest.mark.parametrize("storage", ["auto", "disk"])
    def test_an_unreadable_picture_is_named(self, picture_folder: Callable[..., Path], storage: str) -> None:
        root = picture_folder({"train": 4, "val": 1, "test": 1})
        (root / "train" / "dog" / "002.png").write_bytes(b"not a picture")
        spec = DataSpec(f"folder:{root}", storage=storage, statistics="imagenet")  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=r"dog/002.png \(13 bytes\) is not a readable image"):
            list(eval_loader(load_data(spec).train, 3))

    def test_a_worker_names_it_too(self, picture_folder: Callable[..., Path]) -> None:
        root = picture_folder({"train": 4, "val": 1, "test": 1})
        whole = (root / "train" / "dog" / "003.png").read_bytes()
        (root / "train" / "dog" / "003.png").write_bytes(whole[: len(whole) // 2])
        data = load_data(DataSpec(f"folder:{root}", storage="disk", statistics="imagenet"))
        with pytest.raises(UsageError, match=r"^dog/003.png .* is not a readable image"):
            list(eval_loader(data.train, 3, workers=1))

    def test_layouts_that_cannot_be(self, picture_folder: Callable[..., Path], tmp_path: Path) -> None:
        with pytest.raises(FileError, match=r"no folder .*nowhere \(looked in .*\): give folder:PATH"):
            load_data(f"folder:{tmp_path / 'nowhere'}")
        (tmp_path / "bare").mkdir()
        with pytest.raises(UsageError, match=r"bare has no class folders: expected .*CLASS/picture.png"):
            load_data(f"folder:{tmp_path / 'bare'}")
        (tmp_path / "bare" / "cat").mkdir()
        with pytest.raises(UsageError, match=r"class folders but no picture in them"):
            load_data(f"folder:{tmp_path / 'bare'}")
        root = picture_folder({"train": 3, "test": 1})
        (root / "train" / "emu").mkdir()
        with pytest.raises(UsageError, match=r"has class folders without pictures: emu. Fill or remove them"):
            load_data(f"folder:{root}")
        (root / "train" / "emu").rmdir()
        (root / "test" / "emu").mkdir()
        with pytest.raises(UsageError, match=r"has classes that training lacks: emu"):
            load_data(f"folder:{root}")

    def test_test_folder_alone(self, picture_folder: Callable[..., Path]) -> None:
        with pytest.raises(UsageError, match=r"but no train folder: add"):
            load_data(f"folder:{picture_folder({'test': 1, 'val': 1})}")

    def test_one_class_is_too_few(self, picture_folder: Callable[..., Path]) -> None:
        with pytest.raises(UsageError, match=r"training images of two classes or more, got one \(cat\)"):
            load_data(f"folder:{picture_folder({'': 6}, classes=('cat',))}")


class FakeCIFAR10:
    """What torchvision's class looks like from outside."""

    classes = ["plane", "car"]

    def __init__(self, root: str, train: bool, download: bool = False) -> None:
        if not Path(root, "here").exists() and not download:
            raise RuntimeError("Dataset not found or corrupted.")
        n = 5010 if train else 20
        self.data = np.random.default_rng(train).integers(0, 256, (n, 4, 4, 3), dtype=np.uint8)
        self.targets = [i % 2 for i in range(n)]


class TestTorchvision:
    def test_every_entry_is_a_class_of_torchvision(self) -> None:
        assert all(hasattr(torchvision.datasets, name) for name in SETS)

    def test_arrays(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
        spec = DataSpec("torchvision:CIFAR10", root=str(tmp_path))
        with pytest.raises(FileError, match=rf"looked for in {tmp_path} and not found.*download: true.*SPARSE_ROBUST"):
            load_data(spec)
        (tmp_path / "here").touch()
        data = load_data(spec)
        assert (len(data.train), len(data.validation), len(data.test)) == (10, 5000, 20)
        assert data.validation.ids.tolist() == list(range(10, 5010)) and data.classes == ("plane", "car")
        assert data.mean == (0.4914, 0.4822, 0.4465) and data.std == (0.2470, 0.2435, 0.2616)
        pixels = FakeCIFAR10(str(tmp_path), False).data
        assert np.array_equal(everything(data.test).permute(0, 2, 3, 1).numpy(), pixels)  # type: ignore[arg-type]

    def test_download_is_an_explicit_option(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", FakeCIFAR10)
        assert len(load_data(DataSpec("torchvision:CIFAR10", root=str(tmp_path / "new"), download=True)).test) == 20

    def test_idx_files_of_mnist(self, tmp_path: Path) -> None:
        folder = tmp_path / "MNIST" / "raw"
        folder.mkdir(parents=True)
        for part, n in (("train", 40), ("t10k", 10)):
            images, labels = (np.arange(n * 784) % 256).astype(np.uint8), (np.arange(n) % 10).astype(np.uint8)
            (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images.reshape(n, 28, 28)))
            (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
        data = load_data(DataSpec("torchvision:MNIST", root=str(tmp_path)))
        assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 10)
        assert data.classes == tuple("0123456789") and not data.flips and data.mean == (0.1307,)
        assert load_data(DataSpec("torchvision:MNIST", root=str(tmp_path), channels=3)).mean == (0.1307,) * 3

    def test_pictures_on_disk(self, tmp_path: Path) -> None:
        for name in ("Forest", "River"):
            folder = tmp_path / "eurosat" / "2750" / name
            folder.mkdir(parents=True)
            for i in range(10):
                picture(i, (16, 16)).save(folder / f"{i}.jpg")
        data = load_data(DataSpec("torchvision:EuroSAT", root=str(tmp_path)))
        assert data.classes == ("Forest", "River") and data.size == (16, 16)
        assert (len(data.train) + len(data.validation), len(data.test)) == (16, 4)

    def test_the_environment_names_a_folder(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("SPARSE_ROBUST_DATA", str(tmp_path))
        assert _env.data_root() == tmp_path
        with pytest.raises(FileError, match=rf"torchvision:SVHN was looked for in {tmp_path}"):
            load_data("torchvision:SVHN")
        monkeypatch.delenv("SPARSE_ROBUST_DATA")
        assert _env.data_root() == Path.home() / ".cache" / "sparse-robust" / "data"


def idx_bytes(values: np.ndarray) -> bytes:
    shape = np.array(values.shape, dtype=">i4").tobytes()
    return bytes([0, 0, 8, values.ndim]) + shape + values.astype(np.uint8).tobytes()


class TestFashionMNIST:
    @pytest.fixture
    def files(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
        """A small set in the layout of the full one; the Debian folder looks absent."""
        monkeypatch.setattr(fashion, "SHAPES", {"train": (5040, 2, 2), "t10k": (20, 2, 2)})
        monkeypatch.setattr(fashion, "DEBIAN_FOLDER", tmp_path / "debian")
        monkeypatch.setenv("SPARSE_ROBUST_DATA", str(tmp_path / "user"))
        folder = tmp_path / "user" / "FashionMNIST" / "raw"
        folder.mkdir(parents=True)
        for part, (n, *_) in fashion.SHAPES.items():
            pixels = (np.arange(n * 4) % 256).astype(np.uint8).reshape(n, 2, 2)
            (folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(pixels))
            with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
                file.write(idx_bytes((np.arange(n) % 10).astype(np.uint8)))
        return folder

    def test_is_found_in_the_folders_it_may_be_in(self, files: Path, tmp_path: Path) -> None:
        data = load_data("fashion-mnist")
        assert (len(data.train), len(data.validation), len(data.test)) == (40, 5000, 20)
        assert load_data(DataSpec("fashion-mnist", root=str(files))).digest != ""
        files.rename(tmp_path / "debian")
        assert load_data("fashion-mnist").digest == data.digest

    def test_says_where_it_looked_and_how_to_get_it(self, files: Path, tmp_path: Path) -> None:
        (files / "t10k-labels-idx1-ubyte.gz").unlink()
        message = r"looked for in .*debian and .*user\. Get it with `apt-get update && apt-get install -y dataset-"
        with pytest.raises(FileError, match=message + r".*download: true.*fashion-mnist-source has 6,000"):
            load_data("fashion-mnist")
        with pytest.raises(FileError, match=r"looked for in /absent\. "):
            load_data(DataSpec("fashion-mnist", root="/absent"))

    def test_damaged_files_are_named(self, files: Path) -> None:
        labels = files / "train-labels-idx1-ubyte.gz"
        whole = labels.read_bytes()
        labels.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FileError, match=r"cannot read .*train-labels-idx1-ubyte.gz"):
            load_data("fashion-mnist")
        labels.write_bytes(gzip.compress(idx_bytes(np.zeros(30, np.uint8))))
        with pytest.raises(FileError, match=r"should hold \(5040,\) values of Fashion-MNIST and holds \(30,\)"):
            load_data("fashion-mnist")

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "is not an IDX file of bytes: it begins with nothing"),
            (b"\x89PNG....", "is not an IDX file of bytes: it begins with 89 50 4e 47"),
            (idx_bytes(np.zeros((2, 3), np.uint8))[:-1], r"should hold \[2, 3\] values and holds 5"),
            (idx_bytes(np.zeros((2, 3), np.uint8))[:9], "is not an IDX file"),
        ],
    )
    def test_files_that_are_not_idx(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(FileError, match=message):
            read_idx(tmp_path / "file")


class TestTensors:
    def test_statistics_are_those_of_the_training_images(self, small_data: Callable[..., Data]) -> None:
        data = small_data(31, channels=3, fraction=0.5)
        pixels = everything(data.train).double() / 255  # type: ignore[arg-type]
        assert torch.allclose(torch.tensor(data.mean, dtype=torch.float64), pixels.mean((0, 2, 3)), rtol=0, atol=1e-12)
        assert torch.allclose(
            torch.tensor(data.std, dtype=torch.float64), pixels.std((0, 2, 3), correction=0), rtol=0, atol=1e-9
        )
        with pytest.raises(UsageError, match=r"noise has no published statistics"):
            small_data(statistics="reference")
        assert small_data(channels=3, statistics="imagenet").std == (0.229, 0.224, 0.225)

    def test_test_images_do_not_enter_statistics_or_order(self) -> None:
        pixels, labels = torch.randint(0, 256, (30, 5, 5), dtype=torch.uint8), torch.arange(30) % 2
        one = data_from_tensors("a", (pixels, labels), (pixels[:4], labels[:4]))
        other = data_from_tensors("a", (pixels, labels), (255 - pixels[:4], labels[:4]))
        assert (one.mean, one.std) == (other.mean, other.std) and torch.equal(one.train.ids, other.train.ids)
        assert one.digest != other.digest

    def test_the_digest_names_the_content(self, small_data: Callable[..., Data]) -> None:
        same = {small_data().digest, small_data().digest}
        others = [small_data(**c).digest for c in ({"n": 26}, {"fraction": 0.5}, {"resize": 9}, {"subset_seed": 1})]
        assert len(same) == 1 and len({*same, *others}) == 4, "the seed of an unused subset changes nothing"

    def test_wrong_tensors_are_refused(self) -> None:
        pixels, labels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8), torch.arange(6) % 2
        with pytest.raises(UsageError, match=r"expected uint8 images .* got torch.float32 \(6, 1, 4, 4\)"):
            data_from_tensors("a", (pixels.float(), labels))
        with pytest.raises(UsageError, match=r"and 5 labels"):
            data_from_tensors("a", (pixels, labels[:5]))
        with pytest.raises(UsageError, match=r"every training pixel of a channel of a has one value"):
            data_from_tensors("a", (pixels, labels), spec=DataSpec("a", validation=1))
        with pytest.raises(UsageError, match=r"training labels are out of range, .* expected 0..1, got 6"):
            data_from_tensors("a", (pixels, labels + 6), classes=("x", "y"), spec=DataSpec("a", validation=1))
        with pytest.raises(UsageError, match=r"2 of 2 test labels are out of range"):
            data_from_tensors("a", (pixels, labels), (pixels[:2], labels[:2] - 5), spec=DataSpec("a", validation=1))
        with pytest.raises(UsageError, match=r"images differ in size \(4x4 and 5x5\): set data resize"):
            data_from_tensors("a", (pixels, labels), (torch.zeros(2, 5, 5, dtype=torch.uint8), labels[:2]))
