"""The first convolution for grey images: what nn.Conv2d computes, and gradients that no batch changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.attacks.replica import make_replica
from sparse_robust.attacks.stem import FEWEST_TAPS, GreyConv2d, quicken

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 7, "stride": 2, "padding": 3, "bias": False},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)},
]


def grads(layer: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad((layer(leaf) ** 2).sum(), leaf)
    return grad


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_outputs_are_the_same_and_gradients_up_to_rounding(geometry: dict[str, Any], last: bool) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if last else torch.contiguous_format
    plain = nn.Conv2d(1, 12, **geometry).to(memory_format=layout).requires_grad_(False)
    quick = copy.deepcopy(plain)
    quicken(quick)
    assert type(quick) is GreyConv2d and type(plain) is nn.Conv2d
    x = torch.rand(40, 1, 13, 11)
    assert torch.equal(plain(x), quick(x)) and torch.equal(quick(x), quick(x.clone().requires_grad_(True)))
    whole, expected = grads(quick, x), grads(plain.double(), x.double())
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    for rows in (slice(0, 3), slice(17, 40), slice(24, 32)):
        assert torch.equal(grads(quick, x[rows]), whole[rows])
    assert torch.equal(grads(quick, x.flip(0)).flip(0), whole)


def test_the_gradient_can_be_differentiated_again() -> None:
    quick = nn.Conv2d(1, 2, 3).double().requires_grad_(False)
    quick.__class__ = GreyConv2d
    x = torch.rand(2, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quick, (x,)) and torch.autograd.gradgradcheck(lambda x: quick(x) ** 2, (x,))


@pytest.mark.parametrize("taps", [FEWEST_TAPS, 15, 49])
@pytest.mark.parametrize("channels", [1, 12, 16, 64])
@pytest.mark.parametrize("places", [42, 49, 143, 169])  # most images do not begin at the edge of a vector
def test_the_product_is_the_same_at_every_place_of_a_batch(taps: int, channels: int, places: int) -> None:
    weight, one = torch.randn(channels, taps), torch.randn(1, channels, places)
    for grad in (one.repeat(40, 1, 1), one.transpose(1, 2).repeat(40, 1, 1).transpose(1, 2)):
        products = weight.t().expand(40, -1, -1) @ grad
        assert (products == products[:1]).all()
        assert all(torch.equal(weight.t().expand(n, -1, -1) @ grad[:n], products[:n]) for n in (2, 3, 8))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 4, 2),
        nn.Conv2d(3, 4, 3),
        nn.Conv2d(1, 4, 3, padding="same"),
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(1, 4, 3, dtype=torch.float64),
        type("Other", (nn.Conv2d,), {})(1, 4, 3),
        nn.Conv1d(1, 4, 3),
    ],
    ids=str,
)
def test_other_layers_stay_what_they_are(layer: nn.Module) -> None:
    kind = type(layer)
    quicken(layer)
    assert type(layer) is kind


def test_replicas_have_it_in_single_precision() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)).eval()
    x = torch.rand(8, 1, 8, 8)
    for precision, kind in (("fp32", GreyConv2d), ("bf16", nn.Conv2d)):
        replica = make_replica(model, x, precision=precision)
        assert isinstance(replica.module, nn.Sequential) and type(replica.module[0]) is kind
    assert type(model[0]) is nn.Conv2d
    model[0].weight.data *= 2
    replica = make_replica(model, x)
    model[0].weight.data *= -1
    replica.refresh()
    torch.testing.assert_close(grads(replica.module, x), grads(model, x), rtol=1e-4, atol=1e-5)
