"""Square Attack: random search over square-shaped changes, without gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_robust.attacks.base import EngineAttack
from sparse_robust.attacks.budget import Budget
from sparse_robust.attacks.losses import cross_entropy, margin
from sparse_robust.attacks.norms import L2_ROOM, NORMS, largest_not_above
from sparse_robust.attacks.procedure import Look, Rows, Seen, Task, noise, per_row
from sparse_robust.errors import UsageError, unknown
from sparse_robust.seeding import derive_seed

LOSSES = {"margin": margin, "ce": cross_entropy}

# The share of the image that a square covers is halved after each of these proposals.
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# With `rescale_schedule`, this many proposals are mapped to n_queries.
SCHEDULE = 10_000

TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Square(EngineAttack):
    """Square Attack (Andriushchenko et al., ECCV 2020), a black-box attack: it asks for logits and takes no gradient.

    A random start, then ``n_queries`` proposals, each a random square-shaped change of the best image so far, kept if
    it raises the loss. In Linf a square is set to the upper or lower end of the budget; in L2 and L1 the change in one
    square moves to another. Every image draws its own squares, a function of (seed, its id, restart, step) alone; in
    the authors' programs a batch shares them.

    Works with any number of classes, on images [n, channels, height, width] of any size.

    Attributes:
        norm: ``Linf``, ``L2`` or ``L1``.
        n_queries: proposals of a run, at least 1; with its start, a run looks at n_queries + 1 images.
        p_init: share of the image that the first squares cover, above 0 and up to 1. It is halved after 10, 50, 200,
            500, 1000, 2000, 4000, 6000 and 8000 proposals.
        n_restarts: runs, at least 1.
        loss: ``margin`` (largest other logit minus the label's) or ``ce`` (cross-entropy).
        last_row: squares may cover the last row and the last column of an image, as in the paper. The authors'
            programs, AutoAttack's among them, never place one there, since their random integers leave out the upper
            end: with False neither does this. It is the weaker attack on images of few pixels.
        rescale_schedule: stretch that schedule, made for 10,000 proposals, to n_queries.
        seed: any integer; 0 is a seed like any other.
    """

    norm: str = "Linf"
    n_queries: int = 5000
    p_init: float = 0.8
    n_restarts: int = 1
    loss: str = "margin"
    last_row: bool = True
    rescale_schedule: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, value, known in (("norm", self.norm, NORMS), ("loss", self.loss, LOSSES)):
            if value not in known:
                raise unknown(f"attack {kind}", value, known)
        for name in ("n_queries", "n_restarts"):
            count = getattr(self, name)
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise UsageError(f"{name} must be an integer of at least 1, got {count!r}.")
        if not 0 < self.p_init <= 1:
            raise UsageError(f"p_init is a share of the image, above 0 and up to 1, got {self.p_init!r}.")

    @property
    def name(self) -> str:
        """Name in tables and files."""
        return "square"

    def passes(self, classes: int) -> float:
        """Return what an image that withstands the attack costs, in forward passes."""
        return self.n_restarts * (self.n_queries + 1)

    def prepare(self, budget: Budget, classes: int) -> _Squares:
        """Return the attack within a budget."""
        return _Squares(self, budget)


class _Squares:
    """The procedure: every image has windows, signs and orientations of its own, keyed by its id, run and step.

    Its rows are ``shown`` (the proposal), ``best`` (what it changes) with ``best_loss``, ``step`` (proposals judged so
    far) and ``run``.
    """

    gradient = False
    inside = True

    def __init__(self, attack: Square, budget: Budget) -> None:
        self.attack, self.budget, self.runs = attack, budget, attack.n_restarts
        self.key = derive_seed(attack.seed, attack.name)
        self.power = {"Linf": math.inf, "L2": 2.0, "L1": 1.0}[budget.norm]
        self._windows: dict[object, _Windows] = {}

    def start(self, task: Task, run: Tensor) -> Rows:
        if task.x.dim() != 4:
            raise UsageError(f"Square Attack needs images [n, channels, height, width], got {list(task.x.shape)}.")
        change = self._stripes(task, run) if self.power == math.inf else self._grid(task, run)
        shown = self.budget.project(task.x + change, task.x)
        lowest = torch.full_like(task.logits[:, 0], -torch.inf)
        return {"shown": shown, "best": shown, "best_loss": lowest, "step": torch.zeros_like(run), "run": run}

    def losses(self, logits: Tensor, task: Task, rows: Rows) -> Tensor:
        return LOSSES[self.attack.loss](logits, task.y)

    def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
        better = seen.loss > rows["best_loss"]
        best = _choose(better, rows["shown"], rows["best"])
        propose = self._recolour if self.power == math.inf else self._move
        step = rows["step"] + 1
        state = {
            "shown": propose(task, best, rows["step"], rows["run"]),
            "best": best,
            "best_loss": torch.where(better, seen.loss, rows["best_loss"]),
            "step": step,
            "run": rows["run"],
        }
        return state, step >= self.attack.n_queries

    def _stripes(self, task: Task, run: Tensor) -> Tensor:
        """Return columns of +-eps, [n, C, 1, W]."""
        n, channels, _, width = task.x.shape
        signs = _signs(self._noise(task, run, 0, channels * width), task.x)
        return signs.view(n, channels, 1, width) * self.budget.eps

    def _grid(self, task: Task, run: Tensor) -> Tensor:
        """Return patterns side by side, about 5 x 5, [n, C, H, W]: of length eps in L2, of length 1 each in L1."""
        n, channels, height, width = task.x.shape
        size = max(min(height, width) // 5, 1)
        tall, wide = height // size, width // size
        uniform = self._noise(task, run, 0, (1 + channels) * tall * wide).view(n, 1 + channels, tall, wide)
        upright = _pattern(size, self.power).to(task.x)
        tiles = torch.where(uniform[:, :1, :, None, :, None] < 0.5, upright[:, None, :], upright.T[:, None, :])
        tiles = tiles * _signs(uniform[:, 1:, :, None, :, None], task.x)  # [n, C, tall, size, wide, size]
        above, left = (height - tall * size) // 2, (width - wide * size) // 2
        below, right = height - tall * size - above, width - wide * size - left
        grid = F.pad(tiles.reshape(n, channels, tall * size, wide * size), (left, right, above, below))
        return grid if self.power == 1 else grid * (self.budget.eps / _total(_norms(grid, self.power), self.power))

    def _recolour(self, task: Task, best: Tensor, step: Tensor, run: Tensor) -> Tensor:
        """Return images with a square at the upper or lower end of the budget, channel by channel."""
        uniform = self._noise(task, run, step + 1, 2 + best.shape[1])
        windows = self._windows_for(best)
        window = windows.place(uniform[:, :2], windows.sizes[self._level(windows, step)])
        beyond = _signs(uniform[:, 2:], best)[:, :, None, None] * (3 * self.budget.eps)
        return self.budget.project(torch.addcmul(best, windows.inside(window), beyond), task.x)

    def _move(self, task: Task, best: Tensor, step: Tensor, run: Tensor) -> Tensor:
        """Return images whose change in one square is taken away, and that in another is blended with a pattern.

        A channel's length in the blended square is what both squares had, plus its share of what is left of eps.
        """
        channels, p, eps = best.shape[1], self.power, self.budget.eps
        uniform = self._noise(task, run, step + 1, 5 + channels)
        windows = self._windows_for(best)
        level = self._level(windows, step)
        first, second = (windows.place(uniform[:, at : at + 2], windows.sizes[level]) for at in (0, 2))
        in_first, in_second = windows.inside(first), windows.inside(second)
        pattern = windows.pattern(first, level, uniform[:, 4])
        signs = _signs(uniform[:, 5:], best)[:, :, None, None]

        delta = best - task.x
        old = delta * in_first
        kept = delta * ((1 - in_first) * (1 - in_second))
        freed = _norms(delta - kept, p) ** p
        left = (eps**p - (_norms(delta, p) ** p).sum(1, keepdim=True)).clamp_(min=0) / channels
        # In L1 the published attack grants each channel the whole of that, not its share; the projection shortens it.
        length = (freed + left) ** (1 / p) * (channels if p == 1 else 1)
        new = old.mul_(1 / (_norms(old, p) + TINY)).addcmul_(pattern, signs)
        moved = kept.addcmul_(new, length / (_norms(new, p) + TINY))
        if p == 1:
            return self.budget.project(task.x + moved, task.x)
        scale = eps * (1 - L2_ROOM) / (_total(_norms(moved, p), p) + TINY)
        shown = torch.addcmul(task.x, moved, scale).clamp_(self.budget.lo, self.budget.hi)
        # Projecting costs more than all of the above; what rounding takes out of the ball, if anything, is not tried.
        inside = self.budget.measure(shown, task.x) <= largest_not_above(eps, shown.dtype)
        return _choose(inside, shown, best)

    def _noise(self, task: Task, run: Tensor, draw: int | Tensor, numel: int) -> Tensor:
        return noise(task, numel, key=self.key, stream=run * (self.attack.n_queries + 1) + draw)

    def _windows_for(self, images: Tensor) -> _Windows:
        key = (images.shape[2:], images.dtype, images.device)
        if key not in self._windows:
            self._windows[key] = _Windows(images, self.attack.p_init, self.power, last_row=self.attack.last_row)
        return self._windows[key]

    def _level(self, windows: _Windows, step: Tensor) -> Tensor:
        """Return how often the area has been halved, int64 [n]."""
        if self.attack.rescale_schedule:
            step = step * SCHEDULE // self.attack.n_queries
        return torch.bucketize(step, windows.halvings)


class _Windows:
    """Square windows of the sizes of the schedule, in images of one shape; rows may have different sizes and places.

    A placed window is two int64 tensors, [n, H] and [n, W]: for each row and column of the image its position in the
    window, and `outside` for those that are not in it.
    """

    def __init__(self, images: Tensor, p_init: float, power: float, *, last_row: bool) -> None:
        height, width = images.shape[2:]
        sizes = [_size(p_init / 2**level, height, width, power) for level in range(len(HALVINGS) + 1)]
        device, self.dtype, self.outside = images.device, images.dtype, max(sizes)
        self.sizes, self.halvings = torch.tensor(sizes, device=device), torch.tensor(HALVINGS, device=device)
        self.shape, self.begins = (height, width), torch.tensor([height + last_row, width + last_row], device=device)
        self.positions = torch.arange(max(height, width), device=device)
        if power < math.inf:  # one table, so that rows of any size look up their pattern at once; zeros are outside
            padded = [F.pad(_pattern(size, power), (0, self.outside + 1 - size) * 2) for size in sizes]
            both = torch.stack([torch.stack([upright, upright.T]) for upright in padded])
            self.patterns = both.to(images).flatten()

    def place(self, uniform: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Return windows of ``size`` int64 [n], wholly inside the image, at random: ``uniform`` is [n, 2]."""
        # It stays below the number of places: fp32 rounds (1 - 2**-24) * count to less than count.
        begin = (uniform * (self.begins - size[:, None])).long()
        offset = self.positions - begin[:, :, None]
        placed = torch.where((offset >= 0) & (offset < size[:, None, None]), offset, self.outside)
        return placed[:, 0, : self.shape[0]], placed[:, 1, : self.shape[1]]

    def inside(self, window: tuple[Tensor, Tensor]) -> Tensor:
        """Return 1 in the window and 0 elsewhere, [n, 1, H, W]."""
        rows, columns = ((positions < self.outside).to(self.dtype) for positions in window)
        return (rows[:, :, None] * columns[:, None, :])[:, None]

    def pattern(self, window: tuple[Tensor, Tensor], level: Tensor, uniform: Tensor) -> Tensor:
        """Return the pattern of each row's size in its window, upright or lying, 0 elsewhere: [n, 1, H, W]."""
        rows, columns = window
        side = self.outside + 1
        begin = ((2 * level + (uniform >= 0.5)) * side)[:, None] + rows
        return self.patterns.take((begin * side)[:, :, None] + columns[:, None, :])[:, None]


def _size(share: float, height: int, width: int, power: float) -> int:
    """Return the side of a square that covers a share of the image; odd and at least 3 where it carries a pattern."""
    size = round(math.sqrt(share * height * width))
    size = max(size, 1) if power == math.inf else max(size, 3) | 1
    return min(size, height, width)


def _pattern(size: int, power: float) -> Tensor:
    """Return the pattern of L2 and L1, float64 [size, size] of length 1: a positive bump above a negative one."""
    pattern = torch.cat([_bump(size // 2, size, power), -_bump(size - size // 2, size, power)])
    return pattern / torch.linalg.vector_norm(pattern, ord=power)


def _bump(height: int, width: int, power: float) -> Tensor:
    """Return square rings around the centre, float64 of length 1: ring d sums k**-2 (L1: k**-4) over k > d."""
    rows, columns = (torch.arange(length) - length // 2 for length in (height, width))
    distance = torch.maximum(rows.abs()[:, None], columns.abs()[None, :])
    terms = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** (-4 if power == 1 else -2)
    bump = terms.flip(0).cumsum(0).flip(0)[distance]
    return bump / torch.linalg.vector_norm(bump, ord=power)


def _signs(uniform: Tensor, like: Tensor) -> Tensor:
    """Return -1 or 1, each with probability one half."""
    return (uniform >= 0.5).to(like.dtype) * 2 - 1


def _choose(condition: Tensor, chosen: Tensor, other: Tensor) -> Tensor:
    """Return `where_row` of finite images, exactly; five times as fast on a CPU."""
    return other.lerp(chosen, per_row(condition, chosen).to(chosen.dtype))


def _norms(images: Tensor, power: float) -> Tensor:
    """Return the norm of each channel, [n, C, 1, 1]."""
    channels = images.flatten(2)
    norms = channels.abs().sum(2) if power == 1 else torch.linalg.vector_norm(channels, dim=2)
    return norms[:, :, None, None]


def _total(norms: Tensor, power: float) -> Tensor:
    """Return the norm of each image, [n, 1, 1, 1], from those of its channels."""
    return torch.linalg.vector_norm(norms, ord=power, dim=1, keepdim=True)
