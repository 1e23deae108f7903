"""Captured attacks on a GPU: replays are the attack itself, with new images, noise, weights and radii."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from sparse_robust.attacks import FGSM, PGD
from sparse_robust.attacks.replica import make_replica
from sparse_robust.models import set_normalization

pytestmark = pytest.mark.gpu

ATTACKS = [FGSM(), PGD(steps=4), PGD(norm="L2", steps=3), PGD(norm="L1", steps=3), PGD(steps=3, loss="kl")]


@pytest.fixture
def on_gpu(trained: Any) -> Any:
    model, x, y, ids = trained
    return model.cuda(), x.cuda(), y.cuda(), ids.cuda()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ["eval", "train_frozen"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: f"{attack.name}-{attack.norm}-{attack.loss}")
def test_replays_are_the_attack_itself(on_gpu: Any, attack: PGD, mode: str, precision: str) -> None:
    model, x, y, ids = on_gpu
    attack = replace(attack, mode=mode)
    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    with exact:
        captured, plain = (
            make_replica(model, x, precision=precision, mode=mode, capture=capture) for capture in (True, False)
        )
        assert captured.capture and not plain.capture and captured.graphs is not None
        for number, (eps, count) in enumerate([(0.1, 100), (0.1, 100), (0.1, 100), (0.2, 100), (0.1, 70), (0.1, 100)]):
            part = slice(number, number + count)
            crafts, call = replace(attack, seed=number), {"eps": eps, "ids": ids[part]}
            got = crafts(captured.target, x[part], y[part], **call)
            expected = crafts(plain.target, x[part], y[part], **call)
            torch.testing.assert_close(got, expected, rtol=0, atol=0)
            for parameter in model.parameters():
                parameter.data *= 1.05
            captured.refresh()
            plain.refresh()
        assert not captured.graphs.failure and len(captured.graphs) == 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("capture", [True, False])
def test_steps_that_normalise_on_the_way_are_the_attack(on_gpu: Any, capture: bool, precision: str) -> None:
    """Layouts differ between the two loops, so gradients may round another way where they are nearly zero."""
    model, x, y, ids = on_gpu
    set_normalization(model, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    attack, eps = PGD(steps=4), 0.1
    fused, plain = (make_replica(model, x, precision=precision, capture=capture) for _ in range(2))
    assert fused.normalization is not None
    plain.normalization = None
    for seed in (0, 1):
        got, expected = (replace(attack, seed=seed)(r, x, y, eps=eps, ids=ids) for r in (fused, plain))
        assert got.stride() == expected.stride()
        assert bool((got >= (x - eps).clamp(min=0)).all() and (got <= (x + eps).clamp(max=1)).all())
        assert float((got != expected).float().mean()) < (0.02 if precision == "fp32" else 0.1)


def test_a_replay_never_waits(on_gpu: Any) -> None:
    model, x, y, ids = on_gpu
    replica, attack = make_replica(model, x), PGD(steps=3)
    attack(replica, x, y, eps=0.1, ids=ids)
    replica.refresh()  # the first one makes tables
    torch.cuda.set_sync_debug_mode("error")
    try:
        replica.refresh()
        replace(attack, seed=1)(replica, x, y, eps=0.1, ids=ids + 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert replica.capture


def test_what_waits_cannot_be_captured_and_runs_as_it_is(on_gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, x, y, ids = on_gpu

    class Waits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.inner(images) * (1 if float(images.sum()) > 0 else 2)

    replica, attack = make_replica(Waits(), x), PGD(steps=2)
    assert replica.capture
    for _ in range(2):
        assert (attack(replica, x, y, eps=0.1, ids=ids) != x).any()
    assert not replica.capture
    assert sum("run without CUDA graphs" in record.getMessage() for record in caplog.records) == 1


BREAKS = """
import torch
from sparse_robust.attacks import PGD
from sparse_robust.attacks.replica import make_replica

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5)).cuda()
x, y = torch.rand(8, 3, 4, 4, device="cuda"), torch.arange(8, device="cuda") % 5

class Breaks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = model

    def forward(self, images):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()  # no wait for a tensor, and no capture survives it
        return self.inner(images)

before = torch.cuda.current_stream()
replica = make_replica(Breaks(), x)
assert (PGD(steps=2)(replica, x, y, eps=0.1) != x).any() and not replica.capture and replica.graphs.failure
assert torch.cuda.current_stream() == before
torch.cuda.empty_cache()
torch.nn.functional.dropout(x)
other = make_replica(model, x)
assert (PGD(steps=2)(other, x, y, eps=0.1) != x).any() and other.capture and len(other.graphs) == 1
"""


def test_a_capture_that_breaks_half_way_spoils_nothing_after_it(on_gpu: Any) -> None:
    """In a process of its own: what it may spoil is the process."""
    done = subprocess.run([sys.executable, "-c", BREAKS], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_a_first_attack_draws_as_a_replay_does(on_gpu: Any) -> None:
    _, x, y, ids = on_gpu
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(x[0].numel(), 5)).cuda()
    found = []
    for calls in (1, 2):
        replica = make_replica(model.train(), x, mode="train_frozen")
        for _ in range(calls):
            torch.cuda.manual_seed(7)
            crafted = PGD(steps=3, mode="train_frozen")(replica, x, y, eps=0.1, ids=ids)
        assert replica.capture
        found.append((crafted, torch.rand(3, device="cuda")))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
