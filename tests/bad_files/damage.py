"""Ways to spoil any file, and payloads that leave a mark where they are run."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparse_robust.models import create_model

SENTINEL = "executed"
"""The folder that a payload makes where it is run."""


@dataclass(frozen=True)
class Case:
    """One bad file: which reader it is for, what is wrong with it, and its bytes."""

    kind: str
    name: str
    content: bytes
    sound: bool | None = False
    """Whether it must be read: it looks odd, and is not wrong. None: chance may have left it sound."""


def tiny() -> torch.nn.Module:
    return create_model("test_resnet", num_classes=5, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def cut(content: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """The file cut off at so many lengths, most of them near its ends."""
    size = len(content)
    places = {0, 1, 7, 8, 9, size - 1, size - 8, size // 2}
    generator = random.Random(size)
    while len(places) < count:
        places.add(generator.randrange(size))
    for place in sorted(places)[:count]:
        yield f"cut at {place}", content[:place]


def flipped(content: bytes, count: int, first: int = 4000) -> Iterator[tuple[str, bytes]]:
    """The file with single bits flipped, most of them where its structure is described."""
    generator = random.Random(len(content) + 1)
    for index in range(count):
        end = min(first, len(content)) if index % 3 else len(content)
        place, bit = generator.randrange(end), generator.randrange(8)
        spoiled = bytearray(content)
        spoiled[place] ^= 1 << bit
        yield f"bit {bit} of byte {place} flipped, case {index}", bytes(spoiled)


def shuffled(content: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """The file with a stretch overwritten by noise, left out, or written twice."""
    generator = random.Random(len(content) + 2)
    for index in range(count):
        start, length = generator.randrange(len(content)), generator.randrange(1, 200)
        middle = (generator.randbytes(length), b"", content[start : start + length] * 2)[index % 3]
        yield f"stretch at {start} spoiled, case {index}", content[:start] + middle + content[start + length :]


def strangers() -> dict[str, bytes]:
    """Files of other kinds."""
    return {
        "empty": b"",
        "text": b"hello, this is no such file\n",
        "zeros": bytes(4096),
        "noise": random.Random(0).randbytes(4096),
        "picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "html": b"<html><body>404 not found</body></html>",
        "json": b'{"format": "sparse_robust.masks"}',
        "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    }


class Payload:
    """Makes the sentinel when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (SENTINEL,)


class Evaluated:
    """Makes the sentinel through eval, which has another name to look for."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"__import__('os').mkdir({SENTINEL!r})",)


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, as JSON or as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def torched(content: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()
