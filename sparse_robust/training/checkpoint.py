"""A run's checkpoints: the two newest, each a folder that is whole or absent, with the sha256 of all that is in it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparse_robust.errors import FileError
from sparse_robust.files import commit_folder, read_json, recover_folder, sha256_file
from sparse_robust.training.agree import gathered

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

PROGRESS, TENSORS, MANIFEST = "progress.json", "progress.safetensors", "manifest.json"
KEPT = 2


class Loaded(NamedTuple):
    """What a checkpoint says besides model, optimizer and scaler; ``own`` is what this rank alone said."""

    progress: dict[str, Any]
    tensors: dict[str, Tensor]
    own: dict[str, Tensor]


class Checkpoints:
    """The folder of a run's checkpoints, which all ranks see.

    Each is a folder ``step-<batches done>``. Model, optimizer and scaler are Accelerate's files (safetensors, and
    tensors read with ``weights_only``); what the run itself needs is JSON and safetensors. A manifest carries the
    sha256 of every file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._sound: list[str] = []  # those read or written by this process, oldest first

    def save(
        self,
        accelerator: Accelerator,
        step: int,
        progress: dict[str, Any],
        tensors: dict[str, Tensor],
        own: dict[str, Tensor] | None = None,
    ) -> Path:
        """Write a checkpoint and drop all but the newest two. Called by every rank; returns its folder.

        Args:
            step: batches that are done: names the checkpoint.
            progress, tensors: the run's own; those of the main process are kept.
            own: tensors of this rank alone.

        Raises:
            FileError: on every rank, if one cannot write; the checkpoints that were there are unchanged.
        """
        target = self._path(step)
        temporary = target.with_name(target.name + ".new")
        main = accelerator.is_main_process

        def begin() -> None:
            if main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)

        def write() -> None:
            accelerator.save_state(str(temporary))
            _save_tensors(own or {}, temporary / _own_name(accelerator.process_index))
            if main:
                _save_json(progress, temporary / PROGRESS)
                _save_tensors(tensors, temporary / TENSORS)

        def commit() -> None:
            if main:
                files = sorted(path for path in temporary.rglob("*") if path.is_file())
                _save_json({str(p.relative_to(temporary)): sha256_file(p) for p in files}, temporary / MANIFEST)
                commit_folder(temporary, target)

        for action in (begin, write, commit):
            self._together(accelerator, action, temporary)
        self._sound = [*(name for name in self._sound if name != target.name), target.name][-KEPT:]
        if main:
            self._prune()
        return target

    def load(self, accelerator: Accelerator) -> Loaded | None:
        """Restore model, optimizer and scaler from the newest sound checkpoint; None where there is none.

        A damaged one is named in a warning and the one before it is taken; a run's result does not depend on which.

        Raises:
            FileError: if another rank than the main one does not see the checkpoint.
        """
        name = self._newest_sound() if accelerator.is_main_process else None
        (name,) = broadcast_object_list([name])
        if name is None:
            return None
        folder = self.folder / name
        blind = [rank for rank, sees in enumerate(gathered(accelerator, (folder / MANIFEST).exists())) if not sees]
        if blind:
            raise FileError(
                f"{folder} is not there for rank {', '.join(map(str, blind))} of {accelerator.num_processes}. All "
                "ranks need one folder for the run, on storage that all machines share."
            )
        self._sound = [name]
        accelerator.load_state(str(folder))
        own = folder / _own_name(accelerator.process_index)
        return Loaded(read_json(folder / PROGRESS), load_file(folder / TENSORS), load_file(own) if own.exists() else {})

    def _newest_sound(self) -> str | None:
        if not self.folder.is_dir():
            return None
        for retired in self.folder.glob("step-*.old"):
            recover_folder(retired.with_suffix(""))
        found = sorted(
            (path for path in self.folder.glob("step-*") if path.suffix == "" and path.is_dir()), reverse=True
        )
        for at, path in enumerate(found):
            damage = _damage(path)
            if damage is None:
                return path.name
            then = (
                f"{found[at + 1].name}, the one before it, is tried" if at + 1 < len(found) else "the run starts over"
            )
            logger.warning("checkpoint %s is damaged (%s): %s.", path, damage, then)
        return None

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:010d}"

    def _prune(self) -> None:
        """Delete all but the sound ones: older ones, damaged ones, and what a killed process left half written."""
        for path in self.folder.glob("step-*"):
            if path.name not in self._sound:
                shutil.rmtree(path, ignore_errors=True)

    def _together(self, accelerator: Accelerator, action: Callable[[], None], temporary: Path) -> None:
        """Act on every rank; where one fails, raise on all, so that none waits for it for ever."""
        failure, reason = None, None
        try:
            action()
        except (OSError, RuntimeError, SafetensorError) as error:
            failure, reason = error, f"{getattr(error, 'strerror', None) or error}"
        failed = {rank: text for rank, text in enumerate(gathered(accelerator, reason)) if text is not None}
        if not failed:
            return
        free = shutil.disk_usage(self.folder).free / 1e6 if self.folder.exists() else 0
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        rank, text = next(iter(failed.items()))
        where = f"rank {rank}: " if accelerator.num_processes > 1 else ""
        kept = f"{self._sound[-1]}, the one before it, is unchanged" if self._sound else "there is none before it"
        raise FileError(
            f"cannot write the checkpoint {temporary.with_suffix('')} ({where}{text}; {free:.0f} MB free): {kept}. "
            "Make room and run the same command again."
        ) from failure


def _own_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _save_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, allow_nan=False), encoding="utf-8")


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    if not (folder / MANIFEST).exists():
        return "its manifest is missing"
    try:
        sums = read_json(folder / MANIFEST)
        for name, expected in sums.items():
            if not (folder / name).exists():
                return f"{name} is missing"
            if sha256_file(folder / name) != expected:
                return f"the sha256 of {name} is not the recorded one"
    except (OSError, AttributeError) as error:
        return str(error)
    return None if PROGRESS in sums and TENSORS in sums else f"{MANIFEST} does not name its files"
