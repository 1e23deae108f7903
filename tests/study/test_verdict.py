"""Who wins: the predicates, their tolerance, extreme sparsities, and what tickets have in common."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_robust.errors import FileError, UsageError
from sparse_robust.masks import Masks
from sparse_robust.study.compare import binomial_error, signed, standard_error
from sparse_robust.study.criterion import BASELINES, PREDICATES, Criterion
from sparse_robust.study.overlap import overlap, overlaps, thin_layers
from sparse_robust.study.results import StudyResults, load_results
from sparse_robust.study.rows import LayerCount, TicketRow
from sparse_robust.study.verdict import (
    DoubleWin,
    double_win_table,
    extremes,
    judge,
    match,
    sparsity_label,
)
from tests.study.synthetic import Synthetic, study_of, transfer_row

# mean and sample standard deviation of the dense runs, by (metric, regime)
DENSE = {("SA", "ST"): (96.0, 0.1), ("SA", "AT"): (80.0, 0.3), ("RA", "AT"): (50.0, 0.4), ("RA", "ST"): (1.0, 0.2)}
SEEDS = (0, 1, 2)


def dense_runs(need: tuple[str, str], seeds: Sequence[int]) -> list[float]:
    mean, std = DENSE[need]
    return [mean] if len(seeds) == 1 else [mean - std, mean, mean + std]


def three_way(
    sa_st: float, sa_at: float, ra_at: float, *, ra_st: float = 1.0, seeds: Sequence[int] = SEEDS, k: int = 5
) -> StudyResults:
    """One ticket whose runs all have the given accuracies, beside the dense runs of `DENSE`."""
    rows = []
    for index, seed in enumerate(seeds):
        for regime, sa, ra in (("ST", sa_st, ra_st), ("AT", sa_at, ra_at)):
            dense = [dense_runs((m, regime), seeds)[index] for m in ("SA", "RA")]
            rows.append(transfer_row("AT", 0, regime, *dense, seed=seed))
            rows.append(transfer_row("AT", k, regime, sa, ra, seed=seed))
    return study_of(rows)


def verdict(results: StudyResults, predicate: str = "strict", c: float = 1.0) -> DoubleWin:
    return judge(results, "AT", "imp", "t", 1.0, Criterion(predicate, c))


def wins(results: StudyResults, predicate: str = "strict", c: float = 1.0) -> bool | None:
    return verdict(results, predicate, c).rounds[0].wins


@pytest.mark.acceptance("double-win", "A-32")
@pytest.mark.parametrize(
    ("accuracies", "strict", "lenient"),
    [
        pytest.param((95.95, 79.8, 49.7), True, True, id="all-within-one-std"),
        pytest.param((95.85, 79.8, 49.7), False, False, id="clean-accuracy-short"),
        pytest.param((96.5, 79.6, 51.0), False, True, id="clean-accuracy-under-attack-training-short"),
        pytest.param((96.5, 80.5, 49.5), False, False, id="robust-accuracy-short"),
    ],
)
def test_truth_table(accuracies: tuple[float, float, float], strict: bool, lenient: bool) -> None:
    results = three_way(*accuracies)
    assert wins(results, "strict") is strict
    assert wins(results, "lenient") is lenient


@pytest.mark.acceptance("double-win", "A-32")
def test_the_failing_comparison_is_named() -> None:
    worst = verdict(three_way(95.85, 79.8, 49.7)).rounds[0].worst
    assert worst is not None
    assert worst[0] == ("SA", "ST")
    assert worst[1].margin == pytest.approx(-0.05)


@pytest.mark.acceptance("double-win", "A-32")
def test_without_tolerance_the_first_case_loses() -> None:
    assert wins(three_way(95.95, 79.8, 49.7), c=0) is False
    assert wins(three_way(96.0, 80.0, 50.0), c=0) is True  # "same or better"


@pytest.mark.acceptance("double-win", "A-32")
def test_one_seed_forces_no_tolerance() -> None:
    single = verdict(three_way(95.95, 79.8, 49.7, seeds=(0,)))
    assert single.rounds[0].wins is False
    assert single.label == "single seed"
    assert {m.c for m in single.rounds[0].matches.values() if m} == {0.0}
    assert wins(three_way(96.0, 80.0, 50.0, seeds=(0,))) is True
    several = verdict(three_way(95.95, 79.8, 49.7))
    assert several.label == "3 seeds"
    assert {m.c for m in several.rounds[0].matches.values() if m} == {1.0}


def test_literal_also_wants_robustness_after_standard_transfer() -> None:
    good = (96.0, 80.0, 50.0)
    assert wins(three_way(*good, ra_st=0.9), "literal") is True
    assert wins(three_way(*good, ra_st=0.7), "literal") is False
    assert wins(three_way(*good, ra_st=0.7), "strict") is True


@pytest.mark.parametrize("predicate", PREDICATES)
def test_every_predicate_wants_each_of_its_comparisons(predicate: str) -> None:
    good = {"sa_st": 96.0, "sa_at": 80.0, "ra_at": 50.0, "ra_st": 1.0}
    assert wins(three_way(**good), predicate) is True
    for metric, regime in DENSE:
        key = f"{metric}_{regime}".lower()
        short = three_way(**{**good, key: good[key] - 0.9})
        assert wins(short, predicate) is ((metric, regime) not in PREDICATES[predicate])


accuracy = st.floats(0, 100, allow_nan=False)


@given(
    sparse=st.lists(accuracy, min_size=1, max_size=5),
    dense=st.lists(accuracy, min_size=2, max_size=5),
    c=st.floats(0, 3),
)
def test_match_is_the_formula(sparse: list[float], dense: list[float], c: float) -> None:
    found = match(sparse, dense, c)
    tolerance = c * stdev(dense) if len(sparse) > 1 else 0.0
    margin = sum(sparse) / len(sparse) - sum(dense) / len(dense) + tolerance
    assert found.margin == pytest.approx(margin, abs=1e-9)
    if abs(margin) > 1e-6:
        assert found.wins is (margin > 0)
    assert match(dense, dense, c).wins  # a model matches itself


def test_match_needs_both_sides() -> None:
    with pytest.raises(UsageError, match="at least one run on each side, got 0 sparse and 1 dense"):
        match([], [1.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"predicate": "strikt"}, "unknown predicate 'strikt'. Did you mean 'strict'", id="predicate"),
        pytest.param({"baseline": "best"}, "unknown baseline 'best'.*best_dense", id="baseline"),
        pytest.param({"c": -1.0}, "tolerance c: expected a finite number >= 0", id="negative"),
        pytest.param({"c": math.nan}, "tolerance c: expected a finite number >= 0", id="nan"),
    ],
)
def test_a_criterion_that_does_not_exist_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Criterion(**arguments)  # type: ignore[arg-type]


@pytest.mark.acceptance("double-win", "A-33")
def test_extremes() -> None:
    found = extremes({k: k in {1, 2, 3, 5} for k in range(1, 7)})
    assert (found.k_max, found.k_contig, found.label) == (5, 3, "k = 5")
    found = extremes(dict.fromkeys(range(1, 7), False))
    assert (found.k_max, found.k_contig, found.label) == (0, 0, "none")


@pytest.mark.acceptance("double-win", "A-33")
def test_only_rounds_that_were_run_count_as_gaps() -> None:
    assert extremes({4: True, 8: True, 12: False}).k_contig == 8
    assert extremes({4: False, 8: True}) == extremes({8: True, 4: False})
    assert extremes({4: False, 8: True}).k_contig == 0


def test_open_rounds_are_neither_wins_nor_losses() -> None:
    found = extremes({1: True, 2: None, 3: True})
    assert (found.k_max, found.k_contig) == (3, 1)
    found = extremes({1: None, 2: None})
    assert (found.k_max, found.k_contig, found.label) == (None, None, "not decided")
    assert extremes({}).label == "not decided"


@given(st.dictionaries(st.integers(1, 16), st.booleans(), min_size=1))
def test_extremes_are_what_their_names_say(outcome: dict[int, bool]) -> None:
    found = extremes(outcome)
    winning = [k for k, w in outcome.items() if w]
    assert found.k_max == max(winning, default=0)
    assert all(outcome[k] for k in outcome if k <= (found.k_contig or 0))
    assert all(not outcome[k] for k in sorted(k for k in outcome if k > (found.k_contig or 0))[:1])


@pytest.mark.acceptance("double-win", "A-33")
def test_the_dense_baseline_is_the_same_pretraining() -> None:
    rows = []
    for theta, dense, sparse in (("STD", 90.0, 89.0), ("AT", 70.0, 71.0)):
        for regime in ("ST", "AT"):
            rows += [
                transfer_row(theta, 0, regime, dense, dense / 2),
                transfer_row(theta, 3, regime, sparse, sparse / 2),
            ]
    results = study_of(rows)
    assert {r.theta: r.extremes.k_max for r in double_win_table(results)} == {"STD": 0, "AT": 3}
    harder = double_win_table(results, Criterion(baseline="best_dense"))
    assert {r.theta: r.extremes.k_max for r in harder} == {"STD": 0, "AT": 0}
    assert BASELINES == ("same", "best_dense")


def test_the_best_dense_model_is_chosen_for_each_metric() -> None:
    rows = []
    for theta, sa, ra in (("STD", 90.0, 10.0), ("AT", 80.0, 40.0)):
        for regime in ("ST", "AT"):
            rows += [transfer_row(theta, 0, regime, sa, ra), transfer_row(theta, 3, regime, 85.0, 25.0)]
    criterion = Criterion(baseline="best_dense")
    row = judge(study_of(rows), "STD", "imp", "t", 1.0, criterion)
    found = {need: m.difference for need, m in row.rounds[0].matches.items() if m}
    assert found == {("SA", "ST"): -5.0, ("SA", "AT"): -5.0, ("RA", "AT"): -15.0}


@pytest.mark.parametrize(
    ("drop", "reason"),
    [
        pytest.param(lambda r: r.regime == "AT", "no SA of the ticket under AT transfer", id="regime"),
        pytest.param(lambda r: r.k > 0 and r.regime == "ST", "no SA of the ticket under ST transfer", id="ticket"),
        pytest.param(lambda r: r.k == 0 and r.regime == "ST", "no SA of the dense AT model under ST", id="dense"),
    ],
)
def test_what_is_missing_is_not_decided(drop, reason: str) -> None:  # type: ignore[no-untyped-def]
    results = three_way(97.0, 81.0, 51.0)
    row = verdict(study_of([r for r in results.transfer if not drop(r)]))
    assert row.rounds[0].wins is None
    assert reason in row.undecided[5]
    assert row.extremes.label == "not decided"


def test_a_missing_metric_is_not_decided() -> None:
    rows = [transfer_row("AT", k, regime, 80.0, None) for k in (0, 2) for regime in ("ST", "AT")]
    row = verdict(study_of(rows))
    assert row.rounds[0].wins is None
    assert row.undecided == {2: "no RA of the ticket under AT transfer"}
    assert judge(study_of(rows), "AT", "imp", "t", 1.0, Criterion("standard")).rounds[0].wins is True


def test_targets_fractions_and_finders_are_judged_apart() -> None:
    rows = []
    for target, fraction, finder, good in (("a", 1.0, "imp", 1), ("a", 0.1, "imp", -1), ("b", 1.0, "random", 1)):
        for regime in ("ST", "AT"):
            place = {"target": target, "fraction": fraction}
            rows += [transfer_row("AT", 0, regime, 80.0, 40.0, **place)]
            rows += [transfer_row("AT", 2, regime, 80.0 + good, 40.0 + good, finder=finder, **place)]
    table = double_win_table(study_of(rows))
    found = {(r.target, r.fraction, r.finder): r.extremes.k_max for r in table}
    assert found == {("a", 1.0, "imp"): 2, ("a", 0.1, "imp"): 0, ("b", 1.0, "random"): 2}


def test_a_small_shortfall_is_called_noise() -> None:
    def near(short: float, images: int | None) -> bool:
        rows = [transfer_row("AT", 0, r, 80.0, 40.0, test_images=images) for r in ("ST", "AT")]
        rows += [transfer_row("AT", 2, r, 80.0 - short, 41.0, test_images=images) for r in ("ST", "AT")]
        return verdict(study_of(rows)).rounds[0].near

    assert near(1.0, 500) is True  # two standard errors are about 5 points
    assert near(8.0, 500) is False
    assert near(1.0, 100_000) is False
    assert near(1.0, None) is False  # no error known, so nothing is excused


@pytest.mark.acceptance("double-win", "A-34")
@pytest.mark.parametrize(
    ("k", "label"), [(6, "73.79"), (7, "79.03"), (8, "83.22"), (10, "89.26"), (11, "91.41"), (15, "96.48")]
)
def test_sparsity_labels(k: int, label: str) -> None:
    assert sparsity_label(k) == label
    resnet50 = {6: 6_148_565, 7: 4_918_852, 8: 3_935_082, 10: 2_518_453, 11: 2_014_762, 15: 825_246}
    assert sparsity_label(k, survivors=resnet50[k], numel=23_454_912) == label


# --- masks


def random_masks(density: float, seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (200, 1000), "b.weight": (100, 500)}
    return Masks.from_bools({name: torch.rand(shape, generator=generator) < density for name, shape in shapes.items()})


@pytest.mark.acceptance("double-win", "A-35")
def test_overlap_with_itself_and_with_its_complement() -> None:
    mask = random_masks(0.2, 0)
    same = overlap(3, ("STD", "imp"), ("AT", "imp"), mask, mask)
    assert same.iou == 1.0
    assert [iou for _, iou in same.layers] == [1.0, 1.0]
    apart = overlap(3, ("STD", "imp"), ("AT", "imp"), mask, ~mask)
    assert apart.iou == 0.0
    assert [iou for _, iou in apart.layers] == [0.0, 0.0]


@pytest.mark.acceptance("double-win", "A-35")
@pytest.mark.parametrize(("k", "chance"), [(6, 0.151), (7, 0.117), (8, 0.092), (10, 0.057), (11, 0.045), (15, 0.018)])
def test_chance_level(k: int, chance: float) -> None:
    a, b = random_masks(0.8**k, 1), random_masks(0.8**k, 2)
    found = overlap(k, ("STD", "random"), ("AT", "random"), a, b)
    assert found.chance == pytest.approx(chance, abs=0.0015)
    assert found.iou == pytest.approx(chance, abs=0.005)


def test_chance_with_layer_densities_explains_a_shared_profile() -> None:
    def profile(seed: int) -> Masks:
        generator = torch.Generator().manual_seed(seed)
        density = {"a.weight": 0.9, "b.weight": 0.02}
        return Masks.from_bools({n: torch.rand(300, 300, generator=generator) < d for n, d in density.items()})

    found = overlap(7, ("STD", "random"), ("AT", "random"), profile(0), profile(1))
    assert found.iou == pytest.approx(found.chance_layers, abs=0.005)
    assert found.chance < found.chance_layers - 0.1


def test_overlaps_are_read_from_the_study(tmp_path: Path) -> None:
    results = load_results(Synthetic(examples=False, rounds=(2, 3)).write(tmp_path))
    found, warnings = overlaps(results)
    assert not warnings
    assert {o.k for o in found} == {1, 2, 3}
    assert len(found) == 3 * math.comb(6, 2)
    last = next(o for o in found if o.k == 3 and (o.a, o.b) == (("STD", "imp-st"), ("AT", "imp-st")))
    files = {r.theta: r.ticket(3).file for r in results.find if r.finder == "imp-st"}  # type: ignore[union-attr]
    assert last.iou == Masks.load(tmp_path / files["STD"]).iou(Masks.load(tmp_path / files["AT"]))
    (tmp_path / files["AT"]).write_bytes(b"rubbish")
    fewer, warnings = overlaps(results)
    assert len(fewer) == len(found) - 5
    assert len(warnings) == 1
    assert "AT, imp-st, k = 3" in warnings[0]


def test_thin_layers_are_warned_about() -> None:
    layers = (
        LayerCount("full", (100, 100), 10_000, 10_000),
        LayerCount("thin", (100, 100), 9, 10_000),
        LayerCount("just", (100, 100), 10, 10_000),
        LayerCount("gone", (10, 10), 0, 100),
    )
    found = thin_layers(TicketRow(9, 66.8, 10_019, 30_100, "", "", layers))
    assert found == ["thin keeps 0.090 % (9 of 10,000)", "gone is empty (100 weights, none kept)"]


# --- numbers


def test_standard_errors() -> None:
    assert binomial_error(50, 10_000) == pytest.approx(0.5, abs=1e-3)
    assert binomial_error(0, 100) > 0
    assert standard_error([50], [50], None) is None
    assert standard_error([50], [50], 10_000) == pytest.approx(0.5 * math.sqrt(2), abs=1e-3)
    assert standard_error([48, 50, 52], [10, 10, 10], None) == pytest.approx(2 / math.sqrt(3))
    pooled = standard_error([50, 50], [50, 50], 5_000)  # identical seeds do not make an exact number
    assert pooled == pytest.approx(0.5 * math.sqrt(2), abs=1e-3)


@pytest.mark.parametrize(
    ("points", "text"), [(1.25, "+1.2"), (-0.4, "\u22120.4"), (-0.04, "\u22120.04"), (0.0, "0.0"), (-0.001, "0.0")]
)
def test_signed(points: float, text: str) -> None:
    assert signed(points) == text


# --- reading a study


def test_results_hold_every_row(tmp_path: Path) -> None:
    made = Synthetic(seeds=(0, 1), examples=False, rounds=(2, 3))
    results = load_results(made.write(tmp_path))
    assert (len(results.pretrain), len(results.find), len(results.transfer)) == (3, 6, 2 * 2 * 3 * 2 * (1 + 2 * 2))
    assert results.pending == ()
    assert results.thetas() == ["STD", "FAT", "AT"]
    assert results.finders() == ["imp-st", "random"]
    assert results.targets() == [("fashion", 1.0), ("digits", 1.0)]
    assert results.seeds() == 2
    assert list(results.values("sa", "AT", "imp-st", 2, "digits", 1.0, "ST")) == [0, 1]
    dense = results.values("sa", "AT", "imp-st", 0, "digits", 1.0, "ST")
    assert dense == results.values("sa", "AT", "random", 0, "digits", 1.0, "ST") != {}
    assert results.test_images("digits") == 1000
    assert results.seconds == pytest.approx(3 * 7 + 3 * 7 + 11 + 19 + 27 + len(results.transfer) / 2 * (1.1 + 4.2))
    assert results.class_name("fashion", 9) == "Ankle boot"
    assert results.class_name("unheard of", 9) == "class 9"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        pytest.param(None, None, id="missing"),
        pytest.param("{", "not readable JSON", id="cut-off"),
        pytest.param("[1]", "expected an object, got list", id="list"),
        pytest.param('{"kind": "other"}', "field 'kind'", id="kind"),
        pytest.param({"sa": "high"}, "field 'sa'", id="text"),
        pytest.param({"sa": 101.0}, "a number of 0 to 100", id="too-much"),
        pytest.param({"seed": True}, "field 'seed'", id="bool"),
        pytest.param({"finder": "imp-st"}, "fields 'k' and 'finder'", id="dense-with-a-finder"),
        pytest.param({"fraction": None}, "field 'fraction'", id="none"),
    ],
)
def test_a_damaged_cell_is_pending(tmp_path: Path, change: object, problem: str | None) -> None:
    Synthetic(examples=False, rounds=(2,)).write(tmp_path)
    name = "transfer-AT-dense-k00-digits-1-ST-s0"
    path = tmp_path / "cells" / name / "result.json"
    if change is None:
        path.unlink()
    elif isinstance(change, str):
        path.write_text(change)
    else:
        assert isinstance(change, dict)
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    results = load_results(tmp_path)
    assert results.pending == (name,)
    assert not results.values("sa", "AT", "dense", 0, "digits", 1.0, "ST")
    if problem is None:
        assert results.problems == {}
    else:
        assert problem in results.problems[name]
        assert str(tmp_path) not in results.problems[name]
    row = judge(results, "AT", "imp-st", "digits", 1.0)
    assert row.rounds[0].wins is None


def test_a_field_that_is_missing_is_named(tmp_path: Path) -> None:
    Synthetic(examples=False, rounds=(2,)).write(tmp_path)
    path = tmp_path / "cells" / "find-AT-random" / "result.json"
    data = json.loads(path.read_text())
    del data["tickets"][0]["layers"]
    path.write_text(json.dumps(data))
    assert "field 'layers' is missing" in load_results(tmp_path).problems["find-AT-random"]


def test_the_same_setting_twice_is_a_problem_and_strangers_are_not_read(tmp_path: Path) -> None:
    Synthetic(examples=False, rounds=(2,)).write(tmp_path)
    original = tmp_path / "cells" / "transfer-AT-dense-k00-digits-1-ST-s0"
    for name in ("twin", "stranger"):
        (tmp_path / "cells" / name).mkdir()
        (tmp_path / "cells" / name / "result.json").write_text((original / "result.json").read_text())
    study = json.loads((tmp_path / "study.json").read_text())
    study["cells"].append("twin")
    (tmp_path / "study.json").write_text(json.dumps(study))
    results = load_results(tmp_path)
    assert results.pending == ("twin",)
    assert "occurs in an earlier cell already" in results.problems["twin"]
    assert results.unlisted == ("stranger",)


def test_a_folder_that_is_no_study(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is not a study folder: it has no study.json"):
        load_results(tmp_path)
    (tmp_path / "study.json").write_text("[]")
    with pytest.raises(FileError, match="expected an object, got list"):
        load_results(tmp_path)
