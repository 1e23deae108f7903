"""The budget's contract: no pixel and no norm outside of it, not by one unit in the last place."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from torch import Tensor, nn

from sparse_robust.attacks import PGD, Budget, parse_eps
from sparse_robust.errors import UsageError

RADII = [0.0, 1e-6, 0.5 / 255, 2 / 255, 8 / 255, 0.1, 0.3, 1.0]

pixels = st_numpy.arrays(np.float32, (2, 7), elements=st.floats(0, 1, width=32))
anything = st_numpy.arrays(np.float32, (2, 7), elements=st.floats(-1e6, 1e6, width=32))
radii = st.one_of(st.sampled_from(RADII), st.floats(1e-6, 1))

NORMS = ["Linf", "L2", "L1"]
small_eps_warns = pytest.mark.filterwarnings("ignore:an L[12] eps")


class Case(NamedTuple):
    """Images [n, d] in [0, 1], as many points anywhere, of one dtype, and a radius."""

    x: Tensor
    point: Tensor
    eps: float


@st.composite
def cases(draw: st.DrawFn, furthest: float = 1e6) -> Case:
    width = draw(st.sampled_from([32, 64]))
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 30])))

    def images(low: float, high: float) -> Tensor:
        elements = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(low, high, width=width))
        return torch.from_numpy(draw(st_numpy.arrays(f"f{width // 8}", shape, elements=elements)))

    return Case(images(0, 1), images(-furthest, furthest), draw(st.one_of(radii, st.floats(1, 40))))


def budget_of(norm: str, eps: float) -> Budget:
    return Budget(norm, min(eps, 1.0) if norm == "Linf" else eps)


def same_bits(one: Tensor, other: Tensor) -> bool:
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}[one.dtype]
    return one.dtype == other.dtype and torch.equal(one.view(integers), other.view(integers))


def assert_exactly_inside(z: Tensor, x: Tensor, budget: Budget) -> None:
    """Not by the budget's own word alone: ball and box, with no tolerance."""
    assert z.dtype == x.dtype and z.shape == x.shape
    assert bool((z >= 0).all()) and bool((z <= 1).all())
    if budget.norm == "Linf":
        radius = np.asarray(budget.eps, dtype=x.numpy().dtype)
        assert bool((z.numpy() <= x.numpy() + radius).all()) and bool((z.numpy() >= x.numpy() - radius).all())
    else:
        assert all(float(norm) <= budget.eps for norm in budget.measure(z, x))
    assert budget.contains(z, x).all()


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
@small_eps_warns
@pytest.mark.parametrize("steps", [0, 1, 7])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 128 / 255, 3.0, 12.0, 1e6])
@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_no_norm_leaves_the_l2_and_l1_budgets(norm: str, eps: float, steps: int) -> None:
    x = pixels_100_000()
    model, y = Linear(torch.randn(10_000) / 1000), torch.arange(10) % 2
    for random_start in (True, False):
        budget, attack = Budget(norm, eps), PGD(norm=norm, steps=steps, random_start=random_start)
        x_adv = attack(model, x, y, eps=eps)
        assert_exactly_inside(x_adv, x, budget)
        # Not by the budget's own measure, and not by another one in float64.
        true = torch.linalg.vector_norm(x_adv.double() - x.double(), ord=int(norm[1]), dim=1)
        assert all(float(length) <= eps for length in true)
        if eps == 0 or (steps == 0 and not random_start):
            assert torch.equal(x_adv, x)
        else:
            assert not torch.equal(x_adv, x)


@pytest.mark.acceptance("double-win", "A-17")
@small_eps_warns
@pytest.mark.parametrize("norm", NORMS)
@given(case=cases())
def test_projections_are_exact_idempotent_and_leave_alone_what_is_inside(norm: str, case: Case) -> None:
    x, point, eps = case
    budget = budget_of(norm, eps)
    projected = budget.project(point, x)
    assert_exactly_inside(projected, x, budget)
    assert same_bits(budget.project(projected, x), projected)
    assert same_bits(budget.project(x, x), x)
    between = x + (projected - x) / 2
    inside = budget.contains(between, x)
    assert same_bits(budget.project(between, x)[inside], between[inside])


@small_eps_warns
@pytest.mark.parametrize("norm", NORMS)
@given(case=cases())
def test_projections_take_rows_one_by_one(norm: str, case: Case) -> None:
    x, point, eps = case
    budget = budget_of(norm, eps)
    alone = [budget.project(point[[i]], x[[i]]) for i in range(len(x))]
    # But for the sign of a zero, which vector instructions take from either side of a comparison.
    assert torch.equal(torch.cat(alone), budget.project(point, x))


@small_eps_warns
@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=50)
@given(case=cases(furthest=20.0), seed=st.integers(0, 2**32))
def test_nothing_inside_is_nearer_than_the_projection(norm: str, case: Case, seed: int) -> None:
    x, point, eps = case
    budget = budget_of(norm, eps)
    if norm == "L2":  # its projection is that of the clipped point
        point = point.clamp(0, 1)
    projected = budget.project(point, x).double()
    distance = (projected - point.double()).norm(dim=1)
    generator = torch.Generator().manual_seed(seed)
    for scale in (1.0, 0.1, 1e-2, 1e-3, 1e-4):
        moved = projected + scale * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        candidate = budget.project(moved.to(x.dtype), x).double()
        tolerance = (4e-6 * min(eps, 1) + 2e-7) * math.sqrt(x.shape[1])
        assert ((candidate - point.double()).norm(dim=1) >= distance - tolerance).all()


@small_eps_warns
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [1, 5, 1000])
def test_extreme_images_points_and_radii(norm: str, dtype: torch.dtype, numel: int) -> None:
    levels = torch.tensor([0.0, 1.0, 0.5, 1 / 3, 2.0**-149], dtype=dtype)
    x = levels[:, None].repeat(1, numel)
    for value in (0.0, 1.0, -0.5, 1.5, 1e6, -1e6, math.inf, -math.inf, 2.0**-149, float(np.nextafter(1, 2))):
        point = torch.full_like(x, value)
        nothing = budget_of(norm, 0.0)
        assert_exactly_inside(nothing.project(point, x), x, nothing)
        # Squares of numbers below 1e-22 underflow: such a perturbation has no length in L2.
        assert (nothing.project(point, x) - x).abs().max() <= (1e-22 if norm == "L2" else 0.0)
        everything = budget_of(norm, 1e9)
        assert torch.equal(everything.project(point, x), point.clamp(0, 1))
        for eps in (1e-300, 2.0**-149, 2.0**-126, 1e-6, 0.25, 1 / 3, 1.0, 7.0):
            budget = budget_of(norm, eps)
            assert_exactly_inside(budget.project(point, x), x, budget)


@small_eps_warns
@pytest.mark.parametrize("norm", NORMS)
@given(case=cases(), data=st.data())
def test_starts_are_inside(norm: str, case: Case, data: st.DataObject) -> None:
    x, _, eps = case
    budget = budget_of(norm, eps)
    numbers = st.floats(0, 1, exclude_max=True, width=32)
    shape = (len(x), budget.noise_size(x))
    uniform = torch.from_numpy(data.draw(st_numpy.arrays(np.float32, shape, elements=numbers)))
    assert_exactly_inside(budget.start(x, uniform), x, budget)


@pytest.mark.parametrize("norm", NORMS)
def test_thousands_of_starts_are_inside(norm: str) -> None:
    x = pixels_100_000().view(100, 1000)
    for eps in {"Linf": [8 / 255], "L2": [0.5, 30.0], "L1": [12.0, 1e4]}[norm]:
        budget = Budget(norm, eps)
        for images in (x, x.double()):
            start = budget.start(images, torch.rand(100, budget.noise_size(x)))
            assert_exactly_inside(start, images, budget)
            assert (start != images).any(1).all()


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


@small_eps_warns
@given(x=pixels, grad=anything, eps=radii, step_size=st.floats(0, 10), norm=st.sampled_from(NORMS))
def test_steps_stay_inside(x: np.ndarray, grad: np.ndarray, eps: float, step_size: float, norm: str) -> None:
    budget, clean = Budget(norm, eps), torch.from_numpy(x)
    x_adv = clean
    for sign in (1, 1, -1):
        x_adv = budget.step(x_adv, sign * torch.from_numpy(grad), clean, step_size)
        assert budget.contains(budget.project(x_adv, clean), clean).all()
        if norm != "L2":
            assert_exactly_inside(x_adv, clean, budget)
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
    for norm, eps in (("Linf", 0.3), ("L2", 0.3), ("L1", 1.5)):
        x_adv = PGD(norm=norm)(model, x, torch.zeros(3, dtype=torch.int64), eps=eps)
        assert x_adv.dtype == torch.float64 and Budget(norm, eps).contains(x_adv, x).all()


def test_another_box() -> None:
    x = torch.rand(4, 6) * 2 - 1
    for norm, eps in (("Linf", 0.5), ("L2", 0.5), ("L1", 2.5)):
        budget = Budget(norm, eps, -1.0, 1.0)
        far = budget.project(x + 10 * torch.randn_like(x), x)
        assert budget.contains(far, x).all() and far.min() < 0
        assert far.min() >= -1 and far.max() <= 1
    assert not Budget("Linf", 0.5, -1.0, 1.0).contains(x + 0.6, x).any()
    thirds = Budget("L1", 100, -1 / 3, 1 / 3)  # bounds that no float32 hits
    x = x.clamp(-1 / 3, 1 / 3)
    assert thirds.contains(thirds.project(x + torch.randn_like(x), x), x).all()


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
    assert parse_eps(3, "L2") == 3 and parse_eps(12, "L1") == 12
    assert Budget("Linf", 8, 0, 255).eps == 8


def test_a_radius_of_another_norms_size_warns() -> None:
    with pytest.warns(UserWarning, match=r"an L2 eps of 0.03137 .* 0\.5 to 3"):
        Budget("L2", "8/255")
    for eps in ("8/255", 0.3, "128/255", 1.0):
        with pytest.warns(UserWarning, match=r"an L1 eps of .* 5 to 255"):
            Budget("L1", eps)
    with pytest.warns(UserWarning, match="L1"):
        Budget("L1", 200, 0, 255)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Budget("L2", 0.5), Budget("L2", 0.0), Budget("Linf", 8 / 255)
        Budget("L1", 0.0), Budget("L1", 2.0), Budget("L1", "2000/255"), Budget("L1", 255)


def test_a_budget_needs_a_known_norm_a_radius_and_a_box() -> None:
    with pytest.raises(UsageError, match="Did you mean 'Linf'"):
        Budget("linf", 0.1)
    with pytest.raises(UsageError, match="nan"):
        Budget("Linf")
    with pytest.raises(UsageError, match="lo < hi"):
        Budget("Linf", 0.1, 1.0, 0.0)
