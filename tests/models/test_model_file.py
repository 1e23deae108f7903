"""Model files: exact round trips, and a named error for everything that is not one."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import sha256_state
from sparse_robust.models import (
    create_model,
    get_normalization,
    load_model,
    load_state,
    read_model_file,
    replace_head,
    save_model,
)


def tiny(**arguments: Any) -> nn.Module:
    return create_model("test_resnet", num_classes=4, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), **arguments).eval()


def test_a_file_says_what_is_in_it(tmp_path: Path) -> None:
    model, path = tiny(), tmp_path / "model.safetensors"
    save_model(model, path, extra={"epoch": 3, "why": ["ünïcode", None]})
    described = read_model_file(path)
    assert described.spec == model.spec
    assert (described.mean, described.std) == get_normalization(model)
    assert described.extra == {"epoch": 3, "why": ["ünïcode", None]}
    assert described.sha256 == sha256_state(model.state_dict()) == sha256_state(load_file(path))
    assert list(tmp_path.iterdir()) == [path]


def test_equal_models_are_equal_files_that_all_may_read(tmp_path: Path) -> None:
    """Its texts would come in another order every time, and its mode would be for its owner alone."""
    for number in range(8):
        save_model(tiny(), tmp_path / str(number), extra={"epoch": 3})
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}
    assert load_model(tmp_path / "0").spec.name == "test_resnet"


def test_a_model_without_normalisation(tmp_path: Path) -> None:
    from sparse_robust.models import ModelSpec, build_model

    save_model(build_model(ModelSpec("test_vit", num_classes=3)), tmp_path / "model.safetensors")
    assert get_normalization(load_model(tmp_path / "model.safetensors")) is None


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=["half", "bf16", "double"])
def test_precision_is_kept(cast: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    model = cast(tiny())
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).float()  # mixed, as training leaves it
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors").state_dict()
    for name, value in model.state_dict().items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)


def test_wrapped_and_channels_last_models_are_saved_under_plain_names(tmp_path: Path) -> None:
    model = tiny().to(memory_format=torch.channels_last)
    save_model(torch.compile(model, backend="eager"), tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(torch.equal(loaded.state_dict()[n], v) for n, v in model.state_dict().items())


def test_a_new_head_is_in_the_file(tmp_path: Path) -> None:
    model = replace_head(tiny(), 11)
    save_model(model, tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").spec.num_classes == 11


def test_what_json_cannot_hold_is_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="extra must be made of JSON values"):
        save_model(tiny(), tmp_path / "model.safetensors", extra={"x": object()})
    with pytest.raises(UsageError, match="carries no ModelSpec"):
        save_model(nn.Linear(2, 2), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def rewrite(path: Path, **changes: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    save_file(load_file(path), path, metadata | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": "pt"}, "was not written by save_model: load it with create_model"),
        ({"version": "99"}, "has version 99, this package reads 1"),
        ({"spec": "{}"}, "damaged description"),
        ({"spec": "[1]"}, "damaged description"),
        ({"mean": "3"}, "damaged description"),
        ({"sha256": "0" * 64}, "its weights differ from the digest"),
        ({"spec": '{"name": "resnet_of_mars", "num_classes": 4}'}, "cannot be built here: unknown model"),
        ({"spec": '{"name": "test_vit", "num_classes": 4}'}, "its weights are not those of the test_vit"),
    ],
)
def test_descriptions_that_do_not_hold_are_refused(changes: dict[str, str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(tiny(), path)
    rewrite(path, **changes)
    with pytest.raises(FileError, match=says) as error:
        load_model(path)
    assert str(path) in str(error.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    for reader in (load_model, load_state, read_model_file):
        with pytest.raises(FileError, match="does not exist or is no file"):
            reader(tmp_path)
        with pytest.raises(FileError, match="nothing.pth does not exist"):
            reader(tmp_path / "nothing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(FileError, match="holds a list, expected a dictionary"):
        load_state(tmp_path / "list.pth")
    with pytest.raises(FileError, match="no readable safetensors file"):
        load_model(tmp_path / "list.pth")


def test_the_content_tells_the_kind_not_the_name(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "weights.pth")
    torch.save(state, tmp_path / "weights.safetensors")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("weights.pth", "weights.safetensors", "old.pt"):
        assert torch.equal(load_state(tmp_path / name)["a"], state["a"])


def test_options_of_training_programs_are_read(tmp_path: Path) -> None:
    torch.save(
        {"state_dict": {"a": torch.ones(1)}, "args": argparse.Namespace(lr=0.1)}, tmp_path / "checkpoint.pth.tar"
    )
    assert load_state(tmp_path / "checkpoint.pth.tar")["args"].lr == 0.1


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.acceptance("double-win", "A-39")
@pytest.mark.parametrize("protocol", [2, 5, "torch", "old torch"])
def test_code_in_a_file_is_not_run(protocol: int | str, tmp_path: Path) -> None:
    content, path = {"state_dict": {"a": torch.ones(1)}, "x": Payload(tmp_path / "mark")}, tmp_path / "evil.pth"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps(content, protocol))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=protocol == "torch")
    with pytest.raises(FileError, match=r"evil.pth cannot be read without running the code in it.*trust_pickle=True"):
        load_state(path)
    if not isinstance(protocol, int):
        with pytest.raises(FileError, match=r"\(it asks for (posix|nt).mkdir\)"):
            load_state(path)
    with pytest.raises(FileError, match="trust_pickle"):
        create_model("test_resnet", checkpoint=path)
    assert not (tmp_path / "mark").exists()
    if not isinstance(protocol, int):
        assert torch.equal(load_state(path, trust_pickle=True)["state_dict"]["a"], torch.ones(1))
        assert (tmp_path / "mark").exists()


def test_a_whole_pickled_module_needs_trust(tmp_path: Path) -> None:
    model = tiny()
    torch.save(model, tmp_path / "module.pth")
    with pytest.raises(FileError, match="trust_pickle"):
        load_state(tmp_path / "module.pth")
    assert set(load_state(tmp_path / "module.pth", trust_pickle=True)) == set(model.state_dict())


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good file of each kind."""
    folder, model = tmp_path_factory.mktemp("good"), create_model("test_resnet", num_classes=4)
    save_model(model, folder / "safetensors")
    torch.save(model.state_dict(), folder / "zip")
    torch.save({"state_dict": {"a": torch.arange(9.0)}}, folder / "old", _use_new_zipfile_serialization=False)
    return folder


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["safetensors", "zip", "old"]))
def test_damaged_files_give_a_named_error(data: st.DataObject, kind: str, good: Path, tmp_path: Path) -> None:
    content, path = bytearray((good / kind).read_bytes()), tmp_path / f"{kind}.pth"
    head = min(len(content) - 1, 3000)  # headers and pickles are at the front, and the archive's directory at the end
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.one_of(st.integers(0, head), st.integers(len(content) - head, len(content) - 1)))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))])
    for reader in (load_state, read_model_file, load_model):
        try:
            reader(path)
        except FileError as error:
            assert str(path) in str(error)


def test_any_flipped_weight_is_noticed(good: Path, tmp_path: Path) -> None:
    content, path = bytearray((good / "safetensors").read_bytes()), tmp_path / "flipped.safetensors"
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"flipped.safetensors is damaged: its weights differ from the digest"):
        load_model(path)
