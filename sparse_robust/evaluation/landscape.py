"""The loss around trained weights, in a plane, and the path on which training came there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.attacks import attack_context
from sparse_robust.errors import UsageError, unknown
from sparse_robust.evaluation.streaming import batches, device_of
from sparse_robust.masks import Masks
from sparse_robust.seeding import derive_seed

DIRECTIONS: dict[str, str] = {
    "pca": "the two principal directions of the path to the final weights",
    "random": "two random directions, each filter as long as the filter of the weights it belongs to",
}
DEFAULT_GRID, DEFAULT_MARGIN = 25, 1.2

Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Landscape:
    """What `loss_landscape` finds.

    Attributes:
        x, y: float64 [grid], coordinates along the first and the second direction, ascending; 0 is among them. Units
            are those of the weights (pca), or the length of the weights themselves (random).
        losses: float64 [grid, grid], mean cross-entropy at (y, x).
        centre: index (row, column) of the final weights, where both coordinates are 0.
        path: float64 [states, 2], the path of training projected to the plane; its last point is (0, 0). Without
            points for random directions.
        explained: share of the path's squared length from the final weights that each direction holds; None for random
            directions.
        images: number of images the losses are means of.
    """

    x: Tensor
    y: Tensor
    losses: Tensor
    centre: tuple[int, int]
    path: Tensor
    explained: tuple[float, float] | None
    images: int

    @property
    def final_loss(self) -> float:
        """The loss at the final weights."""
        return float(self.losses[self.centre])


def loss_landscape(
    model: nn.Module,
    path: Sequence[Weights],
    loader: Iterable[Any],
    *,
    masks: Masks | None = None,
    directions: str = "pca",
    grid: int = DEFAULT_GRID,
    margin: float = DEFAULT_MARGIN,
    seed: int = 0,
    settle: Callable[[nn.Module], None] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Landscape:
    """Return the loss on a grid of weights around the last of a path, in two directions.

    The plane goes through the final weights, so the path ends at the origin exactly, and the loss there is that of the
    final network exactly. Weights that are pruned stay 0 everywhere in it. Running statistics are those of the final
    network. After Li et al., Visualizing the loss landscape of neural nets (2018), with the principal directions taken
    around the final weights instead of the path's mean.

    Args:
        model: the network; its buffers are the final ones. It comes back with its weights and statistics as they were.
        path: the network's parameters by name, at points of time in order; the last are the final ones. With directions
            ``random`` these alone suffice.
        loader: batches (images, labels, ...) as `evaluate` takes them; they are read once and kept.
        masks: the weights that may differ from 0.
        directions: a key of `DIRECTIONS`.
        grid: points along each direction, at least 3.
        margin: the grid covers so many times the extent of the path, and with random directions from -1 to 1.
        seed: of random directions.
        settle: called at every grid point with the model holding its weights, to estimate its running statistics anew.
        advance: called after every grid point.

    Raises:
        UsageError: for a path that is too short or does not belong to the model, pruned weights that are not 0 on it,
            or arguments out of range.
    """
    if directions not in DIRECTIONS:
        raise unknown("directions", directions, DIRECTIONS)
    if grid < 3 or not margin >= 1:
        raise UsageError(f"a landscape needs a grid of 3 or more and a margin of 1 or more, got {grid} and {margin}.")
    _check_path(model, path, masks)
    final = path[-1]
    if directions == "pca":
        first, second, points, explained = _principal(path)
    else:
        first, second = (_random(final, masks, seed, number) for number in (0, 1))
        points, explained = torch.zeros(0, 2, dtype=torch.float64), None
    spans = points if len(points) else torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
    (x, column), (y, row) = (_axis(spans[:, d], grid, margin) for d in (0, 1))
    seen = [(images, labels) for images, labels, _ in batches(loader, device_of(model))]
    if not seen:
        raise UsageError("a landscape needs images; the loader gave none.")
    parameters = dict(model.named_parameters())
    final, first, second = (
        {name: tensor.to(parameters[name].device) for name, tensor in part.items()} for part in (final, first, second)
    )
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses = torch.empty(grid, grid, dtype=torch.float64)
    with torch.no_grad():
        held = {name: parameter.clone() for name, parameter in parameters.items()}
        try:
            for i, j in torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).tolist():
                for name, parameter in parameters.items():
                    parameter.copy_(final[name] + float(x[j]) * first[name] + float(y[i]) * second[name])
                if settle is not None:
                    settle(model)
                losses[i, j] = _mean_loss(model, seen)
                advance()
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(held[name])
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
    return Landscape(x, y, losses, (row, column), points, explained, sum(len(y) for _, y in seen))


def _check_path(model: nn.Module, path: Sequence[Weights], masks: Masks | None) -> None:
    if not path:
        raise UsageError("a landscape needs the final weights at least; the path is empty.")
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    for number, state in enumerate(path):
        if {name: tensor.shape for name, tensor in state.items()} != expected:
            differing = sorted(n for n in {*state, *expected} if n not in state or state[n].shape != expected.get(n))
            raise UsageError(f"point {number} of the path is not of this model: {', '.join(differing[:3])} differ.")
        for name, mask in ((n, masks[n]) for n in masks) if masks is not None else ():
            stray = int((state[name].cpu()[~mask] != 0).sum())
            if stray:
                raise UsageError(
                    f"point {number} of the path has {stray} weights in {name} that the mask prunes: are these the "
                    "weights that were trained under it?"
                )


def _principal(path: Sequence[Weights]) -> tuple[Weights, Weights, Tensor, tuple[float, float]]:
    """Return the two principal directions, of length one, the path's coordinates in them, and their shares.

    They come from the inner products of the path's points alone: no matrix of points by weights is made.
    """
    final = path[-1]
    points = [{name: state[name].double() - final[name].double() for name in final} for state in path]
    products = torch.tensor([[_inner(a, b) for b in points] for a in points], dtype=torch.float64)
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0)[:2], vectors.flip(1)[:, :2]
    if len(path) < 3 or not bool(values[-1] > 1e-12 * values[0]):
        raise UsageError(
            "principal directions need a path of three points that are not on one line: train for two epochs at least, "
            "or take directions random."
        )
    lengths = values.sqrt()
    # Which way an eigenvector points is chance: the path begins on the positive side.
    vectors = vectors * torch.where(vectors[0] < 0, -1.0, 1.0)
    coordinates = vectors * lengths
    coordinates[-1] = 0.0
    first, second = (_combined(vectors[:, d] / lengths[d], points, final) for d in (0, 1))
    shares = values / products.trace()
    return first, second, coordinates, (float(shares[0]), float(shares[1]))


def _combined(factors: Tensor, points: Sequence[Weights], like: Weights) -> Weights:
    total = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in like.items()}
    for factor, point in zip(factors.tolist(), points, strict=True):
        for name, tensor in point.items():
            total[name] += factor * tensor
    return {name: tensor.to(like[name].dtype) for name, tensor in total.items()}


def _inner(a: Weights, b: Weights) -> float:
    return sum(float((a[name] * b[name]).sum()) for name in a)


def _random(final: Weights, masks: Masks | None, seed: int, number: int) -> Weights:
    """Return a filter-normalised random direction: nothing along biases and norms, and nothing where it is pruned."""
    direction = {}
    for name, weight in final.items():
        if weight.dim() < 2:
            direction[name] = torch.zeros_like(weight)
            continue
        seeded = torch.Generator().manual_seed(derive_seed("landscape", seed, number, name))
        noise = torch.randn(weight.shape, generator=seeded)
        if masks is not None and name in masks.names():
            noise *= masks[name]
        rows, own = noise.to(weight).flatten(1), weight.flatten(1)
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-30)
        direction[name] = (rows / lengths * torch.linalg.vector_norm(own, dim=1, keepdim=True)).view_as(weight)
    return direction


def _axis(points: Tensor, grid: int, margin: float) -> tuple[Tensor, int]:
    """Return evenly spaced coordinates that cover ``margin`` times the extent of points and 0, and where 0 is."""
    low, high = min(0.0, float(points.min())), max(0.0, float(points.max()))
    step = margin * (high - low) / (grid - 1)
    # The node nearest to where 0 would lie if the extent were centred; so the cover is shifted by half a step at most.
    zero = round(((margin - 1) / 2 * (high - low) - low) / step)
    return (torch.arange(grid, dtype=torch.float64) - zero) * step, zero


def _mean_loss(model: nn.Module, seen: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the mean cross-entropy in eval mode."""
    with attack_context(model):
        total = sum(float(F.cross_entropy(model(x).double(), y, reduction="sum")) for x, y in seen)
    return total / sum(len(y) for _, y in seen)
