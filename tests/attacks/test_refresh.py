"""A replica brought up to date: the arithmetic of folding, bit for bit, and one launch for all layers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from sparse_robust.attacks import refresh as refresh_module
from sparse_robust.attacks.folding import Pair, fold_away
from sparse_robust.attacks.refresh import Refresh, named_tensors
from sparse_robust.attacks.replica import make_replica
from sparse_robust.models import create_model
from tests.attacks.test_replica import Plain, images, randomize
from tests.kernels.harness import interpret


def folded_by_hand(layer: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What the textbook says, one layer at a time."""
    assert norm.running_mean is not None and norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps) * norm.weight
    bias = torch.zeros(len(scale)) if layer.bias is None else layer.bias
    weight = layer.weight * scale.view(-1, 1, 1, 1)
    return weight.detach(), ((bias - norm.running_mean) * scale + norm.bias).detach()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "last"])
def test_weights_are_those_folded_by_hand_bit_for_bit(precision: str, channels_last: bool) -> None:
    model, x = randomize(Plain()), images(8, 10)
    replica = make_replica(model, x, precision=precision, channels_last=channels_last)
    assert len(replica.folded) == 2 and replica.module is not None
    randomize(model, seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    replica.refresh()
    copied = dict(named_tensors(replica.module))
    for pair in replica.folded:
        expected = folded_by_hand(model.get_submodule(pair.layer), model.get_submodule(pair.norm))  # type: ignore[arg-type]
        for kind, tensor in zip(("weight", "bias"), expected, strict=True):
            target = copied[f"{pair.layer}.{kind}"]
            assert torch.equal(target, tensor.to(target.dtype)), (pair, kind)
    assert torch.equal(copied["head.weight"], model.head.weight.to(copied["head.weight"].dtype))


def test_norms_that_stay_are_copied_with_their_counters() -> None:
    model, x = randomize(Plain()), images(8, 10)
    replica = make_replica(model, x, fold=False)
    model.norm1.num_batches_tracked += 7
    randomize(model, seed=3)
    replica.refresh()
    assert replica.module is not None
    original = dict(named_tensors(model))
    assert all(torch.equal(tensor, original[name]) for name, tensor in named_tensors(replica.module))


def test_norms_of_another_precision_than_their_layer() -> None:
    model = randomize(Plain())
    model.conv1.bfloat16()
    module = randomize(Plain()).requires_grad_(False)
    module.conv1.bfloat16()
    pairs = (Pair("conv1", "norm1"),)
    fold_away(module, pairs)
    Refresh(model, module, pairs)()
    weight, bias = folded_by_hand(model.conv1, model.norm1)
    assert weight.dtype == torch.float32 and torch.equal(module.conv1.weight, weight)
    assert module.conv1.bias is not None and torch.equal(module.conv1.bias, bias)


def test_tied_weights_are_written_once() -> None:
    class Tied(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(8, 5)
            self.other.weight = self.head.weight

    model = randomize(Tied())
    module = Tied().requires_grad_(False)
    refresh = Refresh(model, module, ())
    addresses = [tensor.data_ptr() for tensor in refresh._targets]
    assert len(addresses) == len(set(addresses))
    refresh()
    assert torch.equal(module.other.weight, model.head.weight) and module.other.weight is module.head.weight


@interpret
def test_the_kernel_refreshes_to_the_bits_of_the_reference_in_one_launch_a_pair_of_types() -> None:
    from sparse_robust_kernels.masks import masked_copy
    from sparse_robust_kernels.masks import triton as kernels

    launches = []
    launch = kernels._copy

    def counted(*args: object) -> None:
        launches.append(len(args[0]))  # type: ignore[arg-type]
        launch(*args)

    x = images(2)
    for precision, pairs_of_types in (("fp32", 1), ("bf16", 2)):  # weights and biases to bf16; mean and deviation fp32
        model = randomize(create_model("resnet10t", channels=(8, 8, 16, 16), stem_width=8))
        replicas = [make_replica(model, x, precision=precision) for _ in range(2)]
        model.to(memory_format=torch.channels_last)
        randomize(model, seed=3)
        replicas[0].refresh()
        launches.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_copy", counted)
            patch.setattr(refresh_module, "masked_copy", partial(masked_copy, backend="triton"))
            replicas[1].refresh()
        found, expected = (dict(named_tensors(replica.module)) for replica in replicas if replica.module is not None)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert len(launches) == pairs_of_types and sum(launches) == len(replicas[1]._refresh._targets)  # type: ignore[union-attr]
