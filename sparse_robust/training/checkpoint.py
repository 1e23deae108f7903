"""A run's checkpoint: Accelerate's state plus the run's own progress, in one folder that is whole or absent."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sparse_robust.errors import FileError
from sparse_robust.files import commit_folder, read_json, recover_folder, sha256_file, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

PROGRESS, TENSORS, MANIFEST = "progress.json", "progress.safetensors", "manifest.json"


class Checkpoint:
    """The folder that holds one run's newest checkpoint.

    Model, optimizer and scaler are Accelerate's files (safetensors, and tensors read with ``weights_only``); what the
    run itself needs
    is JSON and safetensors. A manifest carries the sha256 of every file.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def save(self, accelerator: Accelerator, progress: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Write a checkpoint and put it in place of the previous one. Called by every rank."""
        temporary = self.folder.with_name(self.folder.name + ".new")
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        try:
            accelerator.save_state(str(temporary))
        except (OSError, RuntimeError, SafetensorError) as error:
            raise FileError(
                f"cannot write the checkpoint {temporary}: {error}. The one before it is unchanged."
            ) from error
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_json(temporary / PROGRESS, progress)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary / TENSORS)
            files = sorted(p for p in temporary.rglob("*") if p.is_file())
            write_json(temporary / MANIFEST, {str(p.relative_to(temporary)): sha256_file(p) for p in files})
            commit_folder(temporary, self.folder)
        accelerator.wait_for_everyone()

    def load(self, accelerator: Accelerator) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """Restore model, optimizer and scaler; return progress and tensors, or None where there is no sound checkpoint.

        A damaged checkpoint is named in a warning and the run starts over: its result does not depend on it.
        """
        if accelerator.is_main_process:
            recover_folder(self.folder)
        accelerator.wait_for_everyone()
        if not self.folder.exists():
            return None
        damaged = self._damaged()
        if damaged:
            logger.warning("checkpoint %s is damaged (%s): this run starts from its beginning.", self.folder, damaged)
            return None
        accelerator.load_state(str(self.folder))
        return read_json(self.folder / PROGRESS), load_file(self.folder / TENSORS)

    def remove(self, accelerator: Accelerator) -> None:
        """Delete the checkpoint of a finished run."""
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            for name in (self.folder.name, self.folder.name + ".new", self.folder.name + ".old"):
                shutil.rmtree(self.folder.with_name(name), ignore_errors=True)

    def _damaged(self) -> str | None:
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            return "its manifest is missing"
        try:
            sums = read_json(manifest)
        except OSError as error:
            return str(error)
        for name, expected in sums.items():
            file = self.folder / name
            if not file.exists():
                return f"{name} is missing"
            if sha256_file(file) != expected:
                return f"the sha256 of {name} is not the recorded one"
        return None
