"""The verdict of every image, and the file that keeps it while an evaluation runs."""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import canonical_json, ensure_writable, parse_json, write_text

UNBROKEN, CLEAN_WRONG = -1, -2

FORMAT = "sparse-robust verdicts"
VERSION = 1
_FLOATS = ("linf", "l2", "l1", "margin")


@dataclass(frozen=True, eq=False)
class Verdicts:
    """A table with one row an image; its columns are tensors [n] on the CPU. It never changes.

    Attributes:
        id: int64, sample ids.
        label: int64.
        clean_prediction: int64, the class predicted without an attack.
        broken_by: int64, index of the stage (an attack at a radius) that fooled the model; `UNBROKEN` (-1) if none did
            so far, `CLEAN_WRONG` (-2) if the model was wrong without any.
        step: int64, how many images that attack had shown the model before the one that fooled it; -1 if none did.
        next_stage: int64, the first stage that has not been tried on the image; the number of stages when it is done.
        linf, l2, l1: float32, size of the perturbation that fooled the model, in units of the images; 0 if none did.
        margin: float32, logit of the label minus the largest other one: of the image that fooled the model, else the
            smallest that any attack reached.
        forward, backward, queries: int64, what the image cost over all stages, as in `sparse_robust.attacks.Counts`.
    """

    id: Tensor
    label: Tensor
    clean_prediction: Tensor
    broken_by: Tensor
    step: Tensor
    next_stage: Tensor
    linf: Tensor
    l2: Tensor
    l1: Tensor
    margin: Tensor
    forward: Tensor
    backward: Tensor
    queries: Tensor

    def __post_init__(self) -> None:
        for name, column in self.columns().items():
            dtype = torch.float32 if name in _FLOATS else torch.int64
            if column.dtype != dtype or column.shape != self.id.shape or column.dim() != 1 or column.is_cuda:
                got = f"{column.dtype} {list(column.shape)} on {column.device}"
                raise UsageError(f"verdicts: column {name} is {dtype} [{self.id.numel()}] on the CPU, got {got}.")

    def __len__(self) -> int:
        return len(self.id)

    def columns(self) -> dict[str, Tensor]:
        """Return the columns by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def empty(cls) -> Verdicts:
        """Return a table without rows."""
        names = [field.name for field in fields(cls)]
        return cls(*(torch.empty(0, dtype=torch.float32 if name in _FLOATS else torch.int64) for name in names))

    @classmethod
    def concat(cls, parts: Sequence[Verdicts]) -> Verdicts:
        """Return the rows of all parts, in turn."""
        parts = [cls.empty(), *parts]
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def select(self, index: Tensor) -> Verdicts:
        """Return the rows at ``index``: int64 positions in any order, or bool [n]."""
        return Verdicts(*(column[index] for column in self.columns().values()))

    def sort(self) -> Verdicts:
        """Return the rows in the order of their ids."""
        return self.select(torch.argsort(self.id, stable=True))

    def done(self, stages: int) -> Tensor:
        """Return bool [n]: whether nothing is left to try, of this number of stages."""
        return (self.broken_by != UNBROKEN) | (self.next_stage >= stages)

    @property
    def clean_correct(self) -> Tensor:
        """bool [n]: classified correctly without an attack."""
        return self.broken_by != CLEAN_WRONG

    @property
    def robust_correct(self) -> Tensor:
        """bool [n]: classified correctly under every attack tried so far."""
        return self.broken_by == UNBROKEN

    def latest(self) -> Verdicts:
        """Return one row an id, sorted by id: the last one of those with the same id."""
        rows = self.sort()
        last = torch.ones(len(rows), dtype=torch.bool)
        last[:-1] = rows.id[:-1] != rows.id[1:]
        return rows.select(last)

    def furthest(self) -> Verdicts:
        """Return one row an id, sorted by id: the one with the largest ``next_stage``, a broken one before others."""
        progress = 2 * self.next_stage + (self.broken_by != UNBROKEN)
        return self.select(torch.argsort(progress, stable=True)).latest()


class VerdictFile:
    """Keeps verdicts in a CSV file while they come in, and gives them back to an evaluation that was interrupted.

    The first line is a comment that says what was evaluated, as canonical JSON; a row of column names and one row an
    image follow, sorted by id. `pandas.read_csv(path, comment="#")` reads it. ``broken_by`` holds the attack's name,
    ``clean`` for an image that is misclassified without any and nothing for a robust one; ``eps`` the radius it was
    broken at. Of several stages with one name and one eps, the second is written ``name:2``. Floats have nine
    digits, which give back every float32 bit for bit.

    A run on one rank writes the file as it goes. In a run on several, each rank writes a part file (``path.rank3``)
    and `finish` puts them together. Every write is atomic, and the bytes of the finished file depend on the verdicts
    alone.
    """

    def __init__(
        self,
        path: str | Path | None,
        header: Mapping[str, Any],
        *,
        seconds: float = 30.0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        """Name the file; nothing is read or written yet.

        Args:
            path: None keeps no file.
            header: what the verdicts depend on, as JSON values; they belong together only if all of it is equal. Its
                ``stages`` is a list of {"attack": name, "eps": number as text, ...} in the order they are tried.
            seconds: shortest time between two writes in `update`.
            rank, world: of this process, and how many there are.

        Raises:
            UsageError: if a name or eps could not be written in a CSV field.
        """
        self.path = None if path is None else Path(path)
        self.header: dict[str, Any] = json.loads(canonical_json(dict(header)))
        self._stages = _stage_words(self.header["stages"])
        self._seconds, self._rank, self._world = seconds, rank, world
        self._known: Verdicts | None = None  # all that was found
        self._mine = Verdicts.empty()  # what this rank's own file holds, or will with its next write
        self._new: list[Verdicts] = []
        self._waiting = 0  # rows in _new
        self._dirty = False
        self._written = time.monotonic()

    def load(self) -> Verdicts:
        """Return what is known already, sorted by id: of the file, and of the parts of any number of ranks.

        Where several have a row for an image, that with the largest ``next_stage`` counts. Repeated calls read once.

        Raises:
            UsageError: if a file belongs to another evaluation; the message names the fields that differ.
            FileError: if one is damaged (the message names the line), not ours, or its folder cannot be written.
        """
        if self._known is None:
            found = {} if self.path is None else {file: self._read(file) for file in (self.path, *self._parts())}
            if self.path is not None:
                ensure_writable(self.path.parent)
            self._known = Verdicts.concat(list(found.values())).furthest()
            own = self._own_file()
            self._mine = self._known if own == self.path or own is None else found.get(own, Verdicts.empty())
        return self._known

    def update(self, rows: Verdicts) -> None:
        """Add rows, or replace those of the same ids; write them if the last write is ``seconds`` ago."""
        if self.path is None:
            return
        self.load()
        self._new.append(rows)
        self._waiting += len(rows)
        self._dirty = True
        if time.monotonic() - self._written >= self._seconds:
            self.flush()
        elif len(self._new) >= 1000 or self._waiting > len(self._mine) + 10_000:
            self._merge()  # keeps the memory in proportion to the images

    def flush(self) -> None:
        """Write what has come in since the last write."""
        own = self._own_file()
        if own is not None and self._dirty:
            self._merge()
            self._write(own, self._mine)
            self._dirty = False

    def finish(self, rows: Verdicts) -> None:
        """Write the finished file and remove the parts; on other ranks than the first it does nothing.

        Args:
            rows: the verdicts of all ranks. Images that were known, but are not among them, stay in the file.
        """
        self._new, self._waiting, self._dirty = [], 0, False
        if self.path is None or self._rank:
            return
        self._write(self.path, Verdicts.concat([self.load(), rows]).latest())
        for part in self._parts():
            part.unlink(missing_ok=True)

    def _own_file(self) -> Path | None:
        if self.path is None or self._world == 1:
            return self.path
        return self.path.with_name(f"{self.path.name}.rank{self._rank}")

    def _parts(self) -> list[Path]:
        if self.path is None or not self.path.parent.is_dir():
            return []
        pattern = re.compile(re.escape(self.path.name) + r"\.rank\d+")
        return sorted(file for file in self.path.parent.iterdir() if pattern.fullmatch(file.name))

    def _read(self, file: Path) -> Verdicts:
        if not file.exists():
            return Verdicts.empty()
        header, rows = read_verdicts(file)
        if header != self.header:
            raise UsageError(
                f"{file} holds verdicts of another evaluation: {_differences(header, self.header)}. Name another file, "
                "or delete this one to start anew."
            )
        return rows

    def _merge(self) -> None:
        self._mine = Verdicts.concat([self._mine, *self._new]).latest()
        self._new, self._waiting = [], 0

    def _write(self, file: Path, rows: Verdicts) -> None:
        write_text(file, _text(self.header, self._stages, rows))
        self._written = time.monotonic()


def read_verdicts(path: str | Path) -> tuple[dict[str, Any], Verdicts]:
    """Return the header and the rows, sorted by id, of a finished or unfinished verdict file.

    Raises:
        FileError: if it is missing, damaged, of a later version or not a verdict file; the message names the line.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}.") from error
    header = _read_header(path, lines[0])
    if lines[-1]:
        raise _damaged(path, len(lines), "it is cut off", lines[-1])
    if lines[1:2] != [",".join(_CSV_COLUMNS)]:
        raise _damaged(path, 2, f"expected the columns {','.join(_CSV_COLUMNS)}", lines[1])
    stages = _stage_words(header["stages"])
    broken_by = {word: index for index, word in enumerate(stages)} | {"clean,": CLEAN_WRONG, ",": UNBROKEN}
    packed, seen = bytearray(), set[str]()
    for number, line in enumerate(lines[2:-1], start=3):
        row = line.split(",")
        try:
            packed += _parse(row, broken_by)
        except (ValueError, OverflowError, struct.error) as error:
            raise _damaged(path, number, str(error), line) from error
        if row[0] in seen:
            raise _damaged(path, number, f"image {row[0]} occurs twice", line)
        seen.add(row[0])
    table = np.frombuffer(bytes(packed), dtype=_RECORD)
    columns = (torch.from_numpy(table[field.name].copy()) for field in fields(Verdicts))
    return header, Verdicts(*columns).sort()


# --- the text

_COLUMNS = tuple(field.name for field in fields(Verdicts))
_CSV_COLUMNS = tuple(word for name in _COLUMNS for word in ((name, "eps") if name == "broken_by" else (name,)))
_PACKER = struct.Struct("<" + "".join("f" if name in _FLOATS else "q" for name in _COLUMNS))
_RECORD = np.dtype([(name, "<f4" if name in _FLOATS else "<i8") for name in _COLUMNS])
_CONVERT: tuple[Callable[[str], float], ...] = tuple(float if name in _FLOATS else int for name in _COLUMNS)
_LINE = ",".join("%s" if n == "broken_by" else "%.9g" if n in _FLOATS else "%d" for n in _COLUMNS)
_BROKEN_BY = _COLUMNS.index("broken_by")
_NEXT_STAGE = _COLUMNS.index("next_stage")


def _text(header: Mapping[str, Any], stages: Sequence[str], rows: Verdicts) -> str:
    words = [*stages, "clean,", ","]  # CLEAN_WRONG and UNBROKEN are negative indices
    columns = {name: column.tolist() for name, column in rows.columns().items()}
    columns["broken_by"] = [words[index] for index in columns["broken_by"]]
    lines = map(_LINE.__mod__, zip(*columns.values(), strict=True))
    return "\n".join([f"# {FORMAT} {VERSION} {canonical_json(header)}", ",".join(_CSV_COLUMNS), *lines, ""])


def _parse(row: list[str], broken_by: Mapping[str, int]) -> bytes:
    if len(row) != len(_CSV_COLUMNS):
        raise ValueError(f"expected {len(_CSV_COLUMNS)} columns, got {len(row)}")
    word = ",".join(row[_BROKEN_BY : _BROKEN_BY + 2])
    if word not in broken_by:
        raise ValueError(f"no stage of this evaluation is {word[:80]!r}")
    numbers = [*row[:_BROKEN_BY], str(broken_by[word]), *row[_BROKEN_BY + 2 :]]
    values = [convert(text) for convert, text in zip(_CONVERT, numbers, strict=True)]
    if not 0 <= values[_NEXT_STAGE] <= len(broken_by) - 2:
        raise ValueError(f"next_stage is in 0..{len(broken_by) - 2}, got {values[_NEXT_STAGE]}")
    return _PACKER.pack(*values)


def _stage_words(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the two CSV fields ``name,eps`` of each stage, made distinct."""
    words: list[str] = []
    for stage in stages:
        name, eps = str(stage["attack"]), str(stage["eps"])
        for text in (name, eps):
            if text in ("", "clean") or re.search(r'[,#"\s:]', text):
                raise UsageError(
                    f"a stage's attack and eps are written in a CSV file: they may not be empty, 'clean', or hold a "
                    f"comma, #, quote, colon or space; got {text!r}."
                )
        before = sum(1 for other in stages[: len(words)] if (str(other["attack"]), str(other["eps"])) == (name, eps))
        words.append(f"{name}:{before + 1},{eps}" if before else f"{name},{eps}")
    return words


def _read_header(path: Path, line: str) -> dict[str, Any]:
    found = re.fullmatch(rf"# {FORMAT} (\d+) (.*)", line.rstrip("\r"))
    if not found:
        raise FileError(
            f"{path} is no verdict file: line 1 should begin '# {FORMAT} {VERSION}', got {line[:60]!r}. It is left as "
            "it is: name another file."
        )
    if int(found[1]) > VERSION:
        raise FileError(f"{path} has version {found[1]}, this package reads up to {VERSION}: update sparse_robust.")
    try:
        header = dict(parse_json(found[2]))
        _stage_words(header["stages"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, 1, f"its header cannot be read ({error!r})", line) from error
    return header


def _damaged(path: Path, number: int, what: str, line: str) -> FileError:
    remedy = (
        "Delete that line, and its image is evaluated again; or delete the file to start anew"
        if number > 2
        else "Delete the file to start anew"
    )
    return FileError(f"{path} is damaged at line {number}: {what}; the line is {line[:80]!r}. {remedy}.")


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    old, new = dict(_flat(there)), dict(_flat(here))
    names = [name for name in {**new, **old} if old.get(name, _ABSENT) != new.get(name, _ABSENT)]
    shown = [f"{n} is {old.get(n, _ABSENT)} there and {new.get(n, _ABSENT)} here" for n in names[:6]]
    return "; ".join(shown) + (f"; and {len(names) - 6} more" if len(names) > 6 else "")


_ABSENT = "absent"


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield (place, JSON text) of every leaf: ``stages[0].eps``."""
    if isinstance(value, Mapping) and value:
        for key, entry in value.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value:
        for index, entry in enumerate(value):
            yield from _flat(entry, f"{name}[{index}]")
    else:
        yield name, canonical_json(value)
