"""Mixed precision and the compiler: what is cast, what is not, and that masks and attacks stay exact."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from sparse_robust.attacks import PGD
from sparse_robust.data import Data
from sparse_robust.files import sha256_state
from sparse_robust.pruning import prune
from sparse_robust.training import Recipe, RunOptions, Trainer, TrainResult

EPS = 0.1
FAST: dict[str, Any] = {
    "regime": "adversarial", "steps": 2, "epochs": 2, "batch_size": 32, "lr": 0.05, "eps": EPS, "validate_every": 0,
}  # fmt: skip


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Accelerator]]:
    """Make an accelerator of other settings than the tests before and after."""

    def make(**settings: Any) -> Accelerator:
        AcceleratorState._reset_state()
        return Accelerator(gradient_accumulation_steps=1, **settings)

    yield make
    AcceleratorState._reset_state()


def half(make: Callable[..., Accelerator], scale: float) -> Accelerator:
    """What Accelerate sets up for fp16 on a GPU; it refuses to on a CPU, which can do it all the same."""
    accelerator = make(mixed_precision="bf16")
    accelerator.state._mixed_precision = "fp16"
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)
    return accelerator


def fit(
    model: nn.Module, data: Data, accelerator: Accelerator, folder: Path | None = None, **recipe: Any
) -> TrainResult:
    options = RunOptions(folder=folder, checkpoint_steps=1)
    masks = prune(model, 0.5)
    recipe = {**FAST, **recipe}
    return Trainer(
        model, data, Recipe(**recipe), seed=0, masks=masks, accelerator=accelerator, options=options
    ).fit()  # fmt: skip


def check_masks(model: nn.Module, result: TrainResult) -> None:
    assert result.masks is not None
    for name, weight in model.named_parameters():
        assert weight.dtype == torch.float32
        if name in result.masks:
            assert (weight[~result.masks[name]] == 0).all() and weight.any()


@pytest.fixture
def crafted(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images that training attacks give back, after a check of their budget and of what they were given."""
    seen, craft = list[Tensor](), PGD.__call__

    def watched(self: PGD, model: Any, x: Tensor, y: Tensor, *, eps: float, ids: Tensor | None = None) -> Tensor:
        images = craft(self, model, x, y, eps=eps, ids=ids)
        assert x.dtype == images.dtype == torch.float32
        lo, hi = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        assert ((lo <= images) & (images <= hi)).all()
        seen.append(images)
        return images

    monkeypatch.setattr(PGD, "__call__", watched)
    return seen


@pytest.mark.parametrize("mode", ["eval", "train_frozen"])
def test_bf16_trains_fp32_weights_on_exact_fp32_iterates(
    mode: str,
    tiny: Callable[..., nn.Module],
    digits: Data,
    accelerator: Callable[..., Accelerator],
    crafted: list[Tensor],
) -> None:
    model = tiny()
    result = fit(model, digits, accelerator(mixed_precision="bf16"), attack_mode=mode)
    assert result.how["precision"] == "bf16" and crafted
    check_masks(model, result)
    how = result.how["attack"]
    assert (how["folded"], how["reason"]) == (15 if mode == "eval" else 0, None)  # checked without autocast
    single = fit(tiny(), digits, accelerator(), attack_mode=mode)
    assert single.how["precision"] == "fp32"
    losses = [entry["train_loss"] for entry in result.history], [entry["train_loss"] for entry in single.history]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


def test_fp16_skips_steps_that_overflow_and_resumes_with_its_scale(
    tiny: Callable[..., nn.Module], digits: Data, accelerator: Callable[..., Accelerator], crafted: list[Tensor],
    tmp_path: Path,
) -> None:  # fmt: skip
    scale = 2.0**40  # overflows: the first steps are skipped until it has come down
    whole, model = half(accelerator, scale), tiny()
    start = sha256_state(dict(model.named_parameters()))
    result = fit(model, digits, whole, clip_grad=1.0)
    assert whole.scaler.get_scale() < scale and result.how["precision"] == "fp16" and crafted
    assert sha256_state(dict(model.named_parameters())) != start
    check_masks(model, result)

    short = fit(tiny(), digits, half(accelerator, scale), tmp_path, clip_grad=1.0)
    newest = sorted((tmp_path / "checkpoint").iterdir())[-1]
    assert (newest / "scaler.pt").exists()
    resumed = half(accelerator, 2.0**3)  # another scale, which the checkpoint's replaces
    again = fit(tiny(), digits, resumed, tmp_path, clip_grad=1.0)
    assert resumed.scaler.get_scale() == whole.scaler.get_scale()
    ends = [sha256_state(each.selection.state("last")) for each in (result, short, again)]
    assert len(set(ends)) == 1


def small() -> nn.Module:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 8, 5, stride=3)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 8 * 8, 10))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_network_keeps_masks_and_checkpoints_and_comes_back_plain(
    backend: str, digits: Data, accelerator: Callable[..., Accelerator], tmp_path: Path
) -> None:
    plain = fit(small(), digits, accelerator(), epochs=1)
    model = small()
    names = set(model.state_dict())
    result = fit(model, digits, accelerator(dynamo_backend=backend), tmp_path, epochs=1)
    assert result.how["compile"] == backend and plain.how["compile"] is None
    check_masks(model, result)
    assert set(model.state_dict()) == set(result.selection.state("last")) == names
    again = fit(small(), digits, accelerator(dynamo_backend=backend), tmp_path, epochs=1)  # its last step is done again
    assert sha256_state(again.selection.state("last")) == sha256_state(result.selection.state("last"))
    for name, tensor in plain.selection.state("last").items():
        assert torch.allclose(result.selection.state("last")[name], tensor, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_algorithms_are_for_the_run_alone(
    wanted: bool, tiny: Callable[..., nn.Module], digits: Data, accelerator: Callable[..., Accelerator],
    monkeypatch: pytest.MonkeyPatch, crafted: list[Tensor],
) -> None:  # fmt: skip
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    during: list[bool] = []
    seed = torch.manual_seed
    monkeypatch.setattr(
        torch, "manual_seed", lambda s: (during.append(torch.are_deterministic_algorithms_enabled()), seed(s))[1]
    )
    result = fit(tiny(), digits, accelerator(), epochs=1, deterministic=wanted)
    assert result.how["deterministic"] == wanted and during[-1] == wanted
    assert not torch.are_deterministic_algorithms_enabled()
