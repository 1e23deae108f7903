"""TRADES and MART against literal versions of their published losses: values, gradients, direction, extremes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.objectives.losses import Loss, cross_entropy, mart, trades

Batch = tuple[Tensor, Tensor, Tensor]


def literal_trades(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float = 6.0) -> Tensor:
    """As published: sums over classes written out, three passes, no log-softmax."""
    clean = model(x).softmax(1)
    moved = model(x_adv).softmax(1)
    again = model(x).softmax(1)
    natural = -clean.log()[torch.arange(len(y)), y].sum() / len(y)
    divergence = (again * (again.log() - moved.log())).sum() / len(y)
    return natural + beta * divergence


def literal_mart(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float = 5.0) -> Tensor:
    """As published, image by image."""
    clean, moved = model(x).softmax(1), model(x_adv).softmax(1)
    total = torch.zeros(())
    for p, q, label in zip(clean, moved, y, strict=True):
        others = [q[j] for j in range(len(q)) if j != label]
        rival = max(others, key=lambda value: value.item())
        boosted = -q[label].log() - (1.0001 - rival + 1e-12).log()
        divergence = sum(p[j] * (p[j].log() - (q[j] + 1e-12).log()) for j in range(len(q)))
        total = total + boosted + beta * divergence * (1.0000001 - p[label])
    return total / len(y)


@pytest.mark.parametrize(("loss", "literal"), [(trades, literal_trades), (mart, literal_mart)], ids=["trades", "mart"])
@pytest.mark.parametrize("norm", [True, False], ids=["batch-norm", "plain"])
def test_loss_and_gradients_are_those_of_the_published_formula(
    loss: Loss, literal: Callable[..., Tensor], norm: bool, make_net: Callable[..., nn.Module], batch: Batch
) -> None:
    x, y, _ = batch
    x_adv = (x + 0.1 * torch.randn(x.shape)).clamp(0, 1)
    ours, theirs = make_net(norm=norm).double(), make_net(norm=norm).double()
    value, logits = loss(ours, x.double(), x_adv.double(), y)
    expected = literal(theirs, x.double(), x_adv.double(), y)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-12)
    assert torch.equal(logits, ours(x_adv.double()))


def test_trades_on_numbers_done_by_hand() -> None:
    # p = (3/4, 1/4) on the clean image, q = (1/2, 1/2) on the other; the label is class 0.
    answers = {0.0: torch.tensor([[3.0, 1.0]]).log(), 1.0: torch.tensor([[1.0, 1.0]]).log()}
    zero, one, y = torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([0])
    value, _ = trades(lambda x: answers[float(x)], zero, one, y, beta=2.0)
    forward = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    backward = 0.5 * torch.tensor(2 / 3).log() + 0.5 * torch.tensor(2.0).log()
    assert value.item() == pytest.approx(float(-torch.tensor(0.75).log() + 2 * forward), rel=1e-6)
    assert abs(float(forward - backward)) > 0.01, "the numbers tell the two directions apart"


@pytest.mark.parametrize("loss", [trades, mart], ids=["trades", "mart"])
def test_both_predictions_get_gradients(loss: Loss) -> None:
    clean, moved = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    zero, one, y = torch.zeros(5, 1), torch.ones(5, 1), torch.arange(5) % 4
    value, _ = loss(lambda x: moved if bool(x[0]) else clean, zero, one, y, beta=1e6)  # type: ignore[call-arg]
    value.backward()
    assert clean.grad is not None and moved.grad is not None
    # the divergence alone is left at this weight, and its own gradient on the clean side is not that of a constant
    assert clean.grad.abs().amax() > 1 and moved.grad.abs().amax() > 1


EXTREME = [
    torch.tensor([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0]]),
    torch.tensor([[-1e4, 0.0, 1e4], [1e4, -1e4, 0.0]]),
    torch.zeros(2, 3),
    torch.full((2, 3), 3e37) * torch.tensor([[1.0, -1.0, 1.0]]),
]


@pytest.mark.parametrize("loss", [cross_entropy, trades, mart], ids=["ce", "trades", "mart"])
@pytest.mark.parametrize("label", [0, 1, 2])
def test_extreme_logits_give_no_nan(loss: Loss, label: int) -> None:
    zero, one, y = torch.zeros(2, 1), torch.ones(2, 1), torch.full((2,), label)
    for first in EXTREME:
        for second in EXTREME:
            clean, moved = first.clone().requires_grad_(), second.clone().requires_grad_()
            value, _ = loss(lambda x, c=clean, m=moved: m if bool(x[0]) else c, zero, one, y)  # type: ignore[misc]
            value.backward()
            assert value.isfinite()
            for tensor in (clean, moved):
                assert tensor.grad is None or tensor.grad.isfinite().all()


@pytest.mark.parametrize("loss", [cross_entropy, trades, mart], ids=["ce", "trades", "mart"])
def test_half_precision_logits_are_taken_in_full_precision(loss: Loss) -> None:
    logits = torch.tensor([[20.0, 0.0, -20.0]], dtype=torch.bfloat16)
    value, seen = loss(lambda x: logits, torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([2]))
    assert value.dtype == seen.dtype == torch.float32
    assert value >= 40


@pytest.mark.parametrize("loss", [cross_entropy, trades, mart], ids=["ce", "trades", "mart"])
def test_label_smoothing_acts_on_the_cross_entropy(
    loss: Loss, make_net: Callable[..., nn.Module], batch: Batch
) -> None:
    x, y, _ = batch
    net = make_net(norm=False)
    plain, logits = loss(net, x, x, y)
    smooth, _ = loss(net, x, x, y, label_smoothing=0.2)  # type: ignore[call-arg]
    expected = F.cross_entropy(logits, y, label_smoothing=0.2) - F.cross_entropy(logits, y)
    torch.testing.assert_close(smooth - plain, expected)
