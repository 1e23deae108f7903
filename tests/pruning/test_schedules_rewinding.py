"""What iterative pruning goes back to: theta, another state, or nothing but the learning rate."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.errors import UsageError
from sparse_robust.masks import Masks
from sparse_robust.pruning import imp, prune

Make = Callable[..., nn.Module]
State = dict[str, Tensor]


def noise(model: nn.Module, masks: Masks, k: int) -> None:
    """A stand-in for training: it adds to every weight what the round alone decides."""
    generator = torch.Generator().manual_seed(k)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    masks.apply_(model)


def state_of(model: nn.Module) -> State:
    return copy.deepcopy(model.state_dict())


def holds(model: nn.Module, masks: Masks, state: State) -> bool:
    expected = copy.deepcopy(model)
    expected.load_state_dict(state)
    masks.apply_(expected)
    return all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_rewinding_to_another_state(make_net: Make) -> None:
    model, theta, initial = make_net(1), state_of(make_net(1)), state_of(make_net(2))
    begun: list[bool] = []

    def train(network: nn.Module, masks: Masks, k: int) -> None:
        begun.append(holds(network, masks, initial))
        noise(network, masks, k)

    tickets = {}
    for k, masks in imp(model, theta, train, rounds=3, rewind=initial):
        assert holds(model, masks, initial)
        tickets[k] = masks
    assert begun == [True, True], "each round begins at the state that is rewound to"
    assert tickets[1] == prune(make_net(1), 0.2), "ticket 1 is cut from theta"
    trained = make_net(2)
    tickets[1].apply_(trained)
    noise(trained, tickets[1], 1)
    assert tickets[2] == prune(trained, count=tickets[2].count(), keep=tickets[1])
    assert tickets[2] != dict(imp(make_net(1), theta, noise, rounds=2))[2]

    rest = dict(imp(make_net(5), theta, train, rounds=3, rewind=initial, done=[tickets[1], tickets[2]]))
    assert rest == {3: tickets[3]}


def test_rewinding_the_learning_rate_alone_goes_on_from_the_trained_weights(make_net: Make) -> None:
    model, theta = make_net(1), state_of(make_net(1))
    tickets, states, expected = {}, {}, make_net(1)
    for k, masks in imp(model, theta, noise, rounds=4, rate=0.3, rewind="lr"):
        if k > 1:
            noise(expected, tickets[k - 1], k - 1)
        masks.apply_(expected)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
        tickets[k], states[k] = masks, state_of(model)
        noise(model, Masks.full(model), 99)  # whoever got the ticket may do with the model what they like
    assert tickets[3] != dict(imp(make_net(1), theta, noise, rounds=3, rate=0.3))[3]
    # taken up again after two tickets, from what the model held then
    done = [tickets[1], tickets[2]]
    rest = dict(imp(make_net(5), states[2], noise, rounds=4, rate=0.3, rewind="lr", done=done))
    assert rest == {k: tickets[k] for k in (3, 4)}


def test_wrong_rewinds_are_refused_at_once(make_net: Make) -> None:
    theta = state_of(make_net())
    with pytest.raises(UsageError, match="unknown rewind 'later'.*lr, theta"):
        imp(make_net(), theta, noise, rounds=2, rewind="later")
    with pytest.raises(UsageError, match="cannot rewind"):
        imp(make_net(), theta, noise, rounds=2, rewind={})
