"""ModelSpec: a value that goes through JSON and refuses what it cannot hold."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.models import ModelSpec, create_model, spec_of

SPEC = ModelSpec("convnext_atto", 7, 1, kwargs={"dims": [8, 16], "block": {"x": [1, [2.5, None]]}, "act_layer": None})


def test_json_round_trip_is_exact() -> None:
    again = ModelSpec.from_dict(json.loads(json.dumps(SPEC.to_dict())))
    assert again == SPEC
    assert hash(again) == hash(SPEC)
    assert again.kwargs == {"dims": (8, 16), "block": {"x": (1, (2.5, None))}}


def test_lists_and_tuples_mean_the_same() -> None:
    assert ModelSpec("x", kwargs={"dims": [1, 2]}) == ModelSpec("x", kwargs={"dims": (1, 2)})
    assert ModelSpec("x", kwargs={"dims": [1, 2]}) != ModelSpec("x", kwargs={"dims": [2, 1]})
    assert len({SPEC, copy.deepcopy(SPEC), pickle.loads(pickle.dumps(SPEC)), ModelSpec("x")}) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_classes": 1}, "num_classes must be a whole number of 2 or more, got 1"),
        ({"num_classes": True}, "num_classes"),
        ({"in_chans": 0}, "in_chans must be a whole number of 1 or more, got 0"),
        ({"stem": "smal"}, "Did you mean 'small'"),
        ({"name": ""}, "named by a text"),
        ({"kwargs": [1]}, "kwargs must map"),
        ({"kwargs": {"act_layer": nn.GELU}}, "'act_layer' must be made of JSON values"),
        ({"kwargs": {"drop_rate": float("nan")}}, "'drop_rate' must be made of JSON values"),
        ({"kwargs": {"block_args": {1: 2}}}, "a key that is no text"),
        ({"kwargs": {"checkpoint_path": "x.pth"}}, "give checkpoint instead"),
        ({"kwargs": {"cache_dir": "/tmp"}}, "HF_HOME"),
        ({"pretraned": True}, "Did you mean 'pretrained'"),
    ],
)
def test_errors_name_the_field(change: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        ModelSpec.from_dict({"name": "resnet18"} | change)


def test_a_name_is_needed() -> None:
    with pytest.raises(UsageError, match="needs the key 'name'"):
        ModelSpec.from_dict({"num_classes": 3})


def test_spec_of_a_foreign_model_is_refused() -> None:
    with pytest.raises(UsageError, match="Linear carries no ModelSpec"):
        spec_of(nn.Linear(1, 1))
    assert spec_of(create_model("test_vit", num_classes=4)).num_classes == 4
