"""One-shot pruning: counts, scopes, random baselines, and agreement with torch's own global pruner."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, cut, prunable_weights
from sparse_robust.pruning import SCORES, Evidence, prune, random_like, register_score, survivors

Make = Callable[..., nn.Module]
Batches = list[tuple[Tensor, Tensor]]


@given(st.integers(0, 10**9), st.integers(0, 999), st.integers(0, 5))
def test_survivors_follow_exact_decimal_arithmetic(n: int, thousandths: int, k: int) -> None:
    expected = n
    for _ in range(k):
        removed = Fraction(thousandths, 1000) * expected
        floor, rest = divmod(removed, 1)
        up = rest > Fraction(1, 2) or (rest == Fraction(1, 2) and floor % 2 == 1)
        expected -= int(floor) + up
    assert survivors(n, thousandths / 1000, k) == expected


def test_a_half_is_rounded_to_even_not_by_the_binary_neighbour() -> None:
    assert survivors(5, 0.1, 1) == 5, "0.1 * 5 is one half, which rounds to 0; as binary 0.1 is a little more"
    assert survivors(15, 0.1, 1) == 13
    assert survivors(100, 0, 3) == 100


@pytest.mark.acceptance("double-win", "A-3")
def test_global_pruning_removes_the_smallest_of_all_layers_together(make_net: Make) -> None:
    model = make_net()
    before = copy.deepcopy(model.state_dict())
    masks = prune(model, 0.6)
    weights = prunable_weights(model)
    kept = torch.cat([weight[masks[name]].abs() for name, weight in weights.items()])
    removed = torch.cat([weight[~masks[name]].abs() for name, weight in weights.items()])
    assert removed.max() <= kept.min()
    assert masks.count() == survivors(masks.numel(), 0.6, 1) == kept.numel()
    assert len({round(kept / numel, 3) for _, _, kept, numel in masks.layers()}) == 3, "densities differ across layers"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items()), "model is untouched"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_layerwise_pruning_takes_the_same_share_of_each_layer(make_net: Make) -> None:
    model = make_net()
    weights = prunable_weights(model)
    masks = prune(model, 0.63, scope="layerwise")
    assert masks.count() == prune(model, 0.63).count(), "the total is exact"
    for name, _, kept, numel in masks.layers():
        assert abs(kept - 0.37 * numel) < 1
        assert masks.only([name]) == cut({name: weights[name]}, numel - kept, magnitude=True)
    nested = prune(model, 0.9, scope="layerwise", keep=masks)
    assert nested <= masks and nested.count() == survivors(masks.numel(), 0.9, 1)


def test_layerwise_shares_are_exact_for_awkward_sizes() -> None:
    model = nn.Sequential(*[nn.Conv2d(1, 1, size) for size in (1, 1, 1, 2, 3)])
    for count in range(1, 17):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masks = prune(model, count=count, scope="layerwise")
        assert masks.count() == count
        assert all(abs(kept - Fraction(count * numel, 16)) < 1 for _, _, kept, numel in masks.layers())


def test_sparsity_counts_over_all_prunable_weights_and_count_is_what_stays(make_net: Make) -> None:
    model = make_net()
    half = prune(model, 0.5)
    assert prune(model, 0.75, keep=half).sparsity == pytest.approx(0.75, abs=1e-3)
    assert prune(model, count=100).count() == 100
    assert prune(model, 0.75, keep=half) == prune(model, 0.75)
    assert prune(model, 0).count() == half.numel()


@pytest.mark.acceptance("double-win", "A-3")
def test_five_rounds_agree_with_torchs_global_pruner(make_net: Make) -> None:
    model = make_net()
    reference = copy.deepcopy(model)
    layers = [(reference.conv1, "weight"), (reference.conv2, "weight"), (reference.conv3, "weight")]
    masks = Masks.full(model)
    for k in range(1, 6):
        with torch.no_grad():
            for name, weight in prunable_weights(model).items():
                weight += 0.05 * torch.randn_like(weight)
                layer = reference.get_submodule(name.removesuffix(".weight"))
                getattr(layer, "weight_orig" if k > 1 else "weight").copy_(weight)
                if k > 1:
                    layer.weight = layer.weight_orig * layer.weight_mask  # otherwise its score is stale
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.2)
        masks = prune(model, count=survivors(masks.count(), 0.2, 1), keep=masks)
        for name in masks:
            theirs = reference.get_submodule(name.removesuffix(".weight")).weight_mask
            assert torch.equal(masks[name], theirs.bool()), (k, name)


@pytest.mark.acceptance("double-win", "A-9")
def test_random_masks_overlap_by_chance_and_obey_their_seed() -> None:
    model = nn.Sequential(nn.Conv2d(256, 256, 3), nn.Conv2d(256, 192, 3), nn.Conv2d(192, 64, 1))
    sparsity = 1 - 0.8**7
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    assert total >= 1_000_000
    first, second = (prune(model, sparsity, score="random", seed=seed) for seed in (0, 1))
    assert first.count() == second.count() == survivors(total, sparsity, 1)
    assert first.iou(second) == pytest.approx(0.117, abs=0.002)
    assert first == prune(copy.deepcopy(model), sparsity, score="random", seed=0) != second
    for _, _, kept, numel in first.layers():
        assert kept / numel == pytest.approx(1 - sparsity, abs=0.01), "the same density in every layer"


def test_random_masks_of_equal_layers_differ() -> None:
    masks = prune(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), 0.5, score="random")
    assert not torch.equal(masks["0.weight"], masks["1.weight"])


def test_random_masks_with_the_densities_of_a_ticket(make_net: Make) -> None:
    ticket = prune(make_net(), 0.7)
    random = random_like(ticket, seed=0)
    assert random.layers() == ticket.layers() and random != ticket
    assert random == random_like(ticket, seed=0) != random_like(ticket, seed=1)
    assert 0 < random.iou(ticket) < 0.5


@pytest.mark.acceptance("double-win", "A-10")
def test_an_emptied_layer_is_named_once_and_the_net_still_runs(make_net: Make) -> None:
    model = make_net()
    with torch.no_grad():
        model.conv2.weight.mul_(1e-3)
    with pytest.warns(UserWarning, match="no weight is left in conv2.weight") as caught:
        masks = prune(model, 0.9)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = prune(model, 0.92, keep=masks)
    masks.apply_(model)
    assert model(torch.rand(2, 3, 8, 8)).isfinite().all()


@pytest.mark.acceptance("double-win", "A-10")
@pytest.mark.filterwarnings("ignore:no weight is left")
def test_rate_zero_is_the_identity_and_a_single_survivor_is_possible(make_net: Make) -> None:
    model = make_net()
    assert prune(model, 0.0) == Masks.full(model)
    single = prune(model, count=1)
    weights = prunable_weights(model)
    largest = max(float(weight.detach().abs().max()) for weight in weights.values())
    assert single.count() == 1
    assert sum(float(weight.detach()[single[name]].abs().sum()) for name, weight in weights.items()) == pytest.approx(
        largest
    )
    single.apply_(model)
    assert model(torch.rand(2, 3, 8, 8)).isfinite().all()


@pytest.mark.acceptance("double-win", "A-13")
def test_a_weight_that_happens_to_be_zero_does_not_count_as_pruned(make_net: Make) -> None:
    model = make_net()
    masks = prune(model, 0.5)
    masks.apply_(model)
    with torch.no_grad():
        for name, weight in prunable_weights(model).items():
            weight[masks[name]] = torch.where(torch.rand(int(masks[name].sum())) < 0.3, 0.0, weight[masks[name]])
    zeros = sum(int((weight == 0).sum()) for weight in prunable_weights(model).values())
    assert zeros > masks.numel() - masks.count()
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)
    further = prune(model, 0.75, keep=masks)
    assert further <= masks and further.count() == survivors(masks.numel(), 0.75, 1), "counts over the mask, not zeros"


def test_stem_head_and_exclusions_are_passed_on(make_net: Make) -> None:
    model = make_net()
    assert prune(model, 0.5, stem=False).names() == ("conv2.weight", "conv3.weight")
    assert prune(model, 0.5, head=True, exclude=["conv2"]).names() == ("conv1.weight", "conv3.weight", "fc.weight")


@pytest.fixture
def saliency() -> Iterable[list[tuple[Tensor, Tensor]]]:
    """A score that needs data, registered for one test; it yields what it saw."""
    seen: list[tuple[Tensor, Tensor]] = []

    @register_score("test-saliency", "The magnitude of gradient times weight.", "none", needs="data", magnitude=True)
    def score(model: nn.Module, weights: Mapping[str, Tensor], evidence: Evidence) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        for x, y in evidence.examples(model):
            seen.append((x, y))
            loss = nn.functional.cross_entropy(model(x), y)
            for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                total[name] += gradient * weights[name].detach()
        return total

    yield seen
    del SCORES["test-saliency"]


def test_a_score_with_data_sees_clean_or_attacked_batches(make_net: Make, batches: Batches, saliency: Batches) -> None:
    model = make_net().eval()
    clean = prune(model, 0.5, score="test-saliency", batches=batches)
    assert [torch.equal(x, image) for (x, _), (image, _) in zip(saliency, batches, strict=True)] == [True] * 8
    saliency.clear()
    attacked = prune(model, 0.5, score="test-saliency", batches=iter(batches), on=lambda model, x, y, ids: 1 - x)
    assert all(torch.equal(x, 1 - image) for (x, _), (image, _) in zip(saliency, batches, strict=True))
    assert clean != attacked and clean.count() == attacked.count()


def test_adversarial_batches_come_from_pgd(make_net: Make, batches: Batches, saliency: Batches) -> None:
    model = make_net().eval()
    prune(model, 0.5, score="test-saliency", batches=batches, on="adversarial")
    for (x, y), (image, label) in zip(saliency, batches, strict=True):
        assert 0 < (x - image).abs().max() <= 8 / 255 + 1e-6 and torch.equal(y, label)


def test_every_score_has_a_description_and_a_source() -> None:
    assert {"magnitude", "random"} <= set(SCORES)
    for name, score in SCORES.items():
        assert score.name == name and score.description.endswith(".") and score.source
    with pytest.raises(UsageError, match="there is a score 'random' already"):
        register_score("random", "", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.0}, r"must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, r"must be in \[0, 1\), got -0.1"),
        ({"sparsity": 90}, r"got 90. It is a share, not a percentage"),
        ({"sparsity": "0.9"}, "must be a number, got the text '0.9'"),
        ({"sparsity": float("nan")}, r"must be in \[0, 1\), got nan"),
        ({"sparsity": 0.99999}, "would keep 0 weights: expected from 1 to 1656"),
        ({"count": 0}, "count 0 would keep 0 weights"),
        ({"count": 1657}, "count 1657 would keep 1657 weights: expected from 1 to 1656"),
        ({}, "give either sparsity"),
        ({"sparsity": 0.5, "count": 3}, "give either sparsity"),
        ({"sparsity": 0.5, "score": "magnitud"}, "unknown score 'magnitud'. Did you mean 'magnitude'"),
        ({"sparsity": 0.5, "scope": "layer"}, "unknown scope 'layer'.*Known: erk, global, layerwise, uniform"),
        ({"sparsity": 0.5, "on": "dirty"}, "unknown kind of batches 'dirty'"),
        ({"sparsity": 0.5, "on": "adversarial"}, "looks at no data"),
        ({"sparsity": 0.5, "score": "test-saliency"}, "'test-saliency' looks at data: give batches"),
        ({"sparsity": 0.5, "keep": Masks.full({"v": torch.zeros(3)})}, "keep does not cover the prunable weights"),
    ],
)
@pytest.mark.usefixtures("saliency")
def test_wrong_arguments_say_what_was_expected(arguments: dict[str, object], message: str, make_net: Make) -> None:
    with pytest.raises(UsageError, match=message):
        prune(make_net(), **arguments)  # type: ignore[arg-type]


def test_nan_in_a_weight_is_named(make_net: Make) -> None:
    model = make_net()
    with torch.no_grad():
        model.conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"NaN in conv2.weight \(1 values\)"):
        prune(model, 0.5)
