"""The projected step against the same written slowly in NumPy, and its corner cases."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparse_robust_kernels import backends
from sparse_robust_kernels.pgd_step import (
    l2_random_start,
    l2_start,
    l2_step,
    linf_project,
    linf_random_start,
    linf_start,
    linf_step,
    linf_step_normalized,
    rgd_step,
)
from sparse_robust_kernels.rng import philox_uniform

EPS = 8 / 255


def batch(n: int = 5, shape: tuple[int, ...] = (3, 4, 5)) -> tuple[Tensor, Tensor, Tensor]:
    """Images with exact zeros and ones among them, iterates inside the Linf ball, gradients with zeros among them."""
    x = torch.rand(n, *shape)
    x[x < 0.1], x[x > 0.9] = 0, 1
    x_adv = linf_project(x + EPS * (2 * torch.rand_like(x) - 1), x, eps=EPS)
    return x_adv, x, torch.randn(n, *shape) * (torch.rand(n, *shape) > 0.1)


def slow_linf_step(x_adv: Tensor, x: Tensor, grad: Tensor, step_size: float, eps: float) -> np.ndarray:
    """One element after the other, in float32."""
    out = np.empty(x.shape, dtype=np.float32)
    size, radius, zero, one = (np.float32(v) for v in (step_size, eps, 0, 1))
    for index in np.ndindex(*x.shape):
        a, b, g = x_adv.numpy()[index], x.numpy()[index], grad.numpy()[index]
        moved = a + size if g > 0 else a - size if g < 0 else a
        out[index] = min(max(moved, max(b - radius, zero)), min(b + radius, one))
    return out


def slow_l2_step(x_adv: Tensor, x: Tensor, grad: Tensor, step_size: float, eps: float) -> np.ndarray:
    """One image after the other, in float64."""
    out = []
    for a, b, g in zip(x_adv.double().numpy(), x.double().numpy(), grad.double().numpy(), strict=True):
        length = math.sqrt((g * g).sum())
        delta = a - b + (step_size * g / length if length > 0 else 0)
        size = math.sqrt((delta * delta).sum())
        out.append(np.clip(b + delta * min(1, eps / size) if size > 0 else b, 0, 1))
    return np.stack(out)


@pytest.mark.parametrize("step_size", [0.0, 1 / 255, 2.5 * EPS, 1.0])
def test_linf_step_is_the_slow_one_bit_for_bit(step_size: float) -> None:
    x_adv, x, grad = batch()
    stepped = linf_step(x_adv, x, grad, step_size=step_size, eps=EPS)
    assert stepped.numpy().tobytes() == slow_linf_step(x_adv, x, grad, step_size, EPS).tobytes()


@pytest.mark.parametrize("eps", [0.05, 0.5, 3.0])
@pytest.mark.parametrize("step_size", [0.0, 0.1, 10.0])
def test_l2_step_is_the_slow_one_up_to_rounding(step_size: float, eps: float) -> None:
    x_adv, x, grad = batch()
    stepped = l2_step(x_adv, x, grad, step_size=step_size, eps=eps)
    np.testing.assert_allclose(stepped.numpy(), slow_l2_step(x_adv, x, grad, step_size, eps), rtol=0, atol=3e-7)


def test_zero_and_nan_gradients_do_not_move_linf() -> None:
    x = torch.full((1, 6), 0.5)
    grad = torch.tensor([[0.0, -0.0, math.nan, math.inf, -math.inf, -1e-45]])
    stepped = linf_step(x, x, grad, step_size=0.125, eps=0.25)
    assert stepped.tolist() == [[0.5, 0.5, 0.5, 0.625, 0.375, 0.375]]


def test_zero_and_nan_gradients_do_not_move_l2() -> None:
    x = torch.full((4, 4), 0.5)
    grad = torch.tensor([[0.0] * 4, [math.nan] * 4, [math.nan, 3, 4, 0], [0, math.inf, -1, 0]])
    stepped = l2_step(x, x, grad, step_size=0.25, eps=1.0)
    assert torch.equal(stepped[:2], x[:2])
    torch.testing.assert_close(stepped[2], torch.tensor([0.5, 0.65, 0.7, 0.5]))
    assert stepped[3].tolist() == [0.5, 0.75, 0.5, 0.5]


def test_an_iterate_inside_the_ball_that_does_not_move_keeps_its_bits() -> None:
    x = torch.rand(64, 100, dtype=torch.float64).float() ** 4
    x_adv = torch.rand(64, 100, dtype=torch.float64).float()
    assert torch.equal(l2_step(x_adv, x, torch.zeros_like(x), step_size=1.0, eps=100.0), x_adv)
    assert not torch.equal(x + (x_adv - x), x_adv)  # the detour over the difference would round


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e30])
def test_l2_direction_neither_underflows_nor_overflows(scale: float) -> None:
    x_adv, x, grad = batch()
    plain = l2_step(x_adv, x, grad, step_size=0.1, eps=1.0)
    scaled = l2_step(x_adv, x, grad * scale, step_size=0.1, eps=1.0)
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", [linf_step, l2_step])
def test_half_precision_gradients_move_full_precision_images(step: Callable[..., Tensor]) -> None:
    x_adv, x, grad = batch()
    half = grad.bfloat16()
    stepped = step(x_adv, x, half, step_size=0.01, eps=EPS)
    assert stepped.dtype == torch.float32
    assert torch.equal(stepped, step(x_adv, x, half.float(), step_size=0.01, eps=EPS))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("step", [linf_step, l2_step])
def test_memory_format_and_batch_do_not_matter(step: Callable[..., Tensor]) -> None:
    x_adv, x, grad = batch(6)
    plain = step(x_adv, x, grad, step_size=0.01, eps=EPS)
    last = [t.to(memory_format=torch.channels_last) for t in (x_adv, x, grad)]
    assert torch.equal(step(*last, step_size=0.01, eps=EPS), plain)
    for i in range(6):
        alone = step(x_adv[i : i + 1], x[i : i + 1], grad[i : i + 1], step_size=0.01, eps=EPS)
        torch.testing.assert_close(alone[0], plain[i], rtol=0, atol=0 if step is linf_step else 1e-7)


def test_linf_start_is_x_plus_the_scaled_noise() -> None:
    x = torch.tensor([[0.0, 0.5, 0.5, 1.0, 0.5]])
    uniform = torch.tensor([[0.0, 0.0, 0.75, 0.75, 0.5]])
    assert linf_start(x, uniform, eps=0.25).tolist() == [[0.0, 0.25, 0.625, 1.0, 0.5]]


def test_linf_start_covers_the_ball_evenly() -> None:
    x = torch.full((100, 3, 8, 8), 0.5)
    noise = linf_start(x, philox_uniform(torch.arange(100), 192, key=1, stream=0), eps=0.25) - x
    counts = torch.histc(noise, bins=10, min=-0.25, max=0.25)
    assert float(((counts - 1920) ** 2 / 1920).sum()) < 27.9  # chi-square, 9 degrees of freedom, once in a thousand


@pytest.mark.parametrize("numel", [2, 3, 12])
def test_l2_start_is_uniform_in_the_ball(numel: int) -> None:
    n = 20_000
    x = torch.full((n, numel), 0.5)
    noise = l2_start(x, philox_uniform(torch.arange(n), numel + 2, key=5, stream=0), eps=0.25) - x
    radius = noise.norm(dim=1) / 0.25
    assert radius.max() <= 1 + 1e-5
    # In a ball the numel-th power of the radius is uniform, and directions cancel.
    counts = torch.histc(radius**numel, bins=10, min=0, max=1)
    assert float(((counts - n / 10) ** 2 / (n / 10)).sum()) < 27.9
    assert noise.mean(0).abs().max() < 5 * 0.25 / math.sqrt(n)


def test_l2_start_survives_the_ends_of_the_unit_interval() -> None:
    ends = torch.tensor([[0.0, 1 - 2**-24, 0.5, 0.0, 1 - 2**-24]])
    started = l2_start(torch.full((1, 3), 0.5), ends, eps=0.25)
    assert started.isfinite().all() and (started - 0.5).norm() <= 0.25 * (1 + 1e-6)


@pytest.mark.parametrize("step_size", [0.0, 3.0, torch.tensor([0.0, 0.5, 1.0, 30.0, 1e4])])
def test_rgd_adds_up_what_it_hides_and_clips_what_it_shows(step_size: float | Tensor) -> None:
    x_adv, x, grad = batch()
    hidden, shown = rgd_step(10 * (x_adv - x), x, grad, step_size=step_size, eps=EPS)
    sizes = step_size.tolist() if isinstance(step_size, Tensor) else [step_size] * 5
    for i, size in enumerate(sizes):
        meant = (10 * (x_adv - x)).numpy()[i] + np.float32(size) * grad.numpy()[i]
        assert hidden[i].numpy().tobytes() == meant.tobytes()
        low, high = np.maximum(x[i].numpy() - np.float32(EPS), 0), np.minimum(x[i].numpy() + np.float32(EPS), 1)
        assert np.array_equal(shown[i].numpy(), np.clip(x[i].numpy() + meant, low, high))


def test_rgd_survives_wild_gradients() -> None:
    x = torch.full((1, 5), 0.5)
    grad = torch.tensor([[math.nan, math.inf, -math.inf, 3e38, -3e38]])
    hidden, shown = rgd_step(torch.zeros(1, 5), x, grad, step_size=1e3, eps=0.25)
    assert hidden.tolist() == torch.tensor([[0, 0, 0, 1e30, -1e30]]).tolist()
    assert shown.tolist() == [[0.5, 0.5, 0.5, 0.75, 0.25]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_normalised_output_is_what_a_model_would_make_of_the_step(dtype: torch.dtype) -> None:
    x_adv, x, grad = batch()
    mean, std = torch.rand(3), torch.rand(3) + 0.1
    stepped, fed = linf_step_normalized(x_adv, x, grad, mean, std, step_size=0.01, eps=EPS, dtype=dtype)
    assert torch.equal(stepped, linf_step(x_adv, x, grad, step_size=0.01, eps=EPS))
    assert torch.equal(fed, ((stepped - mean[:, None, None]) / std[:, None, None]).to(dtype))
    assert fed.is_contiguous(memory_format=torch.channels_last) and stepped.is_contiguous()


def test_random_starts_are_starts_from_counted_numbers() -> None:
    x, ids, stream = torch.rand(3, 2, 5), torch.tensor([4, 0, 2**40]), torch.tensor([1, 0, 7])
    drawn = philox_uniform(ids, 12, key=9, stream=stream)
    started = linf_random_start(x, ids, key=9, stream=stream, eps=0.1)
    assert torch.equal(started, linf_start(x, drawn[:, :10].contiguous(), eps=0.1))
    assert torch.equal(l2_random_start(x, ids, key=9, stream=stream, eps=0.1), l2_start(x, drawn, eps=0.1))
    assert linf_random_start(x[:0], ids[:0], key=9, stream=0, eps=0.1).shape == (0, 2, 5)


def test_wrong_arguments_of_the_newer_operations_are_named() -> None:
    x, ids, three = torch.rand(2, 3, 4, 4), torch.arange(2), torch.ones(3)
    normalized: dict[str, Any] = {"step_size": 0.1, "eps": 0.1}
    with pytest.raises(ValueError, match="mean must be torch.float32"):
        linf_step_normalized(x, x, x, three.double(), three, **normalized)
    with pytest.raises(ValueError, match=r"std must be torch.float32 \(3,\)"):
        linf_step_normalized(x, x, x, three, torch.ones(4), **normalized)
    with pytest.raises(ValueError, match="a model is fed"):
        linf_step_normalized(x, x, x, three, three, **normalized, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"\[n, C, H, W\]"):
        linf_step_normalized(x[0], x[0], x[0], three, three, **normalized)
    with pytest.raises(ValueError, match=r"step_size must be a number or torch.float32 \(2,\)"):
        rgd_step(x, x, x, step_size=three, eps=0.1)
    with pytest.raises(ValueError, match="step_size must be 0 or more"):
        rgd_step(x, x, x, step_size=-1.0, eps=0.1)
    for start in (linf_random_start, l2_random_start):
        with pytest.raises(ValueError, match="3 ids on cpu, but 2 images"):
            start(x, torch.arange(3), key=0, stream=0, eps=0.1)
        with pytest.raises(ValueError, match="key takes 64 bits"):
            start(x, ids, key=-1, stream=0, eps=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.rand(2, 3, dtype=torch.float16)}, "float32 or float64"),
        ({"x_adv": torch.rand(3, 3)}, "x_adv"),
        ({"grad": torch.zeros(2, 3, dtype=torch.int64)}, "floating"),
        ({"grad": torch.rand(2, 4)}, "grad"),
        ({"eps": -1.0}, "eps"),
        ({"step_size": math.nan}, "step_size"),
        ({"lo": 1.0}, "empty"),
        ({"backend": "abacus"}, "available"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.rand(2, 3) for name in ("x_adv", "x", "grad")}
    for step in (linf_step, l2_step):
        with pytest.raises(ValueError, match=message):
            step(**(arguments | {"step_size": 0.1, "eps": 0.1} | change))


def test_noise_of_another_size_is_refused() -> None:
    x = torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3\)"):
        linf_start(x, torch.rand(2, 5), eps=0.1)
    with pytest.raises(ValueError, match=r"\(2, 5\)"):
        l2_start(x, torch.rand(2, 3), eps=0.1)


def test_the_references_are_listed() -> None:
    for name in ("linf_step", "linf_project", "linf_start", "l2_step", "l2_start", "rgd_step"):
        assert backends(f"pgd_step.{name}") == ("reference", "compile")
