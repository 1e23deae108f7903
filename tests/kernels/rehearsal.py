"""Every kernel that a run on a GPU launches, compiled for an H100 or H200 on a machine without one.

    PYTHONPATH=.:kernels python -m tests.kernels.rehearsal             # --help: what else it takes

The bodies of the kernels' gpu tests, attacks and the benchmarks run on the CPU, with Triton's own launch stopped short:
each launch is specialised on its arguments (types, multiples of 16, ones, constants, options) as a GPU's would be, each
distinct specialisation is compiled to machine code, and nothing is executed. What the operations return is the
reference's, so that all that depends on data goes the way it would go. Memory from torch begins at multiples of 16 on
either device, and views of it lie alike.

One line a specialisation: seconds, registers, bytes of spills. The exit status is 1 if one does not compile or spills.
With ``--cache FOLDER`` the machine code stays there. A machine with the same Triton and sources that has the folder at
the same path, and its name as TRITON_CACHE_DIR, compiles nothing of it again.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sparse_robust_kernels import _dispatch, select
from tests.kernels.harness import read

CPU = torch.device("cpu")
GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # the most programs along each axis


# What a launch asks a driver for: what to compile for. There is no stream, and nothing to load code into.
NO_GPU = SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
)


@dataclass(frozen=True)
class Specialisation:
    """A kernel as a launch has it compiled, what launched it first, and what came of it."""

    kernel: str
    where: str
    arguments: str
    seconds: float
    registers: int = 0
    spills: int = 0
    failure: str = ""

    def __str__(self) -> str:
        said = self.failure or f"{self.registers:3d} registers" + (f", SPILLS {self.spills}" if self.spills else "")
        return f"{self.seconds:6.2f} s  {said}  {self.kernel}({self.arguments})  [{self.where}]"


class Launches:
    """The launches of a process, stopped short, while `stopped` holds."""

    def __init__(self) -> None:
        self.count, self.where = 0, ""
        self.found: list[Specialisation] = []

    @contextmanager
    def stopped(self) -> Iterator[None]:
        run, compile_ = JITFunction.run, JITFunction._do_compile

        def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            self.count += 1
            if not all(0 < size <= most for size, most in zip(grid, GRID, strict=False)):
                raise ValueError(f"{kernel.__name__} is launched on the grid {grid}")
            return run(kernel, *args, grid=grid, warmup=True, **kwargs)

        def compiled(kernel: Any, key: Any, signature: Any, device: int, constants: Any, *others: Any) -> Any:
            began = time.perf_counter()
            about = _arguments(signature, constants, *others)
            make = partial(Specialisation, kernel.__name__, self.where, about)
            try:
                code = compile_(kernel, key, signature, device, constants, *others)
                seconds, used = time.perf_counter() - began, read(code)
                self.found.append(make(seconds, used.registers, used.spill_bytes))
            except Exception as error:  # the next ones are of interest too
                code = kernel.device_caches[device][0][key] = object()
                failure = f"{type(error).__name__}: {str(error) or repr(error.__cause__)}"
                self.found.append(make(time.perf_counter() - began, failure=" ".join(failure.split())[-500:]))
            return code

        driver.set_active(NO_GPU)
        with mock.patch.object(JITFunction, "run", launch), mock.patch.object(JITFunction, "_do_compile", compiled):
            yield


def _arguments(signature: dict[str, str], constants: Any, options: Any, attrs: Any, *others: Any) -> str:
    """Write down what a specialisation depends on: ``x:*fp32``, ``n:i32/16`` for a multiple, ``n=1``."""
    names = list(signature)
    known = {names[path[0]]: value for path, value in constants.items()}
    multiples = {names[path[0]] for path, value in attrs.items() if value}
    words = [
        f"{name}={known[name]}" if name in known else f"{name}:{kind}{'/16' * (name in multiples)}"
        for name, kind in signature.items()
    ]
    return ", ".join([*words, f"warps={options.num_warps}", *["unfused"] * (not options.enable_fp_fusion)])


class Answers:
    """Lets kernels be asked for on the CPU, by name and automatically, and answers with what the reference returns.

    To be made before the kernels are imported: they register themselves then. Without ``given``, an operation returns
    what its launches left unwritten; that is for data on which a reference would take minutes.
    """

    def __init__(self) -> None:
        self.given = True
        self._register, self._backends = _dispatch.register, _dispatch.backends
        _dispatch._interprets = lambda: True
        _dispatch.register = self._registered
        _dispatch.backends = select.backends = self._preferred
        for op in _dispatch.operations():
            _dispatch._load_triton(op)

    def _registered(self, op: str, backend: str, **options: Any) -> Any:
        add = self._register(op, backend, **options)

        def answering(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                launched = function(*args, **kwargs)
                if self.given:
                    meant = _dispatch._functions[f"{op}:reference"](*args, **kwargs)
                    for tensor, value in zip(tree_leaves(launched), tree_leaves(meant), strict=True):
                        if value is not None:
                            tensor.copy_(value)
                return launched

            return add(call)

        return answering if backend == "triton" else add

    def _preferred(self, op: str, device: torch.device | str = "cpu") -> tuple[str, ...]:
        _dispatch._load_triton(op)
        return tuple(sorted(self._backends(op, device), key=_dispatch._ORDER.index))


Act = tuple[str, Callable[[], object]]


def tests() -> Iterator[Act]:
    """The bodies of the kernels' gpu tests."""
    from tests.kernels import test_masks_triton as masks
    from tests.kernels import test_optim_triton as optim
    from tests.kernels import test_pgd_step_triton as pgd
    from tests.kernels import test_select_triton as selection

    for check in (*masks.CHECKS, masks.check_rounding):
        yield check.__name__, partial(check, "cpu")
    for shape, dtype in product(pgd.GPU_SHAPES, (torch.float32, torch.bfloat16, torch.float16)):
        few = (min(2, shape[0]), *shape[1:])  # how many does not matter, but for one alone
        yield f"images {'x'.join(map(str, few))} {dtype}", partial(pgd.check_images, few, dtype, "cpu")
    yield "check_mixed_layouts", pgd.check_mixed_layouts
    yield "check_uniform", pgd.check_uniform
    for size in (100, 9000):
        yield f"check_l2_scales {size}", partial(pgd.check_l2_scales, size)
    for kind, variant in product(("few bits", "any"), optim.SGD_OPTIONS):
        yield f"check_sgd {kind} {variant}", partial(optim.check_sgd, kind, variant, exact=False)
    yield "check_adamw", optim.check_adamw
    for dtype, magnitude in product(selection.TYPES, (True, False)):
        tensors = selection.some([1, 7, 0, 1000, 100_003, 4100], dtype, "ties")
        tensors = [torch.randn(64, 32, 3, 3).to(dtype, memory_format=torch.channels_last), tensors[4][1:], *tensors]
        yield f"select {dtype}", partial(selection.check, tensors, selection.masks_of(tensors), magnitude)


def attacks() -> Iterator[Act]:
    """Attacks as tests/attacks/test_attacks_gpu.py and test_capture_gpu.py run them, also on any part of a batch."""
    from sparse_robust.attacks import FGSM, LOSSES, PGD, RGD
    from sparse_robust.attacks.replica import make_replica
    from sparse_robust.models import set_normalization
    from tests.attacks.conftest import make_images, make_network

    x, y = make_images(200, torch.Generator().manual_seed(0))
    ids, model = torch.arange(1000, 1200), make_network().eval()
    known = [PGD(steps=4), FGSM(), PGD(norm="L2", steps=3), PGD(norm="L1", steps=3), RGD(steps=3)]
    for normalised in (False, True):
        if normalised:
            set_normalization(model, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
        targets = [model, *(make_replica(model, x, precision=precision) for precision in ("fp32", "bf16"))]
        for attack, target, part in product(known, targets, (slice(200), slice(1, 71))):
            call = partial(attack, target, x[part], y[part], eps=10.0 if attack.norm == "L1" else 0.1, ids=ids[part])
            yield f"{attack.name} {attack.norm} on {type(target).__name__}", call
    for loss in LOSSES:
        yield f"PGD by {loss}", partial(PGD(steps=4, n_restarts=2, loss=loss).run, model, x, y, eps=0.1, ids=ids)


def benchmarks(sizes: str, answers: Answers) -> Iterator[Act]:
    """The operations of the kernels: all gates on little data, or each kernel once on as much as a GPU is given."""
    from sparse_robust.bench import OPERATIONS
    from sparse_robust.bench.operations import kernels, masked_step, optimizer_step

    if sizes == "quick":
        for module in (masked_step, optimizer_step):
            for name in {"MaskedSGD", "MaskedAdamW"} & vars(module).keys():
                setattr(module, name, partial(getattr(module, name), backend="triton"))
        for name in sorted(OPERATIONS.keys() - {"ceilings", "mask-storage"}):  # which launch no kernels
            for case in OPERATIONS[name].cases(CPU, "quick"):
                yield f"{name}, {case.name}", case.gate
        return
    answers.given = False
    shape, total = kernels.SIZES["full"]["cuda"]
    for name, make in {**kernels.images(shape, CPU), **kernels.weights(total, CPU)}.items():
        yield f"{name}, full size", partial(lambda make: make().call("auto"), make)
        gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the benchmarks' full sizes, which take 6 GB")
    parser.add_argument("--cache", metavar="FOLDER", help="leave the machine code here, and use what is there")
    parser.add_argument("--only", default="", metavar="TEXT", help="what has this in its name")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    launches, answers, broken = Launches(), Answers(), []
    with tempfile.TemporaryDirectory() as temporary, launches.stopped():
        os.environ["TRITON_CACHE_DIR"] = os.path.abspath(given.cache or temporary)
        sizes = ("quick",) if given.quick else ("quick", "full")
        for name, act in chain(tests(), attacks(), *(benchmarks(size, answers) for size in sizes)):
            if given.only not in name:
                continue
            launches.where, shown = name, len(launches.found)
            try:
                act()
            except Exception as error:
                traceback.print_exc()
                broken.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            print(*launches.found[shown:], sep="\n", end="\n" * (len(launches.found) > shown), flush=True)
    bad = [each for each in launches.found if each.failure or each.spills]
    seconds = sum(each.seconds for each in launches.found)
    counted = f"{len(launches.found)} specialisations in {launches.count} launches"
    print(f"\ntriton {triton.__version__}: {counted}, compiled in {seconds:.0f} s")
    for heading, lines in (("do not compile, or spill", bad), ("did not run to its end", broken)):
        if lines:
            print(f"{len(lines)} {heading}:", *lines, sep="\n  ")
    return int(bool(bad or broken))


if __name__ == "__main__":
    sys.exit(main())
