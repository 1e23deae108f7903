"""The loss around trained weights: what lies where in the plane, on a network small enough to do it by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.errors import UsageError
from sparse_robust.evaluation.landscape import Landscape, loss_landscape
from sparse_robust.masks import Masks

IMAGES = 60


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, list[dict[str, Tensor]], Masks, list[tuple[Tensor, Tensor]]]:
    """A masked network with batch norm, its weights after each of five passes, its masks, and test batches."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        masks = Masks.from_bools({"0.weight": torch.rand(4, 1, 3, 3) > 0.5, "4.weight": torch.rand(3, 64) > 0.7})
        x, y = torch.rand(IMAGES, 1, 6, 6), torch.randint(3, (IMAGES,))
        masks.apply_(model)
        path = []
        for _ in range(5):
            path.append({name: p.detach().clone() for name, p in model.named_parameters()})
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.5 * p.grad
            masks.apply_(model)
        path.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return model.eval(), path, masks, [(x[:40], y[:40]), (x[40:], y[40:])]


def loss_of(model: nn.Module, weights: dict[str, Tensor], batches: list[tuple[Tensor, Tensor]]) -> float:
    """The mean cross-entropy, written out."""
    copied = copy.deepcopy(model).eval()
    copied.load_state_dict({**copied.state_dict(), **weights})
    with torch.no_grad():
        total = sum(float(F.cross_entropy(copied(x).double(), y, reduction="sum")) for x, y in batches)
    return total / sum(len(y) for _, y in batches)


@pytest.mark.acceptance("double-win", "A-36")
@pytest.mark.parametrize("directions", ["pca", "random"])
def test_the_centre_is_the_final_network_exactly_and_nothing_is_left_behind(trained: Any, directions: str) -> None:
    model, path, masks, batches = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[dict[str, Tensor]] = []

    def look(holding: nn.Module) -> None:
        seen.append({name: p.detach().clone() for name, p in holding.named_parameters()})

    found = loss_landscape(model, path, batches, masks=masks, directions=directions, grid=7, settle=look)
    assert found.losses.shape == (7, 7) and found.images == IMAGES
    assert found.final_loss == loss_of(model, path[-1], batches)
    row, column = found.centre
    assert found.x[column] == 0 and found.y[row] == 0
    centre = seen[row * 7 + column]
    assert all(torch.equal(centre[name], path[-1][name]) for name in centre)
    for weights in seen:  # pruned coordinates are 0 at every grid point
        assert all(not weights[name][~masks[name]].any() for name in masks)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not model.training


@pytest.mark.acceptance("double-win", "A-36")
def test_the_path_ends_at_the_origin_and_lies_on_the_grid(trained: Any) -> None:
    model, path, masks, batches = trained
    found = loss_landscape(model, path, batches, masks=masks, grid=9)
    assert found.path.shape == (6, 2) and found.path[-1].tolist() == [0.0, 0.0]
    for points, axis in ((found.path[:, 0], found.x), (found.path[:, 1], found.y)):
        assert axis[0] <= points.min() and points.max() <= axis[-1]
        assert torch.allclose(axis.diff(), axis.diff()[0].expand(8))
    assert found.explained is not None
    assert found.explained[0] >= found.explained[1] > 0 and sum(found.explained) <= 1 + 1e-9


def test_the_directions_are_those_of_a_singular_value_decomposition(trained: Any) -> None:
    model, path, _, batches = trained
    found = loss_landscape(model, path, batches, grid=5)
    flat = torch.stack([torch.cat([p.flatten() for p in state.values()]) for state in path]).double()
    u, s, _ = torch.linalg.svd(flat - flat[-1], full_matrices=False)
    expected = (u * s)[:, :2]
    expected = expected * torch.where(expected[0] < 0, -1.0, 1.0)
    assert torch.allclose(found.path, expected, atol=1e-6)
    assert found.explained == pytest.approx((s[:2] ** 2 / (s**2).sum()).tolist())


def test_a_point_of_the_grid_is_the_loss_of_those_weights(trained: Any) -> None:
    model, path, masks, batches = trained
    held: list[dict[str, Tensor]] = []
    found = loss_landscape(
        model, path, batches, masks=masks, grid=5,
        settle=lambda m: held.append({n: p.detach().clone() for n, p in m.named_parameters()}),
    )  # fmt: skip
    for i, j in ((0, 0), (1, 3), (4, 4)):
        assert float(found.losses[i, j]) == loss_of(model, held[5 * i + j], batches)
    assert len({round(float(loss), 6) for loss in found.losses.flatten()}) > 5


def test_random_directions_are_as_long_as_the_filters_and_leave_norms_alone(trained: Any) -> None:
    model, path, masks, batches = trained
    held: list[dict[str, Tensor]] = []
    found: Landscape = loss_landscape(
        model, path[-1:], batches, masks=masks, directions="random", grid=3, margin=1.0,
        settle=lambda m: held.append({n: p.detach().clone() for n, p in m.named_parameters()}),
    )  # fmt: skip
    assert found.x.tolist() == [-1.0, 0.0, 1.0] and found.explained is None and not len(found.path)
    along, final = held[5], path[-1]  # (0, 1)
    for name in ("0.weight", "4.weight"):
        moved = (along[name] - final[name]).flatten(1).norm(dim=1)
        assert torch.allclose(moved, final[name].flatten(1).norm(dim=1), rtol=1e-4)
    for name in ("0.bias", "1.weight", "1.bias", "4.bias"):
        assert torch.equal(along[name], final[name])
    other = loss_landscape(model, path[-1:], batches, directions="random", grid=3, margin=1.0, seed=1)
    assert not torch.equal(other.losses, found.losses)


def test_what_cannot_be_drawn_is_named(trained: Any) -> None:
    model, path, masks, batches = trained
    with pytest.raises(UsageError, match="three points that are not on one line"):
        loss_landscape(model, path[-2:], batches)
    with pytest.raises(UsageError, match="is not of this model: 4.bias"):
        loss_landscape(model, [{k: v for k, v in path[0].items() if k != "4.bias"}, *path[1:]], batches)
    dense = [{name: tensor + 1 for name, tensor in path[0].items()}, *path[1:]]
    with pytest.raises(UsageError, match="that the mask prunes"):
        loss_landscape(model, dense, batches, masks=masks)
    with pytest.raises(UsageError, match="unknown directions 'pcs'"):
        loss_landscape(model, path, batches, directions="pcs")
    with pytest.raises(UsageError, match="grid of 3 or more"):
        loss_landscape(model, path, batches, grid=2)
    with pytest.raises(UsageError, match="path is empty"):
        loss_landscape(model, [], batches)
    with pytest.raises(UsageError, match="gave none"):
        loss_landscape(model, path, [])
