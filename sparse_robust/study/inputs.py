"""What the files that a configuration names contain: the same path may hold something else tomorrow."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from sparse_robust.errors import FileError
from sparse_robust.files import canonical_json, read_json, sha256_file, write_json

INPUTS = "inputs.json"


class Inputs:
    """Digests of the files and folders a study reads.

    They are kept in the study's folder: a file is read again only when its size or its time of change differ, and the
    digest of one that has been deleted since is still known.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._record = None if folder is None else folder / INPUTS
        self._known: dict[str, list[object]] = {}  # path -> [stamp, digest]
        if self._record is not None:
            with suppress(FileError, AttributeError):  # a damaged record costs a second reading, no more
                self._known = {str(path): list(entry) for path, entry in read_json(self._record).items()}
        self._kept = dict(self._known)

    def identity(self, path: str) -> str:
        """Return ``sha256:...`` of a file's content (of a folder: of its files' names and contents), else the text.

        What names no file here, such as a published model, is its own identity.

        Raises:
            FileError: for a file that cannot be read.
        """
        place, known = Path(path), self._known.get(path)
        try:
            if not place.exists():
                return f"sha256:{known[1]}" if known else path
            stamp = self._stamp(place)
            if known is None or known[0] != stamp:
                self._known[path] = known = [stamp, _digest(place)]
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
        return f"sha256:{known[1]}"

    def save(self) -> None:
        """Write the record, if there is anything new in it."""
        if self._record is not None and self._known != self._kept:
            write_json(self._record, self._known)
            self._kept = dict(self._known)

    @staticmethod
    def _stamp(place: Path) -> str:
        return canonical_json([[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in _files(place)])


def _files(place: Path) -> list[Path]:
    return sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place]


def _digest(place: Path) -> str:
    if place.is_file():
        return sha256_file(place)
    listed = [[p.relative_to(place).as_posix(), sha256_file(p)] for p in _files(place)]
    return hashlib.sha256(canonical_json(listed).encode()).hexdigest()
