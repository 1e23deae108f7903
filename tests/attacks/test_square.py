"""Square Attack: a plain second implementation, the exact budget, rows that are independent, its schedule and costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparse_robust.attacks.budget import Budget
from sparse_robust.attacks.procedure import Look, Procedure, Rows, Seen, Task
from sparse_robust.attacks.square import Square, _pattern
from sparse_robust.errors import UsageError
from sparse_robust.seeding import derive_seed
from sparse_robust_kernels.rng import philox_uniform

EPS = {"Linf": 8 / 255, "L2": 0.5, "L1": 6.0}
SHARES = ((8000, 512), (6000, 256), (4000, 128), (2000, 64), (1000, 32), (500, 16), (200, 8), (50, 4), (10, 2))


def never(images: Tensor) -> Tensor:
    raise AssertionError("Square Attack looks at what it shows, at nothing else")


def make_task(n: int, *shape: int, dtype: torch.dtype = torch.float32, classes: int = 3) -> Task:
    x = torch.rand(n, *shape, dtype=dtype)
    x.flatten()[::5], x.flatten()[1::7] = 0, 1  # on the border of the box
    return Task(x, torch.arange(n) % classes, torch.arange(n) + 2**40, torch.zeros(n, classes, dtype=dtype))


def no_run(task: Task) -> Tensor:
    return torch.zeros(len(task.y), dtype=torch.int64)


def drive(procedure: Procedure, task: Task, model: Callable[[Tensor], Tensor], look: Look = never) -> list[Rows]:
    """Every state of one run, in which nobody leaves early."""
    states, over = [procedure.start(task, no_run(task))], torch.zeros(len(task.y), dtype=torch.bool)
    while not over.all():
        rows = states[-1]
        logits = model(rows["shown"])
        loss = procedure.losses(logits, task, rows)
        rows, over = procedure.advance(task, rows, Seen(logits, loss, task.x.new_empty(0)), look)
        states.append(rows)
    return states


def linear_model(task: Task) -> Callable[[Tensor], Tensor]:
    weight = torch.randn(task.x[0].numel(), task.logits.shape[1], generator=torch.Generator().manual_seed(0))
    return lambda images: images.flatten(1) @ weight.to(images.dtype)


# ---- a plain second implementation, one image at a time


def plain_length(images: Tensor, p: int) -> Tensor:
    return images.abs().pow(p).sum().pow(1 / p)


def plain_bump(height: int, width: int, p: int) -> Tensor:
    """Nested rectangles around the centre, as the paper draws them."""
    bump = torch.zeros(height, width, dtype=torch.float64)
    top, left = height // 2, width // 2
    for ring in range(max(height, width) // 2 + 1):
        rows, columns = (slice(max(at - ring, 0), at + ring + 1) for at in (top, left))
        bump[rows, columns] += 1 / (ring + 1) ** (2 if p == 2 else 4)
    return bump / plain_length(bump, p) if height else bump


def plain_pattern(size: int, p: int, *, lying: bool) -> Tensor:
    upper, lower = plain_bump(size // 2, size, p), plain_bump(size - size // 2, size, p)
    pattern = torch.cat([upper, -lower])
    return (pattern.T if lying else pattern) / plain_length(pattern, p)


def plain_size(step: int, height: int, width: int, norm: str, p_init: float = 0.8) -> int:
    share = p_init / next((part for after, part in SHARES if step > after), 1)
    size = int(round(math.sqrt(share * height * width)))
    if norm != "Linf":
        size = max(size, 3)
        size += 1 - size % 2
    return min(max(size, 1), height, width)


def plain_proposal(norm: str, eps: float, x: Tensor, best: Tensor, step: int, u: list[float]) -> Tensor:
    """The next image of one image [C, H, W], not projected, from its uniform numbers."""
    channels, height, width = x.shape
    size = plain_size(step, height, width, norm)

    def square(tops: float, lefts: float) -> tuple[slice, slice]:
        top, left = int(tops * (height - size + 1)), int(lefts * (width - size + 1))
        return slice(top, top + size), slice(left, left + size)

    image = best.clone()
    if norm == "Linf":
        rows, columns = square(*u[:2])
        for c in range(channels):
            sign = 1 if u[2 + c] >= 0.5 else -1
            image[c, rows, columns] = (x[c] + sign * eps)[rows, columns].clamp(0, 1)
        return image
    p = {"L2": 2, "L1": 1}[norm]
    first, second, delta = square(*u[:2]), square(*u[2:4]), best - x
    union = torch.zeros(height, width, dtype=torch.bool)
    union[first], union[second] = True, True
    free = max(eps**p - plain_length(delta, p) ** p, 0) / channels
    for c in range(channels):
        sign = 1 if u[5 + c] >= 0.5 else -1
        length = (plain_length(delta[c][union], p) ** p + free) ** (1 / p) * (channels if p == 1 else 1)
        new = sign * plain_pattern(size, p, lying=u[4] >= 0.5).to(x.dtype)
        had = plain_length(delta[c][first], p)
        new = new + (delta[c][first] / had if had > 0 else 0)
        delta[c][second] = 0
        delta[c][first] = new / plain_length(new, p) * length
    return x + (delta if p == 1 else delta / plain_length(delta, p) * eps)


@pytest.mark.parametrize("norm", EPS)
def test_without_the_last_row_a_square_as_large_as_the_image_stays_in_place(norm: str) -> None:
    task = make_task(6, 1, 3, 3)
    procedure = Square(norm=norm, p_init=1.0, last_row=False).prepare(Budget(norm, EPS[norm]), 3)
    rows = procedure.start(task, no_run(task))
    after, _ = procedure.advance(task, rows, Seen(task.logits, torch.ones(6), task.x.new_empty(0)), never)
    assert after["shown"].isfinite().all() and (after["shown"] != rows["shown"]).any()


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 9, 14)])
def test_a_step_is_that_of_the_plain_implementation_at_every_size(norm: str, shape: tuple[int, ...]) -> None:
    steps = torch.tensor([0, 10, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001, 9999])
    task = make_task(len(steps), *shape, dtype=torch.float64)
    budget, attack = Budget(norm, EPS[norm]), Square(norm=norm, n_queries=10_000, seed=3)
    procedure = attack.prepare(budget, 3)
    rows = procedure.start(task, no_run(task)) | {"step": steps, "run": torch.arange(12) % 2}
    loss = torch.ones(12, dtype=torch.float64)
    after, _ = procedure.advance(task, rows, Seen(task.logits, loss, task.x.new_empty(0)), never)
    for i, step in enumerate(steps.tolist()):
        stream = 10_001 * (i % 2) + step + 1
        uniform = philox_uniform(task.ids[i : i + 1], 8, key=derive_seed(3, "square"), stream=stream)[0].tolist()
        plain = plain_proposal(norm, EPS[norm], task.x[i], rows["shown"][i], step, uniform)
        plain = budget.project(plain[None], task.x[i : i + 1])[0]
        torch.testing.assert_close(after["shown"][i], plain, rtol=0, atol=1e-5 if norm == "L2" else 1e-9)
    assert (after["shown"] != rows["shown"]).flatten(1).any(1).sum() > 8


def test_patterns_are_those_of_the_paper() -> None:
    for p in (1, 2):
        for size in (1, 2, 3, 4, 5, 11, 28):
            pattern = _pattern(size, p)
            torch.testing.assert_close(pattern, plain_pattern(size, p, lying=False), rtol=0, atol=1e-12)
            assert plain_length(pattern, p) == pytest.approx(1)


def test_sizes_are_those_of_the_published_schedule() -> None:
    procedure = Square(n_queries=10_000).prepare(Budget("Linf", 0.1), 10)
    task = make_task(10, 3, 32, 32)
    steps = torch.tensor([0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001])
    # Without noise of its own every pixel at +-eps shows the square: the best image is the clean one, in the middle.
    task = task._replace(x=torch.full_like(task.x, 0.5))
    rows = procedure.start(task, no_run(task)) | {"step": steps}
    rows["shown"] = task.x
    after, _ = procedure.advance(task, rows, Seen(task.logits, torch.ones(10), task.x.new_empty(0)), never)
    changed = (after["shown"] != 0.5).all(1)
    sides = [29, 20, 14, 10, 7, 5, 4, 3, 2, 1]
    assert changed.flatten(1).sum(1).tolist() == [side**2 for side in sides]
    assert changed.any(1).sum(1).tolist() == sides == changed.any(2).sum(1).tolist()


def test_the_schedule_can_be_stretched() -> None:
    attack = Square(n_queries=1000, rescale_schedule=True)
    procedure, task = attack.prepare(Budget("Linf", 0.1), 3), make_task(4, 1, 16, 16)
    task = task._replace(x=torch.full_like(task.x, 0.5))
    rows = procedure.start(task, no_run(task)) | {"step": torch.tensor([1, 2, 5, 6]), "shown": task.x}
    after, _ = procedure.advance(task, rows, Seen(task.logits, torch.ones(4), task.x.new_empty(0)), never)
    sides = [plain_size(step * 10, 16, 16, "Linf") for step in (1, 2, 5, 6)]
    assert (after["shown"] != 0.5).any(1).flatten(1).sum(1).tolist() == [side**2 for side in sides]
    assert len(set(sides)) == 3


@pytest.mark.parametrize("last_row", [True, False])
def test_squares_are_uniform_and_reach_every_border_but_for_the_published_ones(last_row: bool) -> None:
    n = 20_000
    x = torch.full((n, 1, 4, 5), 0.5)
    task = Task(x, torch.zeros(n, dtype=torch.int64), torch.arange(n), torch.zeros(n, 2))
    procedure = Square(n_queries=10_000, last_row=last_row).prepare(Budget("Linf", 0.25), 2)
    rows = procedure.start(task, no_run(task)) | {"step": torch.full((n,), 9000), "shown": x}
    after, _ = procedure.advance(task, rows, Seen(task.logits, torch.ones(n), x.new_empty(0)), never)
    assert after["shown"].unique().tolist() == [0.25, 0.5, 0.75]
    share = (after["shown"] != 0.5).float().mean(0)[0]
    expected = torch.full((4, 5), 1 / 20)
    if not last_row:
        expected = F.pad(torch.full((3, 4), 1 / 12), (0, 1, 0, 1))
    torch.testing.assert_close(share, expected, rtol=0, atol=0.008)  # 4 standard deviations
    assert (after["shown"] > 0.5).float().mean() * 20 == pytest.approx(0.5, abs=0.015)


# ---- the budget


@settings(max_examples=40, deadline=None)
@given(
    norm=st.sampled_from(sorted(EPS)),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(1, 12)),
    eps=st.sampled_from([0.0, 1e-6, 8 / 255, 0.3, 1.0, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
@pytest.mark.filterwarnings("ignore:an L. eps")
def test_every_image_shown_is_exactly_inside_the_budget(
    norm: str, shape: tuple[int, int, int], eps: float, dtype: torch.dtype, seed: int
) -> None:
    task = make_task(5, *shape, dtype=dtype, classes=2)
    budget = Budget(norm, min(eps, 1.0) if norm == "Linf" else eps)
    procedure = Square(norm=norm, n_queries=14, rescale_schedule=True, seed=seed).prepare(budget, 2)
    assert procedure.inside and not procedure.gradient
    for rows in drive(procedure, task, linear_model(task)):
        assert rows["shown"].dtype == rows["best"].dtype == dtype
        assert budget.contains(rows["shown"], task.x).all() and budget.contains(rows["best"], task.x).all()
        assert eps > 0 or torch.equal(rows["shown"], task.x)


@pytest.mark.filterwarnings("ignore:an L. eps")
def test_rounding_takes_no_l2_image_out_of_the_ball() -> None:
    for eps, idle in ((1e-6, 64), (0.1, 0)):  # the first is a few units of the last place of 0.9
        task = make_task(64, 3, 12, 12)
        task = task._replace(x=torch.full_like(task.x, 0.9))
        budget = Budget("L2", eps)
        procedure = Square(norm="L2", n_queries=40, rescale_schedule=True).prepare(budget, 3)
        for rows in drive(procedure, task, linear_model(task))[1:]:
            assert budget.contains(rows["shown"], task.x).all()
            assert (rows["shown"] == rows["best"]).flatten(1).all(1).sum() <= idle, "a proposal was not made"


@pytest.mark.parametrize("norm", EPS)
def test_the_start_uses_the_whole_budget(norm: str) -> None:
    task = make_task(6, 3, 20, 20)
    task = task._replace(x=torch.full_like(task.x, 0.5))
    budget = Budget(norm, EPS[norm])
    shown = Square(norm=norm).prepare(budget, 3).start(task, no_run(task))["shown"]
    torch.testing.assert_close(budget.measure(shown, task.x), torch.full((6,), EPS[norm]), rtol=1e-4, atol=0)
    if norm == "Linf":  # stripes
        assert torch.equal(shown, shown[:, :, :1].expand_as(shown)) and len(shown[:, :, 0].unique(dim=0)) == 6
    else:  # a pattern with both signs in every tile of 4 x 4
        tiles = (shown - task.x).unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
        assert ((tiles.amax(-1) > 0) & (tiles.amin(-1) < 0)).float().mean() > (0.99 if norm == "L2" else 0)


# ---- the search


@pytest.mark.parametrize("norm", EPS)
def test_only_better_proposals_are_kept(norm: str) -> None:
    task, procedure = make_task(4, 2, 8, 8), Square(norm=norm).prepare(Budget(norm, EPS[norm]), 3)
    first = procedure.start(task, no_run(task))

    def judge(rows: Rows, *losses: float) -> Rows:
        return procedure.advance(task, rows, Seen(task.logits, torch.tensor(losses), task.x.new_empty(0)), never)[0]

    second = judge(first, 1.0, 1.0, 1.0, math.nan)
    assert torch.equal(second["best"], first["shown"]) and second["best_loss"].tolist() == [1, 1, 1, -math.inf]
    third = judge(second, 2.0, 1.0, math.nan, 0.0)
    for row, better in enumerate((True, False, False, True)):
        assert torch.equal(third["best"][row], (second["shown"] if better else second["best"])[row])
    assert third["best_loss"].tolist() == [2, 1, 1, 0]
    assert torch.equal(first["best"], first["shown"]) and first["step"].tolist() == [0] * 4, "states stay as they were"


@pytest.mark.parametrize("norm", EPS)
def test_rows_do_not_depend_on_their_neighbours_bit_for_bit(norm: str) -> None:
    task, procedure = make_task(23, 3, 10, 10), Square(norm=norm).prepare(Budget(norm, EPS[norm]), 3)
    step, run = torch.arange(23) * 200, torch.arange(23) % 3
    model, order = linear_model(task), torch.randperm(23, generator=torch.Generator().manual_seed(0))

    def play(rows_of: Tensor) -> Tensor:
        part = task.select(rows_of)
        rows = procedure.start(part, run[rows_of]) | {"step": step[rows_of]}
        for _ in range(3):
            logits = torch.cat([model(image[None]) for image in rows["shown"]])
            loss = procedure.losses(logits, part, rows)
            rows, _ = procedure.advance(part, rows, Seen(part.logits, loss, part.x.new_empty(0)), never)
        return rows["shown"]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together = play(torch.arange(23))
        assert torch.equal(play(order), together[order])
        for size in (1, 7):
            assert torch.equal(torch.cat([play(part) for part in torch.arange(23).split(size)]), together)
    finally:
        torch.set_num_threads(threads)


def test_a_run_looks_at_one_image_more_than_it_has_queries(trained: Any) -> None:
    _, x, _, ids = trained
    seen = list[int]()

    def constant(images: Tensor) -> Tensor:
        seen.append(len(images))
        return torch.tensor([1.0, 0.0]).expand(len(images), 2)

    attack = Square(n_queries=6, n_restarts=3)
    result = attack.run(constant, x[:4], torch.zeros(4, dtype=torch.int64), eps=0.1, ids=ids[:4])
    assert not result.success.any()
    assert result.counts.forward.tolist() == [1 + 3 * (1 + 6)] * 4  # the clean image, and what three runs look at
    assert result.counts.queries.tolist() == result.counts.forward.tolist()
    assert result.counts.backward.tolist() == [0] * 4
    assert attack.passes(2) == 21


def test_restarts_and_seeds_draw_other_numbers(trained: Any) -> None:
    task = make_task(8, 1, 8, 8)
    starts = [
        Square(seed=seed, n_restarts=2).prepare(Budget("Linf", 0.1), 3).start(task, no_run(task) + run)["shown"]
        for seed in (0, 1)
        for run in (0, 1)
    ]
    assert len({start.numpy().tobytes() for start in starts}) == 4


@pytest.mark.parametrize("norm", EPS)
def test_more_queries_fool_more_images(trained: Any, norm: str) -> None:
    model, x, y, ids = trained
    x, y, ids = x[:96], y[:96], ids[:96]
    eps = {"Linf": 0.06, "L2": 0.6, "L1": 6.0}[norm]
    clean = (model(x).argmax(1) == y).float().mean()
    few, many = (Square(norm=norm, n_queries=n).run(model, x, y, eps=eps, ids=ids) for n in (1, 300))
    assert (model(many.images).argmax(1) != y).equal(many.success)
    assert (few.success <= many.success).all(), "a longer search begins like a shorter one"
    assert many.success.float().mean() > few.success.float().mean() + 0.15 * clean


@pytest.mark.parametrize("loss", ["margin", "ce"])
def test_the_search_is_by_the_loss_that_was_asked_for(trained: Any, loss: str) -> None:
    model, x, y, ids = trained
    with torch.no_grad():
        task = Task(x[:16], y[:16], ids[:16], model(x[:16]))
        procedure = Square(loss=loss, n_queries=30).prepare(Budget("Linf", 0.05), 5)
        states = drive(procedure, task, model)
        logits = model(states[-1]["best"])
    others = logits.scatter(1, y[:16, None], -math.inf)
    expected = {
        "margin": others.amax(1) - logits.gather(1, y[:16, None])[:, 0],
        "ce": -logits.log_softmax(1).gather(1, y[:16, None])[:, 0],
    }[loss]
    torch.testing.assert_close(states[-1]["best_loss"], expected)
    assert (states[-1]["best_loss"] > states[1]["best_loss"]).float().mean() > 0.8


@pytest.mark.parametrize("norm", EPS)
def test_it_needs_no_gradient_and_two_classes_do(norm: str) -> None:
    def threshold(images: Tensor) -> Tensor:
        score = torch.from_numpy(images.detach().numpy().mean((1, 2, 3)) - 0.5)
        return torch.stack([-score, score], 1)

    x = 0.47 + 0.02 * torch.rand(6, 1, 7, 5)
    result = Square(norm=norm, n_queries=200).run(
        threshold, x, torch.zeros(6, dtype=torch.int64), eps={"Linf": 0.2, "L2": 1.0, "L1": 8.0}[norm]
    )
    assert result.success.all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm": "L0"}, "unknown attack norm 'L0'"),
        ({"loss": "dlr"}, "unknown attack loss 'dlr'"),
        ({"n_queries": 0}, "n_queries must be an integer of at least 1, got 0"),
        ({"n_queries": 10.0}, "n_queries must be an integer"),
        ({"n_restarts": 0}, "n_restarts must be an integer of at least 1"),
        ({"p_init": 0.0}, "p_init is a share of the image"),
        ({"p_init": 1.5}, "p_init is a share of the image"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Square(**arguments)


def test_images_must_have_a_height_and_a_width() -> None:
    with pytest.raises(UsageError, match=r"needs images \[n, channels, height, width\], got \[4, 10\]"):
        Square().run(lambda x: -x[:, :3], torch.zeros(4, 10), torch.zeros(4, dtype=torch.int64), eps=0.1)
