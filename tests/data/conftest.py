"""Small sets of pictures made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sparse_robust.data import Data, DataSpec, data_from_tensors
from tests.data.pictures import picture


@pytest.fixture
def picture_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes root/[split/]class/n.png; ``splits`` maps a split name ("" for none) to images a class."""

    def make(
        splits: dict[str, int], classes: tuple[str, ...] = ("cat", "dog"), size: tuple[int, int] | None = (8, 8),
        mode: str = "RGB",
    ) -> Path:  # fmt: skip
        root, seed = tmp_path / "pictures", 0
        for split, count in splits.items():
            for name in classes:
                folder = root / split / name
                folder.mkdir(parents=True)
                for index in range(count):
                    shape = size or (40 + seed % 7, 50 - seed % 5)
                    picture(seed, shape, mode).save(folder / f"{index:03d}.png")
                    seed += 1
        return root

    return make


@pytest.fixture
def small_data() -> Callable[..., Data]:
    """A set of ``n`` grey 6x6 images of noise in 3 classes, 4 of them validating, 7 test images."""

    def make(n: int = 27, size: int = 6, channels: int = 1, **choices: object) -> Data:
        generator = torch.Generator().manual_seed(3)
        pixels = torch.randint(0, 256, (n + 7, channels, size, size), dtype=torch.uint8, generator=generator)
        labels = torch.arange(n + 7) % 3
        choices = {"validation": 4, **choices}
        spec = DataSpec("noise", **choices)  # type: ignore[arg-type]
        return data_from_tensors("noise", (pixels[:n], labels[:n]), (pixels[n:], labels[n:]), spec=spec)

    return make
