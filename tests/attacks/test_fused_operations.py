"""Attacks use the operations that kernels fuse, through their one dispatch, and these mean what they replace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_robust.attacks import PGD, RGD, Budget
from sparse_robust.attacks.procedure import Seen, Task
from sparse_robust_kernels import _dispatch
from sparse_robust_kernels.rng import philox_uniform

RADII = {"Linf": 0.1, "L2": 0.7, "L1": 3.0}


def task(n: int = 30, dtype: torch.dtype = torch.float32) -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, 5, 6, generator=generator, dtype=dtype)
    return Task(x, torch.zeros(n, dtype=torch.int64), torch.arange(n) * 7, x.new_zeros(n, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", RADII)
def test_a_fused_start_is_the_start_of_drawn_numbers(norm: str, dtype: torch.dtype) -> None:
    budget, (x, _, ids, _) = Budget(norm, RADII[norm]), task(dtype=dtype)
    for stream in (3, ids % 5):
        drawn = philox_uniform(ids, budget.noise_size(x), key=11, stream=stream)
        started = budget.random_start(x, ids, key=11, stream=stream)
        assert torch.equal(started, budget.start(x, drawn))
        assert budget.contains(started, x).all() and (started != x).flatten(1).any(1).all()


@pytest.mark.parametrize("direction", ["raw", "sign"])
@pytest.mark.parametrize("step_size", [0.05, 1e6, "auto"])
def test_a_fused_raw_step_is_the_step_written_out(direction: str, step_size: float | str) -> None:
    one, budget = task(), Budget("Linf", 0.1)
    procedure = RGD(direction=direction, step_size=step_size, random_start=True).prepare(budget, 4)
    rows = procedure.start(one, torch.zeros_like(one.y))
    grad = torch.randn(one.x.shape, generator=torch.Generator().manual_seed(1))
    grad[0], grad[1, 0] = 0, torch.nan
    grad[2, 1, 2, 3] = torch.inf
    after, _ = procedure.advance(one, rows, Seen(one.logits, one.logits[:, 0], grad), lambda images: images)
    clean = grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    move = after["step_size"].view(-1, 1, 1, 1) * (clean.sign() if direction == "sign" else clean)
    hidden = (rows["hidden"] + move).clamp(-1e30, 1e30)
    assert torch.equal(after["hidden"], hidden)
    assert torch.equal(after["shown"], budget.project(one.x + hidden, one.x))


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that are dispatched, by name and backend."""
    names: list[str] = []

    def noted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(_dispatch, "_functions", {name: noted(name, f) for name, f in _dispatch._functions.items()})
    return names


@pytest.mark.parametrize(
    ("attack", "operations"),
    [
        (PGD(steps=1), {"pgd_step.linf_random_start", "pgd_step.linf_step"}),
        (PGD(norm="L2", steps=1), {"pgd_step.l2_random_start", "pgd_step.l2_step"}),
        (RGD(steps=1, random_start=True, keep="last"), {"pgd_step.linf_random_start", "pgd_step.rgd_step"}),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_attacks_dispatch_them(attack: Any, operations: set[str], trained: Any, called: list[str]) -> None:
    model, x, y, ids = trained
    attack(model, x, y, eps=RADII[attack.norm], ids=ids)
    used = {name.removesuffix(":reference") for name in called}
    assert operations <= used and not {name for name in used if name.startswith("rng.")}


def test_images_of_a_fused_start_do_not_depend_on_their_layout(trained: Any) -> None:
    model, x, y, ids = trained

    def crafted(images: Tensor) -> Tensor:
        return PGD(steps=2)(model, images, y, eps=0.1, ids=ids)

    assert torch.equal(crafted(x), crafted(x.to(memory_format=torch.channels_last)))
