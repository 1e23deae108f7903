"""Bad tickets."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from sparse_robust.files import canonical_json
from sparse_robust.masks import Masks, storage
from sparse_robust.pruning import prune
from sparse_robust.tickets import Ticket
from tests.bad_files.damage import Case, cut, flipped, shuffled, strangers, tiny


def _ticket_bytes(layers: Any, streams: dict[str, Any], about: str | None = None, **changes: Any) -> bytes:
    tensors = {
        name: torch.frombuffer(bytearray(value), dtype=torch.uint8) if isinstance(value, bytes) else value
        for name, value in streams.items()
    }
    written = about if about is not None else canonical_json(_ABOUT)
    metadata = {
        "format": storage.FORMAT, "version": "2", "layers": layers if isinstance(layers, str) else json.dumps(layers),
        "digest": "0" * 64, "ticket": written, **changes,
    }  # fmt: skip
    return save(tensors, {storage.METADATA: json.dumps(metadata)})


_ABOUT = {
    "format_version": 1, "base_sha256": "0" * 64, "architecture": {"name": "x"}, "provenance": {}, "evaluations": [],
    "version": "1",
}  # fmt: skip


def tickets(folder: Path) -> Iterator[Case]:
    model = tiny()
    ticket = Ticket.of(model, prune(model, 0.8), {"finder": "imp"}).with_evaluation({"dataset": "digits"})
    ticket.save(folder / "ticket.safetensors")
    good = (folder / "ticket.safetensors").read_bytes()
    for what, spoiled in [*cut(good, 12), *flipped(good, 20), *shuffled(good, 9)]:
        yield Case("ticket", what, spoiled, sound=None)
    for what, content in strangers().items():
        yield Case("ticket", what, content)
    for what, content in {**_bombs(), **_descriptions(ticket)}.items():
        yield Case("ticket", what, content)
    odd = Masks.from_bools({"../../escaped": torch.arange(9) < 3, "/etc/passwd": torch.ones(3, dtype=torch.bool)})
    Ticket(masks=odd, base_sha256="../../escaped", provenance={"../x": "\x1b[2J"}).save(folder / "odd.safetensors")
    yield Case("ticket", "names that lead elsewhere", (folder / "odd.safetensors").read_bytes(), sound=True)
    (folder / "plain.safetensors").write_bytes(save({"a": torch.zeros(2)}))
    yield Case("ticket", "another safetensors file", (folder / "plain.safetensors").read_bytes())


def _bombs() -> dict[str, bytes]:
    """Small streams that unpack to much."""
    zeros = zlib.compressobj(9)
    large = b"".join([*(zeros.compress(bytes(1 << 20)) for _ in range(400)), zeros.flush()])
    small = zlib.compress(bytes(1 << 20))
    return {
        "a stream of 400 MB for 8 weights": _ticket_bytes([["a", [8], 0]], {"a": large}),
        "a stream of 400 MB as announced": _ticket_bytes([["a", [400 << 23], 0]], {"a": large}),
        "a stream of a terabyte as announced": _ticket_bytes([["a", [1 << 40], 0]], {"a": small}),
        "a thousand streams of 256 MB": _ticket_bytes(
            [[f"a{i}", [1 << 31], 0] for i in range(1000)], {f"a{i}": small for i in range(1000)}
        ),
        "a shape of 10,000 dimensions": _ticket_bytes([["a", [2] * 10_000, 0]], {"a": small}),
        "a shape of huge numbers": _ticket_bytes([["a", [10**300] * 300, 0]], {"a": small}),
        "a count of 10**4300": _ticket_bytes('[["a",[8],' + "9" * 5000 + "]]", {"a": small}),
        "a shape below zero": _ticket_bytes([["a", [-8, -8], 0]], {"a": small}),
        "a shape of nothing": _ticket_bytes([["a", [0], 0]], {"a": zlib.compress(b"")}),
        "no layers": _ticket_bytes([], {"a": small}),
        "a layer twice": _ticket_bytes([["a", [8], 0], ["a", [8], 0]], {"a": small}),
        "a layer without bits": _ticket_bytes([["a", [8], 0], ["b", [8], 0]], {"a": small}),
        "bits without a layer": _ticket_bytes([["a", [8 << 20], 0]], {"a": small, "b": small}),
        "bits as floats": _ticket_bytes([["a", [8], 0]], {"a": torch.zeros(1)}),
        "bits in two dimensions": _ticket_bytes([["a", [8], 0]], {"a": torch.zeros(1, 1, dtype=torch.uint8)}),
        "bits that are no stream": _ticket_bytes([["a", [8], 0]], {"a": b"abcdefgh"}),
        "a stream that goes on": _ticket_bytes([["a", [8], 0]], {"a": zlib.compress(b"\0") + b"more"}),
        "spare bits": _ticket_bytes([["a", [3], 8]], {"a": zlib.compress(b"\xff")}),
        "a wrong count": _ticket_bytes([["a", [8], 3]], {"a": zlib.compress(b"\xff")}),
        "a wrong digest": _ticket_bytes([["a", [8], 8]], {"a": zlib.compress(b"\xff")}),
        "old bits of a wrong length": _ticket_bytes([["a", [8], 8]], {"a": b"\xff\xff"}, version="1"),
        "layers that nest deep": _ticket_bytes("[" * 100_000, {"a": small}),
        "layers that are a text": _ticket_bytes('"abc"', {"a": small}),
        "layers that are texts": _ticket_bytes('["abc"]', {"a": small}),
        "layers of NaN": _ticket_bytes('[["a",[NaN],0]]', {"a": small}),
        "a version of the future": _ticket_bytes([["a", [8], 0]], {"a": small}, version="3"),
        "a version that is a number": _ticket_bytes([["a", [8], 0]], {"a": small}, version=2),
        "a format that is a list": _ticket_bytes([["a", [8], 0]], {"a": small}, format=[]),
    }


def _descriptions(ticket: Ticket) -> dict[str, bytes]:
    """Sound masks with a ticket's description that is none."""
    bits = {name: zlib.compress(value.numpy().tobytes()) for name, value in ticket.masks.tensors().items()}
    layers, digest = json.loads(ticket.masks.metadata()["layers"]), ticket.masks.digest()
    wrong: dict[str, Any] = {
        "evaluations of NaN": '{"format_version":1,"base_sha256":"","architecture":{},"provenance":{},'
        '"evaluations":[{"x":NaN}],"version":"1"}',
        "a deep description": '{"format_version":' + "[" * 100_000,
        "no object": "[1]",
        "null": "null",
        "a version of the future": {**_ABOUT, "format_version": 10**6},
        "a version of a thousand digits": '{"format_version":"' + "9" * 5000 + '"}',
        "evaluations that are a text": {**_ABOUT, "evaluations": "abc"},
        "evaluations that are numbers": {**_ABOUT, "evaluations": [1, 2]},
        "evaluations that are null": {**_ABOUT, "evaluations": None},
        "provenance that is a list": {**_ABOUT, "provenance": [1]},
        "an architecture that is a text": {**_ABOUT, "architecture": "resnet"},
        "without weights": {key: value for key, value in _ABOUT.items() if key != "base_sha256"},
    }
    return {
        f"description: {what}": _ticket_bytes(
            layers, bits, about if isinstance(about, str) else canonical_json(about), digest=digest
        )
        for what, about in wrong.items()
    }
