"""The verdict file: bit for bit back, whole at any moment, the same bytes however the work was cut up."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_robust.errors import FileError, UsageError
from sparse_robust.evaluation.verdicts import CLEAN_WRONG, UNBROKEN, VerdictFile, Verdicts, read_verdicts

STAGES = [{"attack": "apgd-ce", "eps": "8/255", "steps": 100}, {"attack": "square", "eps": "8/255"}]
HEADER = {"data": "digits", "stages": STAGES, "seed": 0}
FLOATS = ("linf", "l2", "l1", "margin")


def verdicts(ids: list[int], next_stage: int = 2, broken_by: int = UNBROKEN, seed: int = 0) -> Verdicts:
    """Rows that are a function of their id, as those of an evaluation are, except for what the arguments say."""
    table = {}
    for name in Verdicts.empty().columns():
        rows = [torch.rand(1, generator=torch.Generator().manual_seed(id + 97 * seed)) * 100 for id in ids]
        column = torch.cat(rows) if rows else torch.empty(0)
        table[name] = column if name in FLOATS else column.long()
    table["id"] = torch.tensor(ids, dtype=torch.int64)
    table["next_stage"] = torch.full_like(table["id"], next_stage)
    table["broken_by"] = torch.full_like(table["id"], broken_by)
    return Verdicts(**table)


def assert_same(a: Verdicts, b: Verdicts) -> None:
    for name, column in a.columns().items():
        other = b.columns()[name]
        assert column.dtype == other.dtype, name
        assert torch.equal(_bits(column), _bits(other)), name


def _bits(column: torch.Tensor) -> torch.Tensor:
    return column.view(torch.int32) if column.dtype == torch.float32 else column


# --- the table


def test_columns_of_a_wrong_type_length_or_device_are_refused() -> None:
    columns = verdicts([1, 2]).columns()
    with pytest.raises(UsageError, match=r"column margin is torch.float32 \[2\] on the CPU, got torch.float64"):
        Verdicts(**{**columns, "margin": columns["margin"].double()})
    with pytest.raises(UsageError, match=r"column step is torch.int64 \[2\] on the CPU, got torch.int64 \[1\]"):
        Verdicts(**{**columns, "step": columns["step"][:1]})


def test_rows_are_joined_chosen_and_sorted() -> None:
    table = Verdicts.concat([verdicts([5, 1]), Verdicts.empty(), verdicts([3])])
    assert table.id.tolist() == [5, 1, 3] and len(table) == 3
    assert table.sort().id.tolist() == [1, 3, 5]
    assert table.select(torch.tensor([2, 0])).id.tolist() == [3, 5]
    assert table.select(table.id > 2).id.tolist() == [5, 3]
    assert_same(table.sort(), verdicts([1, 3, 5]))
    assert len(Verdicts.concat([])) == 0


def test_an_image_is_done_when_it_is_broken_or_nothing_is_left() -> None:
    table = Verdicts.concat(
        [verdicts([0], 1), verdicts([1], 2), verdicts([2], 1, broken_by=0), verdicts([3], 0, broken_by=CLEAN_WRONG)]
    )
    assert table.done(2).tolist() == [False, True, True, True]
    assert table.robust_correct.tolist() == [True, True, False, False]
    assert table.clean_correct.tolist() == [True, True, True, False]


def test_of_several_rows_the_latest_or_the_furthest_counts() -> None:
    both = Verdicts.concat([verdicts([4, 2], next_stage=2, seed=1), verdicts([2, 4], next_stage=1)])
    assert_same(both.latest(), verdicts([2, 4], next_stage=1))
    assert_same(both.furthest(), verdicts([2, 4], next_stage=2, seed=1))
    fooled = verdicts([2], next_stage=2, broken_by=1)
    assert both.furthest().select(torch.tensor([0])).broken_by.tolist() == [UNBROKEN]
    assert_same(Verdicts.concat([fooled, both]).furthest().select(torch.tensor([0])), fooled)


# --- the file


def test_the_file_is_plain_csv_with_names_for_the_stages(tmp_path: Path) -> None:
    rows = [verdicts([9]), verdicts([3], broken_by=1), verdicts([4], broken_by=CLEAN_WRONG)]
    file = VerdictFile(tmp_path / "v.csv", HEADER)
    file.finish(Verdicts.concat(rows))
    first, *rest = (tmp_path / "v.csv").read_text().splitlines()
    assert first.startswith('# sparse-robust verdicts 1 {"data":"digits","seed":0,"stages":[{"attack":"apgd-ce"')
    table = list(csv.DictReader(rest))
    assert [row["id"] for row in table] == ["3", "4", "9"]
    assert [row["broken_by"] for row in table] == ["square", "clean", ""]
    assert [row["eps"] for row in table] == ["8/255", "", ""]
    columns = "id,label,clean_prediction,broken_by,eps,step,next_stage,linf,l2,l1,margin,forward,backward,queries"
    assert rest[0] == columns


def test_pandas_reads_it(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    rows = verdicts(list(range(50)), broken_by=1)
    VerdictFile(tmp_path / "v.csv", HEADER).finish(rows)
    table = pandas.read_csv(tmp_path / "v.csv", comment="#")
    assert table["broken_by"].tolist() == ["square"] * 50
    assert torch.equal(torch.tensor(table["margin"].to_numpy()).float(), rows.margin)


def test_stages_of_one_name_and_eps_stay_apart(tmp_path: Path) -> None:
    stages = [{"attack": "pgd", "eps": eps, "steps": steps} for eps in ("2/255", "4/255") for steps in (10, 50)]
    rows = Verdicts.concat([verdicts([index], 4, broken_by=index) for index in range(4)])
    VerdictFile(tmp_path / "v.csv", {"stages": stages}).finish(rows)
    _, back = read_verdicts(tmp_path / "v.csv")
    assert back.broken_by.tolist() == [0, 1, 2, 3]
    table = list(csv.DictReader((tmp_path / "v.csv").read_text().splitlines()[1:]))
    found = [(row["broken_by"], row["eps"]) for row in table]
    assert found == [("pgd", "2/255"), ("pgd:2", "2/255"), ("pgd", "4/255"), ("pgd:2", "4/255")]


@pytest.mark.parametrize("name", ["", "clean", "a,b", "a#b", "a b", 'a"b', "a\nb", "a:2"])
def test_names_that_csv_could_not_carry_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="attack and eps are written in a CSV file"):
        VerdictFile(None, {"stages": [{"attack": name, "eps": "8/255"}]})


def test_without_a_path_it_keeps_nothing() -> None:
    file = VerdictFile(None, HEADER, seconds=0)
    assert len(file.load()) == 0
    file.update(verdicts([1]))
    file.flush()
    file.finish(verdicts([1]))
    assert len(file.load()) == 0


def test_writes_keep_their_distance_in_time(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    file = VerdictFile(path, HEADER, seconds=3600)
    file.update(verdicts([1]))
    assert not path.exists()
    file.flush()
    assert read_verdicts(path)[1].id.tolist() == [1]
    before = path.stat().st_mtime_ns
    file.flush()
    assert path.stat().st_mtime_ns == before, "nothing new, nothing written"
    eager = VerdictFile(path, HEADER, seconds=0)
    eager.update(verdicts([0]))
    assert read_verdicts(path)[1].id.tolist() == [0, 1]


def test_rows_are_replaced_by_id_and_memory_does_not_grow_with_updates(tmp_path: Path) -> None:
    file = VerdictFile(tmp_path / "v.csv", HEADER, seconds=3600)
    rows = verdicts(list(range(5000)), next_stage=0)
    for stage in (0, 1, 2, 2, 2, 2):
        file.update(Verdicts(**{**rows.columns(), "next_stage": torch.full_like(rows.id, stage)}))
        assert sum(map(len, file._new)) <= len(file._mine) + 10_000
    file.flush()
    _, back = read_verdicts(tmp_path / "v.csv")
    assert len(back) == 5000 and set(back.next_stage.tolist()) == {2}


def test_an_update_without_load_does_not_overwrite_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    VerdictFile(path, HEADER).finish(verdicts([1, 2]))
    VerdictFile(path, HEADER, seconds=0).update(verdicts([3]))
    assert read_verdicts(path)[1].id.tolist() == [1, 2, 3]


def test_images_of_an_earlier_and_larger_run_stay(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    VerdictFile(path, HEADER).finish(verdicts([1, 2, 3]))
    before = path.read_bytes()
    VerdictFile(path, HEADER).finish(verdicts([1, 2]))
    assert path.read_bytes() == before


# --- several ranks


def _run(path: Path, world: int, ids: list[int], *, stop: bool) -> list[Verdicts]:
    """Play an evaluation on several ranks that is interrupted before `finish` if `stop`; returns each rank's rows."""
    files = [VerdictFile(path, HEADER, seconds=0, rank=rank, world=world) for rank in range(world)]
    known = [file.load() for file in files]
    shares = []
    for rank, file in enumerate(files):
        share = verdicts(ids[rank::world], next_stage=1 if stop else 2)
        for row in range(len(share)):
            file.update(share.select(torch.tensor([row])))
        shares.append(share)
    if not stop:
        for rank in reversed(range(world)):
            files[rank].finish(Verdicts.concat(shares))
    assert all(torch.equal(k.id, known[0].id) for k in known)
    return known


@pytest.mark.acceptance("double-win", "A-31")
def test_parts_of_three_ranks_are_resumed_by_two_to_the_same_bytes(tmp_path: Path) -> None:
    ids = [7, 3, 11, 2, 19, 5, 13]
    straight = tmp_path / "straight" / "v.csv"
    _run(straight, 1, ids, stop=False)
    path = tmp_path / "cut" / "v.csv"
    _run(path, 1, ids[:2], stop=True)
    _run(path, 3, ids[:6], stop=True)
    assert sorted(file.name for file in path.parent.iterdir()) == ["v.csv", *(f"v.csv.rank{r}" for r in range(3))]
    known = _run(path, 2, ids, stop=False)[0]
    assert known.id.tolist() == sorted(ids[:6])
    assert [file.name for file in path.parent.iterdir()] == ["v.csv"]
    assert path.read_bytes() == straight.read_bytes()


def test_a_rank_that_writes_first_does_not_wipe_out_rows_that_went_to_another_rank(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    VerdictFile(path, HEADER, seconds=0, rank=1, world=3).update(verdicts([1, 4]))
    early = VerdictFile(path, HEADER, seconds=0, rank=1, world=2)
    early.update(verdicts([3]))  # rows 1 and 4 are the other rank's now, which is killed before it writes
    assert VerdictFile(path, HEADER).load().id.tolist() == [1, 3, 4]


def test_the_row_that_is_further_on_wins(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    VerdictFile(path, HEADER).finish(verdicts([1, 2], next_stage=1))
    VerdictFile(path, HEADER, rank=1, world=2, seconds=0).update(verdicts([2], next_stage=2, broken_by=1))
    loaded = VerdictFile(path, HEADER).load()
    assert loaded.next_stage.tolist() == [1, 2] and loaded.broken_by.tolist() == [UNBROKEN, 1]


# --- what is refused


def test_another_evaluation_is_named_field_by_field(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    VerdictFile(path, HEADER).finish(verdicts([1]))
    before = path.read_bytes()
    other = {**HEADER, "seed": 1, "stages": [{**STAGES[0], "eps": "4/255"}]}
    with pytest.raises(UsageError) as caught:
        VerdictFile(path, other).load()
    message = str(caught.value)
    assert "v.csv holds verdicts of another evaluation" in message
    assert "seed is 0 there and 1 here" in message
    assert 'stages[0].eps is "8/255" there and "4/255" here' in message
    assert 'stages[1].attack is "square" there and absent here' in message
    assert "data" not in message.removeprefix(str(path))
    assert "Name another file, or delete this one" in message
    with pytest.raises(UsageError):
        VerdictFile(path, other, seconds=0).update(verdicts([1]))
    assert path.read_bytes() == before


def test_a_part_of_another_evaluation_is_named_too(tmp_path: Path) -> None:
    VerdictFile(tmp_path / "v.csv", HEADER, seconds=0, rank=2, world=3).update(verdicts([1]))
    with pytest.raises(UsageError, match=r"v\.csv\.rank2 holds verdicts of another evaluation: seed is 0 there"):
        VerdictFile(tmp_path / "v.csv", {**HEADER, "seed": 7}).load()


def _cut(text: str) -> str:
    return text[:-30]


def _cut_at_a_column(text: str) -> str:
    return text.removesuffix("\n")


def _fewer_columns(text: str) -> str:
    return text.replace(text.splitlines()[3], text.splitlines()[3].rpartition(",")[0])


def _word(text: str) -> str:
    return text.replace("square", "squared", 2)


def _swap(new: str, column: int) -> object:
    def change(text: str) -> str:
        lines = text.splitlines()
        row = lines[3].split(",")
        row[column] = new
        return "\n".join([*lines[:3], ",".join(row), *lines[4:], ""])

    return change


DAMAGES = {
    "cut": (_cut, "line 5: it is cut off"),
    "cut at a column": (_cut_at_a_column, "line 5: it is cut off"),
    "fewer columns": (_fewer_columns, "line 4: expected 14 columns, got 13"),
    "a number": (_swap("x", 1), "line 4: invalid literal for int"),
    "a float": (_swap("1.2.3", 10), "line 4: could not convert string to float"),
    "too large": (_swap("9" * 30, 11), "line 4"),
    "too large a float": (_swap("1e300", 10), "line 4"),
    "stage": (_swap("fab", 3), "line 4: no stage of this evaluation is 'fab,8/255'"),
    "eps": (_swap("4/255", 4), "line 4: no stage of this evaluation is 'square,4/255'"),
    "next stage": (_swap("3", 6), r"line 4: next_stage is in 0\.\.2, got 3"),
    "twice": (_swap("1", 0), "line 4: image 1 occurs twice"),
    "no columns": (lambda text: text.splitlines()[0] + "\n", "line 2: expected the columns id,label"),
    "empty line": (lambda text: text + "\n", "line 6: expected 14 columns, got 1"),
    "garbage": (lambda text: text[:400] + "\0\udcff\udcfe" + text[420:], "damaged at line"),
    "header": (lambda text: text.replace('"seed":', '"seed"', 1), "line 1: its header cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_named_with_its_line_and_nothing_is_overwritten(tmp_path: Path, case: str) -> None:
    damage, message = DAMAGES[case]
    path = tmp_path / "v.csv"
    VerdictFile(path, HEADER).finish(verdicts([1, 2, 3], broken_by=1))
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    before = path.read_bytes()
    with pytest.raises(FileError, match=message) as caught:
        VerdictFile(path, HEADER).load()
    assert "elete" in str(caught.value) and "v.csv" in str(caught.value)
    with pytest.raises(FileError):
        VerdictFile(path, HEADER, seconds=0).update(verdicts([1]))
    with pytest.raises(FileError):
        VerdictFile(path, HEADER).finish(verdicts([1]))
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "id,label\n1,2\n", "# a comment\n"])
def test_a_file_of_another_kind_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(FileError, match="is no verdict file: line 1 .* name another file"):
        VerdictFile(path, HEADER).load()
    assert path.read_text() == content


def test_a_later_format_a_missing_file_and_a_folder_have_their_own_words(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    path.write_text("# sparse-robust verdicts 2 {}\n")
    with pytest.raises(FileError, match="has version 2, this package reads up to 1"):
        read_verdicts(path)
    with pytest.raises(FileError, match=r"cannot read .*none\.csv: No such file"):
        read_verdicts(tmp_path / "none.csv")
    with pytest.raises(FileError, match="Is a directory"):
        VerdictFile(tmp_path, HEADER).load()


def test_a_folder_that_takes_no_files_is_noticed_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot write into"):
        VerdictFile(tmp_path / "file" / "v.csv", HEADER).load()


# --- robustness and cost

INT64 = st.integers(-(2**63), 2**63 - 1)
ROW = {
    **{name: st.floats(width=32) if name in FLOATS else INT64 for name in Verdicts.empty().columns()},
    "broken_by": st.integers(-2, 1),
    "next_stage": st.integers(0, 2),
}


@settings(max_examples=60)
@given(st.lists(st.fixed_dictionaries(ROW), max_size=6, unique_by=lambda row: row["id"]))
@example([{**dict.fromkeys(ROW, 0), "linf": -0.0, "l2": float("inf"), "l1": 2.0**-149, "margin": float("nan")}])
@example([{**dict.fromkeys(ROW, 0), "margin": 3.4028234663852886e38, "linf": 1.1754942106924411e-38}])
def test_every_row_comes_back_bit_for_bit(rows: list[dict[str, float]]) -> None:
    dtypes = {name: column.dtype for name, column in Verdicts.empty().columns().items()}
    table = Verdicts(**{name: torch.tensor([row[name] for row in rows], dtype=d) for name, d in dtypes.items()})
    nan = table.margin.new_tensor(float("nan"))  # there are many NaNs, and text has one
    table = Verdicts(**{n: torch.where(c.isnan(), nan, c) if n in FLOATS else c for n, c in table.columns().items()})
    with tempfile.TemporaryDirectory() as folder:
        VerdictFile(Path(folder, "v.csv"), HEADER).finish(table)
        header, back = read_verdicts(Path(folder, "v.csv"))
    assert header == HEADER
    assert_same(back, table.sort())


WRITER = """
import sys, torch
from pathlib import Path
from sparse_robust.evaluation.verdicts import VerdictFile, Verdicts
stages = [{"attack": "apgd-ce", "eps": "8/255", "steps": 100}, {"attack": "square", "eps": "8/255"}]
file = VerdictFile(sys.argv[1], {"data": "digits", "stages": stages, "seed": 0}, seconds=0)
n = 2000
table = {name: torch.zeros(n, dtype=column.dtype) for name, column in Verdicts.empty().columns().items()}
for step in range(10**9):
    table["id"] = torch.arange(n)
    table["step"] = torch.full((n,), step)
    file.update(Verdicts(**table))
    if step == 0:
        print("started", flush=True)
"""


def test_a_kill_in_the_middle_of_writing_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "v.csv"
    for delay in (0.0, 0.013, 0.037):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None and writer.stdout.readline() == "started\n"
            time.sleep(delay)
            os.kill(writer.pid, signal.SIGKILL)
        _, rows = read_verdicts(path)
        assert len(rows) == 2000 and len(torch.unique(rows.step)) == 1
        assert len(VerdictFile(path, HEADER).load()) == 2000


def test_fifty_thousand_images_are_written_and_read_quickly(tmp_path: Path) -> None:
    n = 50_000
    rows = Verdicts(
        **{
            name: torch.rand(n) if name in FLOATS else torch.zeros(n, dtype=torch.int64)
            for name in Verdicts.empty().columns()
        }
    )
    rows = Verdicts(**{**rows.columns(), "id": torch.randperm(n)})
    file = VerdictFile(tmp_path / "v.csv", HEADER, seconds=3600)
    file.load()
    start = time.process_time()
    file.update(rows)
    file.flush()
    wrote = time.process_time() - start
    start = time.process_time()
    _, back = read_verdicts(tmp_path / "v.csv")
    read = time.process_time() - start
    print(f"50,000 rows: written in {wrote:.2f} s, read in {read:.2f} s")
    assert_same(back, rows.sort())
    assert wrote < 2 and read < 4  # about ten times what it takes
