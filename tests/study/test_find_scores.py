"""Finders by any score, budget and pattern: from a configuration and from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from sparse_robust import create_model
from sparse_robust.attacks import PGD
from sparse_robust.cli import main
from sparse_robust.data import DataSpec, load_data
from sparse_robust.errors import UsageError
from sparse_robust.models import load_model, save_model
from sparse_robust.pruning import SCORES, prune, random_like, survivors
from sparse_robust.seeding import derive_seed
from sparse_robust.study.cells import FindCell, cell_name, describe, study_cells
from sparse_robust.study.config import EvaluationConfig, FinderConfig, StudyConfig
from sparse_robust.study.context import Context
from sparse_robust.study.load import build
from sparse_robust.study.scoring import ScoreAttack, pruning_options, with_attack
from sparse_robust.tickets import Ticket
from sparse_robust.training import Recipe

DATA = ["data.name=digits", "data.resize=28", "data.fraction=0.2", "find.score_images=40", "find.score_batch=16"]
QUICK = {"hydra": ["find.score_options={epochs: 1, lr: 20}"]}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = create_model("resnet10t", num_classes=10, in_chans=1, channels=[4, 6, 8, 10], stem_width=4)
    for name, parameter in model.named_parameters():
        if "bn" in name and name.endswith("weight"):  # the last norms of the blocks start at 0
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    file = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_model(model, file)
    return file


def find(weights: Path, out: Path, *words: str) -> list[Ticket]:
    """The tickets that the command finds."""
    assert main(["find", "--quiet", "--out", str(out), f"weights={weights}", *DATA, *words]) == 0
    return [Ticket.load(file) for file in sorted(out.glob("tickets/*.safetensors"))]


@pytest.mark.filterwarnings("ignore:no weight is left")
@pytest.mark.parametrize(
    "score", [pytest.param(name, marks=pytest.mark.slow) if name == "synflow" else name for name in sorted(SCORES)]
)
def test_every_score_finds_tickets(weights: Path, tmp_path: Path, score: str) -> None:
    rounds = 1 if score == "synflow" else 2  # a hundred steps take a while
    words = [f"find.rounds={rounds}", "find.rate=0.4", *QUICK.get(score, [])]
    tickets = find(weights, tmp_path, "--score", score, "--scope", "layerwise", *words)
    numel = tickets[0].masks.numel()
    assert [ticket.masks.count() for ticket in tickets] == [survivors(numel, 0.4, k) for k in range(1, rounds + 1)]
    by_size = prune(load_model(weights), count=tickets[-1].masks.count(), scope="layerwise")
    assert (tickets[-1].masks == by_size) is (score == "magnitude")
    if score != "magnitude":
        assert tickets[0].provenance["find"]["score"] == score


def test_a_score_sees_images_of_the_source_under_the_attack_of_the_configuration(weights: Path, tmp_path: Path) -> None:
    how = ["--score", "snip", "--score-on", "adversarial", "--scope", "erk", "--pattern", "2:4", "find.rounds=5"]
    tickets = find(weights, tmp_path / "one", *how, "evaluation.eps=0.2", "evaluation.steps=3")
    numel, counts = tickets[0].masks.numel(), [ticket.masks.count() for ticket in tickets]
    assert counts[0] == counts[1] > numel / 2 > counts[3] == survivors(numel, 0.2, 4), "2:4 is a ceiling"
    assert tickets[0].provenance["find"]["score_attack"] == {"eps": 0.2, "steps": 3}

    finder = FinderConfig(
        method="oneshot", score="snip", score_on="adversarial", scope="erk", pattern="2:4", score_images=40,
        score_batch=16,
    )  # fmt: skip
    finder = with_attack(finder, EvaluationConfig(eps=0.2, steps=3))
    spec = DataSpec(name="digits", resize=28, fraction=0.2)
    options = pruning_options(finder, spec, 0, Context(Accelerator()))
    assert options["on"].func == PGD(steps=3, keep="last") and options["on"].keywords == {"eps": 0.2}
    assert [len(x) for x, _, _ in options["batches"]] == [16, 16, 8]
    split = load_data(spec).train
    seen = torch.cat([ids for _, _, ids in options["batches"]])
    assert set(seen.tolist()) == set(split.ids[torch.arange(40) * len(split) // 40].tolist())
    assert seen.tolist() != sorted(seen.tolist()), "a file in the order of its classes makes mixed batches"
    model = load_model(weights)
    assert tickets[4].masks == prune(model, count=counts[4], **options)
    assert tickets[4].masks != prune(model, count=counts[4], **{**options, "on": "clean"})


def test_the_attack_of_an_adversarial_recipe_comes_before_that_of_the_evaluation() -> None:
    evaluation = EvaluationConfig(eps=0.5, steps=20, step_size=0.1, norm="L2")
    adversarial = Recipe(regime="adversarial", eps="4/255", steps=3, step_size="2/255")
    common: dict[str, Any] = {"method": "imp", "score": "snip", "score_on": "adversarial"}
    cases = [
        (Recipe(), ScoreAttack(eps=0.5, steps=20, step_size=0.1, norm="L2")),
        (adversarial, ScoreAttack(eps="4/255", steps=3, step_size="2/255")),
        (Recipe(regime="fast", eps=0.05, step_size=0.0625), ScoreAttack(eps=0.05)),
    ]
    for recipe, attack in cases:
        assert with_attack(FinderConfig(recipe=recipe, **common), evaluation).score_attack == attack
    own = FinderConfig(recipe=adversarial, score_attack=ScoreAttack(eps=0.3), **common)
    assert with_attack(own, evaluation) is own
    clean = FinderConfig(method="oneshot", score="snip")
    assert with_attack(clean, evaluation) is clean


def test_custom_densities_and_the_counts_of_other_tickets(weights: Path, tmp_path: Path) -> None:
    words = ["find.scope=custom", "find.densities={conv1*: 1.0, layer4: 0.1}", "find.rounds=1", "find.rate=0.6"]
    masks = find(weights, tmp_path / "one", *words)[0].masks
    layers = {name: (kept, numel) for name, _, kept, numel in masks.layers()}
    assert layers["conv1.0.weight"][0] == layers["conv1.0.weight"][1]
    assert all(kept == round(numel / 10) for name, (kept, numel) in layers.items() if name.startswith("layer4"))
    assert masks.count() == survivors(masks.numel(), 0.6, 1)
    like = [f"like={tmp_path / 'one'}", "find.rounds=1", "find.rate=0.6"]
    random = find(weights, tmp_path / "two", *like, "find.method=random")[0].masks
    assert random == random_like(masks, seed=derive_seed("random-masks", 0, 1)) and random.layers() == masks.layers()
    snip = find(weights, tmp_path / "three", *like, "--score", "snip")[0].masks
    assert snip.layers() == masks.layers() and snip not in (masks, random)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no weight is left")
def test_iterative_pruning_by_a_score_and_a_pattern_resumes(weights: Path, tmp_path: Path) -> None:
    recipe = ["find.recipe.epochs=1", "find.recipe.validate_every=0", "find.recipe.lr=0.01"]
    words = ["--score", "taylor", "--pattern", "channel", "find.method=imp", "find.rounds=3", *recipe]
    whole = find(weights, tmp_path / "whole", *words)
    for before, after in zip(whole, whole[1:], strict=False):
        assert after.masks <= before.masks and after.masks.count() < before.masks.count()
    for name in whole[2].masks:
        channels = whole[2].masks[name].flatten(1)
        assert (channels.all(1) | ~channels.any(1)).all()
    find(weights, tmp_path / "again", *words)
    for file in ("result.json", "tickets/k03.safetensors"):
        (tmp_path / "again" / file).unlink()
    assert [ticket.masks for ticket in find(weights, tmp_path / "again", *words)] == [one.masks for one in whole]


STUDY: dict[str, Any] = {
    "name": "scores",
    "model": {"name": "resnet10t"},
    "source": {"name": "digits", "resize": 28},
    "pretrain": {"STD": {"recipe": {}}},
    "targets": {"t": {"data": {"name": "digits", "resize": 28}, "recipes": {"ST": {}}, "rounds": {}}},
    "rounds": [1],
    "evaluation": {"eps": 0.1, "steps": 7},
}


def study(**finders: dict[str, Any]) -> StudyConfig:
    return build(StudyConfig, {**STUDY, "find": finders})


def test_a_study_takes_every_score_and_new_options_rename_no_old_cell() -> None:
    finders = {name: {"method": "oneshot", "score": name, "scope": "erk", "pattern": "2:4"} for name in SCORES}
    attacked = {"method": "oneshot", "score": "hydra", "score_on": "adversarial", "score_options": {"epochs": 2}}
    config = study(**finders, attacked=attacked, old={"method": "oneshot"}, copy={"method": "oneshot", "like": "hydra"})
    cells = {cell.finder: cell for cell in study_cells(config) if isinstance(cell, FindCell)}
    assert cells["attacked"].config.score_attack == ScoreAttack(eps=0.1, steps=7)
    assert len({cell_name(cell) for cell in cells.values()}) == len(SCORES) + 3
    assert describe(cells["old"].config) == {"method": "oneshot"}
    stronger = build(StudyConfig, {**STUDY, "find": {**finders, "attacked": attacked}, "evaluation": {"eps": 0.2}})
    renamed = {cell.finder for cell in study_cells(stronger) if isinstance(cell, FindCell)}
    names = {cell_name(cell) for cell in study_cells(stronger)}
    assert {finder for finder in renamed if cell_name(cells[finder]) not in names} == {"attacked"}


@pytest.mark.parametrize(
    ("finder", "message"),
    [
        ({"score": "snap"}, "unknown score 'snap'. Did you mean 'snip'"),
        ({"scope": "earth"}, "unknown find.scope 'earth'"),
        ({"pattern": "4:2"}, "expected 1 <= N < M, got '4:2'"),
        ({"scope": "custom"}, "find.scope custom and find.densities .* go together"),
        ({"densities": {"conv1": 0.5}}, "find.scope custom and find.densities"),
        ({"score_on": "dirty", "score": "snip"}, "unknown find.score_on 'dirty'"),
        ({"score_on": "adversarial"}, "'magnitude' looks at no data, so find.score_on adversarial has no meaning"),
        ({"score": "snip", "score_attack": {"eps": 0.1}}, "find.score_attack is for find.score_on adversarial"),
        ({"score": "snip", "score_on": "adversarial", "score_attack": {"norm": "L7"}}, "L7"),
        ({"score": "snip", "score_options": {"lr": 0.1}}, "'snip' takes no options, got 'lr'"),
        ({"score": "movement", "score_options": {"rate": 0.1}}, "option of the score 'movement' 'rate'"),
        ({"method": "random", "score": "snip"}, "find.score 'snip' has no part in method random"),
        ({"like": "other", "scope": "erk"}, "takes the place of find.scope. Got method 'oneshot', scope 'erk'"),
        ({"method": "imp", "rounds": 1, "like": "other"}, "Got method 'imp'"),
        ({"score": "snip", "score_images": 0}, "find.score_images must be at least 1, got 0"),
    ],
)
def test_nonsense_is_refused_with_the_field_that_is_wrong(finder: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        study(x={"method": "oneshot", **finder}, other={"method": "oneshot"})


def test_the_command_line_refuses_it_too(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["find", "--dry-run", f"weights={weights}", "data.name=digits"]
    assert main([*common, "--score", "snap"]) == 2
    assert "unknown score 'snap'. Did you mean 'snip'" in capsys.readouterr().err
    assert main([*common, "--pattern", "2:4", "--scope", "erk", "like=folder"]) == 2
    assert "takes the place of find.scope" in capsys.readouterr().err
    assert main([*common, "--score", "snip", "--score-on", "adversarial", "evaluation.eps=0.1"]) == 0
    shown = capsys.readouterr().out
    assert "score: snip" in shown and "method: oneshot" in shown and "eps: 0.1" in shown


def test_sparsities_may_be_named_instead_of_a_rate(weights: Path, tmp_path: Path) -> None:
    tickets = find(weights, tmp_path, "find.sparsities=[0.5, 0.8, 0.9]", "find.method=oneshot")
    numel = tickets[0].masks.numel()
    assert [ticket.masks.count() for ticket in tickets] == [survivors(numel, s, 1) for s in (0.5, 0.8, 0.9)]
    assert [ticket.provenance["k"] for ticket in tickets] == [1, 2, 3]


@pytest.mark.parametrize("wrong", [(0.9, 0.8), (0.8, 0.8), (0.8, 90), (-0.1, 0.5)])
def test_sparsities_that_do_not_ascend_as_shares_are_refused(wrong: tuple[float, ...]) -> None:
    with pytest.raises(UsageError, match="find.sparsities must ascend"):
        FinderConfig(method="oneshot", sparsities=wrong)


def test_a_finder_with_sparsities_has_as_many_rounds() -> None:
    finder = FinderConfig(method="oneshot", sparsities=(0.8, 0.95))
    assert (finder.rounds, finder.kept(1000, 1), finder.kept(1000, 2)) == (2, 200, 50)
    assert "sparsities" not in describe(FinderConfig(method="oneshot"))
