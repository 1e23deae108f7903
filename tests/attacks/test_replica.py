"""The copy that attacks run on: the same function with batch norms folded away, and nothing done to the original."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_robust.attacks import replica as replica_module
from sparse_robust.attacks.folding import Pair
from sparse_robust.attacks.refresh import named_tensors
from sparse_robust.attacks.replica import Replica, make_replica
from sparse_robust.errors import UsageError
from sparse_robust.models import create_model
from sparse_robust.models.normalization import set_normalization

THIN = {"channels": (8, 16, 24, 32), "stem_width": 8, "stem": "small"}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # with the number of batch norms that can be folded
    "resnet18": (lambda: create_model("resnet18", **THIN), 21),
    "resnet10t": (lambda: create_model("resnet10t"), 14),
    "mobilenetv3": (lambda: create_model("mobilenetv3_small_050"), 34),
    "efficientnet_lite0": (lambda: create_model("efficientnet_lite0"), 49),
    "tf_padding": (lambda: create_model("tf_efficientnet_lite0"), 49),
    "pre-activation": (lambda: create_model("resnetv2_18", channels=(8, 16, 24, 32), stem_chs=8), 8),
    "vit": (lambda: create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2), 0),
}


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and weights of batch norms that are not those of a fresh network."""
    generator = torch.Generator().manual_seed(seed)
    for part in model.modules():
        if isinstance(part, _BatchNorm) and part.running_mean is not None and part.running_var is not None:
            part.running_mean.normal_(0, 0.2, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
            if part.affine:
                part.weight.data.uniform_(0.5, 1.5, generator=generator)
                part.bias.data.normal_(0, 0.2, generator=generator)
    return model


def images(n: int = 4, size: int = 32) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def answer(model: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_(True)
    logits = model(leaf)
    (grad,) = torch.autograd.grad(logits.logsumexp(1).sum(), leaf)
    return logits.detach(), grad


def assert_same_function(model: nn.Module, replica: Replica, x: Tensor, tolerance: float = 1e-4) -> None:
    """Logits and input gradients agree, relative to their spread."""
    for got, expected in zip(answer(replica, x), answer(copy.deepcopy(model).eval(), x), strict=True):
        spread = expected.max() - expected.min()
        assert spread > 0 and (got - expected).abs().max() <= tolerance * spread


def count_norms(module: nn.Module) -> int:
    return sum(isinstance(part, _BatchNorm) for part in module.modules())


class Plain(nn.Module):
    """Convolutions of several kinds with batch norms, as a base for networks that are odd in one way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


FIRST, SECOND = Pair("conv1", "norm1"), Pair("conv2", "norm2")


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_every_batch_norm_folded(name: str) -> None:
    build, folded = NETWORKS[name]
    model, x = randomize(build()), images(size=64 if "lite0" in name or name == "tf_padding" else 32)
    replica = make_replica(model, x)
    assert replica.module is not None and replica.reason is None
    assert len(replica.folded) == folded == count_norms(model) - count_norms(replica.module)
    assert_same_function(model, replica, x)
    assert_same_function(model, replica, images(3, x.shape[2]).flip(0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_original_is_left_as_it_is(precision: str) -> None:
    model, x = randomize(NETWORKS["resnet18"][0]()).train(), images()
    model.layer1.eval()
    model.layer2[0].conv1.weight.requires_grad_(False)
    F.cross_entropy(copy.deepcopy(model)(x), torch.arange(4)).backward()
    model.head_gradient = None
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None

    def describe() -> dict[str, Any]:
        parts = {name: (part.training, len(part._forward_hooks), type(part)) for name, part in model.named_modules()}
        tensors = {
            name: (id(tensor), tensor.requires_grad, tensor.stride(), tensor.dtype, tensor._version)
            for name, tensor in named_tensors(model)
        }
        return {"parts": parts, "tensors": tensors}

    before, values = describe(), {name: tensor.clone() for name, tensor in named_tensors(model)}
    replica = make_replica(model, x, precision=precision)
    assert replica.module is not None
    answer(replica, x)
    replica.refresh()
    assert describe() == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in named_tensors(model))
    assert all(p.grad is None or bool((p.grad == 1).all()) for p in model.parameters())
    assert not any(part.training for part in replica.module.modules())
    assert all(not p.requires_grad and p.grad is None for p in replica.module.parameters())
    own = {tensor.data_ptr() for _, tensor in named_tensors(replica.module)}
    assert not own & {tensor.data_ptr() for _, tensor in named_tensors(model)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zeros_in_weights_stay_zeros(precision: str) -> None:
    model, x = randomize(NETWORKS["resnet18"][0]()), images()
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            masks[name] = torch.rand(parameter.shape) < 0.3
            parameter.data *= masks[name]
    replica = make_replica(model, x, precision=precision)
    assert replica.module is not None and len(replica.folded) == 21
    for _ in range(2):
        weights = dict(replica.module.named_parameters())
        assert all(torch.equal(weights[name] != 0, mask) for name, mask in masks.items())
        replica.refresh()


# ---- what may be folded


class UsedTwice(Plain):
    """The first convolution's output also goes elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        between = self.conv1(x)
        x = F.relu(self.norm1(between))
        return self.head((F.relu(self.norm2(self.conv2(x))) + between).mean((2, 3)))


class ChangedBetween(Plain):
    """The first convolution's output is changed in place before it is normalised."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x).abs_()))
        return self.head(F.relu(self.norm2(self.conv2(x))).mean((2, 3)))


class CalledTwice(Plain):
    """One convolution in two places."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.norm2(self.conv2(F.relu(self.conv2(x))))).mean((2, 3)))


class NormalizedTwice(Plain):
    """One batch norm in two places."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.head(F.relu(self.norm1(F.relu(self.norm2(self.conv2(x))))).mean((2, 3)))


class NormBefore(Plain):
    """A batch norm that follows no convolution, but an activation."""

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(self.norm1(F.relu(self.conv1(x))))))


class WeightUsedElsewhere(Plain):
    """The second convolution's weight also computes something else."""

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return F.conv2d(x, self.conv2.weight[:, :1].expand(-1, x.shape[1], -1, -1), padding=1)


class CalledBesides(Plain):
    """The second convolution is called a second time, past its hooks."""

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        return self.conv2.forward(x) + F.relu(self.norm2(self.conv2(x)))


class Keywords(Plain):
    """Layers called by keyword."""

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(input=self.conv2(input=F.relu(self.norm1(self.conv1(x))))))


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.flatten(1).std(1).view(-1, 1, 1, 1)
        return F.conv2d(x, weight, self.bias, padding=self.padding)


def standardized() -> nn.Module:
    model = Plain()
    model.conv1 = Standardized(3, 8, 3, padding=1)
    return model


def hooked(which: str) -> nn.Module:
    model = Plain()
    model.get_submodule(which).register_forward_hook(lambda module, args, output: output.abs())
    return model


def batch_statistics() -> nn.Module:
    model = Plain()
    model.norm1 = nn.BatchNorm2d(8, track_running_stats=False)
    return model


def parametrized() -> nn.Module:
    model = Plain()
    nn.utils.parametrizations.weight_norm(model.conv1)
    return model


@pytest.mark.parametrize(
    ("build", "folded"),
    [
        (Plain, (FIRST, SECOND)),
        (UsedTwice, (SECOND,)),
        (ChangedBetween, (SECOND,)),
        (CalledTwice, (FIRST,)),
        (NormalizedTwice, (SECOND,)),
        (NormBefore, (SECOND,)),
        (WeightUsedElsewhere, (FIRST,)),
        (CalledBesides, (FIRST,)),
        (Keywords, (FIRST, SECOND)),
        (standardized, (SECOND,)),
        (parametrized, (SECOND,)),
        (lambda: hooked("conv1"), (SECOND,)),
        (lambda: hooked("norm1"), (SECOND,)),
        (batch_statistics, (SECOND,)),
    ],
)
def test_only_what_alone_reads_a_layer_is_folded(build: Callable[[], nn.Module], folded: tuple[Pair, ...]) -> None:
    model, x = randomize(build()), images(8, 10)
    replica = make_replica(model, x)
    assert replica.folded == folded and replica.reason is None
    assert_same_function(model, replica, x)


def test_a_fold_that_the_example_cannot_show_wrong_is_not_made() -> None:
    model, x = randomize(UsedTwice()), images(8, 10)
    model.norm1.weight.data.zero_()  # as residual branches begin
    model.head.weight.data.zero_()  # all logits are equal
    replica = make_replica(model, x)
    assert replica.folded == (SECOND,) and replica.reason is None
    model.head.weight.data.normal_()
    randomize(model, seed=1)
    replica.refresh()
    assert_same_function(model, replica, x)


def test_a_wrong_fold_shows_where_batch_norms_do_nothing_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = NormBefore(), images(8, 10)
    wrong = (Pair("conv1", "norm2"),)  # a new batch norm is nearly the identity: the logits would be the model's
    monkeypatch.setattr(replica_module, "find_pairs", lambda module, example: wrong)
    replica = make_replica(model, x)
    assert replica.folded == () and replica.reason is not None and "other logits" in replica.reason


class Viewed(Plain):
    """Reads features in the order in which they usually lie in memory."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).view(len(x), -1).unflatten(1, (8, -1)).mean(2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_network_that_does_not_take_channels_last_is_copied_without(precision: str) -> None:
    model, x = randomize(Viewed()), images(8, 10)
    replica = make_replica(model, x, precision=precision)
    assert replica.module is not None and replica.folded == (FIRST, SECOND) and not replica.channels_last
    assert replica.reason is not None and "view size is not compatible" in replica.reason
    assert all(weight.is_contiguous() for weight in replica.module.parameters())
    assert_same_function(model, replica, x, 1e-4 if precision == "fp32" else 0.1)


class Flat(nn.Module):
    """Batch norms of vectors and sequences, without weights of their own in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm0 = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)
        self.mix, self.norm1 = nn.Linear(6, 6), nn.BatchNorm1d(6)  # of [n, 6, 6]: over the middle dimension
        self.fc, self.norm2 = nn.Linear(36, 16), nn.BatchNorm1d(16, affine=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.conv(x.flatten(2)[:, :, :8])))
        return self.head(F.relu(self.norm2(self.fc(self.norm1(self.mix(x)).flatten(1)))))


def test_linear_layers_and_other_dimensions() -> None:
    model, x = randomize(Flat()), images(8, 10)
    replica = make_replica(model, x)
    assert replica.folded == (Pair("conv", "norm0"), Pair("fc", "norm2"))
    assert_same_function(model, replica, x)


def test_a_norm_with_two_names_is_replaced_under_both() -> None:
    class Aliased(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(self.conv1, self.norm1)

    model, x = randomize(Aliased()), images(8, 10)
    replica = make_replica(model, x)
    assert len(replica.folded) == 2 and replica.module is not None
    assert_same_function(model, replica, x)
    assert count_norms(replica.module) == 0


def test_folding_can_be_left_out() -> None:
    model, x = randomize(Plain()), images(8, 10)
    replica = make_replica(model, x, fold=False)
    assert replica.folded == () and replica.reason is None and replica.module is not None
    assert count_norms(replica.module) == 2
    assert_same_function(model, replica, x)


def test_folding_is_given_up_where_the_logits_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomize(UsedTwice()), images(8, 10)
    monkeypatch.setattr(replica_module, "find_pairs", lambda module, example: (FIRST, SECOND))
    replica = make_replica(model, x)
    assert replica.folded == () and replica.module is not None
    assert replica.reason is not None and "folded batch norms gives other logits" in replica.reason
    assert_same_function(model, replica, x)


# ---- when there is no copy


class Locked(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Noisy(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Locked, "cannot pickle '_thread.lock' object"),
        (Noisy, "its copy gives other logits"),
        (None, "no torch module"),
    ],
)
def test_what_cannot_be_copied_serves_itself_and_the_reason_is_kept(
    build: Callable[[], nn.Module] | None, reason: str, precision: str
) -> None:
    inner = randomize(Plain()).eval()
    model = build().eval() if build else lambda x: inner(x)
    x = images(8, 10)
    replica = make_replica(model, x, precision=precision)
    assert replica.module is None and replica.folded == ()
    assert replica.reason is not None and reason in replica.reason
    replica.refresh()
    torch.manual_seed(0)
    logits = replica(x)
    torch.manual_seed(0)
    expected = model(x)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, expected) is (precision == "fp32")
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


# ---- precision and layout


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3", "vit"])
def test_bf16_is_near_and_answers_in_fp32(name: str) -> None:
    model, x = randomize(NETWORKS[name][0]()), images()
    replica = make_replica(model, x, precision="bf16")
    logits, grad = answer(replica, x)
    expected, expected_grad = answer(model.eval(), x)
    assert logits.dtype == grad.dtype == torch.float32 and replica.module is not None
    assert 0 < (logits - expected).abs().max() < 0.05 * (expected.max() - expected.min())
    assert F.cosine_similarity(grad.flatten(1), expected_grad.flatten(1)).min() > 0.95
    kinds = {
        type(part): part.weight.dtype for part in replica.module.modules() if isinstance(part, (nn.Conv2d, nn.Linear))
    }
    assert set(kinds.values()) == {torch.bfloat16}


@pytest.mark.parametrize("channels_last", [True, False])
def test_gradients_have_the_layout_of_the_images(channels_last: bool) -> None:
    model, x = randomize(Plain()), images(8, 10)
    replica = make_replica(model, x, channels_last=channels_last)
    assert replica.module is not None
    weight = replica.module.get_parameter("conv2.weight")
    assert weight.is_contiguous(memory_format=torch.channels_last) is channels_last
    _, grad = answer(replica, x)
    assert grad.is_contiguous()
    assert_same_function(model, replica, x)


def test_the_precision_is_one_of_those_known() -> None:
    with pytest.raises(UsageError, match="unknown precision 'fp16'.*bf16"):
        make_replica(Plain(), images(8, 10), precision="fp16")


def test_a_model_without_logits_is_named() -> None:
    with pytest.raises(UsageError, match="a model returns logits"):
        make_replica(nn.Conv2d(3, 4, 3), images(8, 10))


# ---- following the original


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_refresh_follows_the_original_in_place(precision: str) -> None:
    model, x = randomize(NETWORKS["mobilenetv3"][0]()).train(), images()
    replica = make_replica(model, x, precision=precision)
    assert replica.module is not None
    addresses = {name: tensor.data_ptr() for name, tensor in named_tensors(replica.module)}
    before = answer(replica, x)[0]
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape) * parameter.abs().mean()
    randomize(model, seed=5)
    set_normalization(model, (0.4, 0.5, 0.6), (0.3, 0.2, 0.1))
    assert torch.equal(answer(replica, x)[0], before)
    replica.refresh()
    assert {name: tensor.data_ptr() for name, tensor in named_tensors(replica.module)} == addresses
    assert_same_function(model, replica, x, tolerance=1e-4 if precision == "fp32" else 0.2)

    state = {name: tensor + 0 for name, tensor in randomize(model, seed=6).state_dict().items()}
    model.load_state_dict(state, assign=True)  # other tensors under the same names
    replica.refresh()
    assert torch.equal(replica(x), make_replica(model, x, precision=precision)(x))


@pytest.mark.parametrize("grad_mode", [torch.no_grad, torch.inference_mode])
def test_it_can_be_made_in_any_grad_mode(grad_mode: Callable[[], Any]) -> None:
    model, x = randomize(Plain()), images(8, 10)
    with grad_mode():
        replica = make_replica(model, x)
        replica.refresh()
    assert replica.reason is None and len(replica.folded) == 2
    assert_same_function(model, replica, x)


def test_wrappers_are_looked_into() -> None:
    model, x = randomize(Plain()), images(8, 10)
    replica = make_replica(nn.DataParallel(model), x)
    assert type(replica.module) is Plain and len(replica.folded) == 2
    model.head.bias.data += 1
    replica.refresh()
    assert_same_function(model, replica, x)
