"""Which weights stand or fall together: single ones, N of every M, blocks, output channels.

Every pattern cuts a weight into tiles. Selection is always the one exact cut: of single weights, after each tile was
thinned to the N it may keep, or of whole tiles, each by the mean score of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_robust.errors import UsageError
from sparse_robust.masks.mask_set import Masks
from sparse_robust.masks.select import cut

PATTERNS = {
    "unstructured": "Any weights.",
    "N:M": "At most N of each M weights that follow one another along the inputs of an output, such as 2:4.",
    "block:RxC": "Whole blocks of R outputs x C inputs at one place of the kernel, such as block:4x4.",
    "channel": "Whole outputs: all weights of an output channel or neuron.",
}
"""How patterns are written, and what they keep."""


@dataclass(frozen=True)
class Pattern:
    """A way to cut a weight ``[out, in, *kernel]`` into tiles of ``rows`` outputs x ``columns`` inputs.

    A tile lies at one place of the kernel, so the inputs are what follows most closely: the order in which sparse
    matrix units read a convolution (``weight.permute(0, 2, 3, 1)``, as in NVIDIA's ASP). Where ``out`` or ``in`` is not
    divisible, the last tiles are smaller, as if padded with pruned zeros: of a rest of r inputs N:M keeps at most
    min(N, r), and an edge block goes by the mean of the weights that it has.

    Attributes:
        name: as `PATTERNS` writes it.
        rows: outputs of a tile.
        columns: inputs of a tile; None takes all inputs at all places of the kernel.
        limit: how many single weights a tile may keep at most; None keeps or removes it as a whole.
    """

    name: str
    rows: int = 1
    columns: int | None = 1
    limit: int | None = None

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Return the pattern that is written so.

        Raises:
            UsageError: for anything else; the message lists what there is.
        """
        name = str(text).replace(" ", "").lower()
        if name == "unstructured":
            return UNSTRUCTURED
        if name == "channel":
            return cls(name, columns=None)
        if found := re.fullmatch(r"(\d+):(\d+)", name):
            n, m = map(int, found.groups())
            if 1 <= n < m:
                return cls(f"{n}:{m}", columns=m, limit=n)
            raise UsageError(f"the pattern N:M keeps N of every M weights: expected 1 <= N < M, got {text!r}.")
        if found := re.fullmatch(r"block:(\d+)x(\d+)", name):
            rows, columns = map(int, found.groups())
            if rows * columns > 1:
                return cls(f"block:{rows}x{columns}", rows, columns)
            raise UsageError(f"a block has at least two weights, got {text!r}; single weights are 'unstructured'.")
        raise UsageError(f"unknown pattern {text!r}. Known: {', '.join(PATTERNS)} (with numbers: 2:4, block:4x4).")

    @property
    def whole(self) -> bool:
        """Whether tiles of several weights are kept or removed as wholes, so that counts go in their steps."""
        return self.limit is None and (self.rows, self.columns) != (1, 1)

    def capacity(self, keep: Masks) -> dict[str, int]:
        """Return how many of the kept weights of each layer the pattern lets stay at most, whatever the scores."""
        if self.limit is None:
            return {name: kept for name, _, kept, _ in keep.layers()}
        return {name: int(self._fold(keep[name]).sum(1).clamp(max=self.limit).sum()) for name in keep}

    def thin(self, scores: Mapping[str, Tensor], keep: Masks, *, magnitude: bool = False) -> Masks:
        """Return masks that keep the highest-scored ``limit`` of the kept weights of each tile: all where it is None.

        Of equal scores the first along the inputs goes first.

        Raises:
            UsageError: if a kept score is NaN, naming the tensor.
        """
        if self.limit is None:
            return keep
        thinned: dict[str, Tensor] = {}
        for name, score in scores.items():
            alive = keep.on(name, score.device)
            _refuse_nan(name, score, alive)
            tiles, there = self._fold(score.abs() if magnitude else score), self._fold(alive)
            order = tiles.argsort(dim=1, stable=True)  # by score, then what is pruned already before what is not
            order = order.gather(1, there.gather(1, order).to(torch.uint8).argsort(dim=1, stable=True))
            highest = torch.zeros_like(there).scatter_(1, order[:, -self.limit :], True)
            thinned[name] = self._unfold(highest & there, score.shape)
        return Masks.from_bools(thinned)

    def select(self, scores: Mapping[str, Tensor], count: int, keep: Masks, *, magnitude: bool = False) -> Masks:
        """Keep ``count`` of the kept weights of all these layers, ranked together.

        Whole tiles are removed by the mean score of their kept weights, up to the number of tiles that leaves nearest
        to ``count`` weights (of two equally near, the fewer), but never the last one unless ``count`` is 0. Ties are
        broken by (layer order, flat index), or (layer order, output, place in the kernel, input) of the tiles.

        Args:
            scores: floating-point, higher is kept, in the order of the layers.
            count: from 0 to the number of kept weights, of which N:M has thinned its share before (`thin`).
            keep: what is still kept, of the same names.
            magnitude: rank by the absolute value of the scores.

        Raises:
            UsageError: as `cut`.
        """
        if not self.whole:
            return cut(scores, keep.count() - count, keep, magnitude=magnitude)
        alive = {name: self._fold(keep.on(name, score.device)) for name, score in scores.items()}
        sizes = {name: tiles.sum(1) for name, tiles in alive.items()}
        means = {name: self._mean(score, alive[name], sizes[name], magnitude) for name, score in scores.items()}
        there = Masks.from_bools({name: size > 0 for name, size in sizes.items()})

        def without(removed: int) -> tuple[int, Masks]:
            left = cut(means, removed, there)
            return sum(int(size[left.on(name, size.device)].sum()) for name, size in sizes.items()), left

        low, high = 0, there.count() - (count > 0)  # the fewest removals that leave count weights or less, if any do
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if without(middle)[0] <= count else (middle + 1, high)
        kept, tiles = without(low)
        if low and abs((more := without(low - 1))[0] - count) < abs(kept - count):
            tiles = more[1]
        return Masks.from_bools(
            {
                name: self._unfold(tiles.on(name, score.device)[:, None] & alive[name], score.shape)
                for name, score in scores.items()
            }
        )

    def _mean(self, score: Tensor, alive: Tensor, size: Tensor, magnitude: bool) -> Tensor:
        wide = score.to(torch.promote_types(score.dtype, torch.float32))
        tiles = self._fold(wide.abs() if magnitude else wide)
        return torch.where(alive, tiles, 0.0).sum(1) / size.clamp(min=1)

    def _fold(self, tensor: Tensor) -> Tensor:
        """[out, in, *kernel] -> [tiles, weights of a tile], with zeros (False) where an edge tile has none."""
        view = tensor.reshape(tensor.shape[0], tensor.shape[1], -1).transpose(1, 2)  # [out, place, in]
        if self.columns is None:
            view = view.reshape(len(view), 1, -1)
        columns = self.columns or view.shape[2]
        view = F.pad(view, (0, -view.shape[2] % columns, 0, 0, 0, -len(view) % self.rows))
        tiles = view.unflatten(2, (-1, columns)).unflatten(0, (-1, self.rows))  # [out/r, r, place, in/c, c]
        return tiles.permute(0, 2, 3, 1, 4).reshape(-1, self.rows * columns)

    def _unfold(self, tiles: Tensor, shape: torch.Size) -> Tensor:
        """Undo `_fold`."""
        outputs, inputs, places = shape[0], shape[1], shape[2:].numel()
        if self.columns is None:
            inputs, places = inputs * places, 1
        columns = self.columns or inputs
        view = tiles.view(-(-outputs // self.rows), places, -(-inputs // columns), self.rows, columns)
        view = view.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)[:outputs, :, :inputs]  # [out, place, in]
        return view.reshape(outputs, -1, shape[1]).transpose(1, 2).reshape(shape)


UNSTRUCTURED = Pattern("unstructured")


def _refuse_nan(name: str, score: Tensor, alive: Tensor) -> None:
    if wrong := int((score.isnan() & alive).sum()):
        raise UsageError(f"cannot select by these scores: NaN in {name} ({wrong} values).")
