"""Bad checkpoints of other programs, and bad model files of ours."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from sparse_robust.files import canonical_json, sha256_state
from sparse_robust.models import save_model, spec_of
from tests.bad_files.damage import (
    SENTINEL,
    Case,
    Evaluated,
    Payload,
    cut,
    flipped,
    safetensors,
    shuffled,
    strangers,
    tiny,
    torched,
)


def checkpoints(folder: Path) -> Iterator[Case]:
    state = tiny().state_dict()
    forms = {
        "archive": torched({"state_dict": state, "epoch": 3}),
        "old pickle": torched({"state_dict": state}, _use_new_zipfile_serialization=False),
        "safetensors": save({name: value.contiguous() for name, value in state.items()}),
    }
    for form, content in forms.items():
        for what, spoiled in [*cut(content, 10), *flipped(content, 12), *shuffled(content, 6)]:
            yield Case("checkpoint", f"{form}: {what}", spoiled, sound=None)
    for what, content in strangers().items():
        yield Case("checkpoint", what, content)
    for what, content in _payloads(state).items():
        yield Case("checkpoint", f"payload: {what}", content)
    for what, change in _wrong_tensors(state).items():
        yield Case("checkpoint", what, torched({**state, **change}))
    for what, content in {**_archives(state), **_headers()}.items():
        yield Case("checkpoint", what, content)
    endless: dict[str, Any] = {}
    endless["model"] = endless
    yield Case("checkpoint", "a dictionary in itself", torched(endless))
    deep: Any = state
    for _ in range(300):
        deep = {"model": deep}
    yield Case("checkpoint", "a deep dictionary", torched(deep))
    yield Case("checkpoint", "names that are no texts", torched({1: state["fc.bias"], None: state["fc.weight"]}))
    yield Case("checkpoint", "names that lead elsewhere", torched({f"../../{name}": v for name, v in state.items()}))


def _payloads(state: dict[str, Any]) -> dict[str, bytes]:
    found = {f"pickle protocol {p}": pickle.dumps({"state_dict": Payload()}, p) for p in range(6)}
    found["in the options of an archive"] = torched({"state_dict": state, "args": Payload()})
    found["in an old archive"] = torched({"state_dict": state, "x": Payload()}, _use_new_zipfile_serialization=False)
    found["eval in an archive"] = torched({"state_dict": state, "x": Evaluated()})
    found["as a name"] = pickle.dumps({Payload(): 1}, 2)
    found["a whole module"] = torched(tiny())
    found["os.system by hand"] = b"cposix\nsystem\n(Vmkdir " + SENTINEL.encode() + b"\ntR."
    code = f"__import__('os').mkdir('{SENTINEL}')".encode()
    found["exec by hand"] = b"\x80\x02cbuiltins\nexec\n(X" + struct.pack("<I", len(code)) + code + b"tR."
    return found


def _wrong_tensors(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    bias, weight = state["fc.bias"], state["fc.weight"]
    endless = torch.ones(1).expand(1 << 22, 1 << 22)
    norm = "layer1.0.bn1.running_var" if "layer1.0.bn1.running_var" in state else "bn1.running_var"
    found: dict[str, dict[str, Any]] = {
        f"weight of {dtype}": {"fc.weight": torch.zeros(weight.shape, dtype=dtype)}
        for dtype in (torch.int64, torch.uint8, torch.bool, torch.complex64)
    }
    found |= {
        "NaN": {"fc.bias": torch.full_like(bias, float("nan"))},
        "infinity": {"fc.weight": torch.full_like(weight, float("inf"))},
        "one NaN": {"conv1.0.weight": torch.where(torch.rand(state["conv1.0.weight"].shape) > 0.99, float("nan"), 0.0)},
        "minus infinity in a mask's weight": {"fc.weight_mask": torch.ones_like(weight), "fc.weight": -weight / 0},
        "an endless weight": {"fc.weight": endless},
        "an endless mask": {"fc.weight_orig": endless, "fc.weight_mask": endless},
        "endless scores": {"fc.popup_scores": torch.ones(1).expand(1 << 40)},
        "an endless normaliser": {
            "normalizer.new_mean": torch.ones(1).expand(1 << 40), "normalizer.new_std": torch.ones(1).expand(1 << 40)
        },
        "no numbers": {"fc.weight": torch.empty(0)},
        "too many dimensions": {"fc.weight": weight.view(*weight.shape, *(1,) * 40)},
        "a text for a weight": {"fc.weight": "weight"},
        "a sparse weight": {"fc.weight": weight.to_sparse()},
        "a weight without values": {"fc.weight": weight.to("meta")},
        "a quantized weight": {"fc.weight": torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)},
        "a mask of halves": {"fc.weight_mask": torch.full_like(weight, 0.5)},
        "a mask of another shape": {"fc.weight_mask": torch.ones(2)},
        "scores that are NaN": {"fc.popup_scores": torch.full_like(weight, float("nan"))},
        "a deviation of zero": {"normalizer.mean": torch.zeros(3), "normalizer.std": torch.zeros(3)},
        "half a normaliser": {"normalizer.mean": torch.zeros(3)},
        "another head": {"fc.weight": torch.zeros(77, weight.shape[1]), "fc.bias": torch.zeros(77)},
        "a stranger": {"stranger": torch.zeros(2)},
        "a name twice": {"module.fc.bias": bias},
        "statistics of another shape": {norm: torch.zeros(1)},
    }  # fmt: skip
    return found


def _archives(state: dict[str, Any]) -> dict[str, bytes]:
    """zip files that are not as torch writes them."""
    good = torched(state)

    def rebuilt(change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(stream, "w") as new:
            for entry in old.infolist():
                change(new, entry, old.read(entry))
        return stream.getvalue()

    def packed(new: zipfile.ZipFile, entry: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(entry.filename, data)

    def elsewhere(new: zipfile.ZipFile, entry: zipfile.ZipInfo, data: bytes) -> None:
        new.writestr(f"../../{entry.filename}", data)

    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    return {
        "zip bomb": _deflated_bomb(good),
        "tar whose links lead elsewhere": _tar(b"storages"),
        "tar that begins like a pickle": _tar(b"\x80storages"),
        "zip whose names lead elsewhere": rebuilt(elsewhere),
        "zip without a pickle": rebuilt(
            lambda new, entry, data: None if "pkl" in entry.filename else packed(new, entry, data)
        ),
        "zip of nothing": empty.getvalue(),
        "zip with a payload": rebuilt(
            lambda new, entry, data: packed(
                new, entry, pickle.dumps({"x": Payload()}, 2) if entry.filename.endswith("data.pkl") else data
            )
        ),
    }


def _tar(name: bytes) -> bytes:
    """torch's layout of 2016, with a link out of the folder that torch would unpack it into."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, encoding="latin-1") as archive:
        for member in (name.decode("latin-1"), "storages", "tensors", "pickle"):
            link = tarfile.TarInfo(member)
            link.type, link.linkname = tarfile.SYMTYPE, "../../escaped"
            archive.addfile(link)
    return stream.getvalue()


def _deflated_bomb(good: bytes) -> bytes:
    """An archive whose first tensor unpacks to 300 MB."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(good)) as old,
        zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for entry in old.infolist():
            if not entry.filename.endswith("/data/0"):
                new.writestr(entry.filename, old.read(entry))
                continue
            with new.open(entry.filename, "w", force_zip64=True) as file:
                for _ in range(300):
                    file.write(bytes(1 << 20))
    return stream.getvalue()


def _headers() -> dict[str, bytes]:
    """safetensors files whose header is not true."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return {
        "header of an exabyte": safetensors({}, length=1 << 60),
        "header of minus one": safetensors({}, length=(1 << 64) - 1),
        "header of 90 MB that is not there": safetensors({"a": entry}, bytes(8), length=90_000_000),
        "header of 20 MB of spaces": safetensors(b'{"a": 1}' + b" " * 20_000_000),
        "header that nests deep": safetensors(b"{" + b'"a":{' * 50_000 + b"}" * 50_000 + b"}"),
        "header that is a list": safetensors([1, 2]),
        "header that is no UTF-8": safetensors(b'{"\xff\xfe": 1}'),
        "offsets beyond the file": safetensors({"a": {**entry, "data_offsets": [0, 1 << 40]}}, bytes(8)),
        "offsets backwards": safetensors({"a": {**entry, "data_offsets": [8, 0]}}, bytes(8)),
        "offsets that overlap": safetensors({"a": entry, "b": entry}, bytes(8)),
        "offsets below zero": safetensors({"a": {**entry, "data_offsets": [-8, 0]}}, bytes(8)),
        "a hole between tensors": safetensors({"a": entry, "b": {**entry, "data_offsets": [16, 24]}}, bytes(24)),
        "a shape of 2**60": safetensors({"a": {**entry, "shape": [1 << 60]}}, bytes(8)),
        "a shape that overflows": safetensors({"a": {**entry, "shape": [1 << 32, 1 << 32]}}, bytes(8)),
        "a shape below zero": safetensors({"a": {**entry, "shape": [-2]}}, bytes(8)),
        "an unknown dtype": safetensors({"a": {**entry, "dtype": "F33"}}, bytes(8)),
        "no dtype": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        "four-bit floats": safetensors({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, bytes(8)),
        "eight-bit floats": safetensors({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}, bytes(8)),
        "a name that leads elsewhere": safetensors({"../../escaped": entry}, bytes(8)),
        "a name with a null": safetensors({"fc\0.bias": entry}, bytes(8)),
        "an empty name": safetensors({"": entry}, bytes(8)),
        "metadata that is no text": safetensors({"__metadata__": {"format": 3}, "a": entry}, bytes(8)),
    }


# --- model files


def models(folder: Path) -> Iterator[Case]:
    model = tiny()
    save_model(model, folder / "model.safetensors", extra={"epoch": 3})
    good = (folder / "model.safetensors").read_bytes()
    for what, spoiled in [*cut(good, 10), *flipped(good, 12, first=1500), *shuffled(good, 4)]:
        yield Case("model", what, spoiled, sound=None)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    described = {
        "format": "sparse_robust.model", "version": "1", "spec": canonical_json(spec_of(model).to_dict()),
        "mean": "[0.1,0.2,0.3]", "std": "[0.4,0.5,0.6]", "sha256": sha256_state(state), "extra": "{}",
    }  # fmt: skip
    spec = json.loads(described["spec"])
    deep = "[" * 100_000
    changes = {
        "another digest": {"sha256": "0" * 64}, "no number for a mean": {"mean": '["a","b","c"]'},
        "a mean that is NaN": {"mean": "[NaN,0,0]"}, "a deviation of zero": {"std": "[0,1,1]"},
        "a mean of 1e999": {"mean": "[1e999,0,0]"}, "five channels": {"mean": "[1,2,3,4,5]"},
        "a deep description": {"extra": deep}, "a deep architecture": {"spec": deep},
        "an unknown architecture": {"spec": canonical_json({**spec, "name": "../../../etc/passwd"})},
        "a folder for an architecture": {"spec": canonical_json({**spec, "name": "local-dir:/nonexistent"})},
        "a million million classes": {"spec": canonical_json({**spec, "num_classes": 10**12})},
        "400,000 classes": {"spec": canonical_json({**spec, "num_classes": 400_000})},
        "channels without end": {"spec": canonical_json({**spec, "kwargs": {"channels": [4096] * 4}})},
        "arguments of another network": {"spec": canonical_json({**spec, "kwargs": {"channels": [10**9] * 4}})},
        "code for an argument": {"spec": canonical_json({**spec, "kwargs": {"act_layer": "os.system"}})},
        "a version of the future": {"version": "2"}, "another format": {"format": "pt"},
        "no description": {"spec": "null"}, "a digit too many": {"spec": "9" * 10_000},
    }  # fmt: skip
    for what, change in changes.items():
        yield Case("model", what, save(state, {**described, **change}))
    for missing in ("spec", "mean", "sha256", "extra"):
        yield Case("model", f"no {missing}", save(state, {key: v for key, v in described.items() if key != missing}))
    other = {**state, "fc.bias": torch.full((5,), float("nan"))}
    yield Case("model", "weights that are NaN", save(other, {**described, "sha256": sha256_state(other)}), sound=True)
    less = {name: value for name, value in state.items() if name != "fc.bias"}
    yield Case("model", "a weight too few", save(less, {**described, "sha256": sha256_state(less)}))
