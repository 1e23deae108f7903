"""One side of a comparison: a process that imports the package from a given folder and times what it is told to.

Run by its path, so that it is the same program on both sides, whatever their revisions hold. It reads JSON objects, one
a line, and answers with one each: {"open": operation} begins an operation, {"next": true} prepares its next case, with
its gate, {"sample": calls} times that many calls of the case's first route.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Reply = dict[str, Any]


class Side:
    """What this process holds between two requests."""

    def __init__(self, device: str, scale: str) -> None:
        import torch

        self.device, self.scale = torch.device(device), scale
        self.synchronize: Callable[[], None] = (lambda: None) if device == "cpu" else torch.cuda.synchronize
        self.cases: Iterator[Any] = iter(())
        self.call: Callable[[], object] = lambda: None
        self.times = 1

    def open(self, name: str) -> Reply:
        from sparse_robust.bench import OPERATIONS

        if name not in OPERATIONS:
            return {"error": "there is no such operation"}
        self.cases = OPERATIONS[name].cases(self.device, self.scale)
        return {}

    def next(self, _: bool) -> Reply:
        case = next(self.cases, None)
        if case is None:
            return {"end": True}
        try:
            gate = case.gate()
        except Exception as error:
            return {"case": case.name, "error": f"{type(error).__name__}: {error}"}
        route, self.call = next(iter(case.routes.items()))
        self.times = getattr(case, "times", 1)  # an older revision has none
        self.sample(1)
        return {"case": case.name, "route": route, "gate": gate, **self.sample(1)}

    def sample(self, calls: int) -> Reply:
        self.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            self.call()
        self.synchronize()
        return {"seconds": (time.perf_counter() - began) / calls / self.times}


def main() -> None:
    root, device, scale, threads = sys.argv[1:]
    sys.path[:0] = [root, os.path.join(root, "kernels")]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the package prints goes to the other output
    import torch

    if threads != "0":
        torch.set_num_threads(int(threads))
    side = Side(device, scale)
    for line in sys.stdin:
        ((what, argument),) = json.loads(line).items()
        replies.write(json.dumps(getattr(side, what)(argument)) + "\n")


if __name__ == "__main__":
    main()
