"""Pictures in folders, one folder a class: root/{train,val,test}/CLASS/*.png, or root/CLASS/*.png."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_robust.data.source import Source, reader_split
from sparse_robust.data.split import TEST_IDS, VALIDATION_IDS, ReaderSplit, decode
from sparse_robust.errors import FileError, UsageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
ROLES = {"train": ("train", "training"), "validation": ("val", "valid", "validation"), "test": ("test", "testing")}


@dataclass(frozen=True)
class Pictures:
    """Reader of a list of picture files; goes to worker processes."""

    root: Path
    files: tuple[str, ...]

    def __call__(self, position: int) -> Any:
        from PIL import Image, ImageOps

        with Image.open(self.root / self.files[position]) as image:
            return ImageOps.exif_transpose(image)

    def describe(self, position: int) -> str:
        """The path and size of a picture: they name it in errors and stand for it in the digest."""
        path = self.root / self.files[position]
        return f"{self.files[position]} ({path.stat().st_size if path.is_file() else 'missing'} bytes)"


def folder_source(path: str) -> Source:
    """Read the layout of a folder of pictures (the pictures are read when they are used).

    With a ``train`` subfolder, ``val`` and ``test`` beside it are used where they exist; without one the folder itself
    holds the classes. What is missing is held out of the training images in proportion to the classes.

    Raises:
        FileError: if the folder does not exist.
        UsageError: if it has no class folders, a class folder has no picture, or a split has classes that training
            lacks.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileError(f"no folder {root} (looked in {root.parent.absolute()}): give folder:PATH of class folders.")
    found = {role: next((root / n for n in names if (root / n).is_dir()), None) for role, names in ROLES.items()}
    train = found["train"] or root
    classes = tuple(sorted(f.name for f in train.iterdir() if f.is_dir() and not f.name.startswith(".")))
    if not classes:
        raise UsageError(f"{train} has no class folders: expected {train}/CLASS/picture.png.")
    if found["train"] is None and set(classes) & {name for names in ROLES.values() for name in names}:
        raise UsageError(f"{root} has {', '.join(classes)} but no train folder: add {root}/train.")
    channels = _channels(train, classes)
    validation, test = (
        _split(folder, classes, channels, first_id) if folder is not None and found["train"] is not None else None
        for folder, first_id in ((found["validation"], VALIDATION_IDS), (found["test"], TEST_IDS))
    )
    return Source(
        classes, _split(train, classes, channels, 0), test, validation, attribution=f"pictures in {root.absolute()}"
    )


def _split(folder: Path, classes: tuple[str, ...], channels: int, first_id: int) -> ReaderSplit:
    """The pictures of one split, sorted by class and name."""
    present = sorted(f.name for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    strange = [name for name in present if name not in classes]
    if strange:
        raise UsageError(f"{folder} has classes that training lacks: {', '.join(strange[:10])}.")
    files = {name: _pictures(folder, name) for name in present}
    empty = [name for name, found in files.items() if not found]
    if empty:
        raise UsageError(
            f"{folder} has class folders without pictures: {', '.join(empty[:10])}. "
            f"Fill or remove them (known endings: {' '.join(EXTENSIONS)})."
        )
    reader = Pictures(folder, tuple(file for name in present for file in files[name]))
    labels = [classes.index(name) for name in present for _ in files[name]]
    return reader_split(reader, labels, reader.describe, channels=channels, first_id=first_id)


def _pictures(folder: Path, name: str) -> list[str]:
    files = (folder / name).rglob("*")
    return sorted(f.relative_to(folder).as_posix() for f in files if f.suffix.lower() in EXTENSIONS and f.is_file())


def _channels(train: Path, classes: tuple[str, ...]) -> int:
    """1 if the first picture is grey, else 3."""
    first = next((file for name in classes for file in _pictures(train, name)), None)
    if first is None:
        raise UsageError(f"{train} has class folders but no picture in them (known endings: {' '.join(EXTENSIONS)}).")
    reader = Pictures(train, (first,))
    decode(lambda: reader(0), 1, reader.describe(0))
    return channels_of(reader(0))


def channels_of(image: Any) -> int:
    """Channels that a Pillow image needs: 1 for grey ones, 3 for all others."""
    return 1 if image.mode in ("1", "L", "LA") else 3
