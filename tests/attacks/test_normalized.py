"""Sign steps that normalise on the way, against the loop that leaves it to the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_robust.attacks import FGSM, PGD, normalized
from sparse_robust.attacks.capture import Graphs
from sparse_robust.attacks.normalized import find_normalization
from sparse_robust.attacks.replica import make_replica
from sparse_robust.errors import UsageError
from sparse_robust.models import set_normalization
from sparse_robust.objectives.crafting import NFGSM, NearPGD

MEAN, STD = (0.45, 0.5, 0.4), (0.2, 0.3, 1.7)
LINF = [
    PGD(steps=4, step_size="2/255"),
    PGD(steps=3, loss="kl"),
    PGD(steps=2, targeted=True, loss="cw"),
    PGD(steps=0),
    PGD(steps=3, mode="train_frozen"),
    FGSM(),
    NFGSM(),
    NearPGD(steps=2, loss="kl"),
]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What the fused step was asked for, in order."""
    asked: list[torch.dtype] = []

    def step(*given: Any, dtype: torch.dtype, **settings: Any) -> Any:
        asked.append(dtype)
        return fused(*given, dtype=dtype, **settings)

    fused = normalized.linf_step_normalized
    monkeypatch.setattr(normalized, "linf_step_normalized", step)
    return asked


@pytest.fixture
def normalizing(trained: Any) -> Any:
    set_normalization(trained.model, MEAN, STD)
    return trained


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attack", LINF, ids=lambda attack: f"{attack.name}-{attack.loss}-{attack.mode}")
def test_it_is_the_attack_on_the_same_replica_bit_for_bit(
    attack: PGD, precision: str, normalizing: Any, steps: list[torch.dtype]
) -> None:
    model, x, y, ids = normalizing
    replica = make_replica(model, x, precision=precision, mode=attack.mode)
    crafted = attack(replica, x, y, eps=0.1, ids=ids)
    assert steps == [torch.float32 if precision == "fp32" else torch.bfloat16] * max(0, attack.steps - 1)
    steps.clear()
    normalization, replica.normalization = replica.normalization, None
    plain = attack(replica, x, y, eps=0.1, ids=ids)
    assert not steps and crafted.stride() == plain.stride()
    # Where a gradient is so small that dividing it by a standard deviation makes it 0, or rounds its sign away, the
    # step differs; here that never is.
    assert torch.equal(crafted, plain)
    assert attack.steps == 0 or not torch.equal(crafted, x)
    replica.normalization = normalization
    last = x.contiguous(memory_format=torch.channels_last)
    assert attack(replica, last, y, eps=0.1, ids=ids).stride() == last.stride()


def test_compute_of_feed_is_the_replica(normalizing: Any) -> None:
    model, x, _, _ = normalizing
    for precision in ("fp32", "bf16"):
        replica = make_replica(model, x, precision=precision)
        fed = replica.feed(x)
        assert fed.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(replica.compute(fed), replica(x))


def test_it_follows_a_refresh(normalizing: Any, steps: list[torch.dtype]) -> None:
    model, x, y, ids = normalizing
    replica, attack = make_replica(model, x), PGD(steps=3)
    before = attack(replica, x, y, eps=0.1, ids=ids)
    set_normalization(model, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    replica.refresh()
    after = attack(replica, x, y, eps=0.1, ids=ids)
    assert len(steps) == 4 and not torch.equal(before, after)
    assert torch.equal(after, attack(make_replica(model, x), x, y, eps=0.1, ids=ids))


def test_a_captured_attack_does_it_too(normalizing: Any, steps: list[torch.dtype]) -> None:
    model, x, y, ids = normalizing
    captured, plain = make_replica(model, x), make_replica(model, x)

    def capture(function: Any) -> tuple[Any, Tensor]:
        output = torch.full_like(function(), torch.nan)
        return lambda: output.copy_(function()), output

    captured.graphs = Graphs(capture)
    for seed in (0, 1):
        attack = PGD(steps=3, seed=seed)
        assert torch.equal(attack(captured, x, y, eps=0.1, ids=ids), attack(plain, x, y, eps=0.1, ids=ids))
    assert steps and not captured.graphs.failure


@pytest.mark.parametrize(
    "attack",
    [PGD(norm="L2", steps=2), PGD(norm="L1", steps=2), PGD(steps=2, momentum=0.9)],
    ids=["L2", "L1", "momentum"],
)
def test_other_steps_go_the_usual_way(attack: PGD, normalizing: Any, steps: list[torch.dtype]) -> None:
    model, x, y, ids = normalizing
    eps = 0.1 if attack.norm == "Linf" else 1.5
    crafted = attack(make_replica(model, x), x, y, eps=eps, ids=ids)
    assert not steps
    replica = make_replica(model, x)
    replica.normalization = None
    assert torch.equal(crafted, attack(replica, x, y, eps=eps, ids=ids))


def test_models_without_it_and_with_hooks_of_their_own_have_none(trained: Any) -> None:
    model, x, y, ids = trained
    assert find_normalization(model) is None and make_replica(model, x).normalization is None
    set_normalization(model, MEAN, STD)
    replica = make_replica(model, x)
    assert replica.normalization is not None and replica.normalization.mean.tolist() == pytest.approx(MEAN)
    assert make_replica(model, x, channels_last=False).normalization is None
    handle = model.register_forward_hook(lambda module, args, output: -output)
    hooked = make_replica(model, x)
    assert hooked.normalization is None
    expected = PGD(steps=2)(model, x, y, eps=0.1, ids=ids)
    assert torch.equal(PGD(steps=2)(hooked, x, y, eps=0.1, ids=ids), expected)
    handle.remove()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    assert make_replica(model, x).normalization is None


def test_images_of_other_channels_and_types_are_treated_as_ever(normalizing: Any, steps: list[torch.dtype]) -> None:
    model, x, y, ids = normalizing
    replica, attack = make_replica(model, x), PGD(steps=2)
    with pytest.raises(UsageError, match="3-channel images"):
        attack(replica, x[:, :1], y, eps=0.1, ids=ids)
    double, images = make_replica(model.double(), x.double()), x.double()
    crafted = attack(double, images, y, eps=0.1, ids=ids)
    assert not steps and torch.equal(crafted, attack(model, images, y, eps=0.1, ids=ids))


def test_labels_are_checked(normalizing: Any) -> None:
    model, x, y, ids = normalizing
    with pytest.raises(UsageError, match="label"):
        replace(PGD(), steps=2)(make_replica(model, x), x, y + 5, eps=0.1, ids=ids)
