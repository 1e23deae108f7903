"""Make the data files that the package carries, from the original files.

    apt-get update && apt-get install -y dataset-fashion-mnist        # the 70,000 images, MIT licence
    pip install scikit-learn                                          # the 1,797 digits
    python tools/make_embedded_data.py [--fashion FOLDER] [--out FOLDER]

Which images are taken: within each class the images are ranked by the SHA-256 of (cut, file, index), so the choice
depends on nothing but the lists below. Of each class the first 600 training and 100 test images make the source task,
the next 200 and 100 the target task; of the digits a proportional 400 become the test set. The pixels are stored as
they are, images of one class together (they compress better so); ids are the indices in the original files.

Each file is a safetensors payload inside one xz stream. The payload is the same on every machine; the xz stream may
differ between releases of liblzma, so a check of a new build compares the tensors, and SHA256SUMS is written with it.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import lzma
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from sparse_robust.data.fashion import DEBIAN_FOLDER, read_fashion_mnist  # noqa: E402
from sparse_robust.files import sha256_file, write_text  # noqa: E402
from sparse_robust.seeding import derive_seed  # noqa: E402

CUT = "sparse-robust embedded data, first edition"
SOURCE_TRAIN, TARGET_TRAIN, TEST = 600, 200, 100  # images of each class
DIGITS_TEST = 400


def ranked(labels: Tensor, file: str) -> list[list[int]]:
    """The indices of each class, in the order in which they are taken."""
    classes = [torch.nonzero(labels == c).flatten().tolist() for c in range(int(labels.max()) + 1)]
    return [sorted(indices, key=lambda i: derive_seed(CUT, file, i)) for indices in classes]


def digits_test_counts(sizes: list[int]) -> list[int]:
    """Proportional shares of the test images, by largest remainder."""
    exact = [DIGITS_TEST * size / sum(sizes) for size in sizes]
    counts = [int(share) for share in exact]
    for c in sorted(range(len(sizes)), key=lambda c: counts[c] - exact[c])[: DIGITS_TEST - sum(counts)]:
        counts[c] += 1
    return counts


def part(prefix: str, images: Tensor, labels: Tensor, chosen: list[list[int]]) -> dict[str, Tensor]:
    """The tensors of one split, class after class."""
    ids = torch.tensor([i for indices in chosen for i in sorted(indices)])
    return {
        f"{prefix}_images": images[ids].contiguous(),
        f"{prefix}_labels": labels[ids].to(torch.uint8),
        f"{prefix}_ids": ids.to(torch.int32),
    }


def fashion_cuts(folder: Path) -> dict[str, dict[str, Tensor]]:
    (x, y), (tx, ty) = read_fashion_mnist(folder)
    train, test = ranked(y, "fashion-mnist train"), ranked(ty, "fashion-mnist t10k")
    source = part("train", x, y, [r[:SOURCE_TRAIN] for r in train])
    source |= part("test", tx, ty, [r[:TEST] for r in test])
    target = part("train", x, y, [r[SOURCE_TRAIN : SOURCE_TRAIN + TARGET_TRAIN] for r in train])
    target |= part("test", tx, ty, [r[TEST : 2 * TEST] for r in test])
    return {"fashion-mnist-source": source, "fashion-mnist-target": target}


def digits() -> dict[str, Tensor]:
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise SystemExit("the digits come with scikit-learn: pip install scikit-learn")
    table = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(table) as lines:
        rows = np.loadtxt(lines, delimiter=",", dtype=np.int16)
    images, labels = torch.from_numpy(rows[:, :64].astype(np.uint8).reshape(-1, 8, 8)), torch.from_numpy(rows[:, 64])
    order = ranked(labels, "digits")
    counts = digits_test_counts([len(r) for r in order])
    train = part("train", images, labels, [r[n:] for r, n in zip(order, counts, strict=True)])
    return train | part("test", images, labels, [r[:n] for r, n in zip(order, counts, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=DEBIAN_FOLDER, help="folder of the four IDX files")
    parser.add_argument("--out", type=Path, default=ROOT / "sparse_robust" / "data" / "embedded")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    sums = []
    for name, tensors in {**fashion_cuts(arguments.fashion), "digits": digits()}.items():
        path = arguments.out / f"{name}.safetensors.xz"
        path.write_bytes(lzma.compress(save(tensors), preset=9 | lzma.PRESET_EXTREME))
        sums.append(f"{sha256_file(path)}  {path.name}\n")
        sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes\n")
    write_text(arguments.out / "SHA256SUMS", "".join(sums))


if __name__ == "__main__":
    main()
