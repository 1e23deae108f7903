"""What is wrong before an evaluation begins is named with its number; what is right is not complained about."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_robust.errors import UsageError
from sparse_robust.evaluation.diagnose import Finding, diagnose, require_sound
from sparse_robust.models import create_model, set_normalization

CLASSES, N = 4, 32
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Normalize(nn.Module):
    """The layer that many projects write."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _quadrants(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 2).mean(1).flatten(1)


class Brightest(nn.Module):
    """Classes are the quadrants; the logits are their brightness: all images of `images` are classified correctly."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(self.conv.weight)
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return 4 * _quadrants(self.bn(self.conv(x)))


class First(nn.Module):
    """Uses the first of its parts alone."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[0](x)


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(N) % CLASSES
    bright = F.interpolate(F.one_hot(y, CLASSES).view(N, 1, 2, 2).float(), 8)
    x = (0.25 + 0.3 * bright + 0.4 * torch.rand(N, 3, 8, 8, generator=generator)).clamp(0, 1)
    x[:, :, 0, 0], x[:, :, -1, -1] = 0, 1
    return x, y


def names(findings: tuple[Finding, ...]) -> list[str]:
    return [finding.name for finding in findings]


def only(findings: tuple[Finding, ...], name: str, severity: str) -> str:
    """The message of the one finding, which has this name."""
    assert names(findings) == [name], findings
    assert findings[0].severity == severity
    return findings[0].sentence


@pytest.fixture
def model() -> nn.Module:
    return Brightest().eval()


# --- nothing to say


def test_a_sound_model_has_no_findings(model: nn.Module) -> None:
    assert diagnose(model, *images()) == ()
    assert diagnose(nn.Sequential(Normalize(*IMAGENET), Brightest()).eval(), *images()) == ()
    set_normalization(model, *IMAGENET)
    assert diagnose(model, *images()) == ()
    with torch.inference_mode():
        assert diagnose(model, *images()) == ()


def test_a_plain_function_is_sound_too() -> None:
    assert diagnose(lambda x: 4 * _quadrants(x), *images()) == ()


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_an_untrained_network_is_only_said_to_be_at_chance(name: str) -> None:
    size = {"img_size": 32} if name.startswith("vit") else {}
    model = create_model(name, num_classes=CLASSES, in_chans=3, **size).eval()
    x, y = images()
    found = diagnose(model, F.interpolate(x, 32), y)
    assert set(names(found)) <= {"chance", "constant-prediction"}


def test_few_images_do() -> None:
    x, y = images()
    assert diagnose(Brightest().eval(), x[:1], y[:1]) == ()
    assert diagnose(Brightest().eval(), x[:3], 3 - y[:3]) == (), "three images say nothing about accuracy"


def test_the_model_and_random_numbers_are_left_as_they_were() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.drop = Brightest(), nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("total", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            self.total += 1
            return F.dropout(self.inner(self.drop(x)), 0.1, training=True)

    model = Odd().train()
    model.inner.bn.eval()
    model.inner.conv.weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    total, grads = model.total, [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    x, y = images()
    found = diagnose(model, x, y)
    assert {"train-mode", "stochastic"} <= set(names(found))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.drop.training and not model.inner.bn.training and model.total is total
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(torch.get_rng_state(), state)


# --- images


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: 255 * x, "values from 0 to 255: they look like pixels from 0 to 255. Divide them by 255"),
        (lambda x: 2 * x - 1, r"values from -1 to 1: they look scaled to \[-1, 1\]. Undo it with"),
        (
            lambda x: Normalize(*IMAGENET)(x),
            r"they look normalised already \(mean .*, standard deviation",
        ),
        (lambda x: 1.04 * x - 0.02, "a little outside, as resizing leaves it. Clamp them"),
    ],
)
def test_images_outside_the_box_are_guessed(model: nn.Module, change: Callable[[Tensor], Tensor], message: str) -> None:
    x, y = images()
    text = only(diagnose(model, change(x), y), "image-range", "error")
    assert text.startswith("images lie in [0, 1], got values from ")
    with pytest.raises(UsageError, match=message):
        require_sound(diagnose(model, change(x), y))


def test_images_that_are_normalised_for_a_model_that_normalises(model: nn.Module) -> None:
    x, y = images()
    set_normalization(model, *IMAGENET)
    twice = "The model normalises as well, so they would be normalised twice"
    assert twice in only(diagnose(model, Normalize(*IMAGENET)(x), y), "image-range", "error")
    layered = nn.Sequential(Normalize(*IMAGENET), Brightest()).eval()
    assert twice in only(diagnose(layered, Normalize(*IMAGENET)(x), y), "image-range", "error")
    assert twice not in only(diagnose(Brightest(), Normalize(*IMAGENET)(x), y), "image-range", "error")


def test_images_divided_twice_are_a_warning(model: nn.Module) -> None:
    x, y = images()
    found = diagnose(model, x / 255, y)
    assert found[0].name == "image-range" and found[0].severity == "warning"
    assert "divided by 255 twice" in found[0].sentence and "0.0039" in found[0].sentence
    assert diagnose(model, x / 20, y) == ()


def test_another_box_is_respected(model: nn.Module) -> None:
    x, y = images()
    assert diagnose(model, 2 * x - 1, y, lo=-1.0, hi=1.0) == ()


def test_images_of_another_type(model: nn.Module) -> None:
    x, y = images()
    text = only(diagnose(model, (255 * x).to(torch.uint8), y), "image-type", "error")
    assert text == "images are a float32 tensor [n, ...], got uint8 [32, 3, 8, 8]. Divide the pixels by 255."
    assert "autocast" in only(diagnose(model, x.half(), y), "image-type", "error")
    assert "autocast" in only(diagnose(model, x.bfloat16(), y), "image-type", "error")
    assert "got ndarray" in only(diagnose(model, x.numpy(), y), "image-type", "error")  # type: ignore[arg-type]
    assert diagnose(copy.deepcopy(model).double(), x.double(), y) == ()


def test_images_with_nan_are_named_by_id(model: nn.Module) -> None:
    x, y = images()
    x[3, 0, 2, 2], x[5, 1, 0, 0] = float("nan"), float("inf")
    text = only(diagnose(model, x, y, ids=torch.arange(100, 100 + N)), "image-range", "error")
    assert text == "2 of 32 images hold NaN or infinity: sample ids 103, 105."


def test_no_images_are_an_error(model: nn.Module) -> None:
    x, y = images()
    assert "there are no images" in only(diagnose(model, x[:0], y[:0]), "empty", "error")


# --- labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y.int(), r"int64 \[32\] for these images, got int32 \[32\]. Convert"),
        (lambda y: y.float(), r"got float32 \[32\]"),
        (lambda y: F.one_hot(y), r"got int64 \[32, 4\]. For one-hot labels take y.argmax\(1\)"),
        (lambda y: y[:, None], r"got int64 \[32, 1\]. Flatten them"),
        (lambda y: y[:30], "There are 32 images and 30 labels"),
        (lambda y: y.tolist(), "got list"),
    ],
)
def test_labels_of_another_type(model: nn.Module, change: Callable[[Tensor], Tensor], message: str) -> None:
    x, y = images()
    with pytest.raises(UsageError, match=message):
        raise UsageError(only(diagnose(model, x, change(y)), "label-type", "error"))


def test_labels_out_of_range(model: nn.Module) -> None:
    x, y = images()
    text = only(diagnose(model, x, y + 1), "label-range", "error")
    assert "labels are in 0..3 for a model with 4 outputs, got values from 1 to 4" in text
    assert "sample ids 3, 7, 11, 15, 19 and 3 more)" in text and "count from 1: subtract 1" in text
    y[1] = -1
    text = only(diagnose(model, x, y), "label-range", "error")
    assert "(sample ids 1)" in text and "Leave out images without a label" in text
    y[1] = 10
    assert "Does the model belong to this data set?" in only(diagnose(model, x, y), "label-range", "error")


def test_other_devices_are_named(model: nn.Module) -> None:
    x, y = images()
    found = diagnose(copy.deepcopy(model).to("meta"), x, y)
    assert only(found, "device", "error") == "the model is on meta and the images on cpu. Move one: x.to('meta')."
    text = only(diagnose(model, x, y.to("meta")), "device", "error")
    assert "images are on cpu and labels on meta" in text
    spread = First(model, nn.Linear(1, 1, device="meta")).eval()
    assert diagnose(spread, x, y) == (), "a model may be spread over devices"


# --- modes and layers


def test_train_mode_is_reported_where_it_matters(model: nn.Module) -> None:
    text = only(diagnose(model.train(), *images()), "train-mode", "warning")
    assert text.startswith("1 layers of batch norm or dropout are in training mode (first bn)")
    assert model.training and model.bn.training
    drop = nn.Sequential(nn.Dropout(0.5), Brightest().eval())
    assert "(first 0)" in only(diagnose(drop, *images()), "train-mode", "warning")
    harmless = nn.Sequential(nn.Dropout(0.0), nn.InstanceNorm2d(3), nn.ReLU(), Brightest().eval())
    harmless.train(), harmless[3].eval()
    assert diagnose(harmless, *images()) == ()


def test_two_normalisations_are_seen_in_every_form(model: nn.Module) -> None:
    halves = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    hooked = nn.Sequential(Normalize(*IMAGENET), copy.deepcopy(model))
    set_normalization(hooked[1], *IMAGENET)
    layered = nn.Sequential(Normalize(*halves), Normalize(*halves), copy.deepcopy(model))
    outer = nn.Sequential(copy.deepcopy(model))
    set_normalization(outer, *halves)
    set_normalization(outer[0], *halves)
    for twice in (hooked, layered, outer):
        text = only(diagnose(twice.eval(), *images()), "normalises-twice", "warning")
        assert "its second normalisation gets values down to -" in text
        assert "the first layer gets values of mean -" in text


def test_two_normalisations_are_seen_by_the_range_alone() -> None:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    once = nn.Sequential(Apply(lambda x: (x - mean) / std), Brightest()).eval()
    twice = nn.Sequential(Apply(lambda x: ((x - mean) / std - mean) / std), Brightest()).eval()
    assert diagnose(once, *images()) == ()
    text = only(diagnose(twice, *images()), "normalises-twice", "warning")
    assert "the first layer gets values of mean" in text and "second normalisation" not in text


def test_one_normalisation_a_member_of_an_ensemble_is_no_double_one(model: nn.Module) -> None:
    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(nn.Sequential(Normalize(*IMAGENET), copy.deepcopy(model)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return sum(member(x) for member in self.members)

    assert diagnose(Ensemble().eval(), *images()) == ()


def test_other_layers_with_constants_are_no_double_normalisation(model: nn.Module) -> None:
    plain = nn.Sequential(Normalize((0.0,), (1.0,)), Normalize(*IMAGENET), model)
    assert diagnose(plain.eval(), *images()) == ()
    later = nn.Sequential(Normalize(*IMAGENET), nn.Conv2d(3, 3, 1), Normalize(*IMAGENET), model).eval()
    assert "normalises-twice" not in names(diagnose(later, *images()))
    narrow = nn.Sequential(Normalize((0.5,) * 3, (0.05,) * 3), model)  # of a data set without contrast
    x, y = images()
    assert "normalises-twice" not in names(diagnose(narrow.eval(), 0.5 + (x - 0.5) / 10, y))


# --- outputs


def test_probabilities_and_their_logarithms_are_named(model: nn.Module) -> None:
    text = only(diagnose(nn.Sequential(model, nn.Softmax(1)).eval(), *images()), "probabilities", "warning")
    assert "all 32 rows lie in [0, 1] and sum to 1" in text and "here in 0 % of the rows" in text
    sharp = nn.Sequential(model, Apply(lambda z: (100 * z).softmax(1))).eval()
    assert "here in 100 % of the rows" in only(diagnose(sharp, *images()), "probabilities", "warning")
    text = only(diagnose(nn.Sequential(model, nn.LogSoftmax(1)).eval(), *images()), "log-probabilities", "warning")
    assert "so verdicts hold" in text
    assert diagnose(nn.Sequential(model, nn.Sigmoid()).eval(), *images()) == ()


def test_a_model_that_draws_random_numbers_wants_the_rand_version(model: nn.Module) -> None:
    text = only(
        diagnose(nn.Sequential(Apply(lambda x: x + 0.1 * torch.rand_like(x)), model).eval(), *images()),
        "stochastic",
        "warning",
    )
    assert "two passes over the same 32 images differ by up to" in text and "AutoAttack(version='rand')" in text


def test_images_that_see_their_neighbours_are_noticed() -> None:
    model = Brightest().train()
    text = only(diagnose(lambda x: model(x), *images()), "batch-dependent", "warning")
    assert "when the others are left out of the batch" in text
    untracked = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), Brightest()).eval()
    assert names(diagnose(untracked, *images())) == ["batch-dependent"]


def test_a_model_that_optimises_at_test_time_is_noticed(model: nn.Module) -> None:
    def purify(x: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            for _ in range(3):
                (grad,) = torch.autograd.grad((leaf**2).sum(), leaf)
                leaf = (leaf - 1e-3 * grad).detach().requires_grad_()
        return x + (leaf - x).detach()

    text = only(diagnose(lambda x: model(purify(x)), *images()), "test-time-gradients", "warning")
    assert "(3 calls of autograd in one pass)" in text

    class Entropy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Brightest()

        def forward(self, x: Tensor) -> Tensor:
            self.inner(x.detach()).mean().backward()
            return self.inner(x)

    text = only(diagnose(Entropy().eval(), *images()), "test-time-gradients", "error")
    assert "while its parameters are frozen" in text


def test_errors_of_the_model_itself_pass_through(model: nn.Module) -> None:
    x, y = images()
    with pytest.raises(RuntimeError, match="expected input"):
        diagnose(model, x[:, :1], y)


def test_logits_that_are_not_finite_are_named_by_id(model: nn.Module) -> None:
    def broken(x: Tensor) -> Tensor:
        logits = model(x)
        bad = torch.zeros_like(logits)
        bad[2::4] = float("nan")
        bad[3, 0] = float("inf")
        return logits + bad

    x, y = images()
    text = only(diagnose(broken, x, y, ids=torch.arange(50, 50 + N)), "logits", "error")
    assert "the logits of 9 of 32 images hold NaN or infinity: sample ids 52, 53, 56, 60, 64 and 4 more." in text


def test_outputs_that_are_no_logits(model: nn.Module) -> None:
    x, y = images()
    assert "returns logits [n, classes]" in only(diagnose(lambda x: (model(x),), x, y), "output", "error")  # type: ignore[arg-type, return-value]
    assert "float32 [32]" in only(diagnose(lambda x: model(x)[:, 0], x, y), "output", "error")
    text = only(diagnose(lambda x: model(x)[:, :1], x, y % 2), "output", "error")
    assert "the model has one output" in text and "torch.cat([-model(x), model(x)], 1) / 2" in text


def test_logits_without_gradient_are_an_error_where_it_is_needed(model: nn.Module) -> None:
    x, y = images()
    frozen = torch.no_grad()(model.forward)
    assert "no gradient with respect to the images" in only(diagnose(frozen, x, y), "no-gradient", "error")
    assert names(diagnose(lambda x: model(x.detach()), x, y)) == ["no-gradient"], "parameters have one, images not"
    assert names(diagnose(nn.Sequential(Apply(Tensor.detach), model).eval(), x, y)) == ["no-gradient"]
    assert diagnose(frozen, x, y, needs_grad=False) == ()


def test_one_class_a_dead_model_and_chance_are_warnings(model: nn.Module) -> None:
    x, y = images()
    same = torch.zeros_like(y)
    pick = x[y == 0].repeat(4, 1, 1, 1)
    assert "all 32 labels of the first batch are 0" in only(diagnose(model, pick, same), "one-class", "warning")
    dead = nn.Sequential(model, Apply(lambda z: 0 * z + torch.tensor([0.0, 2.0, 1.0, 0.0]))).eval()
    assert "predicts class 1 for all 32 images" in only(diagnose(dead, x, y), "constant-prediction", "warning")
    text = only(diagnose(model, x, (y + 1) % CLASSES), "chance", "warning")
    assert "0.0 % of the 32 images" in text and "chance is 25.0 % for 4 classes" in text


# --- what the caller does with them


def test_errors_are_raised_together_and_warnings_are_not() -> None:
    warning = Finding("chance", "warning", "a warning.")
    require_sound(())
    require_sound((warning,))
    with pytest.raises(UsageError, match=r"^first\. second\.$"):
        require_sound((Finding("a", "error", "first."), warning, Finding("b", "error", "second.")))


def test_several_errors_come_together(model: nn.Module) -> None:
    x, y = images()
    assert names(diagnose(model, 255 * x, y.int())) == ["image-range", "label-type"]


def test_a_profiler_is_left_in_place() -> None:
    import cProfile

    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval(), torch.rand(20, 1, 4, 4)
    profiler = cProfile.Profile()
    profiler.enable()
    diagnose(model, x, torch.arange(20) % 3)
    profiler.disable()
    assert any("diagnose" in str(entry.code) for entry in profiler.getstats())
