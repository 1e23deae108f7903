"""Where the ticket is that a path means."""

from __future__ import annotations

from pathlib import Path

from sparse_robust.errors import UsageError


def ticket_file(path: Path) -> Path:
    """Return the ticket file that a path means: itself, or the one in a folder that was pulled or imported.

    Raises:
        UsageError: for a folder with several tickets or none; the message lists what there is.
    """
    if not path.is_dir():
        return path
    if (path / "ticket.safetensors").is_file():
        return path / "ticket.safetensors"
    found = sorted(file for sub in (path, path / "tickets") for file in sub.glob("k*.safetensors"))
    if len(found) == 1:
        return found[0]
    names = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
    raise UsageError(f"{path} is a folder: name one of its tickets{': ' + names if names else ', it has none here'}.")
