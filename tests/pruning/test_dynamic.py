"""Dynamic sparse training: exact counts, growth by the right thing, new connections at zero, ties, overflow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, prunable_weights
from sparse_robust.pruning import enforce, prune
from sparse_robust.pruning.dynamic import METHODS, Dynamics, MaskSchedule

Make = Callable[..., nn.Module]
Batches = list[tuple[Tensor, Tensor]]
UPDATES = 200


def per_layer(masks: Masks) -> list[int]:
    return [kept for _, _, kept, _ in masks.layers()]


def run(
    model: nn.Module,
    masks: Masks,
    schedule: MaskSchedule,
    batches: Batches,
    *,
    optimizer: str = "sgd",
    updates: int = UPDATES,
    seen: Callable[[int, Masks, Masks, Any], None] = lambda *_: None,
) -> Masks:
    """A training loop that changes masks as the trainer does; ``seen`` gets (update, old, new, optimizer)."""
    kind: Any = {"sgd": SGD, "adamw": AdamW}[optimizer]
    step = kind(model.parameters(), lr=0.02, **({"momentum": 0.9} if optimizer == "sgd" else {}))
    enforcement = enforce(step, model, masks)
    weights = prunable_weights(model)
    for update in range(1, updates + 1):
        x, y = batches[update % len(batches)]
        step.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        new = None
        if schedule.due(update):
            new = schedule.after(update, masks, weights, {name: w.grad for name, w in weights.items()})
        step.step()
        if new is not None:
            old, masks = masks, new
            enforcement.remove()
            enforcement = enforce(step, model, masks)
            seen(update, old, masks, step)
        enforcement.verify()
    return masks


@pytest.mark.acceptance("slak", "A8", "A10", "A11")
@pytest.mark.acceptance("smc-bench", "B7")
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("method", ["set", "rigl"])
def test_counts_stay_over_200_updates_and_new_weights_start_at_zero(
    method: str, optimizer: str, make_net: Make, batches: Batches
) -> None:
    model = make_net()
    first = prune(model, 0.7, score="random", scope="erk")
    counts, changes = per_layer(first), []
    schedule = Dynamics(method=method, every=5).plan(start=first.count(), stop=first.count(), updates=UPDATES, seed=0)

    def seen(update: int, old: Masks, new: Masks, step: Any) -> None:
        assert update % 5 == 0 and update <= 0.75 * UPDATES
        assert per_layer(new) == counts
        born = new & ~old
        changes.append(born.count())
        for name, weight in prunable_weights(model).items():
            here = born[name]
            for tensor in (weight.detach(), *(v for v in step.state[weight].values() if v.shape == weight.shape)):
                assert not tensor[here].contiguous().view(torch.int32).any(), "zero at birth, with zero slots"

    last = run(model, first, schedule, batches, optimizer=optimizer, seen=seen)
    # at 150, the end of the cosine, the share is 0
    assert len(changes) == 30 and sum(changes) > 100 and changes[-1] == 0
    assert changes[0] > changes[-5] or changes[0] > 10
    assert last.count() == first.count() and last != first
    alive = torch.cat([w.detach()[last[n]] for n, w in prunable_weights(model).items()])
    assert (alive != 0).float().mean() > 0.9, "grown weights are trained"


def test_rigl_drops_the_smallest_weights_and_grows_the_largest_gradients() -> None:
    weights = {"w": torch.tensor([5.0, -0.1, 0.3, 4.0, 0.0, 0.0, 0.0, 0.0])}
    gradients = {"w": torch.tensor([0.0, 0.0, 9.0, 0.0, -3.0, 1.0, 2.0, 0.5])}
    masks = Masks.from_bools({"w": torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool()})
    schedule = Dynamics(method="rigl", every=1, drop=0.6, window=(0.0, 1.0)).plan(
        start=4, stop=4, updates=10**6, seed=0
    )
    # 2 of 4 go: places 1 and 2; place 2 comes back by its gradient, place 4 is new
    new = schedule.after(1, masks, weights, gradients)
    assert new["w"].tolist() == [True, False, True, True, True, False, False, False]
    scaled = {"w": gradients["w"] * 1024}
    assert schedule.after(1, masks, weights, scaled) == new, "a scaled gradient selects the same"
    gradients["w"][4], gradients["w"][6] = torch.nan, torch.inf
    overflowed = schedule.after(1, masks, weights, gradients)
    assert overflowed["w"].tolist() == [True, False, True, True, False, True, False, False]
    assert schedule.after(1, masks, weights, {"w": None}).count() == 4


def test_ties_are_broken_by_place() -> None:
    weights = {"a": torch.ones(4), "b": torch.ones(4)}
    gradients: dict[str, Tensor | None] = {"a": torch.ones(4), "b": torch.ones(4)}
    masks = Masks.from_bools({n: torch.tensor([True, True, False, False]) for n in weights})
    rigl = Dynamics(method="rigl", drop=0.6, every=1, window=(0.0, 1.0)).plan(start=4, stop=4, updates=10**6, seed=0)
    # the first of equal magnitudes goes, and the last of equal gradients comes
    assert [rigl.after(1, masks, weights, gradients)[n].tolist() for n in "ab"] == [[False, True, False, True]] * 2
    gradual = Dynamics(method="gradual", every=1, window=(0.0, 1.0)).plan(start=8, stop=5, updates=1, seed=0)
    full = Masks.full(weights)
    assert [gradual.after(1, full, weights, {})[n].tolist() for n in "ab"] == [[False] * 3 + [True], [True] * 4]


def test_set_grows_at_random_by_seed_and_update_alone(make_net: Make) -> None:
    model = make_net()
    masks, weights = prune(model, 0.5), prunable_weights(model)

    def grown(seed: int, update: int) -> Masks:
        torch.rand(seed + update + 1)
        schedule = Dynamics(method="set").plan(start=masks.count(), stop=masks.count(), updates=10**9, seed=seed)
        return schedule.after(update, masks, weights, {})

    assert grown(0, 100) == grown(0, 100)
    assert len({grown(0, 100), grown(0, 200), grown(1, 100)}) == 3
    # uniform: places that were pruned before get their share of the new connections
    new = grown(0, 1) & ~masks
    exchanged = sum(int(0.3 * kept) for kept in per_layer(masks))
    free = masks.numel() - masks.count() + exchanged
    expected = exchanged * (masks.numel() - masks.count()) / free
    assert abs(new.count() - expected) < 5 * (expected**0.5)


@pytest.mark.acceptance("smc-bench", "B5")
@pytest.mark.parametrize("method", ["gradual", "granet"])
def test_pruning_follows_the_cubic_exactly(method: str, make_net: Make, batches: Batches) -> None:
    model = make_net()
    dynamics = Dynamics(method=method, every=7)
    total = Masks.full(model).count()
    stop = 300
    start = dynamics.begins_with(stop, total)
    assert start == {"gradual": total, "granet": round(total / 2)}[method]
    first = prune(model, count=start, score="random", scope="erk") if start < total else Masks.full(model)
    schedule = dynamics.plan(start=start, stop=stop, updates=UPDATES, seed=0)
    begin, end = {"gradual": (20, 160), "granet": (0, 137)}[method]
    met = []

    def seen(update: int, old: Masks, new: Masks, step: Any) -> None:
        met.append(update)
        left = max(0.0, 1 - (update - begin) / (end - begin))
        assert new.count() == pytest.approx(stop + (start - stop) * left**3, abs=0.5001)
        if method == "gradual":
            assert new <= old

    last = run(model, first, schedule, batches, seen=seen)
    assert last.count() == stop
    within = [t for t in range(1, UPDATES + 1) if t % 7 == 0 and begin < t <= (end if method == "gradual" else UPDATES)]
    assert met == sorted({*within, end})


@pytest.mark.acceptance("slak", "A9")
def test_granet_exchanges_within_layers_after_the_global_cut(make_net: Make) -> None:
    model = make_net()
    masks, weights = prune(model, 0.5, score="random"), prunable_weights(model)
    gradients: dict[str, Tensor | None] = {n: torch.rand(w.shape) for n, w in weights.items()}
    schedule = Dynamics(method="granet").plan(start=masks.count(), stop=200, updates=1000, seed=0)
    cut = prune(model, count=schedule.cubic.count(300), keep=masks)  # type: ignore[union-attr]
    new = schedule.after(300, masks, weights, gradients)
    assert per_layer(new) == per_layer(cut) and new != cut
    share = 0.005 + (0.5 - 0.005) / 2 * (1 + torch.cos(torch.tensor(torch.pi * 0.3)).item())
    for name, _, kept, _ in cut.layers():
        dropped = int(-(-share * kept // 1))  # rounded up
        stayed = int((new[name] & cut[name]).sum())
        assert stayed >= kept - dropped
        magnitudes = weights[name].detach().abs()[cut[name]].sort().values
        safe = cut[name] & (weights[name].detach().abs() > magnitudes[dropped - 1])
        assert (new[name] | ~safe).all(), "none but the smallest are dropped"


def test_every_method_has_its_line_and_published_numbers() -> None:
    for name, method in METHODS.items():
        assert method.name == name and method.description.endswith(".") and "20" in method.source
    assert (METHODS["rigl"].drop, METHODS["rigl"].window) == (0.3, (0.0, 0.75))
    assert (METHODS["granet"].drop, METHODS["granet"].drop_last, METHODS["granet"].start) == (0.5, 0.005, 0.5)
    assert METHODS["gradual"].window == (0.1, 0.8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ripl"}, "unknown way to change masks 'ripl'.*rigl"),
        ({"method": "rigl", "every": 0}, "at least 1; got 0"),
        ({"method": "rigl", "drop": 1.0}, r"must be in \[0, 1\), got 1.0"),
        ({"method": "gradual", "drop": 0.1}, "gradual only prunes"),
        ({"method": "set", "start": 0.5}, "set keeps its number of weights"),
        ({"method": "granet", "start": 0.0}, r"must be in \(0, 1\], got 0.0"),
        ({"method": "gradual", "window": (0.5, 0.4)}, "two ascending shares"),
    ],
)
def test_what_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Dynamics(**arguments)


def test_a_method_that_keeps_its_number_cannot_prune() -> None:
    with pytest.raises(UsageError, match="cannot go from 10 to 5"):
        Dynamics(method="rigl").plan(start=10, stop=5, updates=100, seed=0)
