"""What masks take in memory and on the disk: ours, and booleans as torch holds and saves them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from sparse_robust.bench.harness import Case, GateError, operation
from sparse_robust.masks import Masks

SPARSITY = 0.9
SIZES = {"quick": 20_000, "full": 10_000_000}
LAYERS = 10

Bools = dict[str, torch.Tensor]


@operation("mask-storage", "masks of 90 % sparsity: bytes in memory and in a file, and the time to get them there")
def cases(device: torch.device, scale: str) -> Iterator[Case]:
    if device.type != "cpu":
        return
    generator = torch.Generator().manual_seed(0)
    total = SIZES[scale]
    bools = {f"layer{i}": torch.rand(total // LAYERS, generator=generator) >= SPARSITY for i in range(LAYERS)}
    size = f"{total:,} weights"
    yield in_memory(bools, f"in memory, {size}", total)
    yield in_a_file(bools, f"in a file, {size}", total)


def in_memory(bools: Bools, name: str, total: int) -> Case:
    memory: dict[str, float] = {}

    def ours() -> Masks:
        return Masks.from_bools(bools)

    def gate() -> str:
        masks = ours()
        require_read_back(masks, bools)
        memory.update(Masks=size_of(masks.tensors()), bools=size_of(bools))
        return "the same masks read back; memory is that of their tensors"

    return _case(
        name, {"Masks": ours, "bools": lambda: {n: keep.clone() for n, keep in bools.items()}}, gate, total, memory
    )


def in_a_file(bools: Bools, name: str, total: int) -> Case:
    masks = Masks.from_bools(bools)
    memory: dict[str, float] = {}

    def save(write: Callable[[Path], object]) -> int:
        with tempfile.TemporaryDirectory(prefix="sparse-robust-bench-") as folder:
            path = Path(folder, "masks")
            write(path)
            return path.stat().st_size

    def save_bools(path: Path) -> None:
        torch.save(bools, path)

    def save_and_read(path: Path) -> None:
        masks.save(path)
        require_read_back(Masks.load(path), bools)

    def gate() -> str:
        memory.update({"Masks.save": save(save_and_read), "torch.save": save(save_bools)})
        return "the same masks read back; memory is the size of the file"

    routes = {"Masks.save": lambda: save(masks.save), "torch.save": lambda: save(save_bools)}
    return _case(name, routes, gate, total, memory)


def require_read_back(masks: Masks, bools: Bools) -> None:
    """Raise `GateError` unless the masks are these."""
    wrong = [name for name, keep in bools.items() if not torch.equal(masks[name], keep)]
    if wrong or len(masks) != len(bools):
        raise GateError(f"what comes back is not what was stored: {wrong or list(masks)}")


def size_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _case(
    name: str, routes: Mapping[str, Callable[[], object]], gate: Callable[[], str], total: int, memory: dict[str, float]
) -> Case:
    return Case(name=name, routes=routes, gate=gate, work=total, unit="weights", memory=memory)
