"""Budgets: how many weights each layer keeps, against counts written out by hand and published formulas."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from math import prod

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, prunable_weights
from sparse_robust.pruning import SCOPES, prune, random_like
from sparse_robust.pruning.budgets import budget, share

Make = Callable[..., nn.Module]


def kept(masks: Masks) -> list[int]:
    return [count for _, _, count, _ in masks.layers()]


def test_shares_written_by_hand() -> None:
    assert share(10, {"a": 1, "b": 1, "c": 2}, {"a": 9, "b": 9, "c": 9}) == {"a": 3, "b": 2, "c": 5}
    assert share(10, {"a": 1, "b": 1, "c": 2}, {"a": 9, "b": 9, "c": 2}) == {"a": 4, "b": 4, "c": 2}
    assert share(3, {"a": 1, "b": 1, "c": 0}, {"a": 1, "b": 2, "c": 5}) == {"a": 1, "b": 2, "c": 0}
    with pytest.raises(UsageError, match="cannot keep 5 weights in these 2 layers, which can keep 4 together"):
        share(5, {"a": 1, "b": 1}, {"a": 2, "b": 2})


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 60)), min_size=1, max_size=6), st.integers(0, 100))
def test_shares_are_exact_and_below_their_capacity(layers: list[tuple[int, int]], part: int) -> None:
    weights = {str(i): weight for i, (weight, _) in enumerate(layers)}
    capacity = {str(i): room for i, (_, room) in enumerate(layers)}
    total = sum(capacity.values()) * part // 100
    shares = share(total, weights, capacity)
    assert sum(shares.values()) == total and all(0 <= shares[n] <= capacity[n] for n in shares)
    free = [n for n in shares if shares[n] < capacity[n]]
    for one in free:  # in proportion, to within the one weight of rounding
        assert all((shares[n] - 1) / weights[n] <= (shares[one] + 1) / weights[one] + 1e-9 for n in shares)


def erk_densities(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """RigL's appendix, step by step in floating point: freeze the densest layer at 1 until none is above it."""
    dense: set[str] = set()
    while True:
        rest = [name for name in shapes if name not in dense]
        raw = {name: sum(shapes[name]) / prod(shapes[name]) for name in rest}
        total = sum(prod(shape) for shape in shapes.values())
        ones = density * total - sum(prod(shapes[name]) for name in dense)
        epsilon = ones / sum(raw[name] * prod(shapes[name]) for name in rest)
        if max(raw.values()) * epsilon <= 1:
            return {name: 1.0 if name in dense else epsilon * raw[name] for name in shapes}
        dense |= {name for name in rest if raw[name] == max(raw.values())}


size = st.integers(1, 24)
layer_shapes = st.lists(
    st.one_of(st.tuples(size, size), st.tuples(size, size, st.just(3), st.just(3)), st.tuples(size, size, size)),
    min_size=2,
    max_size=6,
)


@pytest.mark.acceptance("slak", "A16")
@given(layer_shapes, st.integers(1, 99))
def test_erk_follows_the_published_formula(shapes: list[tuple[int, ...]], percent: int) -> None:
    named = {f"layer{i}": shape for i, shape in enumerate(shapes)}
    masks = Masks.full({name: torch.empty(shape) for name, shape in named.items()})
    count = masks.numel() * percent // 100
    assume(count > 0)
    quotas = budget(nn.Module(), "erk", masks, count, {n: prod(s) for n, s in named.items()})
    assert quotas is not None and sum(quotas.values()) == count
    for name, density in erk_densities(named, count / masks.numel()).items():
        assert abs(quotas[name] - density * prod(named[name])) < 1 + 1e-6
        assert quotas[name] <= prod(named[name])


def test_erk_leaves_small_layers_dense_and_shares_the_rest(make_net: Make) -> None:
    masks = prune(make_net(), 0.4, scope="erk")
    # 216, 576, 864 weights with dimensions that add up to 17, 22, 26; 994 stay. 17/65 of them would be 259.97, so the
    # first layer is dense, and 778 are shared as 22 to 26: 356.58 and 421.42.
    assert kept(masks) == [216, 357, 421]
    for name, weight in prunable_weights(make_net()).items():  # inside a layer it is magnitude as ever
        ranked = weight.detach().abs().flatten().sort(descending=True).values
        assert weight.detach().abs()[masks[name]].min() >= ranked[int(masks[name].sum()) - 1]


def test_uniform_keeps_the_stem_and_a_fifth_of_the_head(make_net: Make) -> None:
    assert kept(prune(make_net(), 0.5, scope="uniform")) == [216, 245, 367]  # 612 of 1440, 0.425 each
    with_head = prune(make_net(), 0.8, scope="uniform", head=True)
    # 1704 weights, 341 stay: 216 in the stem, 10 of the head's 48, 115 of 1440
    assert kept(with_head) == [216, 46, 69, 10]
    assert kept(prune(make_net(), 0.5, scope="uniform", stem=False)) == [288, 432], "no stem among them: equal"
    with pytest.raises(UsageError, match=r"conv1.weight 216 weights, so the total must be from 216 to 1656, got 166"):
        prune(make_net(), 0.9, scope="uniform")


def test_densities_by_layer(make_net: Make) -> None:
    assert kept(prune(make_net(), scope={"conv1": 1.0, "conv2": 0.25})) == [216, 144, 864], "others stay dense"
    assert kept(prune(make_net(), 0.5, scope={"conv1": 1.0})) == [216, 245, 367], "others share the rest"
    assert kept(prune(make_net(), scope={"conv3": 0.5, "conv*": 0.1})) == [22, 58, 432], "the first that matches"
    assert kept(prune(make_net(), count=512, scope={"conv3": 0.5, "conv*": 0.1})) == [22, 58, 432]


def test_the_counts_of_a_ticket_under_any_score(make_net: Make) -> None:
    ticket = prune(make_net(), 0.7)
    random = prune(make_net(), score="random", scope=ticket, seed=3)
    assert random == random_like(ticket, seed=3) and kept(random) == kept(ticket) != kept(prune(make_net(1), 0.7))
    other = prune(make_net(1), scope=ticket)
    assert kept(other) == kept(ticket) and other != ticket
    assert prune(make_net(), count=ticket.count(), scope=ticket) == ticket


@pytest.mark.parametrize("scope", [*SCOPES, "densities"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block:4x4", "channel"])
def test_every_scope_goes_with_every_pattern(make_net: Make, scope: str, pattern: str) -> None:
    model = make_net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = prune(model, 0.6, scope={"conv2": 0.25} if scope == "densities" else scope, pattern=pattern)
    exact = pattern in ("unstructured", "2:4")
    assert masks.count() == 662 if exact else abs(masks.count() - 662) < 60
    if pattern == "channel":
        for name in masks:
            flat = masks[name].flatten(1)
            assert (flat.all(1) | ~flat.any(1)).all() and flat.any()
    if pattern == "2:4":
        for name in masks:
            rows = masks[name].permute(0, 2, 3, 1)
            groups = rows.reshape(-1, rows.shape[-1]).split(4, dim=1)
            assert all((group.sum(1) <= 2).all() for group in groups)
    further = prune(model, 0.8, pattern=pattern, keep=masks)
    assert further <= masks and further.count() < masks.count()


def test_n_of_m_alone_says_how_much_is_kept(make_net: Make) -> None:
    masks = prune(make_net(), pattern="2:4")
    assert kept(masks) == [8 * 9 * 2, 288, 432], "of three inputs two stay, as if padded to four"
    assert prune(make_net(), pattern="2:4", scope="erk") == masks, "every layer is full"
    assert kept(prune(make_net(), 0.5, pattern="2:4", scope="erk"))[0] == 144, "a full layer's share goes to the others"
    with pytest.raises(UsageError, match=r"would keep 1325 weights, and 2:4 leaves 864 at most"):
        prune(make_net(), 0.2, pattern="2:4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0.5, "scope": "earth"}, "unknown scope 'earth'.*Known: erk, global"),
        ({"scope": "erk"}, "give either sparsity"),
        ({"scope": {"conv9": 0.5}}, "unknown layer in the densities 'conv9'. Did you mean"),
        ({"scope": {"conv1": 1.5}}, r"density of 'conv1' must be in \[0, 1\], got 1.5"),
        ({"scope": {"*": 0.0}}, "keep no weight at all"),
        ({"sparsity": 0.5, "scope": {"*": 0.1}}, "total must be from 166 to 166, got 828"),
        ({"scope": {"conv2": 0.75}, "pattern": "2:4"}, "432 weights to conv2.weight, which can keep 288 at most"),
        ({"sparsity": 0.5, "scope": Masks.full({"v": torch.zeros(3)})}, "the ticket covers other weights"),
        ({"sparsity": 0.5, "pattern": "3"}, "unknown pattern '3'"),
    ],
)
def test_budgets_that_cannot_be_say_why(arguments: dict[str, object], message: str, make_net: Make) -> None:
    with pytest.raises(UsageError, match=message):
        prune(make_net(), **arguments)  # type: ignore[arg-type]


def test_a_ticket_of_another_count_is_refused(make_net: Make) -> None:
    ticket = prune(make_net(), 0.7)
    with pytest.raises(UsageError, match="the ticket keeps 497 weights, so 828 cannot be asked for"):
        prune(make_net(), 0.5, scope=ticket)
    with pytest.raises(UsageError, match="the ticket keeps .* which can keep .* at most here"):
        prune(make_net(), scope=ticket, keep=prune(make_net(), 0.9))


def test_patterns_refuse_transposed_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(8, 4, 3))
    with pytest.raises(UsageError, match="1.weight, of a transposed convolution"):
        prune(model, pattern="2:4")
    assert prune(model, pattern="2:4", exclude=["1"]).names() == ("0.weight",)
    assert prune(model, 0.5).count() == 288
