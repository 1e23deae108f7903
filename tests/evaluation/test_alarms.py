"""Alarms: each rings for a model whose gradients mislead in its way, and none for one that was simply trained."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.attacks import APGD, Budget, Square
from sparse_robust.data import DataSpec, eval_loader, load_data
from sparse_robust.errors import UsageError
from sparse_robust.evaluation import Evaluation, evaluate
from sparse_robust.evaluation import alarms as rules
from sparse_robust.evaluation.alarms import Alarm, run_alarms
from sparse_robust.evaluation.surface import probe_surface
from sparse_robust.evaluation.verdicts import Verdicts

EPS = 0.15


class Trained(NamedTuple):
    model: nn.Module
    other: nn.Module
    x: Tensor
    y: Tensor
    ids: Tensor

    @property
    def loader(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """In batches of 25."""
        return list(zip(*(column.split(25) for column in (self.x, self.y, self.ids)), strict=True))


@pytest.fixture(scope="module")
def trained() -> Trained:
    """Two small networks on the handwritten digits, and 50 test images."""
    data = load_data(DataSpec(name="digits"))
    (x, y, _) = next(iter(eval_loader(data.train, 2000)))
    models = []
    with torch.random.fork_rng():
        for seed in (0, 1):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            for _ in range(40):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            optimizer.zero_grad()
            models.append(model.eval())
    return Trained(*models, *next(iter(eval_loader(data.test, 50, limit=50))))


class Wrapped(nn.Module):
    """A network with something before it and after it."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.model(self.before(x)))


class Misled(torch.autograd.Function):
    """Nothing forwards; backwards the gradient of another pixel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.roll(3, -1).flip(-2)


class OneAtATime(torch.autograd.Function):
    """Nothing forwards; backwards the gradient of a single pixel, another one each time."""

    turn = 0

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        OneAtATime.turn += 1
        chosen = torch.zeros_like(grad).flatten(1)
        chosen[:, OneAtATime.turn * 7 % 64] = 1
        return grad * chosen.view_as(grad)


def shattered(x: Tensor) -> Tensor:
    return x + 0.03 * torch.sin(700 * x)


def raised(found: Sequence[Alarm]) -> set[str]:
    return {alarm.name for alarm in found if alarm.raised}


def by_name(found: Sequence[Alarm]) -> dict[str, Alarm]:
    return {alarm.name: alarm for alarm in found}


# --- models


@pytest.mark.parametrize(("norm", "eps"), [("Linf", EPS), ("L2", 0.7), ("L1", 4.0)])
def test_a_trained_network_raises_none(trained: Trained, norm: str, eps: float) -> None:
    found = run_alarms(trained.model, trained.loader, eps, norm=norm, dense_parent=trained.other)
    assert raised(found) == set()
    assert [alarm.name for alarm in found] == [
        "large-eps", "more-steps", "black-box", "transfer", "zero-gradients", "gradient-direction", "loss-linearity",
        "stochastic",
    ]  # fmt: skip
    assert by_name(found)["large-eps"].values["robust"] == 0
    assert by_name(found)["black-box"].values["ahead"] <= 0


def test_a_saturated_softmax(trained: Trained) -> None:
    """Logits a thousand times as large change no prediction, but the cross-entropy has no slope left."""
    model = Wrapped(trained.model, after=lambda logits: 1000 * logits)
    found = run_alarms(model, trained.loader, EPS, dense_parent=trained.other)
    assert {"large-eps", "zero-gradients", "black-box"} <= raised(found)
    assert by_name(found)["zero-gradients"].values["images"] > 50


def test_rounded_inputs(trained: Trained) -> None:
    """Rounding has the derivative zero everywhere."""
    model = Wrapped(trained.model, before=lambda x: (8 * x).round() / 8)
    found = by_name(run_alarms(model, trained.loader, EPS, dense_parent=trained.other))
    assert found["zero-gradients"].raised and found["zero-gradients"].values == {"images": 100, "elements": 100}
    assert found["large-eps"].raised and found["black-box"].raised
    assert not found["loss-linearity"].raised and "no slope" in found["loss-linearity"].sentence
    json.dumps([alarm.to_dict() for alarm in found.values()], allow_nan=False)


def test_a_gradient_that_points_elsewhere(trained: Trained) -> None:
    found = run_alarms(Wrapped(trained.model, before=Misled.apply), trained.loader, EPS, dense_parent=trained.model)
    assert {"gradient-direction", "black-box", "transfer"} <= raised(found)
    assert by_name(found)["gradient-direction"].values["random_wins"] > 40


def test_a_shattered_gradient(trained: Trained) -> None:
    """Ripples steeper than the loss itself."""
    found = run_alarms(Wrapped(trained.model, before=shattered), trained.loader, EPS)
    assert {"loss-linearity", "black-box"} <= raised(found)
    assert by_name(found)["loss-linearity"].values["realised"] < 0.2


def test_a_model_that_draws_random_numbers(trained: Trained) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Wrapped(trained.model, before=lambda x: x + 0.3 * torch.randn_like(x))
        found = by_name(run_alarms(model, trained.loader, EPS))
    assert found["stochastic"].raised and found["stochastic"].values["flips"] > 0


def test_an_attack_that_has_not_converged(trained: Trained) -> None:
    found = by_name(run_alarms(Wrapped(trained.model, before=OneAtATime.apply), trained.loader, EPS))
    assert found["more-steps"].raised and found["more-steps"].values["gain"] > 1
    assert found["more-steps"].values["steps_20"] > found["more-steps"].values["steps_200"]


def test_a_network_trained_to_resist_one_step() -> None:
    """Fast training without a random start: after a while it resists FGSM, and its gradients say nothing (catastrophic
    overfitting, Wong et al., 2020). Here as a loss along one axis that rises, then falls again."""

    def bump(x: Tensor) -> Tensor:
        level = x.flatten(1).mean(1) - 0.5
        score = 4 * level * (1 - (level / 0.06) ** 2)
        return torch.stack([score, torch.zeros_like(score) - 0.01], 1)

    x = torch.full((20, 1, 8, 8), 0.5) + torch.linspace(0, 0.01, 20).view(-1, 1, 1, 1)
    loader = [(x, torch.zeros(20, dtype=torch.int64), torch.arange(20))]
    found = by_name(run_alarms(bump, loader, 0.1))
    assert found["loss-linearity"].raised and found["gradient-direction"].raised


# --- results that are at hand


def verdicts(broken_by: Sequence[int], stages: Sequence[tuple[str, float]], first_id: int = 0) -> Evaluation:
    """An evaluation of 0, 1, ... with these verdicts."""
    broken = torch.tensor(broken_by)
    zero, none = torch.zeros_like(broken), torch.zeros(len(broken))
    rows = Verdicts(
        zero + torch.arange(len(broken)) + first_id, zero, torch.where(broken == -2, 1, 0), broken, zero - 1, zero,
        none, none, none, none, zero, zero, zero,
    )  # fmt: skip
    robust = float((broken == -1).double().mean())
    return Evaluation(float((broken != -2).double().mean()), robust, (robust,) * len(stages), tuple(stages), rows, {})


STANDARD = [("apgd-ce", 0.1), ("apgd-t", 0.1), ("fab-t", 0.1), ("square", 0.1)]


def pgd_against_autoattack(pgd: Sequence[int], autoattack: Sequence[int]) -> Alarm | None:
    one, other = verdicts(pgd, [("pgd-20", 0.1)]), verdicts(autoattack, STANDARD)
    return rules.gap_alarm(rules.robust_at(one, 0.1), rules.robust_at(other, 0.1))


@pytest.mark.acceptance("double-win", "A-24")
@pytest.mark.parametrize(
    ("pgd", "auto", "rings"), [(50, 46, False), (50, 41, True), (50, 50, False), (50, 52, True)], ids=str
)
def test_pgd_and_autoattack_belong_close_together(pgd: int, auto: int, rings: bool) -> None:
    """In a hundred images: AutoAttack up to 8 points below PGD, and never above."""
    alarm = pgd_against_autoattack([-1] * pgd + [0] * (100 - pgd), [-1] * auto + [1] * (100 - auto))
    assert alarm is not None and alarm.raised == rings
    assert alarm.values["gap"] == pytest.approx(pgd - auto) and f"{auto}.0 % under AutoAttack" in alarm.sentence


def test_only_images_in_both_evaluations_are_compared() -> None:
    one = rules.robust_at(verdicts([-1, -1, 0, -2], [("pgd-20", 0.1)]), 0.1)
    other = rules.robust_at(verdicts([-1, 0, 1, -1], STANDARD, first_id=1), 0.1)
    alarm = rules.gap_alarm(one, other)
    assert alarm is not None and alarm.values["pgd"] == pytest.approx(100 / 3)
    assert rules.gap_alarm(one, rules.robust_at(verdicts([-1], STANDARD, first_id=9), 0.1)) is None


def test_what_is_broken_at_a_larger_radius_is_robust_at_a_smaller_one() -> None:
    stages = [("apgd-ce", 0.05), ("square", 0.05), ("apgd-ce", 0.1), ("square", 0.1)]
    result = verdicts([-1, 0, 1, 2, 3, -2], stages)
    assert list(rules.robust_at(result, 0.05).values()) == [True, False, False, True, True, False]
    assert list(rules.robust_at(result, 0.1).values()) == [True, False, False, False, False, False]
    assert list(rules.robust_at(result, 0.1, without="square").values()) == [True, False, True, False, True, False]


def test_square_may_not_win() -> None:
    few = rules.square_alarm(verdicts([-1] * 997 + [0] * 1 + [3] * 2, STANDARD), 0.1)
    many = rules.square_alarm(verdicts([-1] * 997 + [3] * 3, STANDARD), 0.1)
    assert few is not None and not few.raised and few.values["images"] == 2
    assert many is not None and many.raised and "broke 3 of 1000 images (0.3 %)" in many.sentence
    assert rules.square_alarm(verdicts([-1, 0], [("apgd-ce", 0.1)]), 0.1) is None
    assert rules.square_alarm(verdicts([-1, 0], [("square", 0.1), ("fab-t", 0.1)]), 0.1) is None


@pytest.mark.acceptance("double-win", "A-24")
def test_a_black_box_attack_may_not_do_better() -> None:
    white = torch.tensor([True] * 60 + [False] * 40)
    same, better = white.clone(), white.clone()
    better[0] = False
    for black, rings in ((same, False), (better, True), (~white | white, False)):
        alarm = rules.black_box_alarm(white, black, name="black-box", what="Square")
        assert alarm.raised == rings
    assert rules.black_box_alarm(white, better, name="black-box", what="Square").values["alone"] == 1


@pytest.mark.acceptance("double-win", "A-24")
def test_svhn_above_seventy_percent_is_not_believed() -> None:
    for data, robust, eps, rings in (
        ("svhn", 70.1, 8 / 255, True), ("SVHN-extra", 90.0, 0.1, True), ("svhn", 70.0, 8 / 255, False),
    ):  # fmt: skip
        alarm = rules.implausible_alarm(robust, data, eps=eps, norm="Linf")
        assert alarm is not None and alarm.raised == rings
    assert rules.implausible_alarm(90, "cifar10", eps=8 / 255, norm="Linf") is None
    assert rules.implausible_alarm(90, "svhn", eps=1 / 255, norm="Linf") is None
    assert rules.implausible_alarm(90, "svhn", eps=8 / 255, norm="L2") is None


@pytest.mark.acceptance("double-win", "A-24")
def test_svhn_is_known_by_the_name_of_the_data(trained: Trained) -> None:
    """Whatever else holds: a constant answer withstands everything."""
    held = [(trained.x, torch.zeros_like(trained.y), trained.ids)]

    def constant(x: Tensor) -> Tensor:
        return torch.stack([1 + 0 * x.flatten(1).sum(1), 0 * x.flatten(1).sum(1)], 1)

    found = by_name(run_alarms(constant, held, "8/255", data="svhn", images=10))
    assert found["implausible"].raised and found["implausible"].values["robust"] == 100
    assert found["large-eps"].raised and found["zero-gradients"].raised


def test_late_steps_and_large_radii_by_their_numbers() -> None:
    assert not rules.steps_alarm({20: 50, 100: 45, 200: 44}).raised
    assert rules.steps_alarm({20: 50, 100: 49, 200: 47.9}).raised
    assert rules.large_eps_alarm(5.1, eps=0.5, norm="Linf", classes=10).raised
    assert not rules.large_eps_alarm(5.0, eps=0.5, norm="Linf", classes=2).raised
    assert rules.large_eps_alarm(1.1, eps=0.5, norm="Linf", classes=100).raised  # above chance


def test_evaluations_at_hand_take_part(trained: Trained) -> None:
    suite = [APGD(steps=50), Square(n_queries=400)]
    result = evaluate(trained.model, trained.loader, suite, EPS)
    found = by_name(run_alarms(trained.model, trained.loader, EPS, autoattack=result, images=30))
    assert not found["pgd-autoattack-gap"].raised and not found["square-wins"].raised
    assert "(30 images)" in found["pgd-autoattack-gap"].sentence
    hasty = evaluate(trained.model, trained.loader, [APGD(steps=50), Square(n_queries=20)], EPS)
    assert rules.square_alarm(hasty, EPS) is None  # the cheaper attack went first


# --- the surface


def test_the_expansion_of_a_linear_loss_is_exact() -> None:
    """Two logits far apart: the cross-entropy of the losing class is linear."""
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def model(x: Tensor) -> Tensor:
        score = x.flatten(1) @ weight + 500
        return torch.stack([score, torch.zeros_like(score)], 1)

    x = torch.full((5, 1, 8, 8), 0.5)
    surface = probe_surface(model, [(x, torch.ones(5).long(), torch.arange(5))], Budget("Linf", 0.1))
    assert surface.realised == pytest.approx(1, rel=1e-4) and surface.first_order_error < 1e-2
    assert not surface.random_wins.any() and not surface.zero_gradient.any()
    torch.testing.assert_close(
        surface.predicted, torch.full((5,), 0.1 * float(weight.abs().sum()), dtype=torch.float64)
    )


def test_the_model_comes_back_as_it_was(trained: Trained) -> None:
    model = copy.deepcopy(trained.model).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run_alarms(model, trained.loader, EPS, images=10, dense_parent=model)
    assert model.training and all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_every_alarm_is_a_sentence_with_its_number(trained: Trained) -> None:
    for alarm in run_alarms(trained.model, trained.loader, EPS, images=10, dense_parent=trained.other):
        assert alarm.sentence.endswith(".") and any(char.isdigit() for char in alarm.sentence)
        assert alarm.values and isinstance(alarm.raised, bool)
        assert alarm.to_dict()["threshold"] == alarm.threshold


# --- errors


def test_errors(trained: Trained) -> None:
    with pytest.raises(UsageError, match="eps above 0"):
        run_alarms(trained.model, trained.loader, 0)
    with pytest.raises(UsageError, match="yields no batch"):
        run_alarms(trained.model, [], EPS)
    with pytest.raises(UsageError, match="no gradient"):
        run_alarms(lambda x: trained.model(x).detach(), trained.loader, EPS)
    with pytest.raises(UsageError, match="norm"):
        run_alarms(trained.model, trained.loader, EPS, norm="L7")
