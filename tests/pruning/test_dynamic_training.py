"""Masks that change, in the trainer: average, accumulation, clipping, mixed precision, resume, two ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from sparse_robust.data import Data, DataSpec, load_data
from sparse_robust.errors import UsageError
from sparse_robust.files import sha256_state
from sparse_robust.masks import Masks, prunable_weights
from sparse_robust.models import create_model
from sparse_robust.pruning import prune, survivors
from sparse_robust.pruning.dynamic import Dynamics
from sparse_robust.training import Hook, Recipe, RunOptions, Trainer
from sparse_robust.training.dynamic import DynamicMasks
from sparse_robust.training.trainee import Trainee

RECIPE: dict[str, Any] = {
    "epochs": 2, "batch_size": 16, "lr": 0.05, "eps": 0.1, "validate_every": 0, "regime": "n-fgsm", "guard": False
}  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data(DataSpec(name="digits", resize=28, fraction=0.05, validation=60))


def tiny() -> nn.Module:
    return create_model("resnet10t", num_classes=10, in_chans=1, seed=0, channels=(4, 6, 8, 10), stem_width=4)


class Killed(Exception):
    pass


class Watch(Hook):
    """Checks what must hold after every update; kills the run after so many of this start."""

    name = "watch"

    def __init__(self, counts: list[int] | None = None, die_after: int | None = None) -> None:
        self.counts, self.left, self.seen = counts, die_after, list[Masks]()

    def after_update(self, trainee: Trainee, update: int) -> None:
        masks, enforcement = trainee.masks, trainee.enforcement
        assert masks is not None and enforcement is not None
        enforcement.verify()
        if self.counts is not None:
            assert [kept for _, _, kept, _ in masks.layers()] == self.counts
        if trainee.ema is not None:
            for name, weight in prunable_weights(trainee.ema.module).items():
                assert not weight.detach()[~masks[name]].view(torch.int32).any(), "the average is +0.0 there, too"
        if not self.seen or masks != self.seen[-1]:
            self.seen.append(masks)
        if self.left is not None:
            self.left -= 1
            if self.left <= 0:
                raise Killed


def start_of(dynamics: Dynamics, model: nn.Module, count: int) -> Masks:
    first = dynamics.begins_with(count, Masks.full(model).count())
    return prune(model, count=first, score="random", scope="erk")


def run(
    data: Data, dynamics: Dynamics, *, folder: Path | None = None, die_after: int | None = None,
    accelerator: Accelerator | None = None, **recipe: Any,
) -> tuple[Watch, Masks, str]:  # fmt: skip
    """Train; returns what was watched, the masks at the end and the identity of all that is kept."""
    model = tiny()
    count = survivors(Masks.full(model).count(), 0.8, 1)
    masks = start_of(dynamics, model, count)
    constant = [kept for _, _, kept, _ in masks.layers()] if masks.count() == count else None
    hook, watch = DynamicMasks(dynamics, count=count, seed=3), Watch(constant, die_after)
    trainer = Trainer(
        model, data, Recipe(**{**RECIPE, **recipe}), seed=0, masks=masks, accelerator=accelerator,
        options=RunOptions(folder=folder, checkpoint_steps=3), hooks=[hook, watch],
    )  # fmt: skip
    result = trainer.fit()
    assert hook.masks.count() == count
    state = result.selection.state("last")
    for name in masks.names():
        assert not state[name][~hook.masks[name]].view(torch.int32).any()
    return watch, hook.masks, sha256_state(state)


@pytest.mark.acceptance("slak", "A12", "A13")
@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("rigl", {"ema_decay": 0.9, "accumulate": 2, "clip_grad": 1.0}),
        ("set", {"optimizer": "adamw", "lr": 0.005}),
        ("granet", {"regime": "free", "replays": 2, "epochs": 4, "ema_decay": 0.5}),
        ("gradual", {"regime": "trades", "steps": 1, "awp": 0.005}),
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    method: str, recipe: dict[str, Any], digits: Data, tmp_path: Path
) -> None:
    dynamics = Dynamics(method=method, every=2, window=(0.0, 0.9))
    watch, masks, state = run(digits, dynamics, folder=tmp_path / "whole", **recipe)
    assert len(watch.seen) > 2, "masks have changed"
    for die_after in (3, 4):
        with pytest.raises(Killed):
            run(digits, dynamics, folder=tmp_path / "parts", die_after=die_after, **recipe)
    again = run(digits, dynamics, folder=tmp_path / "parts", **recipe)
    assert again[1] == masks and again[2] == state
    assert again[0].seen[-1] == watch.seen[-1]


@pytest.fixture
def half() -> Iterator[Accelerator]:
    """Accelerate keeps one precision a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(mixed_precision="bf16", cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.acceptance("smc-bench", "B14")
def test_mixed_precision_keeps_pruned_weights_at_zero(digits: Data, half: Accelerator) -> None:
    dynamics = Dynamics(method="rigl", every=2)
    watch, masks, state = run(digits, dynamics, accelerator=half, epochs=2, awp=0.01)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert state != run(digits, dynamics, epochs=2, awp=0.01)[2], "bfloat16 was in use"
    assert len(watch.seen) > 1 and masks == watch.seen[-1]


def test_rigl_sees_the_gradients_of_pruned_weights(digits: Data) -> None:
    class Spy(Hook):
        name = "spy"
        dense = 0

        def before_update(self, trainee: Trainee, update: int) -> None:
            assert trainee.masks is not None
            for name, weight in prunable_weights(trainee.inner).items():
                assert weight.grad is not None
                self.dense += int((weight.grad[~trainee.masks[name]] != 0).sum())

    model, spy = tiny(), Spy()
    masks = prune(model, 0.8)
    Trainer(model, digits, Recipe(**{**RECIPE, "epochs": 1}), seed=0, masks=masks, hooks=[spy]).fit()
    assert spy.dense > 1000


def test_what_is_refused(digits: Data) -> None:
    hook = DynamicMasks(Dynamics(method="rigl"), count=10, seed=0)
    with pytest.raises(UsageError, match="those of no run yet"):
        _ = hook.masks
    with pytest.raises(UsageError, match="give the trainer those to begin with"):
        Trainer(tiny(), digits, Recipe(**RECIPE), seed=0, hooks=[hook]).fit()
    model = tiny()
    masks = prune(model, 0.5)
    with pytest.raises(UsageError, match="set recipe.guard to false"):
        Trainer(model, digits, Recipe(**{**RECIPE, "guard": True}), seed=0, masks=masks, hooks=[hook]).fit()
    with pytest.raises(UsageError, match="cannot go from"):
        Trainer(model, digits, Recipe(**RECIPE), seed=0, masks=masks, hooks=[hook]).fit()


RANKS = """
import copy, sys
import torch
from accelerate import Accelerator
from pathlib import Path
from test_dynamic_training import Dynamics, DataSpec, load_data, run
from sparse_robust.objectives import build_objective

torch.set_num_threads(1)
data = load_data(DataSpec(name="digits", resize=28, fraction=0.05, validation=60))
seen = []
cases = [("rigl", {"regime": "trades", "steps": 1, "awp": 0.01}), ("set", {"regime": "mart", "steps": 1}),
         ("granet", {"regime": "free", "replays": 2})]
for method, recipe in cases:
    accelerator = Accelerator(cpu=True)
    watch, masks, state = run(data, Dynamics(method=method, every=2), accelerator=accelerator, **recipe)
    digests = [mask.digest() for mask in watch.seen]
    assert len(digests) > 1
    everyones = [None, None]
    torch.distributed.all_gather_object(everyones, (digests, state))
    assert everyones[0] == everyones[1], f"{method}: ranks differ"

# Gradients of half a batch each, averaged, are those of the whole batch: the weights were perturbed by both halves.
rank = accelerator.process_index
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4)).double()
whole, x, y, ids = copy.deepcopy(net), torch.rand(8, 1, 4, 4).double(), torch.arange(8) % 4, torch.arange(8)
model = torch.nn.parallel.DistributedDataParallel(net)
gradients, known = {}, torch.distributed.is_initialized
for name, wrapped, inner, mine in (("two", model, net, slice(rank, None, 2)), ("one", whole, whole, slice(None))):
    if name == "one":
        torch.distributed.is_initialized = lambda: False  # as a single process has it
    objective = build_objective("trades", eps=0.1, steps=2, awp=0.1)
    with objective.around(inner):
        objective(wrapped, inner, x[mine], y[mine], ids[mine], seed=0)[0].backward()
    gradients[name] = [parameter.grad for parameter in inner.parameters()]
torch.distributed.is_initialized = known
for two, one in zip(gradients["two"], gradients["one"]):
    torch.testing.assert_close(two, one, rtol=1e-9, atol=1e-12)
Path(sys.argv[1] + str(rank)).write_text("same")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.acceptance("double-win", "A-38")
@pytest.mark.acceptance("slak", "A15")
def test_two_ranks_hold_the_same_masks_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(f"import sys; sys.path[:0] = {[str(Path(__file__).parent)]!r}\n{RANKS}")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = subprocess.run([*torchrun, str(script), str(tmp_path / "out")], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert [(tmp_path / f"out{rank}").read_text() for rank in (0, 1)] == ["same", "same"]
