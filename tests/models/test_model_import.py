"""import_weights and import_by_position: every name is placed, dropped for a reason, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.models import (
    ImportReport,
    create_model,
    get_normalization,
    head_names,
    import_by_position,
    import_weights,
    load_state,
)

State = dict[str, Any]
NARROW = {"channels": (4, 4, 8, 8)}  # all 53 convolutions of a ResNet-50, few weights


def network(name: str = "resnet50", seed: int = 0, num_classes: int = 6, **arguments: Any) -> nn.Module:
    return create_model(name, num_classes=num_classes, seed=seed, **(NARROW if name == "resnet50" else {}), **arguments)


def robustness_layout(state: State) -> State:
    """What robustness and the robust ImageNet models store: a wrapper with an attacker's copy of every weight."""
    wrapped = {f"module.model.{name}": value for name, value in state.items()}
    for part in ("normalizer", "attacker.normalize"):
        wrapped[f"module.{part}.new_mean"] = torch.zeros(3, 1, 1)
        wrapped[f"module.{part}.new_std"] = torch.ones(3, 1, 1)
    wrapped |= {f"module.attacker.model.{name}": value + 1 for name, value in state.items()}
    return {"model": wrapped, "optimizer": {"state": {0: torch.ones(2)}}, "epoch": 90, "schedule": None}


def equal(model: nn.Module, state: State) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.acceptance("double-win", "A-39")
@pytest.mark.parametrize("container", ["model", "state_dict"])
def test_the_robustness_layout_fills_every_convolution(container: str, tmp_path: Path) -> None:
    source, model = network(seed=1).state_dict(), network(seed=2)
    stored = robustness_layout(source)
    stored[container] = stored.pop("model")
    torch.save(stored, tmp_path / "resnet50_linf_eps4.0.ckpt")
    report = import_weights(model, load_state(tmp_path / "resnet50_linf_eps4.0.ckpt"))
    convolutions = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 53
    assert {f"{name}.weight" for name in convolutions} <= set(report.matched)
    assert set(report.matched) == set(source)
    assert equal(model, source)
    assert len(report.ignored) == len(source)
    assert all("attacker.model" in name for name in report.ignored)
    assert report.normalization == get_normalization(model) == ((0.0,) * 3, (1.0,) * 3)
    assert (report.missing, report.mismatched, report.masks) == ((), (), None)


WRAPPED: dict[str, Callable[[State], State]] = {
    "plain": lambda s: s,
    "DataParallel": lambda s: {f"module.{n}": v for n, v in s.items()},
    "compiled": lambda s: {f"_orig_mod.{n}": v for n, v in s.items()},
    "compiled DDP": lambda s: {f"_orig_mod.module.{n}": v for n, v in s.items()},
    "Lightning": lambda s: {"state_dict": {f"model.{n}": v for n, v in s.items()}, "epoch": 3, "best": torch.ones(1)},
    "backbone": lambda s: {f"module.backbone.{n}": v for n, v in s.items()},
    "nested": lambda s: {"model": {"state_dict": s}},
    "half precision": lambda s: {n: v.half() if v.is_floating_point() else v for n, v in s.items()},
    "old batch norm": lambda s: {n: v for n, v in s.items() if not n.endswith("num_batches_tracked")},
    "with options": lambda s: s | {"epoch": 3, "note": "hello"},
}


@pytest.mark.acceptance("double-win", "A-39")
@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_usual_layouts(wrap: Callable[[State], State]) -> None:
    source, model = network("test_resnet", seed=1).half().float(), network("test_resnet", seed=2)
    for name, value in model.state_dict().items():
        value.fill_(7) if name.endswith("num_batches_tracked") else None
    report = import_weights(model, wrap(source.state_dict()))
    assert equal(model, source.state_dict())
    assert len(report.matched) + len(report.missing) == len(source.state_dict())
    assert all(name.endswith("num_batches_tracked") for name in report.missing)


def test_a_model_whose_own_names_begin_like_a_prefix() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Linear(2, 2)

    source, model = Wrapper(), Wrapper()
    for prefix in ("", "module."):
        nn.init.zeros_(model.model.weight)
        import_weights(model, {prefix + name: value for name, value in source.state_dict().items()})
        assert equal(model, source.state_dict())


def refusal(model: nn.Module, state: State, **options: bool) -> str:
    """The message of the error, after checking that nothing was loaded."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as error:
        import_weights(model, state, source="weights.pth", **options)
    assert equal(model, before)
    return str(error.value)


@pytest.mark.acceptance("double-win", "A-39")
def test_a_file_of_another_architecture_names_the_first_keys() -> None:
    message = refusal(network("test_resnet"), network("test_efficientnet").state_dict())
    assert message.startswith("weights.pth does not fit test_resnet: 1 of its 92 tensors match")
    assert "missing" in message and "conv1.0.weight" in message
    assert "unknown to the model" in message and "conv_stem.weight" in message
    assert 'The file fits create_model("test_efficientnet", num_classes=6)' in message
    deeper = refusal(network("resnet18"), network("resnet34").state_dict())
    assert "layer1.2.conv1.weight" in deeper and "0 of its" not in deeper


@pytest.mark.acceptance("double-win", "A-39")
@pytest.mark.parametrize("drop", ["conv1.0.weight", "fc.bias", "bn1.running_mean"])
def test_one_absent_or_additional_name_is_enough(drop: str) -> None:
    state = network("test_resnet").state_dict()
    value = state.pop(drop)
    assert f"missing 1 ({drop})" in refusal(network("test_resnet"), state)
    assert "unknown to the model 1 (stranger)" in refusal(
        network("test_resnet"), state | {drop: value, "stranger": torch.ones(1)}
    )


def test_a_head_of_another_size_needs_permission() -> None:
    state, model = network("test_resnet", seed=1, num_classes=9).state_dict(), network("test_resnet", seed=2)
    head = model.fc.weight.detach().clone()
    message = refusal(model, state)
    assert "fc.weight [9, " in message and "instead of [6, " in message and "allow_head_mismatch=True" in message
    report = import_weights(model, state, allow_head_mismatch=True)
    assert report.mismatched == ("fc.weight", "fc.bias") == head_names(model)
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.conv1[0].weight, state["conv1.0.weight"])


@pytest.mark.parametrize("left", [(), ("fc.bias",)])
def test_a_head_is_taken_whole_or_not_at_all(left: tuple[str, ...]) -> None:
    model = network("test_resnet", seed=2)
    own = {name: model.state_dict()[name].clone() for name in ("fc.weight", "fc.bias")}
    state = {n: v for n, v in network("test_resnet", seed=1).state_dict().items() if n not in own or n in left}
    report = import_weights(model, state, allow_head_mismatch=True)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())
    assert set(report.missing) | set(report.mismatched) == set(own)


def test_permission_for_the_head_permits_nothing_else() -> None:
    state = network("test_resnet").state_dict()
    state["conv1.0.weight"] = torch.ones(1)
    message = refusal(network("test_resnet"), state, allow_head_mismatch=True)
    assert "conv1.0.weight [1] instead of [" in message
    assert refusal(network("test_resnet", in_chans=1), network("test_resnet").state_dict(), allow_head_mismatch=True)


def test_another_stem_is_explained() -> None:
    small, default = network(stem="small"), network()
    assert "check in_chans and stem" in refusal(small, default.state_dict())
    report = import_weights(small, default.state_dict(), allow_stem_mismatch=True)
    assert report.mismatched == ("conv1.weight",)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    state = copy.deepcopy(network("test_resnet").state_dict())
    state["fc.weight"][0, 0] = value
    assert "NaN or infinity in fc.weight" in refusal(network("test_resnet"), state)


def test_integers_for_weights_are_refused() -> None:
    state = network("test_resnet").state_dict()
    state["fc.bias"] = state["fc.bias"].long()
    assert "of another shape or kind 1 (fc.bias" in refusal(network("test_resnet"), state)


def test_doubled_and_empty_files_are_refused() -> None:
    state = network("test_resnet").state_dict()
    assert "holds fc.bias twice" in refusal(network("test_resnet"), state | {"module.fc.bias": state["fc.bias"]})
    assert "holds no weights: no tensor under 2 (epoch, note)" in refusal(
        network("test_resnet"), {"epoch": 3, "note": "x"}
    )


def test_a_dictionary_that_holds_itself_ends() -> None:
    state: State = {}
    state["model"] = state
    assert "holds no weights" in refusal(network("test_resnet"), state)


def test_the_report_reads_well() -> None:
    names = tuple("abcdefg")
    assert str(ImportReport(names, ignored=("x",))) == (
        "matched 7 (a, b, c, d, e, ...); ignored 1 (x); missing 0; mismatched 0"
    )


MODEL, SOURCE = network("test_vit", seed=1), network("test_vit", seed=2).state_dict()


@given(st.lists(st.sampled_from([*SOURCE]), max_size=3, unique=True), st.booleans(), st.booleans())
def test_all_or_nothing(dropped: list[str], reshape: bool, allow: bool) -> None:
    """Whatever is wrong with a file: either every weight but an allowed head comes from it, or none does."""
    before = copy.deepcopy(MODEL.state_dict())
    state = {n: v for n, v in SOURCE.items() if n not in dropped}
    if reshape:
        state |= {name: torch.zeros(3, 1, 7) for name in dropped}
    try:
        report = import_weights(MODEL, state, allow_head_mismatch=allow)
    except UsageError:
        assert equal(MODEL, before)
        assert set(dropped) - (set(head_names(MODEL)) if allow else set())
    else:
        assert set(dropped) <= (set(head_names(MODEL)) if allow else set())
        assert all(torch.equal(v, SOURCE[n]) for n, v in MODEL.state_dict().items() if n in report.matched)
        assert set(report.matched) >= set(SOURCE) - set(head_names(MODEL))
    finally:
        MODEL.load_state_dict(before)


def test_by_position_places_renamed_tensors() -> None:
    source, model = network("test_efficientnet", seed=1).state_dict(), network("test_efficientnet", seed=2)
    report = import_by_position(model, {f"layer{i}": value for i, value in enumerate(source.values())})
    assert equal(model, source)
    assert set(report.matched) == set(source)


def test_by_position_is_strict() -> None:
    model = network("test_efficientnet")
    state = {f"t{i}": value for i, value in enumerate(model.state_dict().values())}
    before = copy.deepcopy(model.state_dict())
    swapped = dict(zip(state, [*list(state.values())[1::-1], *list(state.values())[2:]], strict=True))
    shorter, longer = dict(list(state.items())[:-1]), state | {"more": torch.ones(1)}
    for wrong, says in ((swapped, "tensor 0 is t0"), (shorter, "is nothing"), (longer, "is more .* and nothing")):
        with pytest.raises(UsageError, match=f"does not fit by position: .*{says}"):
            import_by_position(model, wrong)
        assert equal(model, before)


def test_a_file_in_the_same_order_is_pointed_to_the_positional_importer() -> None:
    model = network("test_efficientnet")
    renamed = {f"t{i}": value for i, value in enumerate(model.state_dict().values())}
    assert "import_by_position" in refusal(model, renamed)
