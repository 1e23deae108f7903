"""Configurations and cells: names, defaults, refusals."""

from dataclasses import replace
from pathlib import Path

import pytest

from sparse_robust.errors import UsageError
from sparse_robust.models import ModelSpec
from sparse_robust.study.cells import FindCell, PretrainCell, TransferCell, cell_name, describe, study_cells
from sparse_robust.study.config import FinderConfig, StudyConfig
from sparse_robust.study.estimate import cell_cost, cell_evaluation, pass_flops, passes_per_image, training_cost
from sparse_robust.study.load import build, presets, read_config, to_plain
from sparse_robust.training import Recipe


def quickstart(*overrides: str) -> StudyConfig:
    return build(StudyConfig, read_config("quickstart", overrides))


def test_every_preset_builds_and_survives_a_round_trip() -> None:
    assert {"quickstart", "small", "reference", "recommended"} <= set(presets())
    for name in presets():
        config = build(StudyConfig, read_config(name))
        assert config.name == name and config.description
        assert build(StudyConfig, to_plain(config)) == config


def test_quickstart_has_what_it_promises() -> None:
    config = quickstart()
    assert set(config.pretrain) == {"STD", "FAT", "AT"} and max(config.rounds) >= 5
    assert all(set(target.recipes) == {"ST", "AT"} for target in config.targets.values())
    assert any(finder.method == "random" for finder in config.find.values())


def test_cells_come_after_what_they_need_and_names_are_unique() -> None:
    cells = study_cells(quickstart())
    names = [cell_name(cell) for cell in cells]
    assert len(set(names)) == len(names)
    seen: set[str] = set()
    for cell in cells:
        needs = []
        if isinstance(cell, FindCell):
            needs = [cell.pretrain, *([cell.like] if cell.like else [])]
        elif isinstance(cell, TransferCell):
            needs = [cell.pretrain, *([cell.find] if cell.find else [])]
        assert all(cell_name(need) in seen for need in needs)
        seen.add(cell_name(cell))


def test_every_ticket_has_its_dense_baseline() -> None:
    cells = [cell for cell in study_cells(quickstart()) if isinstance(cell, TransferCell)]
    dense = {(c.pretrain.theta, c.target, c.regime, c.seed) for c in cells if c.find is None}
    assert {(c.pretrain.theta, c.target, c.regime, c.seed) for c in cells if c.find is not None} == dense


def test_defaults_do_not_enter_a_name_and_everything_else_does() -> None:
    cell = next(c for c in study_cells(quickstart()) if isinstance(c, PretrainCell))
    assert cell.config.recipe is not None
    same = replace(
        cell, config=replace(cell.config, recipe=replace(cell.config.recipe, guard_drop=Recipe().guard_drop))
    )
    other = replace(cell, config=replace(cell.config, recipe=replace(cell.config.recipe, guard_drop=0.3)))
    assert cell_name(same) == cell_name(cell) != cell_name(other)
    assert "guard_drop" not in str(describe(cell))


def test_a_change_upstream_renames_what_depends_on_it() -> None:
    before = {cell.slug: cell_name(cell) for cell in study_cells(quickstart())}
    after = {cell.slug: cell_name(cell) for cell in study_cells(quickstart("pretrain.AT.recipe.epochs=9"))}
    changed = {slug for slug in before if before[slug] != after[slug]}
    assert changed == {
        slug for slug in before if "-AT-" in slug.removesuffix("-AT-s0") + "-" and slug.split("-")[1] == "AT"
    }


def test_rename_of_the_study_keeps_its_cells() -> None:
    assert [*map(cell_name, study_cells(quickstart()))] == [*map(cell_name, study_cells(quickstart("name=other")))]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.step=3", r"unknown key in evaluation 'step'. Did you mean 'steps'"),
        (
            "targets.fashion.recipes.AT.epoch=3",
            r"unknown key in targets.fashion.recipes.AT 'epoch'. Did you mean 'epochs'",
        ),
        ("sedes=[0]", r"Did you mean 'seeds'"),
        ("pretrain.STD.recipe.lr=fast", "lr"),
        ("targets.fashion.rounds={imp-st: [17]}", "transfers round 17 of imp-st, which has rounds 1..16"),
        ("find.random.like=imp", "Did you mean 'imp-st'"),
        ("find.imp-st.method=lmp", "Did you mean 'imp'"),
        ("seeds=[1,1]", "twice"),
        ("name.first=x", "single value"),
        ("epochs", "key=value"),
    ],
)
def test_wrong_configurations_are_named(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quickstart(override)


def test_unknown_preset_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'quickstart'.*reference"):
        read_config("quikstart")
    with pytest.raises(UsageError, match="cannot read"):
        read_config(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UsageError, match="mapping"):
        read_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        read_config(tmp_path / "broken.yaml")


def test_finder_rules() -> None:
    with pytest.raises(UsageError, match="needs a recipe"):
        FinderConfig(method="imp", rounds=3)
    assert FinderConfig(method="imp", rounds=1).recipe is None  # ticket 1 needs no training
    with pytest.raises(UsageError, match="unknown find.scope 'layer'.*layerwise"):
        FinderConfig(method="random", scope="layer")


def test_costs_are_the_recipes_arithmetic() -> None:
    """The counts the protocol is known by: 730 M passes of IMP-ST on ImageNet, 49.5 M of one AT transfer on CIFAR."""
    at = Recipe(regime="adversarial", epochs=100, steps=10, validate_from=45)
    assert passes_per_image(at) == 11
    assert training_cost(at, 45_000, 5_000).train == 49_500_000
    imp = Recipe(regime="standard", epochs=30, validate_every=0)
    config = FinderConfig(method="imp", rounds=20, recipe=imp)
    cell = FindCell(
        pretrain=next(c for c in study_cells(quickstart()) if isinstance(c, PretrainCell)), finder="imp", config=config
    )
    assert cell_cost(cell, 1_281_167, 50_000, 50_000).train == pytest.approx(730e6, rel=1e-3)


def test_only_images_that_are_evaluated_cost_anything() -> None:
    """Of the limit in ``evaluation.images``; and twice only where the best weights may be others than the last."""
    transfer = next(cell for cell in study_cells(quickstart()) if isinstance(cell, TransferCell))
    for images, counted in ((None, 400), (50, 50), (1000, 400)):
        for every, times in ((0, 1), (1, 2)):
            cell = replace(
                transfer,
                evaluation=replace(transfer.evaluation, images=images),
                recipe=replace(transfer.recipe, validate_every=every),
            )
            assert cell_cost(cell, 100, 0, 400).evaluation == times * counted * (cell_evaluation(cell) + 1)


def test_floating_point_operations_of_a_pass() -> None:
    """4.09 billion products and sums are what ResNet-50 is known by."""
    assert pass_flops(ModelSpec("resnet50"), (3, 224, 224)) == pytest.approx(3 * 2 * 4.09e9, rel=1e-3)
    assert pass_flops(ModelSpec("resnet50"), (1, 224, 224)) < pass_flops(ModelSpec("resnet50"), (3, 224, 224))
    with pytest.raises(UsageError, match="does not take 28"):
        pass_flops(ModelSpec("vit_tiny_patch16_224"), (1, 28, 28))
