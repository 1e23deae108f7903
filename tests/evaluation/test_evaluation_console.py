"""What an evaluation shows: a bar on a terminal, few lines elsewhere, a table at the end."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table

from sparse_robust.errors import UsageError
from sparse_robust.evaluation.console import EvaluationProgress, curve_table, evaluation_table
from sparse_robust.evaluation.verdicts import Verdicts


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def state(images: int, total: int | None = 200, **changes: Any) -> Any:
    values = {"stage": "apgd-t", "images": images, "total": total, "seen": 100, "clean_correct": 93, "robust": 48}
    values["share"] = None if total is None else images / total
    return SimpleNamespace(**{**values, **changes})


def written(enabled: bool = True, bars: bool = False, total: int | None = 200) -> list[str]:
    text, clock = io.StringIO(), Clock()
    console = Console(file=text, width=200, force_terminal=bars)
    with EvaluationProgress(enabled, bars=bars, seconds=30, console=console, clock=clock) as shown:
        for images in range(0, 101, 10):
            shown(state(images, total))
            clock.now += 10
    return text.getvalue().splitlines()


def test_elsewhere_than_on_a_terminal_a_line_comes_every_so_often() -> None:
    lines = written()
    assert len(lines) == 4, "after 30, 60, 90 seconds, and at the end"
    begin = "30 of 200 images, clean 93.00 %, robust so far 48.00 %, apgd-t, "
    assert lines[0] == f"{begin}0:30 gone, about 2:50 left"
    assert lines[-1].startswith("100 of 200 images") and lines[-1].endswith("1:50 gone, about 1:50 left")


def test_without_a_total_there_is_no_estimate() -> None:
    assert written(total=None)[0] == "30 images, clean 93.00 %, robust so far 48.00 %, apgd-t, 0:30 gone"


def test_other_ranks_are_silent() -> None:
    assert written(enabled=False) == [] and written(enabled=False, bars=True) == []


def test_an_evaluation_that_never_began_says_nothing() -> None:
    text = io.StringIO()
    with EvaluationProgress(bars=False, console=Console(file=text)):
        pass
    assert text.getvalue() == ""


def test_the_bar_carries_stage_and_accuracies() -> None:
    text = io.StringIO()
    console = Console(file=text, width=200, force_terminal=True)
    with EvaluationProgress(bars=True, console=console) as shown:
        shown(state(0, None))
        shown(state(120, robust=21))
        assert shown._bars is not None
        shown._bars.refresh()
    for word in ("apgd-t", "120 of 200", "clean 93.00 %", "robust so far 21.00 %"):
        assert word in text.getvalue()


def test_hours_are_written_out_and_nothing_is_said_twice() -> None:
    text, clock = io.StringIO(), Clock()
    with EvaluationProgress(bars=False, console=Console(file=text, width=200), clock=clock) as shown:
        clock.now += 7200
        shown(state(50))
    assert text.getvalue().count("\n") == 1, "what was said last is not said again at the end"
    assert "2:00:00 gone, about 6:00:00 left" in text.getvalue()


# --- tables


def evaluation(**changes: Any) -> Any:
    """Ten images: one wrong, five broken by the first stage, none by the second, one by the third, three robust."""
    broken = torch.tensor([-2, 0, 0, 0, 0, 0, 2, -1, -1, -1])
    count = torch.arange(10)
    values: dict[str, torch.Tensor] = {
        name: torch.zeros(10, dtype=column.dtype) for name, column in Verdicts.empty().columns().items()
    }
    values |= {"id": count, "broken_by": broken, "step": torch.where(broken >= 0, count, -1)}
    values |= {"linf": count / 1000, "l2": count / 10, "forward": 10 * count + 1, "backward": 10 * count}
    found = {
        "clean": 0.9, "robust": 0.3, "robust_after": (0.4, 0.4, 0.3),
        "stages": (("apgd-ce", 4 / 255), ("square", 4 / 255), ("apgd-ce", 8 / 255)),
        "per_image": Verdicts(**values), "counts": {"forward": 460, "backward": 450, "queries": 10},
        "flips": {"candidates": 0, "rejected": 0},
    }  # fmt: skip
    return SimpleNamespace(**{**found, **changes})


def cells(table: Table) -> list[list[str]]:
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def text_of(table: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=120).print(table)
    return text.getvalue()


def test_the_table_has_a_row_a_stage_between_clean_and_total() -> None:
    table = evaluation_table(evaluation())
    assert cells(table) == [
        ["none", "", "90.00 %", "1", "-", "-", "1.0", "0.0"],
        ["apgd-ce", "4/255", "40.00 %", "5", "3", "0.003", "31.0", "30.0"],
        ["square", "4/255", "40.00 %", "0", "-", "-", "-", "-"],
        ["apgd-ce", "8/255", "30.00 %", "1", "6", "0.006", "61.0", "60.0"],
        ["all", "", "30.00 %", "7", "4", "0.0035", "31.0", "30.0"],
    ]
    assert "10 images" in text_of(table) and "rejected" not in text_of(table)


def test_sizes_are_given_in_the_norm_asked_for() -> None:
    table = evaluation_table(evaluation(), norm="L2")
    assert cells(table)[1][5] == "0.3" and table.columns[5].header == "L2\nsize"
    with pytest.raises(UsageError, match="unknown norm"):
        evaluation_table(evaluation(), norm="two")


@pytest.mark.parametrize(("candidates", "images"), [(1234, "1,234 images"), (1, "1 image")])
def test_flips_are_told(candidates: int, images: str) -> None:
    shown = text_of(evaluation_table(evaluation(flips={"candidates": candidates, "rejected": 1})))
    assert f"{images} fooled the copy" in shown and "rejected by the model itself: 1." in " ".join(shown.split())


def test_the_caption_tells_what_all_images_cost_whatever_a_stage_broke() -> None:
    table = evaluation_table(evaluation())
    assert isinstance(table.caption, str) and "medians over the images a stage broke" in table.caption
    assert "an image took 46.0 forward passes (1.0 without a gradient) and 45.0 backward" in table.caption
    assert evaluation_table(evaluation(stages=(), robust_after=())).caption is None


def test_the_table_fits_80_columns_with_every_figure_whole() -> None:
    counts = torch.arange(10) * 1000
    rows = evaluation().per_image
    spent = {name: counts for name in ("forward", "backward", "queries", "step")}
    large = evaluation(per_image=Verdicts(**{**rows.columns(), **spent}))
    text = io.StringIO()
    Console(file=text, width=80).print(evaluation_table(large))
    assert "…" not in text.getvalue() and max(map(len, text.getvalue().splitlines())) <= 80
    assert all(cell in text.getvalue() for row in cells(evaluation_table(large)) for cell in row[2:])


def test_an_evaluation_without_attacks_has_a_table_too() -> None:
    empty = evaluation(stages=(), robust_after=(), robust=0.9)
    assert [row[0] for row in cells(evaluation_table(empty))] == ["none", "all"]


def test_the_curve_starts_at_the_clean_accuracy_and_falls() -> None:
    rows = cells(curve_table(evaluation()))
    assert [row[:2] for row in rows] == [["0", "90.00 %"], ["4/255", "40.00 %"], ["8/255", "30.00 %"]]
    assert [len(row[2]) for row in rows] == [36, 16, 12]
    zero = evaluation(stages=(("pgd", 0.0), ("pgd", 0.5), ("pgd", 1.0)))
    assert [row[0] for row in cells(curve_table(zero))] == ["0", "0.5", "1"]
