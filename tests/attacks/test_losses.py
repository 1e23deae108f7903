"""Losses: formulas written out row by row, few classes, signs, invariance, and gradients where logits are equal."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_robust.attacks import LOSSES
from sparse_robust.attacks.losses import cross_entropy_targeted, dlr, dlr_targeted, kl, margin

CLASSES = [2, 3, 4, 10]


def some_logits(classes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [12, classes], every label, and targets that are none of them."""
    y = torch.arange(12) % classes
    return 3 * torch.randn(12, classes, dtype=dtype), y, (y + 1 + torch.arange(12) % (classes - 1)) % classes


def ce_of(row: list[float], y: int) -> float:
    return math.log(sum(math.exp(value - row[y]) for value in row))


def cw_of(row: list[float], y: int) -> float:
    return max(value for j, value in enumerate(row) if j != y) - row[y]


def dlr_of(row: list[float], y: int) -> float:
    ordered = sorted(row, reverse=True)
    return cw_of(row, y) / (1 if len(row) == 2 else ordered[0] - ordered[2])


def dlr_targeted_of(row: list[float], y: int, target: int) -> float:
    ordered = sorted(row, reverse=True)
    gap = {2: 1.0, 3: ordered[0] - ordered[-1]}.get(len(row)) or ordered[0] - (ordered[2] + ordered[3]) / 2
    return -(row[y] - row[target]) / gap


FORMULAS: dict[str, Callable[[list[float], int], float]] = {"ce": ce_of, "cw": cw_of, "dlr": dlr_of}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_are_per_image(name: str, classes: int, dtype: torch.dtype) -> None:
    logits, y, _ = some_logits(classes, dtype)
    values = LOSSES[name](logits, y)
    expected = [FORMULAS[name](row, label) for row, label in zip(logits.tolist(), y.tolist(), strict=True)]
    torch.testing.assert_close(values, torch.tensor(expected, dtype=dtype), rtol=1e-5, atol=1e-5)
    alone = [LOSSES[name](logits[[i]], y[[i]]) for i in range(12)]
    assert torch.equal(torch.cat(alone), values)


@pytest.mark.parametrize("classes", CLASSES)
def test_targeted_losses_are_per_image(classes: int) -> None:
    logits, y, target = some_logits(classes, torch.float64)
    columns = list(zip(logits.tolist(), y.tolist(), target.tolist(), strict=True))
    towards = torch.tensor([dlr_targeted_of(*column) for column in columns], dtype=torch.float64)
    torch.testing.assert_close(dlr_targeted(logits, y, target), towards)
    likelihood = torch.tensor([-ce_of(row, aim) for row, _, aim in columns], dtype=torch.float64)
    torch.testing.assert_close(cross_entropy_targeted(logits, target), likelihood)


@pytest.mark.parametrize("classes", CLASSES)
def test_kl_is_that_of_the_clean_prediction_from_the_adversarial_one(classes: int) -> None:
    logits, clean = torch.randn(2, 7, classes, dtype=torch.float64)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=clean), torch.distributions.Categorical(logits=logits)
    )
    torch.testing.assert_close(kl(logits, clean), expected)
    leaf = clean.clone().requires_grad_(True)
    value = kl(leaf, clean)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    assert value.abs().max() < 1e-12 and grad.abs().max() < 1e-12
    assert (kl(logits, clean) > 0).all()
    certain = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    assert kl(certain, certain.flip(0)).tolist() == [1e4, 1e4]


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("classes", CLASSES)
def test_larger_is_closer_to_another_class(name: str, classes: int) -> None:
    row = 1.0 - torch.arange(classes)[None]  # the best of the others is 0
    y = torch.tensor([0])
    values = []
    for own in (5.0, 2.0, 0.5, -0.5, -2.0):
        row[0, 0] = own
        values.append(float(LOSSES[name](row, y)))
    assert values == sorted(values) and values[0] < values[2] < values[3]
    if name != "ce":
        assert all((value > 0) == (own < 0) for value, own in zip(values, (5.0, 2.0, 0.5, -0.5, -2.0), strict=True))


@pytest.mark.parametrize("classes", CLASSES)
def test_targeted_losses_and_negated_losses_grow_towards_the_target(classes: int) -> None:
    logits, y, target = some_logits(classes)
    closer = logits.scatter_add(1, target[:, None], torch.full((12, 1), 0.5))
    assert (cross_entropy_targeted(closer, target) > cross_entropy_targeted(logits, target)).all()
    assert (-margin(closer, target) > -margin(logits, target)).all()
    reached = logits.scatter(1, target[:, None], logits.amax(1, keepdim=True) + 1)
    for loss in LOSSES.values():
        assert (-loss(reached, target) > -loss(reached, y)).all()
    ahead = (logits.gather(1, target[:, None]) > logits.gather(1, y[:, None]))[:, 0]
    assert torch.equal(dlr_targeted(logits, y, target) > 0, ahead)
    assert (dlr_targeted(reached, y, target) > 0).all()


@given(
    classes=st.sampled_from([3, 4, 10]),
    shift=st.floats(-50, 50),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**32),
)
def test_dlr_depends_on_neither_shift_nor_scale(classes: int, shift: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, classes, generator=generator, dtype=torch.float64)
    y, target = torch.arange(8) % classes, torch.arange(1, 9) % classes
    torch.testing.assert_close(dlr(scale * logits + shift, y), dlr(logits, y), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        dlr_targeted(scale * logits + shift, y, target), dlr_targeted(logits, y, target), rtol=1e-5, atol=1e-7
    )
    predicted = logits.argmax(1)
    assert (dlr(logits, predicted) <= 0).all() and (dlr(logits, predicted) >= -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 7.5, -1e4, 1e30])
@pytest.mark.parametrize("classes", CLASSES)
def test_equal_logits_have_finite_losses_and_gradients(classes: int, value: float, dtype: torch.dtype) -> None:
    _, y, target = some_logits(classes)
    losses = {**LOSSES, "dlr-t": lambda z, y: dlr_targeted(z, y, target), "kl": lambda z, y: kl(z, 0 * z)}
    for loss in losses.values():
        leaf = torch.full((12, classes), value, dtype=dtype, requires_grad=True)
        values = loss(leaf, y)
        (grad,) = torch.autograd.grad(values.sum(), leaf)
        assert values.dtype == dtype and values.shape == (12,)
        assert values.isfinite().all() and grad.isfinite().all()


def test_a_label_that_ties_with_another_class_has_no_margin() -> None:
    logits = torch.tensor([[2.0, 2.0, 1.0, 0.0]])
    for label in (0, 1):
        y = torch.tensor([label])
        assert margin(logits, y).item() == dlr(logits, y).item() == 0
    assert dlr(logits, torch.tensor([2])).item() == 1 and dlr(logits, torch.tensor([3])).item() == 2
    assert dlr_targeted(logits, torch.tensor([0]), torch.tensor([0])).item() == 0
