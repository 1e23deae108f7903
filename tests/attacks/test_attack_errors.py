"""What users get wrong, and what they are told; the model is not run before."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_robust.attacks import FGSM, PGD
from sparse_robust.errors import UsageError

X, Y = torch.rand(4, 3, 5, 5), torch.tensor([0, 1, 2, 0])


def model(x: Tensor) -> Tensor:
    return x.flatten(1)[:, :3]


def never(x: Tensor) -> Tensor:
    raise AssertionError("the model was run on bad input")


def nudged(value: float) -> Tensor:
    x = X.clone()
    x[1, 2, 3, 4] = value
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "linf"}, "unknown attack norm 'linf'. Did you mean 'Linf'"),
        ({"norm": "L0"}, "Known: L1, L2, Linf"),
        ({"loss": "CE"}, "Known: ce, cw, dlr, kl"),
        ({"keep": "best"}, "Known: first, last"),
        ({"loss": "kl", "random_start": False}, "needs a random start"),
        ({"alpha": 0.1, "step_size": 0.2}, "alpha is another name for step_size"),
        ({"momentum": -1}, "momentum must be 0 or more"),
        ({"mode": "training"}, "unknown attack mode 'training'. Did you mean 'train'"),
        ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"steps": True}, "steps must be an integer"),
        ({"n_restarts": 0}, "n_restarts must be an integer of at least 1"),
        ({"n_restarts": 2, "random_start": False}, "restarts without a random start"),
        ({"step_size": "two"}, "such as '8/255'"),
        ({"step_size": -0.1}, "finite and 0 or more"),
        ({"step_size": math.nan}, "finite and 0 or more"),
    ],
)
def test_wrong_hyper_parameters_are_named_at_once(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        PGD(**change)
    assert message in str(caught.value)


def test_fgsm_has_one_step() -> None:
    with pytest.raises(TypeError):
        FGSM(steps=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": "8/255px"}, "such as '8/255'"),
        ({"eps": -0.1}, "finite and 0 or more, got -0.1"),
        ({"eps": math.nan}, "finite and 0 or more"),
        ({"eps": 8}, "did you mean '8/255'"),
        ({"x": (255 * X).to(torch.uint8)}, "got uint8 [4, 3, 5, 5]"),
        ({"x": X.half()}, "autocast"),
        ({"x": X.flatten()}, "got float32 [300]"),
        ({"x": X.numpy()}, "got ndarray"),
        ({"x": 255 * X}, "divide uint8 pixels by 255"),
        ({"x": nudged(-0.01)}, "images must lie in [0, 1], got values from -0.01 to"),
        ({"x": nudged(math.nan)}, "got values from nan"),
        ({"y": Y.int()}, "got int32 [4]"),
        ({"y": Y[:3]}, "int64 [4] for these images, got int64 [3]"),
        ({"y": torch.eye(3)[Y]}, "got float32 [4, 3]"),
        ({"ids": torch.arange(3)}, "sample ids are int64 [4]"),
        ({"ids": torch.arange(4.0)}, "sample ids are int64 [4]"),
        ({"y": Y.to("meta")}, "labels on meta"),
    ],
)
def test_wrong_batches_are_named_before_the_model_runs(change: dict[str, Any], message: str) -> None:
    arguments = {"x": X, "y": Y, "eps": 0.1, "ids": None} | change
    x, y, options = arguments["x"], arguments["y"], {"eps": arguments["eps"], "ids": arguments["ids"]}
    for call in (PGD(), PGD(n_restarts=2), PGD().run, FGSM()):
        with pytest.raises(UsageError) as caught:
            call(never, x, y, **options)
        assert message in str(caught.value)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, -1, 2, 0], [-100, 0, 0, 0]])
def test_labels_out_of_range(labels: list[int]) -> None:
    for call in (PGD(), PGD(steps=0).run, PGD(loss="cw").run):
        with pytest.raises(UsageError, match=r"labels must be in 0..2 for a model with 3 outputs"):
            call(model, X, torch.tensor(labels), eps=0.1)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: (model(x), None), "got tuple"),
        (lambda x: model(x)[:2], r"n = 4; got float32 \[2, 3\]"),
        (lambda x: x, r"got float32 \[4, 3, 5, 5\]"),
        (lambda x: model(x)[:, :1], r"got float32 \[4, 1\]"),
        (lambda x: model(x.detach()), "no gradient with respect to its input"),
        (lambda x: torch.zeros(4, 3), "no gradient with respect to its input"),
    ],
)
def test_models_that_do_not_return_logits(output: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PGD()(output, X, Y, eps=0.1)


def test_an_linf_sized_l2_radius_warns() -> None:
    with pytest.warns(UserWarning, match="size of another norm's"):
        PGD(norm="L2", steps=1)(model, X, Y, eps="8/255")
