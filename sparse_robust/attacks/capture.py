"""Attacks on a replica as CUDA graphs: a whole attack of many small kernels is one launch from the second call on.

A graph replays the same work on the same memory. What differs between calls is therefore a tensor: images, labels,
sample ids and the key of the noise are copied into the graph's own buffers first. Everything else (steps, radius, loss,
shape) names the graph, and another one is captured for other values. Weights are read where they were: a replica that
is refreshed in place needs no new graph.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
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

    They may: one ends before the next begins, and what it wrote is copied out at once.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], Any], Tensor]:
        """See `Capture`."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                function()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that pin a loader's memory, may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = function()
        return graph.replay, output


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
