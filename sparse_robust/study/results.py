"""A study folder as a whole: the rows of its finished cells, and the names of those that are still to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparse_robust.errors import FileError
from sparse_robust.files import read_json
from sparse_robust.study.rows import DENSE, FindRow, PretrainRow, TicketRow, TransferRow, read_cell

_THETAS = ("STD", "FAT", "AT")


@dataclass(frozen=True)
class StudyResults:
    """All that the verdict and the report read.

    Attributes:
        pending: names of the listed cells that have no readable result, in the study's order.
        problems: for a pending name, what is wrong with its result (a cell that is merely not run yet has no entry).
        unlisted: folders under ``cells/`` that do not belong to this study and were not read.
        seconds: compute time of the finished cells together.
        classes: class names of a target, where the study recorded them.
    """

    name: str
    config: Mapping[str, Any]
    machine: Mapping[str, Any]
    pretrain: tuple[PretrainRow, ...]
    find: tuple[FindRow, ...]
    transfer: tuple[TransferRow, ...]
    pending: tuple[str, ...]
    seconds: float
    folder: Path
    cells: tuple[str, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)
    unlisted: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    classes: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def thetas(self) -> list[str]:
        """Return the pre-trainings that occur: STD, FAT, AT first, others after them by name."""
        found = {r.theta for rows in (self.pretrain, self.find, self.transfer) for r in rows}
        return [t for t in _THETAS if t in found] + sorted(found - set(_THETAS))

    def standard(self) -> str | None:
        """Return the pre-training that robust ones are compared with: STD, else the first with a standard regime."""
        plain = [r.theta for r in self.pretrain if r.regime in ("standard", "ST")]
        return "STD" if "STD" in self.thetas() else next(iter(plain), None)

    def method(self, finder: str) -> str:
        """Return how a finder works, "imp", "oneshot" or "random": from the config, or from its name."""
        entry = _mapping(_mapping(self.config.get("find")).get(finder))
        return str(entry.get("method") or finder.split("-")[0])

    def finders(self) -> list[str]:
        """Return the ticket finders that occur, without the dense model: IMP first, random masks last."""
        found = {r.finder for rows in (self.find, self.transfer) for r in rows} - {DENSE}
        order = list(_mapping(self.config.get("find")))
        rank = {"imp": 0, "random": 2}
        return sorted(found, key=lambda f: (rank.get(self.method(f), 1), order.index(f) if f in order else -1, f))

    def main_finder(self) -> str | None:
        """Return the finder whose tickets stand for the study: the first IMP, else the first that is not random."""
        return next((f for f in self.finders() if self.method(f) != "random"), None)

    def random_finder(self) -> str | None:
        """Return the finder of the random masks, or None."""
        return next((f for f in self.finders() if self.method(f) == "random"), None)

    def targets(self) -> list[tuple[str, float]]:
        """Return the (target, fraction) pairs in the order of the study's cells, larger fractions of a target first."""
        order = list(dict.fromkeys(r.target for r in self.transfer))
        return sorted({(r.target, r.fraction) for r in self.transfer}, key=lambda p: (order.index(p[0]), -p[1]))

    def regimes(self) -> list[str]:
        """Return the transfer regimes that occur, ST before AT."""
        return sorted({r.regime for r in self.transfer}, key=lambda r: (r != "ST", r != "AT", r))

    def rounds(self, theta: str, finder: str, target: str, fraction: float) -> list[int]:
        """Return the pruning rounds k >= 1 that were transferred, under any regime."""
        return sorted(
            {
                r.k
                for r in self.transfer
                if (r.theta, r.finder, r.target, r.fraction) == (theta, finder, target, fraction) and r.k > 0
            }
        )

    def values(
        self, metric: str, theta: str, finder: str, k: int, target: str, fraction: float, regime: str
    ) -> dict[int, float]:
        """Return seed -> accuracy in percent of ``metric`` ("sa" or "ra"); the finder does not matter at k = 0."""
        return dict(self._accuracies.get((metric, theta, DENSE if k == 0 else finder, k, target, fraction, regime), {}))

    @cached_property
    def _accuracies(self) -> dict[tuple[object, ...], dict[int, float]]:
        found: dict[tuple[object, ...], dict[int, float]] = {}
        for row in sorted(self.transfer, key=lambda r: r.seed):
            for metric, value in (("sa", row.sa), ("ra", row.ra)):
                if value is not None:
                    found.setdefault((metric, *row.identity[:-1]), {})[row.seed] = value
        return found

    def sparsity(self, k: int, finder: str | None = None) -> float:
        """Return the sparsity of round ``k`` in percent, from the rows; where no row has it, that of cuts of 20 %."""
        rows: list[TransferRow | TicketRow] = [r for r in self.transfer if r.k == k and finder in (None, r.finder)]
        rows += [t for f in self.find if finder in (None, f.finder) for t in f.tickets if t.k == k]
        return rows[0].sparsity if k and rows else 100 * (1 - 0.8**k)

    def test_images(self, target: str) -> int | None:
        """Return the number of test images behind a target's accuracies: of its rows, else config ``test_images``."""
        recorded = [r.test_images for r in self.transfer if r.target == target and r.test_images]
        given = self.config.get("test_images")
        value = min(recorded) if recorded else given.get(target) if isinstance(given, Mapping) else given
        return int(value) if isinstance(value, int | float) and value > 0 else None

    def train_images(self, target: str, fraction: float) -> int | None:
        """Return the number of training images of a target at a fraction, where the rows record it."""
        rows = [r for r in self.transfer if (r.target, r.fraction) == (target, fraction) and r.train_images]
        return rows[0].train_images if rows else None

    def class_name(self, target: str, label: int) -> str:
        """Return the name of a class, or "class 3" where the study does not record names."""
        rows = [r.classes for r in self.transfer if r.target == target and r.classes]
        names = self.classes.get(target) or (rows[0] if rows else ())
        return names[label] if label < len(names) else f"class {label}"

    def seeds(self) -> int:
        """Return the largest number of seeds that any transferred setting has."""
        groups: dict[tuple[object, ...], int] = {}
        for row in self.transfer:
            groups[row.identity[:-1]] = groups.get(row.identity[:-1], 0) + 1
        return max(groups.values(), default=0)


def load_results(folder: str | Path) -> StudyResults:
    """Read a study folder: ``study.json`` and ``cells/*/result.json``.

    A listed cell whose result is missing or damaged is pending, with the reason in ``problems``; nothing is dropped
    silently.

    Raises:
        FileError: if ``study.json`` is missing or is not what a study writes.
    """
    folder = Path(folder)
    path = folder / "study.json"
    if not path.exists():
        raise FileError(
            f"{folder} is not a study folder: it has no study.json. Expected the folder of `sparse-robust study run`."
        )
    study = read_json(path)
    if not isinstance(study, dict):
        raise FileError(
            f"{path}: expected an object, got {type(study).__name__}. "
            "Delete it and run the study again to have it written anew."
        )
    present = sorted(p.parent.name for p in folder.glob("cells/*/result.json"))
    cells = study.get("cells") or present
    if not isinstance(cells, list) or not all(isinstance(name, str) and _is_plain(name) for name in cells):
        raise FileError(f"{path}: 'cells' must be a list of folder names. Run the study again to have it written anew.")
    rows: list[PretrainRow | FindRow | TransferRow] = []
    pending, problems, seen = [], {}, set()
    for name in cells:
        try:
            row = read_cell(folder, name)
            if isinstance(row, TransferRow) and row.identity in seen:
                raise FileError(f"the setting {row.identity} occurs in an earlier cell already")
        except FileError as error:
            pending.append(name)
            if name in present:
                problems[name] = str(error).replace(f"{folder}/", "")
            continue
        rows.append(row)
        if isinstance(row, TransferRow):
            seen.add(row.identity)
    notes = study.get("notes") or []
    if not isinstance(notes, (str, list)):
        raise FileError(f"{path}: 'notes' must be a list of texts, got {type(notes).__name__}.")
    return StudyResults(
        name=str(study.get("name") or folder.name),
        config=_mapping(study.get("config")),
        machine=_mapping(study.get("machine")),
        pretrain=tuple(r for r in rows if isinstance(r, PretrainRow)),
        find=tuple(r for r in rows if isinstance(r, FindRow)),
        transfer=tuple(r for r in rows if isinstance(r, TransferRow)),
        pending=tuple(pending),
        seconds=sum(r.seconds for r in rows),
        folder=folder,
        cells=tuple(cells),
        problems=problems,
        unlisted=tuple(name for name in present if name not in set(cells)),
        notes=(notes,) if isinstance(notes, str) else tuple(str(n) for n in notes),
        classes=_mapping(study.get("classes") or _mapping(study.get("config")).get("classes")),
    )


def _is_plain(name: str) -> bool:
    """Tell whether a text names a folder inside another one."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}
