"""Attacks on a replica as CUDA graphs: a whole attack of many small kernels is one launch from the second call on.

A graph replays the same work on the same memory. What differs between calls is therefore a tensor: images, labels,
sample ids and the key of the noise are copied into the graph's own buffers first. Everything else (steps, radius, loss,
shape) names the graph, and another one is captured for other values. Weights are read where they were: a replica that
is refreshed in place needs no new graph.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)

Crafting = Callable[..., Tensor]
"""Tensors -> images. It reads nothing back from the device, and takes nothing that varies but these tensors."""

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], Any], Tensor]]
"""Run a function and return what replays it, and the tensor that each replay writes."""

# Passes before a capture: libraries choose algorithms, kernels are compiled, memory is fetched.
WARMUPS = 3

# Graphs that are kept, the most recently used ones: a training has one or two, the last batch of an epoch included.
MOST = 4


class CudaCapture:
    """Captures on a side stream, as torch asks for; the graphs of one instance share their memory.

    They may: one ends before the next begins, and what it wrote is copied out at once. Works on the current device.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """See `Capture`.

        Raises:
            RuntimeError: if it cannot be captured. What waits for the device shows before anything is captured: a
                capture that fails half-way is not undone by every torch.
        """
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        drawn = torch.cuda.get_rng_state()
        side.wait_stream(current)
        try:
            with torch.cuda.stream(side):
                for warmup in range(WARMUPS):
                    with _forbidding_waits() if warmup == WARMUPS - 1 else nullcontext():
                        function()
        finally:
            current.wait_stream(side)
            torch.cuda.set_rng_state(drawn)  # the first replay draws what it would have drawn without these
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as those that pin a loader's memory, may go on meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = function()
        except BaseException:
            _recover(current, self._pool)
            raise
        return graph.replay, output


@contextmanager
def _forbidding_waits() -> Iterator[None]:
    """Let what would make the host wait for the device raise RuntimeError instead."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _recover(stream: Any, pool: Any) -> None:
    """Put right what a failed capture leaves behind: the stream of the capture and, before torch 2.12, an allocation
    that never ended and a generator that counts for the graph. The next capture, and ``empty_cache``, need them so."""
    torch.cuda.set_stream(stream)
    with suppress(RuntimeError):
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
    with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device=stream.device)
    torch.cuda.set_stream(stream)


class _Captured(NamedTuple):
    replay: Callable[[], Any]
    inputs: tuple[Tensor, ...]
    output: Tensor


class Graphs:
    """The captured attacks of one replica.

    Attributes:
        failure: why nothing is captured any more; an empty text while it works.
    """

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture or CudaCapture()
        self._known: OrderedDict[Hashable, _Captured] = OrderedDict()
        self.failure = ""

    def __len__(self) -> int:
        return len(self._known)

    def run(self, kind: Hashable, craft: Crafting, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return ``craft(*inputs)``, captured with the first call of a kind and replayed with the next ones.

        The result is the caller's. Where it cannot be captured, that is logged once, and this and all later calls run
        as they are.

        Args:
            kind: all that the work depends on besides the values of the inputs and of the weights; their shapes, types
                and strides are added to it.
        """
        with torch.cuda.device_of(inputs[0]):
            return self._run(kind, craft, inputs)

    def _run(self, kind: Hashable, craft: Crafting, inputs: tuple[Tensor, ...]) -> Tensor:
        if self.failure:
            return craft(*inputs)
        kind = (kind, *((tensor.shape, tensor.dtype, tensor.stride(), tensor.device) for tensor in inputs))
        known = self._known.get(kind)
        if known is None:
            held = tuple(tensor.clone() for tensor in inputs)
            try:
                replay, output = self._capture(lambda: craft(*held))
            except RuntimeError as error:  # what capturing does not allow, and memory that does not suffice
                self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
                self._known.clear()
                _logger.warning("attacks on the replica run without CUDA graphs: %s", self.failure)
                return craft(*inputs)
            known = self._known[kind] = _Captured(replay, held, output)
            if len(self._known) > MOST:
                self._known.popitem(last=False)
        self._known.move_to_end(kind)
        for held_tensor, tensor in zip(known.inputs, inputs, strict=True):
            held_tensor.copy_(tensor)
        known.replay()
        return known.output.clone()
