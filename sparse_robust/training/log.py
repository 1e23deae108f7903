"""The record of a run while it goes on: one JSON line an epoch, and the trackers Accelerate was given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_robust.files import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator


class RunLog:
    """Appends to ``log.jsonl`` in the run's folder (main process only) and passes the numbers on to the trackers."""

    def __init__(self, folder: Path | None, accelerator: Accelerator, project: str, name: str) -> None:
        self.accelerator = accelerator
        self.file = folder / "log.jsonl" if folder is not None and accelerator.is_main_process else None
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.unlink(missing_ok=True)
        if accelerator.log_with:
            # tensorboard has no project: its run is a folder; the others take the run's name beside the project's
            boards = {str(getattr(kind, "value", kind)) for kind in accelerator.log_with}
            group = f"{project}/{name}" if boards == {"tensorboard"} else project
            named = {board: {"name": name} for board in boards & {"wandb", "trackio"}}
            accelerator.init_trackers(group, init_kwargs=named)

    def epoch(self, entry: dict[str, Any]) -> None:
        """Record one epoch."""
        if self.file is not None:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        if self.accelerator.trackers:
            numbers = {name: value for name, value in entry.items() if isinstance(value, (int, float))}
            self.accelerator.log(numbers, step=entry["epoch"])

    def rewrite(self, history: list[dict[str, Any]]) -> None:
        """Make the file say what the checkpoint knows: lines written after it are done again."""
        if self.file is not None:
            write_text(self.file, "".join(json.dumps(entry) + "\n" for entry in history))

    def close(self) -> None:
        """End the trackers of this run."""
        if self.accelerator.is_main_process:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        self.accelerator.trackers = []
