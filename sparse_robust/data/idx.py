"""The IDX format of the MNIST family: four bytes of header, the shape, then the values."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparse_robust.errors import FileError

UNSIGNED_BYTE = 8


def read_idx(path: str | Path) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or gzipped (by its name).

    Source: http://yann.lecun.com/exdb/mnist (file format section).

    Returns:
        uint8 tensor of the shape that the header gives.

    Raises:
        FileError: if the file is missing, or is not a whole IDX file of bytes.
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise FileError(f"cannot read {path}: {error}.") from error
    dimensions = content[3] if len(content) > 3 else 0
    start = 4 + 4 * dimensions
    if len(content) < start or content[:3] != bytes([0, 0, UNSIGNED_BYTE]) or dimensions == 0:
        raise FileError(f"{path} is not an IDX file of bytes: it begins with {content[:4].hex(' ') or 'nothing'}.")
    shape = [int(n) for n in np.frombuffer(content, ">i4", dimensions, offset=4)]
    if len(content) - start != int(np.prod(shape)):
        raise FileError(f"{path} should hold {shape} values and holds {len(content) - start}: fetch it again.")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)
