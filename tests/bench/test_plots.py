"""Pictures drawn from the record file alone."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from sparse_robust import bench
from sparse_robust.bench import Record
from sparse_robust.bench.plots import draw_history, draw_ratios, machine_name
from sparse_robust.errors import FileError


def record(route: str, median: float, day: int, *, case: str = "1e6", threads: int = 2) -> Record:
    machine = asdict(bench.machine()) | {"cpu": "A CPU", "cores": 2, "threads": threads, "commit": "abcdef012345"}
    return Record(
        time=f"2026-01-{day:02d}T10:00:00+00:00", operation="select", case=case, route=route, device="cpu", samples=3,
        calls=1, median_s=median, q20_s=0.9 * median, q80_s=1.2 * median, relative=1.0, per_second=1.0, unit="weights",
        gate="same", load=0.0, **machine,
    )  # fmt: skip


RECORDS = [
    *(record(route, time * (1 + day / 10), day) for day in (1, 2) for route, time in (("ours", 1.0), ("sort", 8.0))),
    record("ours", 2.0, 2, case="1e7"),
]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    path = tmp_path / "records.csv"
    bench.append(path, [*RECORDS, record("ours", 1.0, 3, threads=1)])
    return path


def test_two_pictures_for_each_machine_that_has_rivals(csv: Path, tmp_path: Path) -> None:
    written = bench.plot(csv, tmp_path / "new" / "plots")
    assert [path.name for path in written] == [
        "history-a-cpu-2-cores-2-threads.png",
        "ratios-a-cpu-2-cores-2-threads.png",
        "history-a-cpu-2-cores-1-thread.png",  # no rival, so no ratios
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)


def test_the_same_record_gives_the_same_bytes(csv: Path, tmp_path: Path) -> None:
    one, other = (bench.plot(csv, tmp_path / name) for name in ("one", "other"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


def test_history_shows_every_run_with_its_spread() -> None:
    figure = draw_history(RECORDS, "A CPU")
    assert figure is not None
    first, second = figure.axes
    assert first.get_title() == "select\n1e6" and second.get_title() == "select\n1e7"
    ours, theirs = first.containers
    assert list(ours.lines[0].get_ydata()) == [1.1, 1.2] and list(theirs.lines[0].get_ydata()) == [8.8, 9.6]
    low, high = ours.lines[2][0].get_segments()[0][:, 1]
    assert (low, high) == (pytest.approx(0.99), pytest.approx(1.32))
    assert [label.get_text() for label in first.get_xticklabels()] == ["01-01 10:00\nabcdef0", "01-02 10:00\nabcdef0"]
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["ours", "sort"]


def test_ratios_are_those_of_the_latest_run() -> None:
    faster = [replace(each, median_s=6.0, q20_s=5.4, q80_s=7.2) if each.time.startswith("2026-01-02")
              and each.route == "sort" else each for each in RECORDS]  # fmt: skip
    figure = draw_ratios(faster, "A CPU")
    assert figure is not None
    (axes,) = figure.axes
    (bar,) = axes.patches  # from 1 to the ratio
    assert bar.get_x() == 1 and bar.get_x() + bar.get_width() == pytest.approx(6.0 / 1.2)
    assert [text.get_text() for text in axes.texts] == ["5.00x"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["select: 1e6\nsort / ours"]
    (whisker,) = [c for c in axes.collections if hasattr(c, "get_segments")]
    assert whisker.get_segments()[0][:, 0] == pytest.approx([5.4 / (1.2 * 1.2), 7.2 / (1.2 * 0.9)])


def test_nothing_is_drawn_of_nothing() -> None:
    assert draw_history([], "") is None and draw_ratios([], "") is None
    assert draw_ratios([RECORDS[-1]], "") is None


def test_machines_are_told_apart() -> None:
    gpu = replace(RECORDS[0], device="cuda", gpu="NVIDIA H200")
    names = {machine_name(RECORDS[0]), machine_name(replace(RECORDS[0], threads=1)), machine_name(gpu)}
    assert names == {"A CPU, 2 cores, 2 threads", "A CPU, 2 cores, 1 thread", "NVIDIA H200"}


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        bench.plot(tmp_path / "none.csv", tmp_path)
