"""What the parity benchmark decides and counts; it runs the comparisons themselves outside the tests."""

from __future__ import annotations

import copy
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.parity import parity, rows, sides, speed
from benchmarks.parity.networks import NETWORKS
from benchmarks.parity.rows import Row
from benchmarks.parity.sides import Outcome, Task
from sparse_robust.bench import GateError
from sparse_robust.errors import FileError

TASK = Task("Linf", 0.1, "apgd-ce")


def outcome(robust: int, *, count: int = 1000, backward: int = 100, largest: float = 1.0) -> Outcome:
    return Outcome([n < robust for n in range(count)], 900, 200, backward, largest, 1.0, 1.0)


def row(**changes: object) -> Row:
    kinds = {"str": "text", "int": 7, "float": 0.1}
    values = {field.name: kinds[str(field.type)] for field in fields(Row)} | {"noise": math.nan}
    return Row(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(("robust", "holds"), [(500, True), (505, True), (495, True), (506, False), (494, False)])
def test_half_a_point_of_difference_is_allowed_and_no_more(robust: int, holds: bool) -> None:
    verdict = rows.judge(TASK, [outcome(robust)], [outcome(500)], available=1000)
    assert (verdict == "holds") is holds
    assert holds or "0.60 points apart" in verdict


def test_several_seeds_are_judged_by_their_means() -> None:
    reference = [outcome(500), outcome(500)]
    assert rows.judge(TASK, [outcome(508), outcome(494)], reference, available=1000) == "holds"
    assert "0.55 points" in rows.judge(TASK, [outcome(508), outcome(503)], reference, available=1000)
    assert rows.noise([outcome(500), outcome(510)]) == pytest.approx(math.sqrt(0.5))
    assert math.isnan(rows.noise([outcome(500)]))


def test_more_backward_passes_and_too_large_perturbations_are_refused() -> None:
    def judged(**changes: float) -> str:
        return rows.judge(TASK, [outcome(500, **changes)], [outcome(500)], available=1000)  # type: ignore[arg-type]

    assert judged(backward=100, largest=1 + 1e-8) == "holds"
    assert judged(backward=101) == "101 backward passes, the reference makes 100"
    assert "1.001 eps" in judged(largest=1.001)


def test_a_comparison_on_part_of_the_work_is_not_judged() -> None:
    apart = [outcome(300, count=400)], [outcome(200, count=400)]
    assert rows.judge(TASK, *apart, available=1000) == "short"
    assert "25.00 points" in rows.judge(TASK, *apart, available=400)  # the whole test set
    few_queries = replace(TASK, queries=100)
    assert rows.judge(few_queries, [outcome(300)], [outcome(500)], available=1000) == "short"
    with pytest.raises(ValueError, match="same images"):
        rows.judge(TASK, [outcome(300)], [outcome(300, count=400)], available=1000)


def test_disagreement_counts_what_one_side_alone_broke() -> None:
    first = replace(outcome(0), robust=[True, False, False, False])
    second = replace(outcome(0), robust=[True, True, True, False])
    assert (rows.only([first], [second]), rows.only([second], [first])) == (2, 0)
    assert rows.only([first, second], [second, second]) == 1


def test_passes_are_counted_image_by_image_also_in_copies_of_the_model() -> None:
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.rand(5, 1, 2, 2)
    with sides.counting(model) as passes:
        model(x)
        shown = x.clone().requires_grad_(True)
        for _ in range(2):  # the same tensor twice, as when gradients are averaged
            torch.autograd.grad(model(shown).sum(), shown)
        with torch.no_grad():
            model(shown)
        copied = copy.deepcopy(model)(shown[:3])
        copied.sum().backward()
    model(x)
    assert (passes.forward, passes.backward) == (5 + 2 * 5 + 5 + 3, 2 * 5 + 3)


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "parity.csv"
    assert rows.read(path) == []
    written = [row(verdict="holds"), row(verdict="a, b; c", noise=0.25)]
    for one in written:
        rows.append(path, one)
    first, second = rows.read(path)
    assert (math.isnan(first.noise), second) == (True, written[1])
    assert (first.broken, second.broken) == (False, True)
    path.write_text("time,run\n")
    with pytest.raises(FileError, match="other columns"):
        rows.append(path, written[0])


def test_words_choose_networks_norms_and_attacks() -> None:
    assert len(parity.chosen(())) == len(NETWORKS) * 3 * 5
    assert parity.chosen(("L1", "cnn", "square", "Linf")) == [("cnn", "Linf", "square"), ("cnn", "L1", "square")]
    with pytest.raises(ValueError, match="'l1' is none of cnn"):
        parity.chosen(("l1",))


def test_routes_that_disagree_are_not_timed() -> None:
    ours = torch.arange(200) < 100
    shown = speed.agreement({"ours": ours, "theirs": torch.arange(200) < 101}, points=0.5)
    assert shown == "ours 50.0 % robust; theirs 50.5 % (1 of 200 verdicts differ)"
    with pytest.raises(GateError, match="at most 0.5 points"):
        speed.agreement({"ours": ours, "theirs": torch.arange(200) < 102}, points=0.5)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=lambda network: network.name)
def test_the_networks_are_built_alike_every_time(network: object) -> None:
    first, second = (NETWORKS[network.name].build().state_dict() for _ in range(2))  # type: ignore[attr-defined]
    assert all(torch.equal(first[name], second[name]) for name in first)
