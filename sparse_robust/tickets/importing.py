"""Another program's sparse checkpoint as a network and a ticket of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sparse_robust.errors import UsageError
from sparse_robust.files import sha256_file
from sparse_robust.masks import Masks, prunable_weights
from sparse_robust.models import (
    ImportReport,
    create_model,
    head_names,
    import_weights,
    load_state,
    replace_head,
)
from sparse_robust.models.layouts import read_contents
from sparse_robust.models.suggest import classes_in
from sparse_robust.tickets.ticket import Ticket


@dataclass(frozen=True, eq=False)
class Imported:
    """What a checkpoint became.

    Fields:
        model: the network with the file's weights, masked where the file says so.
        report: what became of every name in the file.
        ticket: the file's masks on these weights; None where it holds none.
        provenance: the file's name and sha256.
    """

    model: nn.Module
    report: ImportReport
    ticket: Ticket | None
    provenance: Mapping[str, Any]


def import_checkpoint(
    path: str | Path,
    name: str | None = None,
    *,
    num_classes: int | None = None,
    in_chans: int = 3,
    stem: str = "default",
    density: float | None = None,
    zeros: bool = False,
    trust_pickle: bool = False,
) -> Imported:
    """Read a weights file of another program (`import_weights` says which) with the masks in it.

    Args:
        path: the file.
        name: timm's name of the architecture; None takes the ``arch`` that many training programs store.
        num_classes: of the head; None takes the size of the head in the file.
        in_chans, stem: as in `create_model`.
        density: for a file with scores, the share of each layer's weights to keep.
        zeros: a file without masks: weights that are exactly zero count as pruned.
        trust_pickle: let the file run the code it contains.

    Raises:
        UsageError: if the file does not fit the architecture, or does not say which it is.
        FileError: if it cannot be read.
    """
    path = Path(path)
    state = load_state(path, trust_pickle=trust_pickle)
    name = name or _architecture(state, path)
    model = create_model(name, num_classes=num_classes or 1000, in_chans=in_chans, stem=stem)
    if num_classes is None:
        contents = read_contents(state, model.state_dict(), str(path), density)
        found = classes_in(head_names(model), contents.tensors)
        if found is not None and 2 <= found <= MAX_CLASSES:
            replace_head(model, found)
    report = import_weights(model, state, density=density, source=str(path))
    provenance = {"imported from": path.name, "sha256 of that file": sha256_file(path)}
    masks = report.masks
    if masks is None and zeros:
        masks = zero_masks(model)
        if masks is None:
            raise UsageError(f"no prunable weight in {path} is exactly zero: this network is dense.")
        provenance["masks"] = "weights that are exactly zero"
    ticket = None if masks is None else Ticket.of(model, masks, provenance)
    return Imported(model, report, ticket, provenance)


MAX_CLASSES = 1 << 20
"""Of a head that is made for a file, because the file has one of that size."""


def zero_masks(model: nn.Module) -> Masks | None:
    """Return masks of the prunable weights that keep all but those that are exactly zero; None for a dense network."""
    weights = prunable_weights(model)
    masks = Masks.from_bools({name: (weight.detach() != 0).cpu() for name, weight in weights.items()})
    return masks if masks.count() < masks.numel() else None


def _architecture(state: Mapping[str, Any], path: Path) -> str:
    for key in ("arch", "architecture"):
        if isinstance(state.get(key), str):
            return str(state[key])
    raise UsageError(f"{path} does not say which architecture it is: give timm's name of it (--model resnet50).")
