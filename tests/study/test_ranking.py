"""Finders side by side: one row a ticket, the most robust first, with attacks, cost and empty layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparse_robust.study.report import write_report
from sparse_robust.study.report.ranking import rank_finders, ranking_pictures
from sparse_robust.study.report.style import drawing
from sparse_robust.study.results import load_results
from tests.study.synthetic import Synthetic

WORTH = {"oneshot-snip": 50.0, "oneshot-mag": 40.0, "oneshot-erk": 45.0, "random": 20.0}


def law(metric: str, theta: str, finder: str, k: int, target: str, regime: str) -> float:
    return WORTH.get(finder, 60.0) - k + (20 if metric == "sa" else 0)


def write(folder: Path, **options: object) -> Path:
    study = Synthetic(
        thetas=("AT",), finders=tuple(WORTH), rounds=(2, 8), targets=("fashion",), regimes=("AT",), seeds=(0, 1, 2),
        noise=0.0, law=law, examples=False,
    )  # fmt: skip
    study.write(folder)
    for path in folder.glob("cells/transfer-*-oneshot-snip-k08-*/result.json"):
        row = json.loads(path.read_text())
        row["attacks"] = {"PGD-10": row["ra"] + 2, "APGD-CE": row["ra"]}
        path.write_text(json.dumps(row))
    path = folder / "cells" / "find-AT-oneshot-mag" / "result.json"
    row = json.loads(path.read_text())
    row["tickets"][7]["layers"][2]["kept"] = 0
    path.write_text(json.dumps(row))
    return folder


def test_every_transferred_ticket_has_a_row_and_the_most_robust_is_first(tmp_path: Path) -> None:
    rows = rank_finders(load_results(write(tmp_path)))
    assert [(row["k"], row["finder"]) for row in rows] == [
        (k, finder) for k in (2, 8) for finder in ("oneshot-snip", "oneshot-erk", "oneshot-mag", "random")
    ]
    assert rows[0]["ra"] == {"mean": 48.0, "std": 0.0, "n": 3}
    assert rows[0]["seconds"] == 7.0


def test_what_each_attack_leaves_and_which_layers_are_empty_is_told(tmp_path: Path) -> None:
    rows = {(row["finder"], row["k"]): row for row in rank_finders(load_results(write(tmp_path)))}
    attacked = rows["oneshot-snip", 8]["attacks"]
    assert [(name, value["mean"]) for name, value in attacked.items()] == [("PGD-10", 44.0), ("APGD-CE", 42.0)]
    assert rows["oneshot-mag", 8]["collapsed"] == ["layer1.0.conv2.weight"]
    assert rows["oneshot-mag", 2]["collapsed"] == []


def test_few_finders_make_no_ranking(tmp_path: Path) -> None:
    Synthetic(rounds=(2,), examples=False).write(tmp_path)
    assert rank_finders(load_results(tmp_path)) == []


def test_the_page_shows_the_ranking_and_its_picture(tmp_path: Path) -> None:
    page = write_report(write(tmp_path)).read_text(encoding="utf-8")
    assert 'id="ranking-table"' in page
    assert "RA after<br>PGD-10" in page
    assert "RA after<br>APGD-CE" not in page  # the last attack's is RA itself
    assert (tmp_path / "report" / "finders.png").stat().st_size > 10_000


@pytest.mark.parametrize("crossed", [True, False])
def test_the_picture_marks_tickets_with_an_empty_layer(crossed: bool, tmp_path: Path) -> None:
    rows = rank_finders(load_results(write(tmp_path)))
    for row in rows:
        row["collapsed"] = row["collapsed"] if crossed else []
    with drawing():
        (shown,) = ranking_pictures({"ranking": rows})
        (other,) = ranking_pictures({"ranking": [{**row, "collapsed": []} for row in rows]})
    assert (shown.svg != other.svg) is crossed
