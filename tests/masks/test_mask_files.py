"""The file of a mask set: it comes back as it was, is as small as it should be, and is verified to the last bit."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_robust.errors import FileError
from sparse_robust.masks import Masks, prunable_weights
from sparse_robust.masks.storage import METADATA, read, write


@given(st.lists(st.lists(st.integers(0, 6), max_size=4), min_size=1, max_size=5), st.integers(0, 2**31))
def test_a_file_comes_back_bit_for_bit_in_order(shapes: list[list[int]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keep = {f"z{9 - i}.weight": torch.rand(shape, generator=generator) < 0.5 for i, shape in enumerate(shapes)}
    masks = Masks.from_bools(keep)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "new", "masks.safetensors")
        masks.save(path)
        again = Masks.load(path)
        assert [p.name for p in path.parent.iterdir()] == ["masks.safetensors"], "no temporary file is left"
    assert again == masks and again.names() == masks.names() and again.shapes() == masks.shapes()
    assert again.layers() == masks.layers() and again.digest() == masks.digest()


def shapes_of(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {layer: weight.shape for layer, weight in prunable_weights(timm.create_model(name)).items()}


@pytest.mark.acceptance("double-win", "A-40")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("density", "most"), [(0.5, 1.01), (0.2, 0.75), (0.1, 0.5), (0.01, 0.17)])
def test_a_file_takes_little_more_than_its_entropy(name: str, density: float, most: float, tmp_path: Path) -> None:
    masks = Masks.from_bools({layer: torch.rand(shape) < density for layer, shape in shapes_of(name).items()})
    masks.save(tmp_path / "masks.safetensors")
    assert (tmp_path / "masks.safetensors").stat().st_size * 8 <= most * masks.numel()
    assert Masks.load(tmp_path / "masks.safetensors") == masks


def test_a_regular_mask_takes_next_to_nothing(tmp_path: Path) -> None:
    channels = torch.zeros(512, 512, 3, 3, dtype=torch.bool)
    channels[::3] = True
    two_of_four = torch.tensor([True, False, False, True]).repeat(1024, 256)
    masks = Masks.from_bools({"channels": channels, "2:4": two_of_four, "all": torch.ones(4_000_000).bool()})
    masks.save(tmp_path / "masks.safetensors")
    assert (tmp_path / "masks.safetensors").stat().st_size * 8 <= 0.02 * masks.numel()
    assert Masks.load(tmp_path / "masks.safetensors") == masks


@pytest.mark.slow
def test_a_large_file_is_written_and_read_in_seconds(tmp_path: Path) -> None:
    masks = Masks.from_bools({f"layer{i}": torch.rand(1_000_000) < 0.1 for i in range(25)})
    masks.digest()
    began = time.process_time()
    masks.save(tmp_path / "masks.safetensors")
    saved = time.process_time()
    assert Masks.load(tmp_path / "masks.safetensors") == masks
    assert saved - began < 2 and time.process_time() - saved < 2


def test_files_of_version_1_are_read(tmp_path: Path) -> None:
    masks = Masks.from_bools({"b.weight": torch.rand(3, 7) < 0.5, "a.weight": torch.rand(5, 3, 3) < 0.5})
    metadata = {METADATA: json.dumps(masks.metadata() | {"version": "1"})}
    save_file(masks.tensors(), tmp_path / "old.safetensors", metadata)
    again = Masks.load(tmp_path / "old.safetensors")
    assert again == masks and again.names() == masks.names()
    again.save(tmp_path / "new.safetensors")
    assert Masks.load(tmp_path / "new.safetensors") == masks


def test_a_file_of_version_1_spelt_out(tmp_path: Path) -> None:
    bits = bytes([0b10010101, 0b0001])
    about = {
        "digest": hashlib.sha256(b"w\0(3, 4)\0" + bits).hexdigest(),
        "format": "sparse_robust.masks",
        "layers": '[["w",[3,4],5]]',
        "version": "1",
    }
    tensor = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    header = json.dumps({"__metadata__": {"sparse_robust": json.dumps(about)}, "w": tensor}).encode()
    (tmp_path / "old.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bits)
    kept = Masks.load(tmp_path / "old.safetensors")["w"].reshape(-1)
    assert kept.nonzero().flatten().tolist() == [0, 2, 4, 7, 8]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    masks = Masks.from_bools({"stem.weight": torch.rand(3, 7) < 0.5, "block.weight": torch.rand(5, 3, 3) < 0.5})
    masks.save(tmp_path / "masks.safetensors")
    return tmp_path / "masks.safetensors"


Change = Callable[[dict[str, Tensor], dict[str, str]], None]


def flip(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Move one kept weight, so that the counts still agree."""
    bits = tensors["block.weight"]
    flags = torch.tensor([(int(byte) >> i) & 1 for byte in bits[:5] for i in range(8)])
    for index in (int(flags.argmax()), int(flags.argmin())):
        bits[index // 8] ^= 1 << (index % 8)


def edit_layers(edit: Callable[[list[list[object]]], None]) -> Change:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        layers = json.loads(metadata["layers"])
        edit(layers)
        metadata["layers"] = json.dumps(layers)

    return change


DAMAGE: dict[str, tuple[Change, str]] = {
    "other format": (lambda t, m: m.update(format="onnx"), "holds no masks: expected the format 'sparse_robust.masks'"),
    "no metadata": (lambda t, m: m.clear(), "holds no masks.*got None"),
    "no layers": (lambda t, m: m.__delitem__("layers"), "list of layers cannot be read"),
    "layers not JSON": (lambda t, m: m.update(layers="[[1,"), "list of layers cannot be read"),
    "layers of another kind": (lambda t, m: m.update(layers='{"a": 1}'), "list of layers cannot be read"),
    "a name twice": (edit_layers(lambda rows: rows.append(rows[0])), "a name twice"),
    "a negative size": (edit_layers(lambda rows: rows[0].__setitem__(1, [-3, -7])), "negative size"),
    "no digest": (lambda t, m: m.__delitem__("digest"), "digest"),
    "missing tensor": (lambda t, m: t.__delitem__("stem.weight"), r"missing \['stem.weight'\]"),
    "extra tensor": (lambda t, m: t.update(extra=torch.zeros(1, dtype=torch.uint8)), r"unexpected \['extra'\]"),
    "wrong length": (
        lambda t, m: t.update({"stem.weight": t["stem.weight"][:2].clone()}),
        "3 bytes when unpacked, and take fewer",
    ),
    "spare bits": (lambda t, m: t["stem.weight"].__setitem__(2, 255), "beyond its 21 weights"),
    "wrong count": (
        lambda t, m: t["stem.weight"].__setitem__(0, int(t["stem.weight"][0]) ^ 1),
        "should keep .* keep",
    ),
    "moved bit": (flip, "its digest should be"),
    "other digest": (lambda t, m: m.update(digest="0" * 64), "its digest should be 0000"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_with_the_file(damage: str, path: Path) -> None:
    change, message = DAMAGE[damage]
    tensors, metadata = read(path)
    change(tensors, metadata)
    write(path, tensors, metadata)
    with pytest.raises(FileError, match=message) as caught:
        Masks.load(path)
    assert str(path) in str(caught.value)


def raw(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors and the metadata as they stand in a file."""
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()[METADATA]


STREAMS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut off": (lambda stream: stream[:-5], "do not end where they should"),
    "cut off in its check sum": (lambda stream: stream[:-1], "do not end where they should"),
    "empty": (lambda stream: b"", "should take 3 bytes when unpacked, and take fewer"),
    "no stream": (lambda stream: b"\x00\x01\x02", "cannot be unpacked"),
    "wrong check sum": (lambda stream: stream[:-1] + bytes([stream[-1] ^ 1]), "cannot be unpacked"),
    "more after it": (lambda stream: stream + b"\x00", "do not end where they should"),
    "too long": (lambda stream: zlib.compress(bytes(4)), "should take 3 bytes when unpacked, and take more"),
    "too short": (lambda stream: zlib.compress(bytes(2)), "should take 3 bytes when unpacked, and take fewer"),
    "a bomb": (lambda stream: zlib.compress(bytes(100_000_000)), "should take 3 bytes when unpacked, and take more"),
}


@pytest.mark.parametrize("damage", STREAMS)
def test_a_damaged_stream_is_named_with_its_tensor(damage: str, path: Path) -> None:
    change, message = STREAMS[damage]
    streams, stored = raw(path)
    changed = bytearray(change(streams["stem.weight"].numpy().tobytes()))
    streams["stem.weight"] = torch.tensor(list(changed), dtype=torch.uint8)
    save_file(streams, path, {METADATA: stored})
    with pytest.raises(FileError, match=f"the bits of stem.weight {message}") as caught:
        Masks.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 2, dtype=torch.uint8)])
def test_a_tensor_that_is_no_stream_is_named(wrong: Tensor, path: Path) -> None:
    streams, stored = raw(path)
    save_file(streams | {"stem.weight": wrong}, path, {METADATA: stored})
    with pytest.raises(FileError, match="the bits of stem.weight are .* expected a zlib stream"):
        Masks.load(path)


def test_a_newer_version_asks_for_an_update(path: Path) -> None:
    streams, stored = raw(path)
    save_file(streams, path, {METADATA: stored.replace('"version":"2"', '"version":"3"')})
    with pytest.raises(FileError, match="version '3' of the mask format, and this package reads 1, 2. Update"):
        Masks.load(path)


def test_a_flipped_bit_in_any_byte_is_seen_or_says_nothing(path: Path) -> None:
    masks, content = Masks.load(path), path.read_bytes()
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << (index % 8)
        path.write_bytes(damaged)
        try:
            assert Masks.load(path) == masks
        except FileError:
            continue


@pytest.mark.parametrize("size", [0, 4, 20, -1])
def test_a_cut_off_file_is_refused(size: int, path: Path) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(FileError, match="not a whole safetensors file"):
        Masks.load(path)


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileError, match="does not exist or is not a file"):
            Masks.load(missing)


def test_the_order_of_layers_is_part_of_the_file(path: Path) -> None:
    masks = Masks.load(path)
    assert masks.names() == ("stem.weight", "block.weight")
    assert json.loads(masks.metadata()["layers"])[0][:2] == ["stem.weight", [3, 7]]
    assert sorted(load_file(path)) == ["block.weight", "stem.weight"]


def test_a_failed_save_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full_disk(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(FileError, match="No space left on device"):
        Masks.full({"w": torch.zeros(9)}).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_equal_masks_are_equal_files(path: Path, tmp_path: Path) -> None:
    Masks.load(path).save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("stored", ["[1]", "{", '{"format": 1}'])
def test_metadata_of_another_kind_is_named(path: Path, stored: str) -> None:
    save_file(read(path)[0], path, {METADATA: stored})
    with pytest.raises(FileError, match="its metadata cannot be read"):
        Masks.load(path)
