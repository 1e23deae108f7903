"""Iterative pruning with rewinding: what is cut when, from which weights, and what everything is rewound to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim import SGD

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks, prunable_weights
from sparse_robust.pruning import enforce, imp, prune, rewind_, survivors

Make = Callable[..., nn.Module]
Batches = list[tuple[Tensor, Tensor]]
State = dict[str, Tensor]

# Surviving weights of 20 rounds at 20 %, rounding halves to even.
SURVIVORS = {
    "resnet18": (
        *(8_933_530, 7_146_824, 5_717_459, 4_573_967, 3_659_174, 2_927_339, 2_341_871, 1_873_497, 1_498_798, 1_199_038),
        *(959_230, 767_384, 613_907, 491_126, 392_901, 314_321, 251_457, 201_166, 160_933, 128_746),
    ),
    "resnet50": (
        *(18_763_930, 15_011_144, 12_008_915, 9_607_132, 7_685_706, 6_148_565, 4_918_852, 3_935_082, 3_148_066),
        *(2_518_453, 2_014_762, 1_611_810, 1_289_448, 1_031_558, 825_246, 660_197, 528_158, 422_526, 338_021, 270_417),
    ),
}


def noise(model: nn.Module, masks: Masks, k: int) -> None:
    """A stand-in for training that depends on the round alone and moves everything, also norms and counters."""
    generator = torch.Generator().manual_seed(k)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
            else:
                tensor += 1


def nothing(model: nn.Module, masks: Masks, k: int) -> None:
    """No training."""


def state_of(model: nn.Module) -> State:
    return copy.deepcopy(model.state_dict())


@pytest.mark.acceptance("double-win", "A-1", "A-2", "A-6")
@pytest.mark.filterwarnings("ignore:no weight is left")  # random weights empty the widest layers first
@pytest.mark.parametrize("name", ["resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_surviving_counts_of_resnets(name: str) -> None:
    model = timm.create_model(name)
    theta = state_of(model)
    total = sum(weight.numel() for weight in prunable_weights(model).values())
    masks = Masks.full(model)
    for k, ticket in imp(model, theta, nothing, rounds=20):
        assert ticket.count() == SURVIVORS[name][k - 1] == survivors(total, 0.2, k)
        assert masks.count() - ticket.count() == round(masks.count() / 5)
        assert abs(100 * ticket.sparsity - 100 * (1 - 0.8**k)) < 1e-4
        assert ticket <= masks
        masks = ticket
        if k in (1, 6):
            assert ticket == prune(model, count=ticket.count()), "without training, k cuts are one"
    if name == "resnet50":
        assert total - SURVIVORS[name][0] == 4_690_982


@pytest.mark.acceptance("double-win", "A-2", "A-3")
def test_every_round_cuts_the_smallest_trained_weights_of_those_alive(make_net: Make) -> None:
    model = make_net()
    trained: list[State] = [state_of(model)]

    def train(model: nn.Module, masks: Masks, k: int) -> None:
        noise(model, masks, k)
        trained.append(state_of(model))

    before = Masks.full(model)
    for k, masks in imp(model, trained[0], train, rounds=6):
        assert masks <= before and before.count() - masks.count() == round(0.2 * before.count())
        weights = trained[k - 1]
        kept = torch.cat([weights[name][masks[name]].abs() for name in masks])
        removed = torch.cat([weights[name][(before & ~masks)[name]].abs() for name in masks])
        assert removed.max() <= kept.min()
        before = masks
    assert len({round(kept / numel, 3) for _, _, kept, numel in before.layers()}) == 3
    assert before.count() == survivors(before.numel(), 0.2, 6)


@pytest.mark.acceptance("double-win", "A-5")
def test_ticket_one_is_one_shot_pruning_and_needs_no_training(make_net: Make) -> None:
    model = make_net()
    theta = state_of(model)
    trained: list[int] = []

    def train(model: nn.Module, masks: Masks, k: int) -> None:
        trained.append(k)
        noise(model, masks, k)

    standard = imp(model, theta, train, rounds=3)
    adversarial = imp(make_net(), theta, nothing, rounds=3)
    k, first = next(standard)
    assert (k, trained) == (1, [])
    assert first == next(adversarial)[1] == prune(make_net(), 0.2)
    assert [k for k, _ in standard] == [2, 3] and trained == [1, 2]


@pytest.mark.acceptance("double-win", "A-6")
def test_cuts_without_training_equal_one_cut(make_net: Make) -> None:
    model = make_net()
    for scope in ("global", "layerwise"):
        for _, masks in imp(model, state_of(make_net()), nothing, rounds=8, scope=scope):
            if scope == "global":
                assert masks == prune(make_net(), count=masks.count())
            assert masks.count() in [survivors(masks.numel(), 0.2, k) for k in range(9)]


@pytest.mark.acceptance("double-win", "A-8")
def test_scores_are_the_weights_as_just_trained() -> None:
    model = nn.Conv2d(1, 4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([4.0, 3.0, 1.0, 2.0]).view(4, 1, 1, 1))

    def train(model: nn.Module, masks: Masks, k: int) -> None:
        optimizer = SGD(model.parameters(), lr=1.0)
        enforce(optimizer, model, masks)
        model.weight.grad = torch.tensor([3.5, -3.5, 0.0, 0.0]).view(4, 1, 1, 1)
        optimizer.step()  # 0.5, 6.5: the order of the first two is reversed, with no forward in between

    tickets = dict(imp(model, state_of(model), train, rounds=2, rate=0.34))
    assert tickets[1]["weight"].view(-1).tolist() == [True, True, False, True]
    assert tickets[2]["weight"].view(-1).tolist() == [False, True, False, True]


@pytest.mark.acceptance("double-win", "A-11")
def test_everything_is_rewound_after_each_prune(make_net: Make, batches: Batches) -> None:
    model = make_net()
    noise(model, Masks.full(model), 0)  # norms and counters of a trained network
    theta = state_of(model)

    def check(masks: Masks) -> None:
        for name, tensor in model.state_dict().items():
            if name in masks:
                assert torch.equal(tensor[masks[name]], theta[name][masks[name]])
                assert not tensor[~masks[name]].view(torch.int32).any()
            else:
                assert torch.equal(tensor, theta[name]), name
        assert all(parameter.grad is None for parameter in model.parameters())

    def train(model: nn.Module, masks: Masks, k: int) -> None:
        check(masks)
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        enforcement = enforce(optimizer, model, masks)
        assert not optimizer.state, "nothing of the last round's momentum"
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        enforcement.verify()
        assert not torch.equal(model.bn1.running_mean, theta["bn1.running_mean"])
        assert model.bn1.num_batches_tracked == theta["bn1.num_batches_tracked"] + len(batches)

    for _, masks in imp(model, theta, train, rounds=4):
        check(masks)
        noise(model, masks, 99)  # whoever got the ticket may do with the model what they like


def test_the_models_own_state_dict_may_be_given(make_net: Make) -> None:
    model = make_net()
    copied = dict(imp(make_net(), state_of(model), noise, rounds=4))
    live = dict(imp(model, model.state_dict(), noise, rounds=4))
    assert live == copied


class Noted(nn.Module):
    """Keeps something besides tensors in its state."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head, self.note = nn.Linear(6, 6), nn.Linear(6, 3), ["as made"]

    def get_extra_state(self) -> list[str]:
        return self.note

    def set_extra_state(self, state: list[str]) -> None:
        self.note = state


def test_states_of_wrapped_models_and_extra_state_are_taken() -> None:
    torch.manual_seed(0)
    model = Noted()
    plain = dict(imp(copy.deepcopy(model), model.state_dict(), noise, rounds=2))
    wrapped = torch.compile(model, backend="eager")
    found = imp(wrapped, wrapped.state_dict(), noise, rounds=2)
    model.note.append("changed since")
    assert dict(found) == plain and model.note == ["as made"]


@pytest.mark.acceptance("double-win", "A-37")
@pytest.mark.parametrize("finished", [0, 1, 2, 5])
def test_a_run_continues_from_its_finished_tickets(finished: int, make_net: Make) -> None:
    theta = state_of(make_net())
    whole = dict(imp(make_net(), theta, noise, rounds=5))
    model = make_net(seed=7)  # whatever the interrupted process left
    trained: list[int] = []

    def train(model: nn.Module, masks: Masks, k: int) -> None:
        trained.append(k)
        noise(model, masks, k)

    rest = dict(imp(model, theta, train, rounds=5, done=[whole[k] for k in range(1, finished + 1)]))
    assert rest == {k: masks for k, masks in whole.items() if k > finished}
    assert trained == list(range(max(finished, 1), 5)), "no finished round is trained again"


@pytest.mark.acceptance("double-win", "A-10")
def test_rate_zero_keeps_everything(make_net: Make) -> None:
    tickets = dict(imp(make_net(), state_of(make_net()), noise, rounds=3, rate=0))
    assert set(tickets.values()) == {Masks.full(make_net())}
    assert dict(imp(make_net(), state_of(make_net()), noise, rounds=0)) == {}


def test_the_prunable_set_and_the_score_can_be_chosen(make_net: Make) -> None:
    theta = state_of(make_net())
    tickets = dict(imp(make_net(), theta, noise, rounds=3, stem=False, head=True, exclude=["conv3"]))
    assert tickets[3].names() == ("conv2.weight", "fc.weight")
    random = dict(imp(make_net(), theta, noise, rounds=3, score="random", seed=3))
    assert random[3] <= random[2] <= random[1] and random[3].count() == survivors(1656, 0.2, 3)
    assert random == dict(imp(make_net(), theta, nothing, rounds=3, score="random", seed=3))


def test_rewind_refuses_the_state_of_another_model(make_net: Make) -> None:
    model = make_net()
    theta = state_of(model)
    theta["conv9.weight"] = theta.pop("conv2.weight")
    with pytest.raises(UsageError, match="cannot rewind.*(?s:.)*conv2.weight(?s:.)*conv9.weight"):
        rewind_(model, theta, Masks.full(model))


def done_of_another_run(make_net: Make) -> Iterator[tuple[dict[str, object], str]]:
    model = make_net()
    first = prune(model, 0.2)
    other = prune(model, count=first.count(), score="random")
    second = prune(model, count=survivors(first.count(), 0.2, 1), keep=first)
    yield {"rounds": -1}, "rounds must be 0 or more"
    yield {"rate": 1.0}, r"must be in \[0, 1\)"
    yield {"rounds": 1, "done": [first, second]}, "2 tickets are done already and only 1 rounds"
    yield {"done": [second]}, "ticket 1 keeps .* weights; 1 rounds at this rate leave"
    yield {"done": [other, second]}, "ticket 2 is not nested"
    yield {"done": [first.only(["conv1.weight"])]}, "ticket 1 .*not a mask of this model"
    yield {"stem": False, "done": [first]}, "ticket 1 .*not a mask of this model"
    yield {"exclude": ["nonesuch"]}, "unknown layer to exclude"
    yield {"theta": {}}, "cannot rewind"


def test_wrong_arguments_are_refused_at_once(make_net: Make) -> None:
    for arguments, message in done_of_another_run(make_net):
        model = make_net()
        theta = arguments.pop("theta", model.state_dict())
        with pytest.raises(UsageError, match=message):
            imp(model, theta, nothing, **{"rounds": 3, **arguments})  # type: ignore[arg-type]


def test_rounds_keep_what_a_pattern_allows(make_net: Make) -> None:
    run = partial(imp, make_net(), state_of(make_net()), noise, rate=0.2, pattern="2:4", scope="erk")
    tickets = [masks for _, masks in run(rounds=5)]
    assert [masks.count() for masks in tickets] == [864, 864, 848, 678, 542], "2:4 keeps 864 of 1656"
    assert [masks.layers()[0][2] for masks in tickets][:4] == [144] * 4, "small layers stay as full as 2:4 lets them"
    assert [masks for _, masks in run(rounds=5, done=tickets[:3])] == tickets[3:]


def test_whole_channels_come_to_the_nearest_count_of_each_round() -> None:
    model = nn.Conv2d(1, 4, 10)
    run = partial(imp, model, state_of(model), noise, rate=0.06, pattern="channel")
    tickets = [masks for _, masks in run(rounds=8)]
    assert [survivors(400, 0.06, k) for k in (2, 3, 4)] == [353, 332, 312]
    assert [masks.count() for masks in tickets] == [400, 400, 300, 300, 300, 300, 300, 200], "of 312 the 300 there are"
    assert [masks for _, masks in run(rounds=8, done=tickets[:4])] == tickets[4:]


def test_rounds_may_end_at_named_sparsities(make_net: Make) -> None:
    model = make_net()
    tickets = dict(imp(model, state_of(model), nothing, rounds=3, sparsities=(0.5, 0.8, 0.95)))
    numel = tickets[1].numel()
    assert [tickets[k].count() for k in (1, 2, 3)] == [survivors(numel, share, 1) for share in (0.5, 0.8, 0.95)]
    assert tickets[3] <= tickets[2] <= tickets[1]


@pytest.mark.parametrize(("sparsities", "message"), [((0.5,), "one share a round"), ((0.8, 0.5), "must ascend")])
def test_sparsities_that_are_no_plan_are_refused(make_net: Make, sparsities: tuple[float, ...], message: str) -> None:
    model = make_net()
    with pytest.raises(UsageError, match=message):
        imp(model, state_of(model), nothing, rounds=2, sparsities=sparsities)
