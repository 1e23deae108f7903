"""Scores against their definitions, computed the slow way in float64; and what holds for every score."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from sparse_robust.attacks import PGD
from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, prunable_weights
from sparse_robust.models import set_normalization
from sparse_robust.pruning import SCORES, Evidence, prune

Make = Callable[..., nn.Module]
Batches = list[tuple[Tensor, Tensor]]
QUICK: dict[str, dict[str, Any]] = {"hydra": {"options": {"epochs": 2}}, "synflow": {"steps": 5}}
WITH_DATA = sorted(name for name, score in SCORES.items() if score.needs == "data")
PUBLISHED = {"magnitude", "random", "snip", "grasp", "synflow", "taylor", "fisher", "movement", "hydra"}


def lively(model: nn.Module) -> nn.Module:
    """Give the norms statistics and parameters as after training."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, least in ((module.running_mean, -0.5), (module.running_var, 0.5), (module.weight.data, 0.5)):
                assert tensor is not None
                tensor.copy_(least + torch.rand(tensor.shape, generator=generator))
            module.bias.data.copy_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return model


@pytest.fixture
def net(make_net: Make) -> nn.Module:
    return lively(make_net()).double().eval()


@pytest.fixture
def data(batches: Batches) -> Batches:
    return [(x.double(), y) for x, y in batches[:2]]


def scored(name: str, model: nn.Module, batches: Batches, **options: float) -> dict[str, Tensor]:
    """The scores themselves, without selection."""
    network = copy.deepcopy(model)
    weights = prunable_weights(network)
    keep = Masks.full(weights)
    evidence = Evidence(keep=keep, select=lambda scores: keep, batches=batches)
    return SCORES[name].function(network, weights, evidence, **options)


def stacked(batches: Batches) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def gradients_of_gates(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The derivative of the mean loss by gates of value 1 that multiply the weights: SNIP's own definition."""
    weights = prunable_weights(model)
    gates = {name: torch.ones_like(weight).requires_grad_(True) for name, weight in weights.items()}
    gated = {name: weight.detach() * gates[name] for name, weight in weights.items()}
    loss = F.cross_entropy(functional_call(model, gated, x), y)
    return dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-5, atol=1e-5 * float(score.abs().max()))
        assert score.abs().max() > 0


def test_snip_is_the_sensitivity_to_a_gate_on_the_weight(net: nn.Module, data: Batches) -> None:
    assert_equal(scored("snip", net, data), gradients_of_gates(net, *stacked(data)))
    assert SCORES["snip"].magnitude


def test_taylor_and_fisher_look_at_every_image_alone(net: nn.Module, data: Batches) -> None:
    x, y = stacked(data)
    each = [gradients_of_gates(net, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    mean = {name: torch.stack([one[name].abs() for one in each]).mean(0) for name in each[0]}
    assert_equal(scored("taylor", net, data), mean)
    half = {name: torch.stack([one[name] ** 2 for one in each]).mean(0) / 2 for name in each[0]}
    assert_equal(scored("fisher", net, data), half)  # w^2 g^2 / 2: the gates' gradient is w g


class Tiny(nn.Module):
    """Few enough weights for a whole Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.mix = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x))).mean((2, 3))
        out: Tensor = self.head(torch.tanh(self.mix(x)))
        return out


def test_grasp_is_the_weight_times_hessian_times_gradient() -> None:
    torch.manual_seed(0)
    model = lively(Tiny()).double().eval()
    data = [
        (torch.rand(5, 1, 4, 4).double(), torch.randint(3, (5,))),
        (torch.rand(2, 1, 4, 4).double(), torch.tensor([0, 2])),
    ]
    x, y = stacked(data)
    weights = prunable_weights(model)

    def loss(flat: Tensor, temperature: float = 200.0) -> Tensor:
        parts = flat.split([weight.numel() for weight in weights.values()])
        named = {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}
        return F.cross_entropy(functional_call(model, named, x) / temperature, y)

    flat = torch.cat([weight.detach().flatten() for weight in weights.values()])
    for temperature in (200.0, 1.0):
        at = partial(loss, temperature=temperature)
        hessian = torch.autograd.functional.hessian(at, flat)
        gradient = torch.autograd.functional.jacobian(at, flat)
        found = scored("grasp", model, data, temperature=temperature)
        score = torch.cat([each.flatten() for each in found.values()])
        torch.testing.assert_close(score, flat * (hessian @ gradient), rtol=1e-5, atol=0)

    # Higher is kept: what is removed first is what raises the gradient flow most (the paper's highest -w H g).
    def flow(weights: Tensor) -> float:
        return float(torch.autograd.functional.jacobian(partial(loss, temperature=1.0), weights).square().sum())

    for index in (int(score.argmin()), int(score.argmax())):
        step = torch.zeros_like(flat)
        step[index] = 1e-4 * flat[index]
        fall = (flow(flat) - flow(flat - step)) / 2e-4
        assert fall == pytest.approx(float(score[index]), rel=1e-3)
    assert score.min() < 0 < score.max() and not SCORES["grasp"].magnitude
    assert SCORES["grasp"].options == {"temperature": 200.0}


def test_movement_adds_up_minus_weight_times_gradient_along_the_run(net: nn.Module, data: Batches) -> None:
    network = copy.deepcopy(net)
    expected = {name: torch.zeros_like(weight) for name, weight in prunable_weights(net).items()}
    for _ in range(2):
        for x, y in data:
            parameters = dict(network.named_parameters())
            found = torch.autograd.grad(F.cross_entropy(network(x), y), list(parameters.values()))
            with torch.no_grad():
                for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
                    if name in expected:
                        expected[name] -= parameter * gradient
                    parameter -= 0.05 * gradient
    assert_equal(scored("movement", net, data, lr=0.05, epochs=2), expected)
    still = {name: -2 * gate for name, gate in gradients_of_gates(net, *stacked(data)).items()}
    assert_equal(scored("movement", net, data, lr=0.0), still)  # two batches, each by its mean
    assert not SCORES["movement"].magnitude


def test_movement_trains_under_the_masks_there_are(net: nn.Module, data: Batches) -> None:
    keep = prune(net, 0.5)
    masked = copy.deepcopy(net)
    keep.apply_(masked)
    network, weights = copy.deepcopy(masked), prunable_weights(masked)
    evidence = Evidence(keep=keep, select=lambda scores: keep, batches=data)
    found = SCORES["movement"].function(masked, weights, evidence, lr=0.5)
    for name, weight in weights.items():
        assert (
            not weight[~keep[name]].any()
            and weight[keep[name]].ne(dict(network.named_parameters())[name][keep[name]]).any()
        )
        assert not found[name][~keep[name]].any()


def test_synflow_by_hand() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.5]]))
        model[2].weight.copy_(torch.tensor([[-4.0, 0.25]]))
    found = SCORES["synflow"].function(
        model,
        dict(model.named_parameters()),
        Evidence(keep=Masks.full(dict(model.named_parameters())), select=lambda s: None, batches=[(torch.rand(3, 2),)]),
    )
    assert found["0.weight"].tolist() == [[4.0, 8.0], [0.75, 0.125]] and found["0.weight"].dtype == torch.float64
    assert found["2.weight"].tolist() == [[12.0, 0.875]]


@pytest.mark.parametrize("trained", [False, True])
def test_synflow_conserves_the_flow_and_uses_no_pixel(make_net: Make, trained: bool) -> None:
    chain = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 9, 3, bias=False), nn.BatchNorm2d(9),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(9, 4, bias=False),
    )  # fmt: skip
    if trained:
        lively(chain)
        for module in chain:
            if isinstance(module, nn.BatchNorm2d):
                module.bias.data.zero_()
    weights = prunable_weights(chain, head=True)
    batches = [(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]))]
    evidence = Evidence(keep=Masks.full(weights), select=lambda s: None, batches=batches)
    flows = [score.sum() for score in SCORES["synflow"].function(chain, weights, evidence).values()]
    torch.testing.assert_close(flows[0], flows[1])
    torch.testing.assert_close(flows[0], flows[2])
    dark, bright = (
        prune(make_net(), 0.9, score="synflow", batches=[(x,)], steps=5) for x in (0 * batches[0][0], batches[0][0])
    )
    assert dark == bright


def test_synflow_never_empties_a_layer_where_magnitude_does() -> None:
    """Down to few times as many weights as layers; the authors' critical compression."""
    torch.manual_seed(0)
    widths = [3, 32, 8, 32, 8, 4]
    model = nn.Sequential(
        *[
            layer
            for a, b in zip(widths, widths[1:], strict=False)
            for layer in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())
        ]
    )
    shape = [(torch.zeros(1, 3, 6, 6), torch.tensor([0]))]
    for count in (100, 30):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            masks = prune(model, count=count, score="synflow", batches=shape)
        assert masks.count() == count and all(kept > 0 for _, _, kept, _ in masks.layers())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            by_size = prune(model, count=count)
            once = prune(model, count=count, score="synflow", batches=shape, steps=1)
        assert once != masks
    assert any(kept == 0 for _, _, kept, _ in by_size.layers()), "the test needs a network on which magnitude fails"
    assert any(kept == 0 for _, _, kept, _ in once.layers()), "and on which a single step fails, too"


def test_hydra_starts_from_the_weights_and_learns_by_the_straight_through_gradient(
    net: nn.Module, data: Batches
) -> None:
    start = scored("hydra", net, data, epochs=0)
    for name, weight in prunable_weights(net).items():
        scale = math.sqrt(6 / weight[0].numel()) / weight.detach().abs().max()
        torch.testing.assert_close(start[name], weight.detach() * scale)
    same = {"scope": "layerwise", "batches": data}
    before = prune(net, 0.7, score="hydra", options={"epochs": 0}, **same)  # type: ignore[arg-type]
    assert before == prune(net, 0.7, scope="layerwise")

    def hardest(score: Tensor) -> Tensor:
        return score.abs() >= score.abs().flatten().topk(round(0.3 * score.numel())).values[-1]

    scores = {name: score.clone().requires_grad_(True) for name, score in start.items()}
    optimizer = torch.optim.SGD(scores.values(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for (x, y), rate in zip(data, [0.1, 0.05], strict=True):  # a cosine over the two batches of one epoch
        gated = {}
        for name, weight in prunable_weights(net).items():
            size = scores[name].abs()
            gated[name] = weight.detach() * (hardest(size.detach()).double() + size - size.detach())
        optimizer.zero_grad()
        F.cross_entropy(functional_call(net, gated, x), y).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    weights = prunable_weights(net)
    evidence = Evidence(
        keep=Masks.full(weights), batches=data,
        select=lambda scores: Masks.from_bools({name: hardest(score) for name, score in scores.items()}),
    )  # fmt: skip
    learned = SCORES["hydra"].function(copy.deepcopy(net), prunable_weights(copy.deepcopy(net)), evidence, epochs=0)
    assert_equal(learned, start)
    network = copy.deepcopy(net)
    learned = SCORES["hydra"].function(network, prunable_weights(network), evidence, epochs=1)
    moved = {name: score.detach() - start[name] for name, score in scores.items()}
    assert_equal({name: score - start[name] for name, score in learned.items()}, moved)
    defaults = {"epochs": 20, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    assert SCORES["hydra"].options == defaults and SCORES["hydra"].magnitude


def test_hydra_finds_a_more_robust_mask_than_magnitude(make_net: Make, batches: Batches) -> None:
    model = make_net()
    # The class is the brightest channel.
    labels = [(0.7 * x + 0.3 * F.one_hot(y % 3, 3)[:, :, None, None], y % 3) for x, y in batches]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x, y in 8 * labels:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.eval()
    attack = partial(PGD(steps=2), eps=0.01)
    seen: list[float] = []

    def watched(network: nn.Module, x: Tensor, y: Tensor, *, ids: Tensor) -> Tensor:
        seen.append(sum(float((weight != 0).sum()) for weight in prunable_weights(network).values()))
        return attack(network, x, y, ids=ids)

    common = {"sparsity": 0.7, "scope": "layerwise"}
    masks = prune(model, score="hydra", on=watched, batches=labels, options={"epochs": 5}, **common)  # type: ignore[arg-type]
    assert seen == [497.0] * 40, "the attack is against the network as pruned at each update"

    def loss(masks: Masks) -> float:
        network = copy.deepcopy(model)
        masks.apply_(network)
        return sum(
            float(F.cross_entropy(network(attack(network, x, y, ids=torch.arange(8))), y).detach()) for x, y in labels
        )

    assert loss(masks) < 0.8 * loss(prune(model, **common))  # type: ignore[arg-type]


def test_the_list_of_scores_says_what_each_is() -> None:
    assert set(SCORES) == PUBLISHED
    for name, score in SCORES.items():
        assert score.name == name and score.description.endswith(".") and len(score.source) > 20
    assert {name for name, score in SCORES.items() if score.steps > 1} == {"synflow"} and SCORES["synflow"].steps == 100


def pruned(name: str, model: nn.Module, batches: Batches, **how: Any) -> Masks:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prune(model, **{"sparsity": 0.6, "score": name, "batches": batches, **QUICK.get(name, {}), **how})


@pytest.mark.acceptance("smc-bench", "B6")
@pytest.mark.acceptance("slak", "A6")
@pytest.mark.parametrize("name", sorted(SCORES))
def test_every_score_counts_exactly_recurs_and_leaves_all_as_it_was(
    make_net: Make, batches: Batches, name: str
) -> None:
    model = lively(make_net()).train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model(batches[0][0]).sum().backward()
    state = copy.deepcopy(model.state_dict())
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    images, generator = [x.clone() for x, _ in batches], torch.get_rng_state()
    masks = pruned(name, model, batches, on="adversarial" if name in WITH_DATA else "clean")
    assert masks.count() == 662 and masks == pruned(
        name, model, batches, on="adversarial" if name in WITH_DATA else "clean"
    )
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
    for key, parameter in model.named_parameters():
        before = gradients[key]
        assert parameter.grad is before or torch.equal(parameter.grad, before)  # type: ignore[arg-type]
        assert parameter.requires_grad is (key != "conv1.weight")
    assert model.training and not model.bn1.training and model.bn2.training
    assert all(torch.equal(x, image) for (x, _), image in zip(batches, images, strict=True))
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", WITH_DATA)
def test_adversarial_batches_give_other_masks(make_net: Make, batches: Batches, name: str) -> None:
    model = lively(make_net())
    clean = pruned(name, model, batches[:2])
    strong = partial(PGD(steps=5), eps=0.3)
    attacked = pruned(name, model, batches[:2], on=strong)
    assert clean.count() == attacked.count() and clean != attacked
    assert attacked == pruned(name, model, batches[:2], on=strong)


@pytest.mark.parametrize("name", ["snip", "grasp", "taylor", "fisher"])
@pytest.mark.parametrize("attacked", [False, True])
def test_scores_do_not_depend_on_how_images_are_batched(
    make_net: Make, data: Batches, name: str, attacked: bool
) -> None:
    model = lively(make_net()).double()
    x, y = stacked(data)
    how = {"on": partial(PGD(steps=2), eps=0.05)} if attacked else {}
    whole = pruned(name, model, [(x, y)], **how)
    for size in (1, 5):
        assert pruned(name, model, list(zip(x.split(size), y.split(size), strict=True)), **how) == whole
    order = torch.randperm(len(x))
    mixed = pruned(name, model, [(x[order], y[order], order)], **how)  # type: ignore[list-item]
    assert mixed.iou(whole) > 0.98, "noise goes with the ids, up to the rounding of sums in another order"


def test_batch_statistics_are_an_option(make_net: Make, batches: Batches) -> None:
    model = lively(make_net())
    assert pruned("snip", model, batches, mode="train") != pruned("snip", model, batches)
    assert pruned("snip", model.train(), batches) == pruned("snip", model.eval(), batches), (
        "the model's own mode is not"
    )


def test_dropout_is_seeded(make_net: Make, batches: Batches) -> None:
    model = nn.Sequential(nn.Dropout(0.5), lively(make_net()))
    first = pruned("snip", model, batches, mode="train", seed=1)
    torch.manual_seed(5)
    assert pruned("snip", model, batches, mode="train", seed=1) == first
    assert pruned("snip", model, batches, mode="train", seed=2) != first
    assert pruned("snip", model, batches, seed=1) == pruned("snip", model, batches, seed=2)


def test_scores_see_the_network_that_is_left(make_net: Make, batches: Batches) -> None:
    model = lively(make_net())
    half = pruned("snip", model, batches, sparsity=0.5)
    masked = copy.deepcopy(model)
    half.apply_(masked)
    assert pruned("snip", model, batches, keep=half, sparsity=0.8) == pruned(
        "snip", masked, batches, keep=half, sparsity=0.8
    )
    in_steps = pruned("snip", model, batches, sparsity=0.8, steps=4)
    assert in_steps.count() == 331 and in_steps != pruned("snip", model, batches, sparsity=0.8)
    assert pruned("magnitude", model, [], sparsity=0.8, steps=7) == pruned("magnitude", model, [], sparsity=0.8)
    for scope in ("layerwise", "erk", {"conv2": 0.1}):
        assert pruned("snip", model, batches, sparsity=0.8, steps=3, scope=scope).count() == 331


def test_a_loss_of_ones_own(make_net: Make, batches: Batches) -> None:
    model = lively(make_net())

    def doubled(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        return 2 * F.cross_entropy(forward(x), y, reduction="none")

    def margin(forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.multi_margin_loss(forward(x), y, reduction="none")

    assert pruned("snip", model, batches, loss=doubled) == pruned("snip", model, batches)
    assert pruned("snip", model, batches, loss=margin) != pruned("snip", model, batches)


def test_normalisation_inside_the_model_stays_out_of_synflow(make_net: Make) -> None:
    import sparse_robust as sr

    model = sr.create_model("resnet10t", num_classes=4, in_chans=3, channels=[4, 6, 8, 10], stem_width=4)
    lively(model)  # the last norm of an untrained block has scale 0, which stops all flow
    batches = [(torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))]
    plain = prune(model, 0.8, score="synflow", batches=batches, steps=3)
    set_normalization(model, [0.9, 0.1, 0.5], [0.1, 0.9, 0.3])
    assert prune(model, 0.8, score="synflow", batches=batches, steps=3) == plain
    assert float(model.input_mean.flatten()[0]) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": "snipp"}, "unknown score 'snipp'. Did you mean 'snip'"),
        ({"score": "snip"}, "'snip' looks at data: give batches"),
        ({"score": "synflow"}, "takes the shape of its input from a batch"),
        ({"score": "snip", "batches": []}, "batches holds no image"),
        ({"score": "synflow", "batches": [], "on": "adversarial"}, "'synflow' looks at no data"),
        ({"score": "magnitude", "options": {"lr": 1}}, "'magnitude' takes no options, got 'lr'"),
        ({"score": "grasp", "batches": [], "options": {"T": 1}}, "option of the score 'grasp' 'T'.*temperature"),
        ({"score": "magnitude", "mode": "trian"}, "unknown mode 'trian'. Did you mean 'train'"),
        ({"score": "magnitude", "steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_say_what_was_expected(arguments: dict[str, Any], message: str, make_net: Make) -> None:
    with pytest.raises(UsageError, match=message):
        prune(make_net(), 0.5, **arguments)


def test_scores_that_are_not_numbers_are_named(make_net: Make, batches: Batches) -> None:
    model = make_net()
    with torch.no_grad():
        model.conv3.bias[0] = float("nan")
    with pytest.raises(UsageError, match="NaN in conv1.weight"):
        prune(model, 0.5, score="snip", batches=batches)
