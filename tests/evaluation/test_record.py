"""The record says what was measured, of which network, and nothing that was not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sparse_robust.bench.machines import machine
from sparse_robust.errors import UsageError
from sparse_robust.evaluation.record import RobustnessRecord, eps_text, make_record, robust_at, write_record
from sparse_robust.evaluation.verdicts import Verdicts
from sparse_robust.masks import Masks
from sparse_robust.models import create_model

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


def evaluation(names: tuple[str, ...] = STANDARD, radii: tuple[float, ...] = (8 / 255,)) -> Any:
    stages = tuple((name, eps) for eps in radii for name in names)
    columns = {name: torch.zeros(3, dtype=column.dtype) for name, column in Verdicts.empty().columns().items()}
    after = tuple(0.9 - 0.05 * (i + 1) for i in range(len(stages)))
    return SimpleNamespace(
        clean=0.9, robust=after[-1] if after else 0.9, robust_after=after, stages=stages, per_image=Verdicts(**columns),
        counts={"forward": 70, "backward": 50, "queries": 20}, flips={"candidates": 7, "rejected": 1},
    )  # fmt: skip


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))  # 40 + 34 parameters


def record(*args: Any, **changes: Any) -> RobustnessRecord:
    about: dict[str, Any] = {"name": "a model", "dataset": "digits", "date": "2026-01-02", **changes}
    return make_record(*(args or (evaluation(), network())), **about)


def half_masks(model: nn.Module) -> Masks:
    keep = torch.zeros(4, 1, 3, 3, dtype=torch.bool)
    keep[:3] = True
    return Masks.from_bools({"0.weight": keep})


def test_fields_have_the_documented_order_and_values() -> None:
    found = record(version="standard")
    documented = re.findall(r"^ *(\w+)  +\S", RobustnessRecord.__doc__ or "", re.MULTILINE)
    assert list(found) == documented == list(RobustnessRecord.__annotations__)
    assert found["threat_model"] == "Linf" and found["eps"] == "8/255"
    assert found["clean_acc"] == "90.00" and found["robust_acc"] == found["autoattack_acc"] == "70.00"
    assert found["attacks"][1] == {"attack": "apgd-t", "eps": "8/255", "robust_acc": "80.00"}
    assert found["images"] == 3 and found["counts"]["queries"] == 20 and found["flips"]["rejected"] == 1
    assert found["date"] == "2026-01-02" and found["versions"]["torch"] == torch.__version__
    assert record(version="standard") == found


def test_a_dense_network_is_said_to_be_dense() -> None:
    found = record()
    assert (found["parameters"], found["remaining_params"], found["sparsity"], found["ticket"]) == (74, 74, 0.0, "")
    assert found["architecture"] == "Sequential" and found["pattern"] == "unstructured"


def test_sparsity_is_counted_over_prunable_and_over_all_weights() -> None:
    model = network()
    masks = half_masks(model)
    masks.apply_(model)
    found = record(evaluation(), model, masks=masks, pattern="channel")
    assert found["sparsity"] == 9 / 36 and found["sparsity_all"] == 9 / 74 and found["remaining_params"] == 65
    assert found["ticket"] == masks.digest() and found["pattern"] == "channel"


def test_masks_that_were_not_applied_or_belong_elsewhere_are_refused() -> None:
    model = network()
    with pytest.raises(UsageError, match=r"9 pruned weights of 0\.weight are not zero .*masks\.apply_\(model\)"):
        record(evaluation(), model, masks=half_masks(model))
    with pytest.raises(UsageError, match="belong to another model"):
        record(evaluation(), nn.Sequential(nn.Conv2d(1, 5, 3)), masks=half_masks(model))
    with pytest.raises(UsageError, match="of a plain function they say nothing"):
        record(evaluation(), lambda x: x, masks=half_masks(model))


def test_the_architecture_comes_from_the_model() -> None:
    model = create_model("resnet10t", num_classes=10, in_chans=1, channels=(4, 6, 8, 10), stem_width=4)
    assert record(evaluation(), model)["architecture"] == "resnet10t"
    assert record(evaluation(), model, architecture="mine")["architecture"] == "mine"
    assert record(evaluation(), len)["architecture"] == "len" and record(evaluation(), len)["parameters"] is None


def test_autoattack_accuracy_is_there_only_for_the_standard_version() -> None:
    assert "autoattack_acc" not in record()
    assert "autoattack_acc" not in record(evaluation(("apgd-ce", "apgd-dlr")), network(), version="rand")
    with pytest.raises(UsageError, match="standard version is apgd-ce, apgd-t, fab-t, square, and .* apgd-ce, pgd"):
        record(evaluation(("apgd-ce", "pgd")), network(), version="standard")


def test_one_of_several_radii_is_chosen() -> None:
    several = evaluation(("pgd", "square"), (2 / 255, 4 / 255, 8 / 255))
    found = record(several, network(), eps="4/255")
    assert found["eps"] == "4/255" and found["robust_acc"] == "70.00" and len(found["attacks"]) == 4
    assert robust_at(several) == pytest.approx({2 / 255: 0.8, 4 / 255: 0.7, 8 / 255: 0.6})
    with pytest.raises(UsageError, match="several radii: say with eps which one .* 2/255, 4/255, 8/255"):
        record(several, network())
    with pytest.raises(UsageError, match=r"no attack at eps '6/255'; it has 2/255"):
        record(several, network(), eps="6/255")
    with pytest.raises(UsageError, match="needs an evaluation with at least one attack"):
        record(evaluation(()), network())
    with pytest.raises(UsageError, match="unknown norm 'inf'"):
        record(norm="inf")


def test_it_is_written_as_json_in_the_same_order(tmp_path: Path) -> None:
    found = record(flags=["Square wins by 3.1 points."], machine=machine(), footnote="a note")
    write_record(tmp_path / "record.json", found)
    back = json.loads((tmp_path / "record.json").read_text())
    assert back == found and list(back) == list(found)
    assert back["machine"]["cores"] >= 1 and back["flags"] == ["Square wins by 3.1 points."]
    assert record(machine={"cpu": "x"})["machine"] == {"cpu": "x"}


@pytest.mark.parametrize(
    ("eps", "text"),
    [(0.0, "0"), (8 / 255, "8/255"), (0.5 / 255, "0.5/255"), (0.3, "0.3"), (0.5, "0.5"), (128 / 255, "128/255"),
     (12.0, "12"), (0.12345, "0.12345"), (1e-9, "1e-09"), (1.0, "1")],
)  # fmt: skip
def test_radii_are_written_as_people_do(eps: float, text: str) -> None:
    assert eps_text(eps) == text
