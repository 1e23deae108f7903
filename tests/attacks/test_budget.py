"""The budget's contract: no pixel and no norm outside of it, not by one unit in the last place."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from torch import Tensor, nn

from sparse_robust.attacks import PGD, Budget, parse_eps
from sparse_robust.errors import UsageError

RADII = [0.0, 1e-6, 0.5 / 255, 2 / 255, 8 / 255, 0.1, 0.3, 1.0]

pixels = st_numpy.arrays(np.float32, (2, 7), elements=st.floats(0, 1, width=32))
anything = st_numpy.arrays(np.float32, (2, 7), elements=st.floats(-1e6, 1e6, width=32))
radii = st.one_of(st.sampled_from(RADII), st.floats(1e-6, 1))


def bounds(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """lo and hi of the contract, computed by NumPy in float32."""
    radius = np.float32(eps)
    lo = np.maximum(x.numpy() - radius, np.float32(0))
    hi = np.minimum(x.numpy() + radius, np.float32(1))
    return torch.from_numpy(lo), torch.from_numpy(hi)


def pixels_100_000() -> Tensor:
    """1e5 pixels, [10, 10000]: 8-bit ones and ones of full precision, exact zeros and ones among them."""
    x = torch.rand(10, 10_000, dtype=torch.float64).float()  # float32 draws lie on a grid of 2**-24
    x[:, ::2] = torch.randint(256, (10, 5_000)) / 255
    x[torch.rand_like(x) < 0.05], x[torch.rand_like(x) < 0.05] = 0, 1
    return x


class Linear(nn.Module):
    """Logits (0, w.x) for flattened images."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.mark.acceptance("double-win", "A-17")
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("eps", RADII)
def test_no_pixel_leaves_the_linf_budget(eps: float, steps: int) -> None:
    x = pixels_100_000()
    model, y = Linear(torch.randn(10_000) / 1000), torch.arange(10) % 2
    for random_start in (True, False):
        x_adv = PGD(steps=steps, step_size=2 / 255, random_start=random_start)(model, x, y, eps=eps)
        lo, hi = bounds(x, eps)
        assert int((x_adv < lo).sum()) == int((x_adv > hi).sum()) == 0
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert Budget("Linf", eps).contains(x_adv, x).all()
        if eps == 0 or (steps == 0 and not random_start):
            assert torch.equal(x_adv.view(torch.int32), x.view(torch.int32)) and x_adv is not x
        else:
            assert not torch.equal(x_adv, x)


@pytest.mark.acceptance("double-win", "A-17")
@pytest.mark.filterwarnings("ignore:an L2 eps")
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 8 / 255, 0.5, 128 / 255, 3.0, 1000.0])
def test_no_norm_leaves_the_l2_budget(eps: float, steps: int) -> None:
    x = pixels_100_000()
    model, y = Linear(torch.randn(10_000) / 1000), torch.arange(10) % 2
    for random_start in (True, False):
        budget, attack = Budget("L2", eps), PGD(norm="L2", steps=steps, random_start=random_start)
        x_adv = attack(model, x, y, eps=eps)
        # Not by the budget's own measure, and not by another one in float64.
        assert all(float(norm) <= eps for norm in budget.measure(x_adv, x))
        assert all(float(norm) <= eps for norm in (x_adv.double() - x.double()).norm(dim=1))
        assert x_adv.min() >= 0 and x_adv.max() <= 1
        assert budget.contains(x_adv, x).all()
        if eps == 0 or (steps == 0 and not random_start):
            assert torch.equal(x_adv, x)


@given(x=pixels, other=anything, eps=radii)
@example(x=np.ones((2, 7), np.float32), other=np.zeros((2, 7), np.float32), eps=8 / 255)
def test_linf_projection(x: np.ndarray, other: np.ndarray, eps: float) -> None:
    budget, clean, point = Budget("Linf", eps), torch.from_numpy(x), torch.from_numpy(other)
    projected = budget.project(point, clean)
    lo, hi = bounds(clean, eps)
    assert torch.equal(projected, torch.minimum(torch.maximum(point, lo), hi))
    assert budget.contains(projected, clean).all()
    assert torch.equal(budget.project(projected, clean), projected)
    assert budget.contains(clean, clean).all() and torch.equal(budget.project(clean, clean), clean)


@pytest.mark.filterwarnings("ignore:an L2 eps")
@given(x=pixels, other=anything, eps=st.one_of(radii, st.floats(1, 100)))
@example(x=np.full((2, 7), 0.99999, np.float32), other=np.full((2, 7), 0.9999, np.float32), eps=1e-6)
@example(x=np.full((2, 7), 1, np.float32), other=np.full((2, 7), 1 - 2**-24, np.float32), eps=2**-25)
def test_l2_projection(x: np.ndarray, other: np.ndarray, eps: float) -> None:
    budget, clean, point = Budget("L2", eps), torch.from_numpy(x), torch.from_numpy(other)
    projected = budget.project(point, clean)
    assert all(float(norm) <= eps for norm in budget.measure(projected, clean))
    assert projected.min() >= 0 and projected.max() <= 1
    assert budget.contains(projected, clean).all()
    assert torch.equal(budget.project(projected, clean), projected)
    assert budget.contains(clean, clean).all() and torch.equal(budget.project(clean, clean), clean)
    # The nearest point of the ball to the clipped point lies on the segment towards x.
    clipped = np.clip(other.astype(np.float64), 0, 1) - x
    length = np.linalg.norm(clipped, axis=1, keepdims=True)
    expected = x + clipped * np.minimum(1, eps / np.maximum(length, 1e-300))
    np.testing.assert_allclose(projected.numpy(), expected, rtol=0, atol=6e-8 + 6e-6 * min(eps, 1))


@pytest.mark.filterwarnings("ignore:an L2 eps")
@given(x=pixels, grad=anything, eps=radii, step_size=st.floats(0, 10), norm=st.sampled_from(["Linf", "L2"]))
def test_steps_stay_inside(x: np.ndarray, grad: np.ndarray, eps: float, step_size: float, norm: str) -> None:
    budget, clean = Budget(norm, eps), torch.from_numpy(x)
    x_adv = clean
    for sign in (1, 1, -1):
        x_adv = budget.step(x_adv, sign * torch.from_numpy(grad), clean, step_size)
        assert budget.contains(budget.project(x_adv, clean), clean).all()
        # A step's own result may leave an L2 ball by the rounding of x + delta, 2**-25 an element.
        assert (budget.measure(x_adv, clean) <= eps + math.sqrt(7) * 2**-24).all()


@pytest.mark.acceptance("double-win", "A-17")
def test_what_overshoots_in_the_delta_formulation_is_inside_the_bounds_of_ours() -> None:
    """Carrying delta = clip(x + delta) - x, as older libraries do, leaves |delta| up to 3e-8 above eps."""
    eps, step_size = 8 / 255, 2 / 255
    x = pixels_100_000()
    model, y = Linear(torch.randn(10_000) / 1000), torch.zeros(10, dtype=torch.int64)
    ascent = model.weight.detach().sign()
    delta = torch.zeros_like(x)
    for _ in range(20):
        delta = (delta + step_size * ascent).clamp(-eps, eps)
        delta = (x + delta).clamp(0, 1) - x
    assert 2.6e-8 < float((delta.abs().double() - eps).max()) < 3e-8

    x_adv = PGD(steps=20, step_size=step_size, random_start=False)(model, x, y, eps=eps)
    lo, hi = bounds(x, eps)
    assert bool((x_adv >= lo).all()) and bool((x_adv <= hi).all())
    torch.testing.assert_close(x_adv, x + delta, rtol=0, atol=6e-8)
    # The difference of two floats is rounded: only the bounds can be met exactly.
    assert float((x_adv.double() - x.double()).abs().max()) > eps


def test_double_precision_images_stay_double() -> None:
    x = torch.rand(3, 4, dtype=torch.float64)
    model = Linear(torch.randn(4, dtype=torch.float64))
    for norm in ("Linf", "L2"):
        x_adv = PGD(norm=norm)(model, x, torch.zeros(3, dtype=torch.int64), eps=0.3)
        assert x_adv.dtype == torch.float64 and Budget(norm, 0.3).contains(x_adv, x).all()


def test_another_box() -> None:
    x = torch.rand(4, 6) * 2 - 1
    for norm in ("Linf", "L2"):
        budget = Budget(norm, 0.5, -1.0, 1.0)
        far = budget.project(x + 10 * torch.randn_like(x), x)
        assert budget.contains(far, x).all() and far.min() < 0
    assert not Budget("Linf", 0.5, -1.0, 1.0).contains(x + 0.6, x).any()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8/255", 8 / 255),
        (" 0.5 / 255 ", 0.5 / 255),
        ("0.03", 0.03),
        ("1e-2", 0.01),
        (0, 0.0),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
    ],
)
def test_eps_as_text_and_number(value: str | float, expected: float) -> None:
    assert parse_eps(value) == expected
    assert Budget("Linf", value).eps == expected


@pytest.mark.parametrize("value", ["", "eight", "8/255/2", "8/0", "8//255", None, True, [1], "8/255px", 1j])
def test_eps_that_is_no_number(value: object) -> None:
    with pytest.raises(UsageError, match="such as '8/255'"):
        parse_eps(value)


@pytest.mark.parametrize("value", [-0.1, "-8/255", math.nan, "nan", math.inf, "inf"])
def test_eps_out_of_range(value: str | float) -> None:
    with pytest.raises(UsageError, match="finite and 0 or more"):
        parse_eps(value)


def test_eps_in_pixel_counts_is_caught() -> None:
    with pytest.raises(UsageError, match="did you mean '8/255'"):
        Budget("Linf", 8)
    with pytest.raises(UsageError, match="did you mean '8/255'"):
        parse_eps("8", "Linf")
    assert parse_eps(3, "L2") == 3
    assert Budget("Linf", 8, 0, 255).eps == 8


def test_an_l2_radius_of_linf_size_warns() -> None:
    with pytest.warns(UserWarning, match="L2 eps"):
        Budget("L2", "8/255")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Budget("L2", 0.5), Budget("L2", 0.0), Budget("Linf", 8 / 255)


def test_a_budget_needs_a_known_norm_a_radius_and_a_box() -> None:
    with pytest.raises(UsageError, match="Did you mean 'Linf'"):
        Budget("linf", 0.1)
    with pytest.raises(UsageError, match="nan"):
        Budget("Linf")
    with pytest.raises(UsageError, match="lo < hi"):
        Budget("Linf", 0.1, 1.0, 0.0)
