"""The kernels one by one, at a size that memory bounds: bytes a second, and torch.compile beside them on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_robust.attacks.capture import CudaCapture
from sparse_robust.bench.gates import require_close, require_same
from sparse_robust.bench.harness import Case, operation
from sparse_robust_kernels import masks, pgd_step, rng
from sparse_robust_kernels.masks import reference as mask_reference

EPS, STEP_SIZE = 8 / 255, 2 / 255
L2: dict[str, Any] = {"step_size": 0.75, "eps": 3.0}
DRAW = {"key": 0x5EED, "stream": 7}
ONE_SWEEP = 8192  # elements of a sample up to which an L2 step reads it once
TOLERANCE = 1e-6  # of L2 kernels, which sum in another order than the reference
KEPT = 0.2
TIMES = 10  # calls in a CUDA graph

# Images [n, C, H, W], and a number of weights.
SIZES: dict[str, dict[str, tuple[tuple[int, int, int, int], int]]] = {
    "quick": {"cpu": ((3, 3, 9, 7), 3_000), "cuda": ((3, 3, 9, 7), 3_000)},
    "full": {"cpu": ((16, 3, 224, 224), 10_000_000), "cuda": ((256, 3, 224, 224), 300_000_000)},
}

Found = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Kernel:
    """One operation of the dispatch on given data."""

    call: Callable[[str], Found | None]
    """Runs it with a backend. What it changes in place it changes to the same again."""
    bytes: float
    """What it cannot do without: each input read once, each output written once."""
    result: Callable[[str], Found] | None = None
    """What it leaves, from fresh data, where the call returns nothing."""
    plain: Callable[[], object] | None = None
    """What torch.compile is given: the plain way to write it. None: the dispatch's own backend ``compile``."""
    exact: bool = True


Kernels = Mapping[str, Callable[[], Kernel]]


def images(shape: tuple[int, int, int, int], device: torch.device) -> Kernels:
    """Return the operations on images by their names in the dispatch; data are made when one is called for."""
    count = torch.Size(shape).numel()
    once = count // shape[0] <= ONE_SWEEP

    def noise(seed: int, *, width: int | None = None) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return torch.rand(shape if width is None else (shape[0], width), generator=generator, device=device)

    def step(operation: Callable[..., Found], bytes_each: float, *, exact: bool = True, **options: Any) -> Kernel:
        x = noise(0)
        x_adv = (x + EPS * (2 * noise(1) - 1)).clamp(0, 1)
        grad = noise(2) - 0.5
        return Kernel(
            lambda backend: operation(x_adv, x, grad, backend=backend, **options), bytes_each * count, exact=exact
        )

    def normalized() -> Kernel:
        mean, std = (torch.full((shape[1],), value, device=device) for value in (0.45, 0.22))
        x, x_adv, grad = (
            each.contiguous(memory_format=torch.channels_last) for each in (noise(0), noise(1), noise(2) - 0.5)
        )
        return Kernel(
            lambda backend: pgd_step.linf_step_normalized(
                x_adv, x, grad, mean, std, step_size=STEP_SIZE, eps=EPS, backend=backend
            ),
            18 * count,
        )

    def start(operation: Callable[..., Found], spare: int, eps: float) -> Kernel:
        x, uniform = noise(0), noise(1, width=count // shape[0] + spare)
        return Kernel(lambda backend: operation(x, uniform, eps=eps, backend=backend), 12 * count)

    def random_start(
        operation: Callable[..., Found], eps: float, exact: bool, plain: Callable[[Tensor], Tensor]
    ) -> Kernel:
        x, ids = noise(0), torch.arange(shape[0], device=device)
        return Kernel(
            lambda backend: operation(x, ids, eps=eps, backend=backend, **DRAW),
            8 * count,
            plain=lambda: plain(x),
            exact=exact,
        )

    # With torch's own generator: one that counts is written out block by block, and takes minutes to compile.
    def linf_start(x: Tensor) -> Tensor:
        return (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)

    def l2_start(x: Tensor) -> Tensor:
        normal = torch.randn_like(x).flatten(1)
        radius = torch.rand(len(x), 1, device=x.device) ** (1 / normal.shape[1])
        return (x + (L2["eps"] * radius * normal / normal.norm(dim=1, keepdim=True)).view_as(x)).clamp(0, 1)

    def project() -> Kernel:
        x, x_adv = noise(0), 2 * noise(1) - 0.5
        return Kernel(lambda backend: pgd_step.linf_project(x_adv, x, eps=EPS, backend=backend), 12 * count)

    def uniform() -> Kernel:
        ids, numel = torch.arange(shape[0], device=device), count // shape[0]
        return Kernel(
            lambda backend: rng.philox_uniform(ids, numel, backend=backend, **DRAW),
            4 * count,
            plain=lambda: torch.rand(len(ids), numel, device=device),
        )

    linf: dict[str, Any] = {"step_size": STEP_SIZE, "eps": EPS}
    return {
        "pgd_step.linf_step": lambda: step(pgd_step.linf_step, 16, **linf),
        "pgd_step.linf_step_normalized": normalized,
        "pgd_step.linf_project": project,
        "pgd_step.linf_start": lambda: start(pgd_step.linf_start, 0, EPS),
        "pgd_step.linf_random_start": lambda: random_start(pgd_step.linf_random_start, EPS, True, linf_start),
        "pgd_step.l2_step": lambda: step(pgd_step.l2_step, 16 if once else 28, exact=False, **L2),
        "pgd_step.l2_start": lambda: start(pgd_step.l2_start, pgd_step.L2_START_SPARE, L2["eps"]),
        "pgd_step.l2_random_start": lambda: random_start(pgd_step.l2_random_start, L2["eps"], False, l2_start),
        "pgd_step.rgd_step": lambda: step(pgd_step.rgd_step, 20, **linf),
        "rng.philox_uniform": uniform,
    }


def weights(total: int, device: torch.device) -> Kernels:
    """Return the operations on masks by their names in the dispatch."""

    def make() -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(0)
        weight = torch.randn(total, generator=generator, device=device)
        return weight, torch.rand(total, generator=generator, device=device) < KEPT

    def zero() -> Kernel:
        weight, keep = make()
        table = masks.MaskTable([keep], [weight])

        def result(backend: str) -> Tensor:
            fresh = weight.clone()
            masks.zero_([fresh], table, backend=backend)
            return fresh

        changed = weight.clone()
        return Kernel(
            lambda backend: masks.zero_([changed], table, backend=backend),
            8.125 * total,
            result,
            lambda: changed.mul_(keep),
        )

    def copy() -> Kernel:
        weight, keep = make()
        table = masks.MaskTable([keep], [weight])
        target = torch.empty_like(weight, dtype=torch.bfloat16)

        def result(backend: str) -> Tensor:
            fresh = torch.full_like(target, torch.nan)
            masks.masked_copy([weight], table, [fresh], backend=backend)
            return fresh

        return Kernel(
            lambda backend: masks.masked_copy([weight], table, [target], backend=backend),
            6.125 * total,
            result,
            lambda: target.copy_(weight * keep),
        )

    def pack() -> Kernel:
        keep = make()[1]
        return Kernel(
            lambda backend: masks.pack_bits(keep, backend=backend),
            1.125 * total,
            plain=lambda: mask_reference.pack_bits(keep),
        )

    def unpack() -> Kernel:
        packed = masks.pack_bits(make()[1])
        return Kernel(
            lambda backend: masks.unpack_bits(packed, total, backend=backend),
            1.125 * total,
            plain=lambda: mask_reference.unpack_bits(packed, total),
        )

    def count() -> Kernel:
        packed = masks.pack_bits(make()[1]).repeat(4)  # once would lie in the cache of a GPU from the second call on
        return Kernel(
            lambda backend: masks.count_bits(packed, backend=backend),
            packed.numel(),
            plain=lambda: mask_reference.count_bits(packed),
        )

    return {
        "masks.zero_": zero,
        "masks.masked_copy": copy,
        "masks.pack_bits": pack,
        "masks.unpack_bits": unpack,
        "masks.count_bits": count,
    }


class Replayed:
    """Calls a function `TIMES` times, from its first call on as one CUDA graph.

    To launch a kernel takes Python up to 0.1 ms, and some of these need less for all their bytes: a GPU would be seen
    waiting. Attacks that are captured launch them this way, too.

    Attributes:
        failure: why it is no graph; an empty text if it is one.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._replay: Callable[[], object] | None = None
        self.failure = ""

    def __call__(self) -> None:
        if self._replay is None:
            try:
                self._replay = CudaCapture()(self._several)[0]
            except RuntimeError as error:
                self._replay, self.failure = self._several, str(error).partition("\n")[0]
        self._replay()

    def _several(self) -> Any:
        for _ in range(TIMES):
            self._call()


def case(name: str, size: str, kernel: Kernel, *, compiles: bool, captures: bool = False) -> Case:
    """Return the case of one kernel: the automatic choice, and if asked for torch.compile of the same.

    Args:
        captures: time CUDA graphs of several calls.
    """
    routes: dict[str, Callable[[], object]] = {"auto": lambda: kernel.call("auto")}
    if compiles:
        compiled = None if kernel.plain is None else torch.compile(kernel.plain)
        routes["torch.compile"] = compiled if compiled is not None else lambda: kernel.call("compile")
    if captures:
        routes = {route: Replayed(call) for route, call in routes.items()}

    def gate() -> str:
        result = kernel.result or kernel.call
        found, expected = _named(result("auto")), _named(result("reference"))
        shown = "the bits of the reference"
        if kernel.exact:
            require_same(name, found, expected)
        else:
            require_close(name, found, expected, TOLERANCE)
            shown = f"the reference within {TOLERANCE:.0e}"
        try:
            routes.get("torch.compile", lambda: None)()
        except Exception as error:  # a rival that cannot be compiled keeps nothing else from being timed
            del routes["torch.compile"]
            shown += f"; torch.compile gave up: {type(error).__name__}"
        for route, timed in routes.items():
            if isinstance(timed, Replayed):
                timed()
                shown += f"; no graph of {route}: {timed.failure}" * bool(timed.failure)
        return shown

    times = TIMES if captures else 1
    return Case(f"{name}, {size}", routes, gate, work=round(kernel.bytes), unit="B", times=times)


def _named(found: Found | None) -> dict[str, Tensor]:
    assert found is not None
    return {str(index): tensor for index, tensor in enumerate(found if isinstance(found, tuple) else (found,))}


def _cases(device: torch.device, scale: str, kernels: Callable[..., Kernels], size: Any, text: str) -> Iterator[Case]:
    on_gpu = device.type == "cuda"
    for name, make in kernels(size, device).items():
        yield case(name, text, make(), compiles=on_gpu and scale == "full", captures=on_gpu)


@operation("pgd-step", "random starts and steps of attacks on images, and their random numbers: bytes a second")
def pgd_cases(device: torch.device, scale: str) -> Iterator[Case]:
    shape = SIZES[scale][device.type][0]
    yield from _cases(device, scale, images, shape, "x".join(map(str, shape)))


@operation("masks", "packing, unpacking, applying and copying through bit masks: bytes a second")
def mask_cases(device: torch.device, scale: str) -> Iterator[Case]:
    total = SIZES[scale][device.type][1]
    yield from _cases(device, scale, weights, total, f"{total:,} weights")


COPIED = {"quick": {"cpu": 1 << 20, "cuda": 1 << 20}, "full": {"cpu": 1 << 28, "cuda": 1 << 32}}


@operation("ceilings", "what the machine does at best: bytes copied a second, bf16 products a second")
def ceilings(device: torch.device, scale: str) -> Iterator[Case]:
    source = torch.randn(COPIED[scale][device.type] // 4, device=device)
    target = torch.full_like(source, torch.nan)

    def copied() -> str:
        target.copy_(source)
        require_same("copy", {"": target}, {"": source})
        return "the same bits"

    yield Case("copy", {"copy_": lambda: target.copy_(source)}, copied, 8 * source.numel(), "B")
    if device.type == "cuda":
        size = 8192 if scale == "full" else 256
        one, other = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))

        def multiplied() -> str:
            require_close("product", {"": one @ other}, {"": one.float() @ other.float()}, 1e-2)
            return "fp32's product within 1e-02"

        name = f"{size}x{size}x{size} bf16 product"
        yield Case(name, {"matmul": lambda: one @ other}, multiplied, 2 * size**3, "FLOP")
