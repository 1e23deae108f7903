"""Errors that say what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseRobustError(Exception):
    """Base of every error this package raises on purpose."""

    exit_status = 1
    """What the command line exits with."""


class UsageError(SparseRobustError, ValueError):
    """The caller asked for something that cannot be done; nothing has been changed."""

    exit_status = 2


class FileError(SparseRobustError, OSError):
    """A file is missing, damaged, not ours, or cannot be written."""


def unknown(kind: str, got: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that is not in a registry: the nearest names first, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(got, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    shown = ", ".join(names[:40]) + (f", ... ({len(names)} in all)" if len(names) > 40 else "")
    return UsageError(f"unknown {kind} {got!r}.{hint} Known: {shown}.")
