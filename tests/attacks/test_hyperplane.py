"""The smallest moves onto a hyperplane, against bisection in float64, and what a GPU and odd gradients ask of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_robust.attacks.hyperplane import to_hyperplane
from tests.attacks.linear_models import NORMS, ORDERS, smallest_move

pixels = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(0, 1, width=32))
normals = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.0]), st.floats(-10, 10, width=32))
rows = st.integers(1, 8).flatmap(
    lambda d: st.tuples(st.lists(pixels, min_size=d, max_size=d), st.lists(normals, min_size=d, max_size=d))
)
shares = st.one_of(st.sampled_from([0.0, 0.5, 1.0, 1.5]), st.floats(0, 1.2))


def reach(points: Tensor, w: Tensor) -> Tensor:
    """The most that <w, point> can grow inside the box, [n]."""
    return (w.abs() * torch.where(w > 0, 1 - points, points)).sum(-1)


def problem(n: int, d: int, share: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Points with exact zeros and ones, heavy-tailed normals with zeros, and gaps that are a share of what is in
    reach."""
    generator = torch.Generator().manual_seed(n + d)
    points = (1.6 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 0.3).clamp(0, 1)
    w = torch.randn(n, d, generator=generator, dtype=torch.float64) ** 3
    w[torch.rand(n, d, generator=generator) < 0.2] = 0
    points, w = points.to(dtype), w.to(dtype)
    return points, w, share * reach(points, w)


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=150, deadline=None)
@given(row=rows, share=shares, sign=st.sampled_from([1.0, -1.0]))
def test_moves_are_the_smallest_that_reach_the_plane(
    norm: str, row: tuple[list[float], list[float]], share: float, sign: float
) -> None:
    points, w = (torch.tensor([values], dtype=torch.float64) for values in row)
    gap = sign * share * reach(points, sign * w)
    moves = to_hyperplane(points, w, gap, norm=norm)
    assert ((points + moves) >= -1e-12).all() and ((points + moves) <= 1 + 1e-12).all()
    assert (moves[w == 0] == 0).all()
    wanted = smallest_move(points[0].numpy(), w[0].numpy(), float(gap), norm)
    # Weights of 1e-9 beside 1 may or may not be needed for the last bits of the gap.
    assert abs(float((w * moves).sum()) - float(w[0].numpy() @ wanted)) <= 1e-9 * float(w.abs().max())
    assert np.linalg.norm(moves[0].numpy(), ORDERS[norm]) <= np.linalg.norm(wanted, ORDERS[norm]) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
@pytest.mark.parametrize("norm", NORMS)
def test_moves_of_large_images_agree_with_bisection(norm: str, share: float, dtype: torch.dtype) -> None:
    points, w, gap = problem(6, 500, share, dtype)
    moves = to_hyperplane(points, w, gap, norm=norm)
    wanted = [smallest_move(*(value[i].numpy() for value in (points, w)), float(gap[i]), norm) for i in range(6)]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    if dtype == torch.float32 and norm == "L1":
        tolerance = 1e-3  # one coordinate makes up for what all others round
    torch.testing.assert_close(moves.double(), torch.from_numpy(np.stack(wanted)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("share", [0.99, 0.9999, 1.0])
@pytest.mark.parametrize("norm", NORMS)
def test_planes_that_barely_meet_the_box_are_reached(norm: str, share: float) -> None:
    points, w, gap = problem(8, 3000, share)
    moves = to_hyperplane(points, w, gap, norm=norm)
    gained = (w.double() * moves.double()).sum(1)
    assert ((gained - gap.double()).abs() <= 1e-5 * gap).all()


@pytest.mark.parametrize("norm", NORMS)
def test_planes_outside_the_box_lead_to_its_corner(norm: str) -> None:
    points, w, gap = problem(5, 40, 1.01)
    corner = torch.where(w > 0, 1 - points, torch.where(w < 0, -points, 0))
    assert torch.equal(to_hyperplane(points, w, gap, norm=norm), corner)
    huge = torch.full_like(gap, torch.finfo(gap.dtype).max)
    assert torch.equal(to_hyperplane(points, w, huge, norm=norm), corner)
    assert torch.equal(to_hyperplane(points, -w, -huge, norm=norm), corner)


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_moves_without_need_or_direction(norm: str) -> None:
    points, w, gap = problem(5, 40, 0.5)
    assert (to_hyperplane(points, w, torch.zeros_like(gap), norm=norm) == 0).all()
    assert (to_hyperplane(points, torch.zeros_like(w), gap, norm=norm) == 0).all()
    assert (to_hyperplane(points, torch.zeros_like(w), torch.zeros_like(gap), norm=norm) == 0).all()


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
@pytest.mark.parametrize("norm", NORMS)
def test_the_length_of_the_normal_does_not_matter(norm: str, exponent: int) -> None:
    points, w, gap = problem(5, 40, 0.5)
    w = torch.where(w.abs() < 1e-3, 0, w)  # so that nothing underflows
    scaled = to_hyperplane(points, w * 2.0**exponent, gap * 2.0**exponent, norm=norm)
    assert torch.equal(scaled, to_hyperplane(points, w, gap, norm=norm))


@pytest.mark.parametrize("norm", NORMS)
def test_a_row_has_the_same_bits_alone_and_beside_any_other(norm: str) -> None:
    parts = [problem(4, 301, share) for share in (0.01, 0.5, 0.999, 1.2)]
    points, w, gap = (torch.cat(columns) for columns in zip(*parts, strict=True))
    together = to_hyperplane(points, w, gap, norm=norm)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_hyperplane(points[order], w[order], gap[order], norm=norm), together[order])
    for i in range(16):
        alone = slice(i, i + 1)
        assert torch.equal(to_hyperplane(points[alone], w[alone], gap[alone], norm=norm), together[alone])


@pytest.mark.parametrize("norm", NORMS)
def test_normals_broadcast_over_several_points(norm: str) -> None:
    (first, w, gap), second = problem(4, 50, 0.3), problem(4, 51, 0.3)[0][:, :50]
    moves = to_hyperplane(torch.stack([first, second], 1), w[:, None], torch.stack([gap, -gap], 1), norm=norm)
    assert torch.equal(moves[:, 0], to_hyperplane(first, w, gap, norm=norm))
    assert torch.equal(moves[:, 1], to_hyperplane(second, w, -gap, norm=norm))


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_is_read_back_from_the_device(norm: str) -> None:
    points = torch.empty(3, 2, 10, device="meta")
    moves = to_hyperplane(points, points[:, :1], points[..., 0], norm=norm)
    assert moves.shape == points.shape


def test_rounding_of_the_gain_does_not_spread_over_coordinates_of_no_weight() -> None:
    w = torch.full((200, 1000), 1e-9)
    w[:, :3] = 0.3 + torch.rand(200, 3, generator=torch.Generator().manual_seed(0))
    points = torch.full_like(w, 0.1)
    gap = (w[:, :3] * (1 - points[:, :3])).sum(1)  # met by the three, but for the last bit
    gap = torch.nextafter(gap, torch.full_like(gap, torch.inf))
    assert (to_hyperplane(points, w, gap, norm="L1").abs().sum(1) <= 2.7 + 1e-4).all()
