"""The drop-in for AutoAttack, and what an evaluation says to bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_robust as sr
from sparse_robust.attacks import FGSM, PGD, AutoAttack, autoattack
from sparse_robust.errors import UsageError
from sparse_robust.evaluation import evaluate, read_evaluation


def adversary(model: Any, **changes: Any) -> AutoAttack:
    """The standard ensemble, with the settings that a test can afford."""
    given = {"norm": "Linf", "eps": 0.08, "version": "standard", "verbose": False, **changes}
    found = AutoAttack(model, **given)
    found.apgd.n_iter = found.apgd_targeted.n_iter = found.fab.n_iter = 10
    found.apgd_targeted.n_target_classes = found.fab.n_target_classes = 3
    found.square.n_queries = 50
    return found


def test_it_behaves_as_its_users_expect(digits: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, x, y, _ = digits
    assert sr.attacks.AutoAttack is AutoAttack
    tried = adversary(model, verbose=True, log_path=tmp_path / "log.txt")
    x_adv, labels = tried.run_standard_evaluation(x, y, bs=20, return_labels=True)
    assert x_adv.shape == x.shape and x_adv.dtype == x.dtype and x_adv.device == x.device
    assert torch.equal(labels, model(x_adv).argmax(1))
    broken = labels != y
    assert 0.1 < broken.float().mean() < 0.9
    assert float((x_adv - x).abs().max()) <= 0.08 + 1e-7 and torch.equal(x_adv[~broken], x[~broken])
    assert tried.evaluation is not None and tried.evaluation.robust == pytest.approx(1 - float(broken.float().mean()))
    assert {name for name, _ in tried.evaluation.stages} == {"apgd-ce", "apgd-t", "fab-t", "square"}
    assert tried.clean_accuracy(x, y) == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    for text in (capsys.readouterr().err, (tmp_path / "log.txt").read_text()):
        assert "apgd-ce" in text and "AutoAttack standard, Linf eps 0.08, 64 images" in text
    assert torch.equal(adversary(model).run_standard_evaluation(x, y, bs=3), x_adv)


def test_a_plain_function_is_enough(digits: Any) -> None:
    model, x, y, _ = digits
    tried = adversary(lambda images: model(images), version="custom", attacks_to_run=["apgd-ce", "square"])
    assert (model(tried.run_standard_evaluation(x, y)).argmax(1) != y).any()


def test_each_attack_alone(digits: Any) -> None:
    model, x, y, _ = digits
    found = adversary(model).run_standard_evaluation_individual(x[:30], y[:30])
    assert list(found) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    together = adversary(model).run_standard_evaluation(x[:30], y[:30])
    fooled = [model(images).argmax(1) != y[:30] for images in found.values()]
    assert torch.equal(torch.stack(fooled).any(0), model(together).argmax(1) != y[:30])


def test_an_interrupted_evaluation_goes_on(digits: Any, tmp_path: Path) -> None:
    model, x, y, _ = digits
    file = tmp_path / "state.csv"
    adversary(model).run_standard_evaluation(x, y, state_path=file)
    text = file.read_bytes()
    rows = text.splitlines(keepends=True)
    file.write_bytes(b"".join(rows[:30]))
    again = adversary(model)
    again.run_standard_evaluation(x, y, state_path=file)
    assert file.read_bytes() == text
    assert again.evaluation is not None and again.evaluation.robust == read_evaluation(file).robust


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_versions_are_those_of_the_reference(norm: str) -> None:
    named = {version: [a.name for a in autoattack(version, norm=norm)] for version in ("standard", "plus", "rand")}
    assert named["standard"] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert named["plus"] == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    assert named["rand"] == ["apgd-ce", "apgd-dlr"]
    ce, targeted, fab, square = autoattack("standard", norm=norm)
    assert (ce.n_restarts, targeted.n_target_classes) == ((5, 5) if norm == "L1" else (1, 9))
    assert (ce.steps, targeted.steps, fab.steps, fab.n_target_classes, square.n_queries) == (100, 100, 100, 9, 5000)
    assert not square.last_row
    assert [a.n_restarts for a in autoattack("plus", norm=norm)] == [5, 5, 5, 1, 1, 1]
    assert {a.eot_iter for a in autoattack("rand", norm=norm)} == {20}


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_two_and_three_classes(classes: int, norm: str) -> None:
    """Where DLR is not defined as published, nothing crashes and the ensemble still works."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes)).eval()
    x = torch.rand(20, 1, 8, 8)
    y = model(x).argmax(1)
    tried = adversary(model, norm=norm, eps={"Linf": 0.05, "L2": 0.3, "L1": 1.5}[norm], version="plus")
    tried.run_standard_evaluation(x, y)
    assert tried.evaluation is not None and tried.evaluation.robust < 1


def test_a_model_with_randomness_of_its_own(digits: Any) -> None:
    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = digits.model

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.inner(images) + 0.5 * torch.randn(len(images), 10)
            return logits

    model = Noisy().eval()
    with pytest.warns(UserWarning, match="rand"):
        evaluate(model, [(digits.x, digits.y)], [FGSM()], 0.08)
    tried = AutoAttack(model, eps=0.08, version="rand", verbose=False)
    tried.apgd.n_iter, tried.apgd.eot_iter = 5, 4
    with pytest.warns(UserWarning, match="rand"):
        tried.run_standard_evaluation(digits.x, digits.y)
    assert tried.evaluation is not None and tried.evaluation.robust < 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "strong"}, "unknown version of AutoAttack 'strong'"),
        ({"norm": "L3"}, "unknown norm"),
        ({"attacks_to_run": ["apgd-ce"]}, "attacks_to_run is for version='custom'"),
        ({"version": "custom", "attacks_to_run": ["apgd"]}, "unknown attack of AutoAttack 'apgd'"),
        ({"eps": -0.1}, "0 or more"),
        ({"eps": 8}, "did you mean '8/255'"),
        ({"is_tf_model": True}, "TensorFlow"),
    ],
)
def test_wrong_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        AutoAttack(torch.nn.Identity(), **change)
    assert message in str(caught.value)
    tried = AutoAttack(torch.nn.Identity(), eps=0.1, verbose=False)
    tried.square.n_iter = 3
    with pytest.raises(UsageError, match="square has no setting 'steps'"):
        tried.attacks()
    tried = AutoAttack(torch.nn.Identity(), version="custom", eps=0.1, verbose=False)
    with pytest.raises(UsageError, match="needs attacks_to_run"):
        tried.run_standard_evaluation(torch.rand(2, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(AttributeError, match="n_querys"):
        tried.square.n_querys = 3  # type: ignore[attr-defined]


def breaks(digits: Any, how: str) -> tuple[Any, list[Any], Any]:
    """Return (model, loader, eps), one of them wrong."""
    model, x, y, ids = digits
    eps: Any = 0.05
    if how == "NaN logits":
        return lambda images: torch.full((len(images), 10), math.nan) * images.flatten(1)[:, :1], [(x, y, ids)], eps
    if how == "labels":
        y = y + 5
    elif how == "empty loader":
        return model, [], eps
    elif how == "label dtype":
        y = y.int()
    elif how == "eps":
        eps = -1
    elif how == "many eps":
        eps = []
    elif how == "pixels":
        x = 255 * x
    elif how == "dtype":
        x = (255 * x).to(torch.uint8)
    elif how == "twice":
        return model, [(x[:5], y[:5], ids[:5]), (x[:5], y[:5], ids[:5])], eps
    elif how == "probabilities":
        return lambda images: model(images).softmax(1), [(x, y, ids)], eps
    elif how == "no gradient":
        return lambda images: model(images.detach()), [(x, y, ids)], eps
    elif how == "one output":
        return lambda images: model(images)[:, :1], [(x, y, ids)], eps
    return model, [(x, y, ids)], eps


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("NaN logits", "NaN"), ("labels", "labels"), ("empty loader", "yields no batch"), ("label dtype", "int64"),
        ("eps", "0 or more"), ("many eps", "at least one"), ("pixels", "255"), ("dtype", "255"),
        ("twice", "came twice"), ("no gradient", "gradient"), ("one output", "logits|logit"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(digits: Any, tmp_path: Path, how: str, message: str, check: bool) -> None:
    model, loader, eps = breaks(digits, how)
    with pytest.raises(UsageError, match=message):
        evaluate(model, loader, [PGD(steps=2)], eps, check=check, file=tmp_path / "verdicts.csv")


def test_work_before_bad_input_is_kept(digits: Any, tmp_path: Path) -> None:
    """The third window is broken: the verdicts of the first two are in the file, and a mended loader goes on."""
    model, x, y, ids = digits
    bad = x.clone()
    bad[40] = 7.0
    file = tmp_path / "verdicts.csv"
    how = {"attacks": [PGD(steps=2)], "eps": 0.05, "file": file, "window": 16, "chunk": 8, "seconds": 0.0}
    with pytest.raises(UsageError, match=r"\[0, 1\]"):
        evaluate(model, [(bad[i : i + 16], y[i : i + 16], ids[i : i + 16]) for i in range(0, 64, 16)], **how)
    assert len(read_evaluation(file)) == 32
    whole = evaluate(model, [(x, y, ids)], **how)
    fresh = evaluate(model, [(x, y, ids)], **{**how, "file": None})
    assert torch.equal(whole.per_image.step, fresh.per_image.step)


def test_probabilities_are_named(digits: Any) -> None:
    model, loader, eps = breaks(digits, "probabilities")
    with pytest.warns(UserWarning, match="probabilit"):
        evaluate(model, loader, [FGSM()], eps)


def test_a_model_left_in_training_mode_is_named_and_left_there(digits: Any) -> None:
    digits.model.train()
    with pytest.warns(UserWarning, match="training mode"):
        evaluate(digits.model, [(digits.x, digits.y)], [FGSM()], 0.05)
    assert digits.model.training


def test_a_model_on_another_device(digits: Any) -> None:
    model = digits.model.to("meta")
    with pytest.raises(UsageError, match="meta"):
        PGD(steps=1).run(model, digits.x, digits.y, eps=0.1)
    with pytest.raises(UsageError, match="aims at given classes"):
        evaluate(digits.model, [(digits.x, digits.y)], [PGD(targeted=True)], 0.1)
