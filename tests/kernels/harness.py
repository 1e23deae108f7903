"""Triton kernels without a GPU: compiled to sm_90 machine code and measured, and run in the interpreter.

The interpreter is chosen when a kernel is decorated, so it needs a process of its own: one worker for each process of
tests, started with ``TRITON_INTERPRET=1`` on first use. In it every test starts from the same seeds, torch.empty gives
poison, and the sanitizer watches every launch.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.util
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pytest

pytest.importorskip("triton", reason="needs triton")

ROOT = Path(__file__).resolve().parents[2]
WORKER = os.environ.get("SPARSE_ROBUST_TEST_WORKER") == "interpreter"
TIMEOUT = 300.0  # seconds for one call


@dataclass(frozen=True)
class Compiled:
    """What the machine code of a kernel uses. Widths are in bits, of single accesses to global memory."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str
    sass: str
    load_widths: set[int]
    store_widths: set[int]


def compile_sm90(
    kernel: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
    enable_fp_fusion: bool = False,
    unaligned: Sequence[str] = (),
) -> Compiled:
    """Compile a kernel for an H100 or H200, on any machine, and read its machine code.

    Args:
        signature: Triton types by parameter name, such as ``*fp32``, ``i32``, ``fp32``; constexprs may be left out.
        constexprs: their values.
        unaligned: pointers and integers that are not taken to be multiples of 16, as all others are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    assert set(names) == set(signature) | set(constexprs), f"the kernel takes {names}"
    types = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    aligned = [name for name, kind in types.items() if re.match(r"\*|[iu]\d", kind) and name not in unaligned]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": enable_fp_fusion}
    source = ASTSource(kernel, types, constexprs, attrs)
    return read(triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options))


def read(compiled: Any) -> Compiled:
    """Return what the machine code of a compiled kernel uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = _tool("cuobjdump", "-res-usage", file.name), _tool("nvdisasm", "-c", file.name)
    used = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared_bytes=compiled.metadata.shared,
        ptx=compiled.asm["ptx"],
        sass=sass,
        load_widths=_widths("LDG", sass),
        store_widths=_widths("STG", sass),
    )


def interpreted(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return ``function(*args, **kwargs)``, run in the interpreter's process; what it raises is an AssertionError here.

    The function is found again by its file and name; arguments and result are pickled. A worker that dies is reported
    and replaced.
    """
    reply = _worker().call((function.__code__.co_filename, function.__qualname__, args, kwargs))
    if "error" in reply:
        raise AssertionError(f"in the interpreter:\n{reply['error']}")
    return reply["result"]


def interpret(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test ``interpret`` and run its body in the interpreter's process."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        if WORKER:
            test(*args, **kwargs)
        else:
            interpreted(test, *args, **kwargs)

    return pytest.mark.interpret(run)  # type: ignore[no-any-return]


class _Worker:
    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "SPARSE_ROBUST_TEST_WORKER": "interpreter"}
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self.stderr = tempfile.TemporaryFile()  # noqa: SIM115  (as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.stderr,
        )  # fmt: skip

    def call(self, request: Any) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        timer = threading.Timer(TIMEOUT, self.process.kill)
        timer.start()
        try:
            pickle.dump(request, stdin)
            stdin.flush()
            reply: dict[str, Any] = pickle.load(stdout)
            return reply
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # it died
            code = self.process.wait()
            self.stderr.seek(0)
            said = self.stderr.read().decode(errors="replace")[-4000:]
            raise AssertionError(f"the interpreter's process ended with status {code}:\n{said}") from None
        finally:
            timer.cancel()

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait()


_workers: list[_Worker] = []


def _worker() -> _Worker:
    while _workers and _workers[0].process.poll() is not None:
        _workers.pop()
    if not _workers:
        _workers.append(_Worker())
        atexit.register(_workers[0].close)
    return _workers[0]


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    import torch

    from tests.kernels import sanitizer

    sanitizer.install()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    while True:
        try:
            path, name, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            found: Any = _module(path)
            for part in name.split("."):
                found = getattr(found, part)
            reply = pickle.dumps({"result": found(*args, **kwargs)})
        except BaseException:
            reply = pickle.dumps({"error": traceback.format_exc()})
        replies.write(reply)
        replies.flush()


@functools.cache
def _module(path: str) -> Any:
    name = ".".join(Path(path).resolve().relative_to(ROOT).with_suffix("").parts)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _tool(name: str, *arguments: str) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def _widths(instruction: str, sass: str) -> set[int]:
    modifiers = re.findall(rf"\b{instruction}((?:\.\w+)*)", sass)
    return {next((int(size) for size in re.findall(r"(?<=\.)(?:U|S)?(\d+)", text)), 32) for text in modifiers}


if __name__ == "__main__":
    # Replies have the first output for themselves: what tests print goes to the second.
    own = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(sys.stdin.buffer, own)
