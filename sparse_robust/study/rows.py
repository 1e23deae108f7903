"""The rows of a study: what one finished cell says, read strictly from its ``result.json``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sparse_robust.errors import FileError
from sparse_robust.files import read_json

_T = TypeVar("_T")
DENSE = "dense"  # the finder of the unpruned model, k = 0


@dataclass(frozen=True)
class Score:
    """Clean and robust accuracy of one checkpoint, in percent; None where it was not measured."""

    epoch: int
    sa: float | None
    ra: float | None


@dataclass(frozen=True)
class PretrainRow:
    """One dense pre-training on the source task."""

    cell: str
    theta: str
    regime: str | None
    sa: float | None
    ra: float | None
    epochs: int
    seconds: float
    sha256: str
    stopped_by_guard: bool
    test_images: int | None
    history: tuple[Mapping[str, Any], ...] = field(repr=False)


@dataclass(frozen=True)
class LayerCount:
    """Kept and total weights of one layer of a ticket."""

    name: str
    shape: tuple[int, ...]
    kept: int
    numel: int

    @property
    def density(self) -> float:
        """Share of kept weights, 0..1."""
        return self.kept / self.numel


@dataclass(frozen=True)
class TicketRow:
    """One ticket after ``k`` cuts: ``count`` of ``numel`` prunable weights are kept.

    ``sparsity`` is in percent, ``file`` is relative to the study's folder.
    """

    k: int
    sparsity: float
    count: int
    numel: int
    digest: str
    file: str
    layers: tuple[LayerCount, ...] = field(repr=False)


@dataclass(frozen=True)
class FindRow:
    """The tickets that one finder made from one pre-training."""

    cell: str
    theta: str
    finder: str
    regime: str | None
    seconds: float
    tickets: tuple[TicketRow, ...]

    def ticket(self, k: int) -> TicketRow | None:
        """Return ticket ``k``, or None."""
        return next((t for t in self.tickets if t.k == k), None)


@dataclass(frozen=True)
class TransferRow:
    """One transfer of a ticket (or, with ``k`` = 0, of the dense model) to a downstream task.

    Accuracies and sparsity are in percent; ``fraction`` of the training images is in (0, 1].
    """

    cell: str
    theta: str
    finder: str
    k: int
    sparsity: float
    target: str
    fraction: float
    regime: str
    seed: int
    sa: float | None
    ra: float | None
    epochs: int
    seconds: float
    mask_digest: str | None
    survivors: int | None
    train_images: int | None
    test_images: int | None
    stopped_by_guard: bool
    classes: tuple[str, ...]
    checkpoints: Mapping[str, Score] = field(repr=False)
    history: tuple[Mapping[str, Any], ...] = field(repr=False)
    attacks: Mapping[str, float] = field(default_factory=dict)
    """Robust accuracy in percent left after each attack in turn, where there were several."""

    @property
    def identity(self) -> tuple[object, ...]:
        """What no two cells of a study may share."""
        return (self.theta, self.finder, self.k, self.target, self.fraction, self.regime, self.seed)


def read_cell(folder: Path, name: str) -> PretrainRow | FindRow | TransferRow:
    """Read ``cells/NAME/result.json``.

    Raises:
        FileError: if it is missing, is not JSON, or a field is missing or of the wrong kind, which the message names.
    """
    path = folder / "cells" / name / "result.json"
    data = read_json(path)
    if not isinstance(data, dict):
        raise FileError(f"{path}: expected an object, got {type(data).__name__}")
    readers: dict[str, Callable[[str, dict[str, Any]], PretrainRow | FindRow | TransferRow]]
    readers = {"pretrain": _pretrain, "find": _find, "transfer": _transfer}
    kind = str(data.get("kind"))
    if kind not in readers:
        raise FileError(f"{path}: field 'kind': expected one of {', '.join(readers)}, got {kind!r}")
    try:
        return readers[kind](name, data)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        what = f"field {error} is missing" if isinstance(error, KeyError) else str(error)
        raise FileError(f"{path}: {what}. Delete the file to have the cell made again.") from error


def _pretrain(name: str, data: dict[str, Any]) -> PretrainRow:
    return PretrainRow(
        cell=name,
        theta=_text(data, "theta"),
        regime=_optional(_text, data, "regime"),
        sa=_percent(data, "sa"),
        ra=_percent(data, "ra"),
        epochs=_whole(data, "epochs"),
        seconds=_number(data, "seconds"),
        sha256=str(data.get("sha256", "")),
        stopped_by_guard=bool(data.get("stopped_by_guard", False)),
        test_images=_optional(_whole, data, "test_images"),
        history=tuple(data.get("history") or ()),
    )


def _find(name: str, data: dict[str, Any]) -> FindRow:
    return FindRow(
        cell=name,
        theta=_text(data, "theta"),
        finder=_text(data, "finder"),
        regime=_optional(_text, data, "regime"),
        seconds=_number(data, "seconds"),
        tickets=tuple(sorted((_ticket(t) for t in data["tickets"]), key=lambda t: t.k)),
    )


def _ticket(data: dict[str, Any]) -> TicketRow:
    layers = tuple(
        LayerCount(_text(x, "name"), tuple(int(s) for s in x["shape"]), _whole(x, "kept"), _whole(x, "numel", least=1))
        for x in data["layers"]
    )
    return TicketRow(
        k=_whole(data, "k"),
        sparsity=_number(data, "sparsity", most=100.0),
        count=_whole(data, "count"),
        numel=_whole(data, "numel", least=1),
        digest=str(data.get("digest", "")),
        file=_text(data, "file"),
        layers=layers,
    )


def _transfer(name: str, data: dict[str, Any]) -> TransferRow:
    k = _whole(data, "k")
    finder = _text(data, "finder")
    if (k == 0) != (finder == DENSE):
        raise ValueError(
            f"fields 'k' and 'finder': k = 0 and the finder {DENSE!r} go together, got k = {k} and {finder!r}"
        )
    checkpoints = {
        str(n): Score(_whole(c, "epoch"), _percent(c, "sa"), _percent(c, "ra"))
        for n, c in (data.get("checkpoints") or {}).items()
        if c
    }
    return TransferRow(
        cell=name,
        theta=_text(data, "theta"),
        finder=finder,
        k=k,
        sparsity=_number(data, "sparsity", most=100.0),
        target=_text(data, "target"),
        fraction=_number(data, "fraction", most=1.0),
        regime=_text(data, "regime"),
        seed=_whole(data, "seed"),
        sa=_percent(data, "sa"),
        ra=_percent(data, "ra"),
        epochs=_whole(data, "epochs"),
        seconds=_number(data, "seconds"),
        mask_digest=_optional(_text, data, "mask_digest"),
        survivors=_optional(_whole, data, "survivors"),
        train_images=_optional(_whole, data, "train_images"),
        test_images=_optional(_whole, data, "test_images"),
        stopped_by_guard=bool(data.get("stopped_by_guard", False)),
        classes=tuple(str(c) for c in data.get("classes") or ()),
        checkpoints=checkpoints,
        history=tuple(data.get("history") or ()),
        attacks={
            str(name): _number({"attacks": ra}, "attacks", most=100.0)
            for name, ra in (data.get("attacks") or {}).items()
        },
    )


def _text(data: Mapping[str, Any], key: str) -> str:
    value = data[key]
    if not isinstance(value, str) or not value:
        raise ValueError(f"field {key!r}: expected text, got {value!r}")
    return value


def _number(data: Mapping[str, Any], key: str, *, most: float = math.inf) -> float:
    value = data[key]
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not 0 <= value <= most
    ):
        raise ValueError(f"field {key!r}: expected a number of 0 to {most:g}, got {value!r}")
    return float(value)


def _percent(data: Mapping[str, Any], key: str) -> float | None:
    return None if data.get(key) is None else _number(data, key, most=100.0)


def _whole(data: Mapping[str, Any], key: str, *, least: int = 0) -> int:
    value = data[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"field {key!r}: expected a whole number of at least {least}, got {value!r}")
    return value


def _optional(read: Callable[[Mapping[str, Any], str], _T], data: Mapping[str, Any], key: str) -> _T | None:
    return None if data.get(key) is None else read(data, key)
