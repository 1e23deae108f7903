"""The engine: full batches, early exits, verdicts by the real model, and nothing that depends on the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.attacks import PGD, Budget
from sparse_robust.attacks.engine import Engine
from sparse_robust.attacks.passes import Passes
from sparse_robust.attacks.procedure import Look, Rows, Seen, Task, noise

HALF = Budget("Linf", 0.5)


class Ladder:
    """Shows x, x + 0.01, x + 0.02, ...: a run takes `length` steps, and starts `run` tenths higher."""

    inside = True

    def __init__(self, length: int = 10, runs: int = 1, gradient: bool = True) -> None:
        self.budget, self.length, self.runs, self.gradient = HALF, length, runs, gradient
        self.started: list[list[int]] = []

    def start(self, task: Task, run: Tensor) -> Rows:
        self.started.append(task.ids.tolist())
        return {"shown": task.x + 0.1 * run.view(-1, 1), "step": torch.zeros_like(run)}

    def losses(self, logits: Tensor, task: Task, rows: Rows) -> Tensor:
        return logits[:, 0]

    def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
        assert seen.grad.shape == (rows["shown"].shape if self.gradient else (0,))
        step = rows["step"] + 1
        return {"shown": rows["shown"] + 0.01, "step": step}, step >= self.length


class Threshold(nn.Module):
    """Class 1 as soon as the only pixel reaches the threshold."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold, self.sizes = threshold, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        score = 100 * (x[:, :1] - self.threshold) + 1e-4
        return torch.cat([-score, score], 1)


def task(*values: float) -> Task:
    x = torch.tensor(values).view(-1, 1)
    return Task(x, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)), x.new_zeros(len(x), 2))


@pytest.mark.parametrize("gradient", [True, False])
def test_every_image_leaves_at_the_step_that_fools_the_model(gradient: bool) -> None:
    model = Threshold(0.5)
    outcome = Engine(model, 4).run(Ladder(gradient=gradient), task(0.5, 0.47, 0.39, 0.4, 0.45, 0.2))
    assert outcome.fooled.tolist() == [True, True, False, True, True, False]
    assert outcome.step.tolist() == [0, 3, -1, 10, 5, -1]
    torch.testing.assert_close(outcome.images[outcome.fooled], torch.full((4, 1), 0.5))
    seen = [1, 4, 10, 10, 6, 10]  # the last image of a run is only looked at
    assert outcome.forward.tolist() == [n + 1 for n in seen]  # and every verdict is confirmed
    assert outcome.backward.tolist() == (seen if gradient else [0] * 6)
    assert outcome.queries.tolist() == ([1] * 6 if gradient else [n + 1 for n in seen])
    torch.testing.assert_close(outcome.margin[2], torch.tensor(2 * (1 - 1e-4)), rtol=1e-3, atol=0)  # 0.49 at best


def test_free_slots_are_taken_at_once() -> None:
    """20 images of one step and 4 of ten in slots for 4: without refilling it would take 24 / 4 * 10 batches."""
    model, ladder = Threshold(0.5), Ladder()
    values = [0.3] * 4 + [0.5] * 20
    Engine(model, 4).run(ladder, task(*values))
    assert ladder.started == [[0, 1, 2, 3], *[[i, i + 1, i + 2, i + 3] for i in range(4, 24, 4)]]
    model, ladder = Threshold(0.5), Ladder()
    Engine(model, 4).run(ladder, task(0.3, 0.3, *[0.5] * 8))
    assert ladder.started[1:4] == [[4, 5], [6, 7], [8, 9]]  # beside the two that go on


def test_only_canonical_batches_reach_the_model() -> None:
    model = Threshold(0.5)
    Engine(model, 8).run(Ladder(), task(*torch.linspace(0.3, 0.55, 21).tolist()))
    assert set(model.sizes) <= {1, 2, 4, 8}


@pytest.mark.parametrize("values", [[0.33], [0.33, 0.2, 0.47, 0.12, 0.45]])
def test_what_fools_the_copy_alone_goes_on_where_it_was(values: list[float]) -> None:
    real, copy = Threshold(0.45), Threshold(0.40)
    outcome = Engine(real, 4, craft=copy).run(Ladder(length=20), task(*values))
    expected = [value >= 0.45 - 0.2 for value in values]
    assert outcome.fooled.tolist() == expected
    assert outcome.step[0] == 12  # 0.45, although 0.40 to 0.44 fooled the copy
    assert outcome.candidates - outcome.rejected == sum(expected)
    assert outcome.rejected >= 5


def test_a_rejected_candidate_of_the_last_step_is_not_lost() -> None:
    real, copy = Threshold(0.40), Threshold(0.39)
    outcome = Engine(real, 4, craft=copy).run(Ladder(length=10), task(0.30, 0.295))
    # Shown: 0.30 ... 0.39 (fools the copy at the last gradient), and then 0.40, which is only looked at.
    assert outcome.fooled.tolist() == [True, False] and outcome.step.tolist() == [10, -1]


def test_runs_follow_each_other_until_one_succeeds() -> None:
    ladder = Ladder(length=3, runs=4)
    outcome = Engine(Threshold(0.5), 4).run(ladder, task(0.48, 0.38, 0.27, 0.1, 0.0))
    assert outcome.fooled.tolist() == [True, True, True, False, False]
    assert outcome.step.tolist() == [2, 4 + 2, 8 + 3, -1, -1]
    assert outcome.forward[3] == 4 * (3 + 1)
    assert sum(ids.count(3) for ids in ladder.started) == 4 and sum(ids.count(0) for ids in ladder.started) == 1


def test_the_last_and_the_smallest_image() -> None:
    class Best(Ladder):
        def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
            moved, over = super().advance(task, rows, seen, look)
            return {**moved, "best": moved["shown"]}, over

        def start(self, task: Task, run: Tensor) -> Rows:
            rows = super().start(task, run)
            return {**rows, "best": rows["shown"]}

    model = Threshold(0.5)
    last = Engine(model, 4).run(Ladder(length=5), task(0.47, 0.40), keep="last")
    torch.testing.assert_close(last.images, torch.tensor([[0.52], [0.45]]))
    assert last.fooled.tolist() == [True, False] and last.backward.tolist() == [5, 5]
    smallest = Engine(model, 4).run(Best(length=5, runs=3), task(0.47, 0.40), keep="smallest")
    torch.testing.assert_close(smallest.images, torch.tensor([[0.52], [0.55]]))  # of runs that end 0.05, 0.15, 0.25 on
    assert smallest.fooled.all() and smallest.backward.tolist() == [15, 15]


def test_what_is_outside_of_the_budget_does_not_count() -> None:
    class Outside(Ladder):
        inside = False

        def __init__(self) -> None:
            super().__init__(length=20)
            self.budget = Budget("Linf", 0.05)

    outcome = Engine(Threshold(0.5), 4).run(Outside(), task(0.46, 0.40))
    assert outcome.fooled.tolist() == [True, False]
    assert torch.equal(outcome.images[1], torch.tensor([0.40]))  # what it found is no answer: the image itself
    assert abs(float(outcome.margin[1]) - 10) < 0.1  # 0.45 is the last one inside


def test_looks_count_as_hits_and_as_queries() -> None:
    class Looks(Ladder):
        def advance(self, task: Task, rows: Rows, seen: Seen, look: Look) -> tuple[Rows, Tensor]:
            look(rows["shown"] + 0.1)
            return super().advance(task, rows, seen, look)

    outcome = Engine(Threshold(0.5), 4).run(Looks(length=3), task(0.40, 0.385, 0.1))
    assert outcome.fooled.tolist() == [True, True, False]
    torch.testing.assert_close(outcome.images[:2], torch.tensor([[0.5], [0.505]]))
    assert outcome.step.tolist() == [1, 5, -1]
    assert outcome.queries.tolist() == [2, 4, 4] and outcome.backward.tolist() == [1, 3, 3]


def test_targets_are_reached_not_left() -> None:
    values = task(0.45, 0.3)._replace(y=torch.ones(2, dtype=torch.int64))
    outcome = Engine(Threshold(0.5), 4).run(Ladder(length=8), values, targeted=True)
    assert outcome.fooled.tolist() == [True, False] and outcome.step.tolist() == [5, -1]


def test_averages_over_passes_of_a_random_model() -> None:
    class Shaky(Threshold):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x) + (self.calls % 2 - 0.5) * torch.tensor([[10.0, -10.0]])

    torch.manual_seed(0)
    outcome = Engine(Shaky(0.5), 4, eot_iter=4).run(Ladder(), task(0.45, 0.3))
    assert outcome.step.tolist() == [5, -1] and outcome.backward.tolist() == [24, 40]


def test_an_empty_task_and_a_still_procedure() -> None:
    ladder = Ladder()
    ladder.still = True  # type: ignore[attr-defined]
    assert len(Engine(Threshold(0.5), 4).run(ladder, task()).images) == 0
    outcome = Engine(Threshold(0.5), 4).run(ladder, task(0.5, 0.4))
    assert outcome.fooled.tolist() == [True, False] and outcome.backward.tolist() == [0, 0]


@pytest.mark.parametrize("count", [1, 2, 5, 19])
@pytest.mark.parametrize("threshold", [0.5, 0.45])
def test_finished_images_are_told_once_each(count: int, threshold: float) -> None:
    """Also the last one, which goes through its attack in two rows."""
    told: list[int] = []
    engine = Engine(Threshold(0.5), 4, craft=Threshold(threshold))
    values = task(*torch.linspace(0.2, 0.52, count).tolist())
    outcome = engine.run(Ladder(length=3, runs=2), values, done=lambda _, at: told.extend(at.tolist()))
    assert sorted(told) == list(range(count))
    assert outcome.candidates - outcome.rejected <= int(outcome.fooled.sum())


class Fickle(nn.Module):
    """Rounds differently in batches of fewer than ``least``, and where ``places`` is set in the first row."""

    def __init__(self, least: int, places: bool = False) -> None:
        super().__init__()
        self.least, self.places, self.sizes = least, places, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        factor = torch.ones(len(x), 1) * (1 + 1e-6 * (len(x) < self.least))
        factor[0] += 1e-6 * self.places
        return torch.cat([x, x * factor], 1)


@pytest.mark.parametrize(
    ("model", "chunk", "count", "size"),
    [
        (Fickle(0), 32, 3, 4),
        (Fickle(0), 32, 17, 24),  # beside the powers of two, multiples of 8
        (Fickle(0), 256, 130, 144),  # or of a sixteenth of the chunk
        (Fickle(0), 24, 17, 24),
        (Fickle(8), 32, 3, 8),
        (Fickle(9), 24, 1, 16),
        (Fickle(32), 32, 3, 32),
        (Fickle(0, places=True), 32, 3, 32),
    ],
)
@pytest.mark.parametrize("gradient", [True, False])
def test_the_smallest_batch_with_the_same_bits_is_found(
    model: Fickle, chunk: int, count: int, size: int, gradient: bool
) -> None:
    model = Fickle(model.least, model.places)
    passes, x = Passes(model, chunk), torch.rand(count, 1)
    assert passes.size(x, gradient=gradient) == chunk and not model.sizes  # nothing is tried for one batch
    found = [passes.size(x, gradient=gradient) for _ in range(60)]
    assert found[-1] == size == min(found) and found == sorted(found, reverse=True)
    settled = sum(model.sizes)
    assert settled <= sum(chunk - min(size, count) for _ in found)  # trials cost less than padding would have
    assert passes.size(torch.rand(count, 1), gradient=gradient) == size and sum(model.sizes) == settled


def test_batches_that_are_padded_and_those_that_are_not_give_the_same_bits() -> None:
    x, model = torch.rand(3, 1), Fickle(8)
    passes = Passes(model, 32)
    for _ in range(20):
        assert torch.equal(passes.logits(x), torch.cat([x, x], 1))
    assert set(model.sizes[-3:]) == {8}


def test_noise_is_a_function_of_seed_id_and_stream() -> None:
    one = task(*[0.5] * 5)._replace(ids=torch.tensor([3, 9, 2**40, 3, 9]))
    drawn = noise(one, 6, key=5, stream=torch.tensor([0, 0, 1, 0, 1]))
    assert torch.equal(drawn[0], drawn[3]) and not torch.equal(drawn[1], drawn[4])


@pytest.mark.parametrize("chunk", [2, 5, 64])
def test_no_verdict_depends_on_who_else_is_there(trained: Any, chunk: int) -> None:
    model, x, y, ids = trained
    attack = PGD(steps=6, n_restarts=3, step_size="1/255")
    whole = attack.run(model, x, y, eps="4/255", ids=ids, chunk=chunk)
    order = torch.randperm(60)
    for part in order.split(7):
        run = attack.run(model, x[part], y[part], eps="4/255", ids=ids[part], chunk=chunk)
        for name in ("images", "success", "step", "norms"):
            assert torch.equal(getattr(run, name), getattr(whole, name)[part])
        for name in ("forward", "backward", "queries"):
            assert torch.equal(getattr(run.counts, name), getattr(whole.counts, name)[part])
