"""Seeds derived from names, so that no random stream depends on what ran before it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed that is a function of ``parts`` alone (SHA-256 of their text form).

    The same parts give the same seed in every process and on every rank; seed 0 is as good as any other.
    """
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Run a block under torch's global generators seeded from ``parts``; the caller's random state comes back after
    it."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(*parts))
        yield
