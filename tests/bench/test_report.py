"""What a terminal of 80 columns shows of benchmarks, and which options exclude each other."""

from __future__ import annotations

import io
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sparse_robust import bench
from sparse_robust.bench import Record
from sparse_robust.bench.records import rate, size
from sparse_robust.errors import FileError, UsageError


def record(operation: str, case: str, route: str, per_second: float, unit: str, memory: float | None = None) -> Record:
    machine: dict[str, Any] = asdict(bench.machine())
    return Record(
        time="2026-01-01T10:00:00+00:00", operation=operation, case=case, route=route, device="cpu", samples=3,
        calls=1, median_s=0.1234, q20_s=0.1111, q80_s=0.2345, relative=12.34, per_second=per_second, unit=unit,
        gate="same", load=0.0, **machine, cpu_s=0.1222, memory_bytes=memory,
    )  # fmt: skip


RECORDS = [
    record("masks", "masks.masked_copy, 100,000,000 weights", "auto", 7.571e9, "B"),
    record("mask-storage", "in memory, 10,000,000 weights", "Masks", 2.248e9, "weights", 1.25e6),
    record("optimizer-step", "SGD, 10,000,000 weights", "torch.optim, enforce, cast", 3.9e7, "weights"),
    record("masked-step", "perceptron 784-4096-4096-10 128x1x28x28", "torch.nn.utils.prune", 12345.6, "images"),
]


def lines(shown: Any, width: int) -> list[str]:
    text = io.StringIO()
    Console(file=text, width=width).print(shown)
    return text.getvalue().splitlines()


def test_the_table_cuts_nothing_at_80_columns() -> None:
    shown = lines(bench.table(RECORDS, width=80), 80)
    assert max(map(len, shown)) <= 80 and "…" not in "".join(shown)
    words = " ".join(" ".join(shown).split())
    for figure in ("123 ms", "111 ..", "234 ms", "122 ms", "12.34x", "7.57 GB/s", "2.25 G", "1.25 MB", "39 M"):
        assert figure in words, figure
    assert "masks: masks.masked_copy," in words and "torch.optim, enforce, cast" in words and "12,346" in words


def test_a_wide_table_has_a_line_a_route_and_memory_only_where_it_was_measured() -> None:
    rows = [" ".join(line.split()) for line in lines(bench.table(RECORDS, width=140), 140)]
    assert "Masks 123 ms 111 .. 234 ms 122 ms 12.34x 2.25 G weights/s 1.25 MB" in rows
    assert "torch.nn.utils.prune 123 ms 111 .. 234 ms 122 ms 12.34x 12,346 images/s" in rows
    assert rows[1].endswith("memory") and not lines(bench.table(RECORDS[:1]), 140)[1].rstrip().endswith("memory")


@pytest.mark.parametrize(
    ("per_second", "unit", "text"),
    [
        (7.571e9, "B", "7.57 GB/s"), (2.248e9, "weights", "2.25 G weights/s"), (3e12, "B", "3 TB/s"),
        (54.61, "images", "54.6 images/s"), (12345.6, "images", "12,346 images/s"),
        (999_900, "things", "999,900 things/s"), (9.999e14, "B", "1,000 TB/s"),
    ],
)  # fmt: skip
def test_rates_read_well(per_second: float, unit: str, text: str) -> None:
    assert rate(per_second, unit) == text


def test_sizes_read_well() -> None:
    assert [size(value) for value in (12, 2500, 6.01e5, 4.35e9)] == ["12 B", "2.5 kB", "601 kB", "4.35 GB"]


def command(**options: Any) -> tuple[int, list[str]]:
    text = io.StringIO()
    status = bench.command(**options, device="cpu", console=Console(file=text, width=80))
    return status, text.getvalue().splitlines()


def test_the_list_hangs_its_descriptions() -> None:
    status, shown = command(list_only=True)
    assert status == 0 and max(map(len, shown)) <= 80
    wide = max(map(len, bench.OPERATIONS)) + 2
    assert {line[:wide].strip() for line in shown} - {""} == set(bench.OPERATIONS)
    assert any(line.startswith(" " * wide) for line in shown) and all(line[wide - 2 : wide] == "  " for line in shown)


def test_rows_are_said_to_be_added_only_where_some_were(tmp_path: Path) -> None:
    out = tmp_path / "records.csv"
    options = {"names": ["mask-storage"], "scale": "quick", "csv": out}
    status, shown = command(**options, samples=0)
    assert status == 0 and not out.exists() and not any("added to" in line for line in shown)
    assert any("added to" in line for line in command(**options, samples=3)[1]) and out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "HEAD", "csv": Path("q.csv"), "names": ["masks"]}, "--base does not take a record file: leave that"),
        ({"base": "HEAD", "plot": Path("pl")}, "--base and --plot exclude each other"),
        ({"base": "HEAD", "claims": True}, "--base does not take --claims"),
        ({"plot": Path("pl"), "csv": Path("q.csv"), "names": ["nosuch"]}, "unknown operation 'nosuch'"),
        ({"plot": Path("pl"), "csv": Path("q.csv"), "claims": True}, "--plot does not take --claims"),
        ({"list_only": True, "names": ["masks"], "claims": True}, "names of operations or --claims: leave those out"),
        ({"since": "2026"}, "--since is for --show alone"),
    ],
)
def test_options_that_would_be_ignored_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        command(**options)


def test_a_picture_and_a_table_are_of_the_operations_named(tmp_path: Path) -> None:
    out = tmp_path / "records.csv"
    bench.append(out, RECORDS)
    _, shown = command(show=True, csv=out, names=["mask-storage"])
    assert any("in memory" in line for line in shown) and not any("perceptron" in line for line in shown)
    _, drawn = command(plot=tmp_path / "all", csv=out)
    _, one = command(plot=tmp_path / "one", csv=out, names=["mask-storage"])
    assert drawn and one
    assert "no record of pgd" in " ".join(command(plot=tmp_path, csv=out, names=["pgd"])[1])
    everything, picture = ((tmp_path / name).glob("history*.png") for name in ("all", "one"))
    assert next(everything).read_bytes() != next(picture).read_bytes()


def test_a_folder_that_takes_no_pictures_is_named(tmp_path: Path) -> None:
    out = tmp_path / "records.csv"
    bench.append(out, [*RECORDS[:1], replace(RECORDS[0], route="other")])
    with pytest.raises(FileError, match=r"cannot write .*records\.csv/history-.*\.png"):
        bench.plot(out, out)


def test_what_is_no_record_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"cannot read .*: Is a directory\. Name a record file"):
        bench.read(tmp_path)
    with pytest.raises(FileError, match=r"cannot read .*Is a directory"):
        bench.append(tmp_path, RECORDS)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")
    for act in (bench.read, lambda path: bench.append(path, RECORDS)):
        with pytest.raises(FileError, match=r"picture\.png is no CSV file"):
            act(picture)
