"""L1: the projection against its break points, starts uniform in the ball, sparse steps, and linear memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_robust.attacks import PGD, Budget
from sparse_robust.attacks.l1 import L1_START_SPARE, l1_norm, l1_start, l1_step, project_l1_box, sparse_sign


def by_break_points(point: np.ndarray, x: np.ndarray, eps: float) -> np.ndarray:
    """The projection of one point, in float64, as Croce and Hein find it: the norm is linear between break points."""
    point, x = point.astype(np.float64), x.astype(np.float64)
    delta = point - x
    length, room = np.abs(delta), np.where(delta > 0, 1 - x, x)

    def norm(threshold: float) -> float:
        return float(np.clip(length - threshold, 0, room).sum())

    if norm(0.0) <= eps:
        return np.clip(point, 0, 1)
    breaks = sorted({0.0, *length.tolist(), *np.maximum(length - room, 0).tolist()})
    last = next(i for i, threshold in enumerate(breaks) if norm(threshold) <= eps)
    left, right = breaks[last - 1], breaks[last]
    threshold = left + (right - left) * (norm(left) - eps) / (norm(left) - norm(right))
    return x + np.sign(delta) * np.clip(length - threshold, 0, room)


def assert_is_the_projection(point: Tensor, x: Tensor, eps: float) -> None:
    projected = project_l1_box(point, x, eps).double().numpy()
    furthest = float((point - x).abs().max())
    for row, one, centre in zip(projected, point.numpy(), x.numpy(), strict=True):
        # A relative 2**-22 of room, a rounding towards x, and the precision of the threshold.
        tolerance = 2.5e-7 * eps + (1.2e-7 if x.dtype == torch.float32 else 1e-15) + 2e-12 * furthest
        np.testing.assert_allclose(row, by_break_points(one, centre, eps), rtol=0, atol=tolerance)


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Images [n, d] and points near and far, of one dtype."""
    width, shape = draw(st.sampled_from([32, 64])), draw(st.sampled_from([(1, 1), (2, 3), (3, 12)]))
    furthest = draw(st.sampled_from([1, 4, 1000]))
    arrays = [
        draw(st_numpy.arrays(f"f{width // 8}", shape, elements=st.floats(low, high, width=width)))
        for low, high in ((0, 1), (-furthest, furthest))
    ]
    return torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1])


@given(case=rows(), eps=st.one_of(st.sampled_from([0.01, 0.5, 1.0, 3.0]), st.floats(1e-6, 20)))
@example(case=(torch.full((1, 4), 0.5), torch.full((1, 4), 0.9)), eps=1.0)
@example(case=(torch.zeros(1, 4), torch.full((1, 4), 1e6)), eps=0.1)
@example(case=(torch.tensor([[0.0, 1.0, 0.9, 0.2]]), torch.tensor([[1e6, -1e6, 3.0, 0.1]])), eps=2.05)
def test_projection_is_that_of_the_break_points(case: tuple[Tensor, Tensor], eps: float) -> None:
    x, point = case
    assert_is_the_projection(point, x, eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.02, 0.3, 5.0])
def test_projection_of_whole_images(dtype: torch.dtype, scale: float) -> None:
    x = torch.rand(3, 600, dtype=dtype)
    x[:, ::7], x[:, 1::7] = 0, 1
    assert_is_the_projection(x + scale * torch.randn(3, 600, dtype=dtype), x, 5.0)


@pytest.mark.acceptance("double-win", "A-17")
def test_images_that_the_threshold_takes_to_the_box_are_exactly_there() -> None:
    x = torch.rand(20, 3, 8, 8)
    z = project_l1_box(x + 3 * torch.randn_like(x), x, 40.0)
    assert (l1_norm(z - x) <= 40).all() and z.min() == 0 and z.max() == 1
    assert ((z == 0) | (z == 1)).flatten(1).sum(1).min() > 20


def test_radii_may_differ_by_row() -> None:
    x = torch.rand(4, 3, 5, 5)
    point, radii = x + torch.randn_like(x), torch.tensor([0.0, 1.5, 3.0, 1e9])
    for eps in (radii, radii.double()):
        together = project_l1_box(point, x, eps)
        assert (l1_norm(together - x) <= radii).all()
        for i, radius in enumerate(radii.tolist()):
            assert torch.equal(project_l1_box(point[[i]], x[[i]], radius), together[[i]])


def test_memory_formats_agree_and_infinities_end_at_the_box() -> None:
    x = torch.rand(2, 3, 4, 4)
    point = x + torch.randn_like(x)
    last = project_l1_box(point.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last), 2.0)
    assert torch.equal(last, project_l1_box(point, x, 2.0))
    point[0, 0, 0, 0], x[0, 0, 0, 0] = math.inf, 0.25
    z = project_l1_box(point, x, 2.0)
    assert z[0, 0, 0, 0] == 1 and (l1_norm(z - x) <= 2).all()
    assert torch.equal(project_l1_box(point, x, 2.0)[1], last[1])


def kolmogorov(values: Tensor) -> float:
    """The largest distance of the empirical distribution from the uniform one on [0, 1]."""
    values = values.double().flatten().sort().values
    steps = torch.arange(len(values) + 1) / len(values)
    return float(torch.maximum((values - steps[:-1]).abs().max(), (values - steps[1:]).abs().max()))


def test_starts_are_uniform_in_the_ball() -> None:
    count, d, eps = 20_000, 5, 0.4
    x = torch.full((count, d), 0.5, dtype=torch.float64)  # the box is out of reach
    delta = (l1_start(x, torch.rand(count, d + L1_START_SPARE), eps=eps, lo=0.0, hi=1.0) - x) / eps
    critical = 1.95 / math.sqrt(count)  # at 0.1 percent
    # Volumes: a ball within the ball holds radius**d of it, a cap beyond |v_i| > t holds (1 - t)**d.
    assert kolmogorov(delta.abs().sum(1) ** d) < critical
    for i in range(d):
        assert kolmogorov((1 - delta[:, i].abs()) ** d) < critical
    assert abs(float(delta.abs().mean()) - 1 / (d + 1)) < 0.002
    signs = (delta > 0).double() @ (2.0 ** torch.arange(d, dtype=torch.float64))
    orthants = torch.bincount(signs.long(), minlength=2**d) / count
    assert orthants.min() > 0.8 / 2**d and orthants.max() < 1.2 / 2**d


def test_a_start_takes_one_number_an_element_and_one_more() -> None:
    x = torch.rand(2, 3, 4, 4)
    budget = Budget("L1", 12.0)
    assert budget.noise_size(x) == 49
    uniform = torch.rand(2, 49)
    assert not torch.equal(budget.start(x, uniform)[0], budget.start(x, uniform.flip(0))[0])
    assert torch.equal(budget.start(x[1:], uniform[1:])[0], budget.start(x, uniform)[1])
    for extreme in (0.0, 1 - 2.0**-24, 0.5):
        assert budget.contains(budget.start(x, torch.full((2, 49), extreme)), x).all()


class TestStep:
    """Images of 300 elements: three of them are one percent."""

    x = torch.full((1, 300), 0.5)

    def step(self, grad: Tensor, step_size: float = 0.3, *, at: Tensor | None = None, eps: float = 100.0) -> Tensor:
        x = self.x.to(grad.dtype)
        return l1_step(x if at is None else at, x, grad, step_size=step_size, eps=eps, lo=0.0, hi=1.0)

    def test_moves_the_largest_hundredth_along_its_signs_by_the_step_size(self) -> None:
        for dtype in (torch.float32, torch.float64):
            grad = torch.randn(1, 300, dtype=dtype)
            delta = self.step(grad) - self.x
            largest = grad.abs().topk(3).indices[0]
            expected = torch.zeros_like(grad)
            expected[0, largest] = 0.1 * grad[0, largest].sign()
            torch.testing.assert_close(delta, expected, rtol=0, atol=1e-7)

    def test_passes_over_what_is_at_the_box_in_the_direction_of_the_gradient(self) -> None:
        grad, at = torch.linspace(1, 2, 300)[None], self.x.clone()
        grad[0, 298] *= -1
        at[0, 299], at[0, 298], at[0, 297], at[0, 296] = 1.0, 0.0, 0.0, 1.0
        moved = (self.step(grad, at=at) - at)[0]
        assert set(moved.nonzero().flatten().tolist()) == {297, 295, 294}
        torch.testing.assert_close(moved[[297, 295, 294]], torch.full((3,), 0.1), rtol=0, atol=1e-6)

    def test_what_the_box_leaves_of_the_step_goes_to_the_next_largest(self) -> None:
        grad, at = torch.linspace(1, 2, 300)[None], self.x.clone()
        at[0, 299], at[0, 298] = 0.97, 0.98
        moved = (self.step(grad, at=at) - at)[0]
        expected = torch.tensor([0.03, 0.02, 0.1, 0.1, 0.05])
        torch.testing.assert_close(moved.flip(0)[:5], expected, rtol=0, atol=1e-6)
        assert moved[:295].abs().max() == 0

    def test_equals_share(self) -> None:
        moved = self.step(torch.ones(1, 300)) - self.x
        torch.testing.assert_close(moved, torch.full((1, 300), 0.001), rtol=0, atol=1e-7)
        everything_at_the_box = torch.ones(1, 300)
        assert torch.equal(self.step(torch.ones(1, 300), at=everything_at_the_box, eps=150.0), everything_at_the_box)

    @pytest.mark.parametrize("value", [0.0, math.nan])
    def test_zero_and_nan_gradients_move_nothing(self, value: float) -> None:
        grad, at = torch.full((1, 300), value), project_l1_box(torch.rand(1, 300), self.x, 5.0)
        assert torch.equal(self.step(grad, at=at, eps=5.0), at)
        grad[0, 7] = -1e-30
        moved = self.step(grad, at=at, eps=100.0) - at
        assert moved.nonzero().tolist() == [[0, 7]] and moved[0, 7] < 0

    def test_an_infinite_gradient_is_the_largest(self) -> None:
        grad = torch.randn(1, 300)
        grad[0, 5] = -math.inf
        assert self.step(grad)[0, 5] < 0.5

    def test_a_step_of_no_length_stays(self) -> None:
        assert torch.equal(self.step(torch.randn(1, 300), 0.0), self.x)

    def test_gradients_may_be_of_lower_precision(self) -> None:
        grad = torch.randn(1, 300).bfloat16()
        step = l1_step(self.x, self.x, grad, step_size=0.3, eps=9.0, lo=0.0, hi=1.0)
        assert torch.equal(step, self.step(grad.float())) and step.dtype == torch.float32

    def test_rows_are_independent(self) -> None:
        x, grad = torch.rand(5, 3, 8, 8), torch.randn(5, 3, 8, 8).round(decimals=1)
        at = project_l1_box(x + 0.1 * torch.randn_like(x), x, 2.0)
        sizes: dict[str, Any] = {"step_size": 0.7, "eps": 2.0, "lo": 0.0, "hi": 1.0}
        together = l1_step(at, x, grad, **sizes)
        for i in range(5):
            assert torch.equal(l1_step(at[[i]], x[[i]], grad[[i]], **sizes), together[[i]])


class Linear(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.mark.parametrize(("shape", "eps"), [((1, 4, 12), 3.0), ((3, 8, 8), 2.0), ((3, 8, 8), 12.0)])
@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_nears_the_optimum_of_a_linear_model(shape: tuple[int, ...], eps: float, random_start: bool) -> None:
    x, weight = torch.rand(16, *shape), torch.randn(math.prod(shape))
    y = torch.arange(16) % 2
    ascent = weight * (1 - 2 * y[:, None])
    # The optimum spends the radius on the largest weights, each up to the box.
    order = weight.abs().argsort(descending=True)
    room = torch.where(ascent > 0, 1 - x.flatten(1), x.flatten(1))[:, order]
    spent = torch.minimum(room, (eps - (room.cumsum(1) - room)).clamp(min=0))
    optimum = (spent * weight.abs()[order]).sum(1)
    x_adv = PGD(norm="L1", steps=50, random_start=random_start)(Linear(weight), x, y, eps=eps)
    gained = ((x_adv - x).flatten(1) * ascent).sum(1)
    assert (gained <= optimum * (1 + 1e-5)).all() and (gained >= 0.97 * optimum).all()


def test_sparse_sign_takes_as_many_as_each_row_wants() -> None:
    grad = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    count = torch.tensor([1, 2, 10, 74, 75, 1000])
    signs = sparse_sign(grad, count)
    for row, sign, wanted in zip(grad.flatten(1), signs.flatten(1), count.tolist(), strict=True):
        expected = torch.zeros(75, dtype=torch.float64)
        largest = row.abs().topk(min(wanted, 75)).indices
        expected[largest] = row[largest].sign()
        assert torch.equal(sign, expected)


def test_sparse_sign_takes_equals_together_and_zeros_never() -> None:
    grad = torch.tensor([[3.0, -2, 2, 0, math.nan, 1], [0, 0, -0.0, 0, 0, 0], [-math.inf, 5, 0, 0, 0, 0]])
    expected = torch.tensor([[1.0, -1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0]])
    assert torch.equal(sparse_sign(grad, torch.tensor([2, 3, 1])), expected)


class Recorder(TorchDispatchMode):
    """Keeps the size of the largest tensor made, and fails on operations that wait for a device."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        out = func(*args, **(kwargs or {}))
        self.largest = max(
            self.largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(t))
        )
        return out


def test_memory_is_linear_and_nothing_waits() -> None:
    x, grad = torch.rand(2, 3, 40, 40), torch.randn(2, 3, 40, 40)
    with Recorder() as recorder:
        start = l1_start(x, torch.rand(2, 4801), eps=12.0, lo=0.0, hi=1.0)
        step = l1_step(start, x, grad, step_size=1.0, eps=12.0, lo=0.0, hi=1.0)
        sparse_sign(grad, torch.tensor([3, 4000]))
    assert recorder.largest <= x.numel() + 2
    assert Budget("L1", 12.0).contains(step, x).all()
