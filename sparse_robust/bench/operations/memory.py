"""How much memory a call needs at its peak, beside what was in use before."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch


def extra_peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Return bytes: on a GPU what torch allocates, on the CPU what Linux holds resident; None on other systems."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the recorded peak to the present size
        before = _resident("VmRSS")
        call()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, ValueError):
        return None


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"no {field} in /proc/self/status")
    return int(found[1]) * 1024
