"""The loop under its callers: precision, gradient modes, memory formats, empty batches, NaN, and no waiting."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_robust.attacks import LOSSES, PGD, Budget, attack_context
from sparse_robust.attacks.iterated import climb
from sparse_robust.attacks.passes import differentiate
from sparse_robust.attacks.procedure import Task
from sparse_robust.errors import UsageError

EPS = 8 / 255


def test_nan_gradients_move_nothing_and_nan_logits_predict_nothing() -> None:
    x, y = 0.25 + 0.5 * torch.rand(4, 2, 3, 3), torch.zeros(4, dtype=torch.int64)
    x[::2, 0, 0, 0], x[1::2, 0, 0, 0] = 0.8, 0.1  # the odd ones cannot leave the good half

    def broken(images: Tensor) -> Tensor:
        factor = torch.where(images[:, 0, 0, :1] > 0.5, math.nan, 1.0)
        return images.flatten(1)[:, 1:4] * factor

    for norm in ("Linf", "L2"):
        start = PGD(norm=norm, steps=0)(broken, x, y, eps=0.25)
        result = PGD(norm=norm, steps=2)(broken, x, y, eps=0.25)
        assert torch.equal(result[::2], start[::2])
        assert (result[1::2] != start[1::2]).flatten(1).any(1).all()
        with pytest.raises(UsageError, match=r"NaN for 2 of 4 .* \[0, 2\]"):
            PGD(norm=norm).run(broken, x, y, eps=0.25)

    def breaks_near_one(images: Tensor) -> Tensor:
        factor = torch.where(images[:, 0, 0, :1] > 0.75, math.nan, 1.0)
        return (images.flatten(1)[:, :1] * torch.tensor([1.0, -1.0])) * factor

    x[:, 0, 0, 0] = 0.6
    result = PGD(random_start=False, loss="cw", targeted=True, steps=5).run(breaks_near_one, x, y + 1, eps=0.25)
    assert not result.success.any()  # what is NaN is not the target either
    result = PGD(steps=0, seed=1).run(breaks_near_one, x, y, eps=0.25)
    assert torch.equal(result.success, result.images[:, 0, 0, 0] > 0.75) and result.success.any()


def test_the_loss_is_summed_so_the_batch_does_not_scale_it(trained: Any) -> None:
    model, x, y, _ = trained
    together = differentiate(model, x, lambda logits: LOSSES["ce"](logits, y))
    alone = differentiate(model, x[:1], lambda logits: LOSSES["ce"](logits, y[:1]))
    torch.testing.assert_close(alone.grad[0], together.grad[0], rtol=1e-4, atol=1e-6)
    assert together.loss.shape == (len(x),) and together.logits.shape == (len(x), 5)


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_grad_mode_does_not_matter(trained: Any, grad_mode: Callable[[], Any]) -> None:
    model, x, y, ids = trained
    attack = PGD(steps=2, n_restarts=2)
    expected = attack.run(model, x, y, eps=EPS, ids=ids)
    with grad_mode():
        inside = [tensor.clone() for tensor in (x, y, ids)]  # inference tensors, under inference_mode
        result = attack.run(model, inside[0], inside[1], eps=EPS, ids=inside[2])
        images = dataclasses.replace(attack, n_restarts=1)(model, inside[0], inside[1], eps=EPS, ids=inside[2])
    assert torch.equal(result.images, expected.images) and torch.equal(result.success, expected.success)
    assert not images.requires_grad and images.grad_fn is None and not images.is_inference()


def test_images_with_a_graph_are_not_followed(trained: Any) -> None:
    model, x, y, ids = trained
    leaf = x.clone().requires_grad_(True)
    x_adv = PGD(steps=1)(model, leaf * 1.0, y, eps=EPS, ids=ids)
    assert not x_adv.requires_grad and leaf.grad is None


def test_under_autocast_the_iterate_is_full_precision(trained: Any) -> None:
    model, x, y, ids = trained
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        x_adv = PGD(steps=4, step_size=1 / 64, random_start=False)(model, x, y, eps="16/255", ids=ids)
        seen = [differentiate(model, x, lambda logits, loss=loss: loss(logits, y)) for loss in LOSSES.values()]
    assert {tensor.dtype for tensor in (x_adv, *(one.loss for one in seen), *(one.grad for one in seen))} == {x.dtype}
    # Every pixel that met no bound moved by whole steps: nothing was rounded to bfloat16.
    free = (x > 0.25) & (x < 0.75)
    assert torch.equal(((x_adv - x) * 64)[free].round(decimals=3), ((x_adv - x) * 64).round()[free])
    assert (x_adv != x).float().mean() > 0.5


def test_channels_last_images_give_the_same(trained: Any) -> None:
    model, x, y, ids = trained
    for norm, eps in (("Linf", EPS), ("L2", 0.3)):
        attack = PGD(norm=norm, steps=0)
        last = attack(model, x.to(memory_format=torch.channels_last), y, eps=eps, ids=ids)
        assert torch.equal(last, attack(model, x, y, eps=eps, ids=ids))


def test_an_empty_batch_comes_back(trained: Any) -> None:
    model, x, y, ids = trained
    attack = PGD(n_restarts=2)
    result = attack.run(model, x[:0], y[:0], eps=EPS, ids=ids[:0])
    assert result.images.shape == (0, 3, 8, 8) and len(result.success) == len(result.counts.forward) == 0
    assert PGD()(model, x[:0], y[:0], eps=EPS).shape == (0, 3, 8, 8)


class NoReadBack(TorchDispatchMode):
    """Fails on operations that hand a value to the host, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("loss", [*LOSSES, "kl"])
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_training_reads_nothing_back(trained: Any, norm: str, loss: str) -> None:
    model, x, y, ids = trained
    attack, budget = PGD(norm=norm, steps=2, step_size=0.1, loss=loss), Budget(norm, 0.25 if norm == "Linf" else 6.0)
    with attack_context(model):
        logits = model(x).detach()
        with NoReadBack():
            x_adv = climb(attack.prepare(budget, 5), model, Task(x, y, ids, logits), check=False)
    assert torch.equal(attack(model, x, y, eps=budget.eps, ids=ids), x_adv) and budget.contains(x_adv, x).all()
    with NoReadBack(), pytest.raises(AssertionError, match="waits"):  # the detector works
        attack.run(model, x, y, eps=budget.eps, ids=ids)
