"""A sparse network as a folder that timm loads: ``timm.create_model("local-dir:FOLDER", pretrained=True)``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from sparse_robust.errors import FileError, UsageError
from sparse_robust.files import read_json, sha256_state, write_json
from sparse_robust.masks import Masks, fit_stem, unwrap
from sparse_robust.masks.wrappers import find_parameters
from sparse_robust.models import build_model, check_input_size, get_normalization, head_names, load_model, spec_of
from sparse_robust.models.sizes import nominal_size
from sparse_robust.tickets.ticket import Ticket

CONFIG, WEIGHTS = FILES = ("config.json", "model.safetensors")
# What timm records of the weights that it publishes for the architecture, which are not these.
OTHERS = ("tag", "license", "origin_url", "paper_ids", "paper_name", "notes")


def export_timm(
    model: nn.Module, folder: str | Path, masks: Masks | None = None, *, image_size: int | None = None
) -> Path:
    """Write ``config.json`` and ``model.safetensors``, which timm loads unchanged, and return the folder.

    The normalisation moves from inside the model to timm's ``mean`` and ``std`` of its preprocessing, which make equal
    logits of equal images. Pruned weights are stored as zeros. The model stays as it is.

    Args:
        model: made by `create_model` or `load_model`.
        folder: created; files of an earlier export there are replaced, others are left.
        masks: applied to the copy that is written; None for a network that is as it should be.
        image_size: side of the images that timm's preprocessing makes; None takes what the network was built for.

    Raises:
        UsageError: if timm cannot build this architecture (a small stem), the masks do not fit, or the network does not
            take such images.
        FileError: if the folder cannot be written.
    """
    import timm

    spec, folder = spec_of(model), Path(folder)
    if spec.stem == "small":
        raise UsageError(
            f"timm cannot build this {spec.name}: it has the stem for small images (stem='small'), and timm has no "
            "argument for that. Share its weights file instead: sparse_robust.models.load_model reads it."
        )
    size = nominal_size(model) if image_size is None else (image_size, image_size)
    check_input_size(model, *size)
    plain = build_model(spec.with_(pretrained=False))  # by its name and arguments alone, as timm will
    plain.load_state_dict({name: value.cpu() for name, value in unwrap(model).state_dict().items()})
    if masks is not None:
        masks.apply_(plain)
    mean, std = get_normalization(model) or ((0.0,) * spec.in_chans, (1.0,) * spec.in_chans)
    data = {"mean": mean, "std": std, "input_size": (spec.in_chans, *size), "crop_pct": 1.0}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as written:
            timm.models.save_for_hf(plain, written, safe_serialization=True, data_config=data)
            _settle(Path(written) / CONFIG, mean, std)
            mode = (Path(written) / CONFIG).stat().st_mode
            for name in FILES:
                (Path(written) / name).chmod(mode)  # safetensors leaves its files to their owner alone
                (Path(written) / name).replace(folder / name)
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror or error}.") from error
    return folder


def trained_under(ticket: Ticket, path: str | Path) -> tuple[nn.Module, Masks]:
    """Load a network that belongs to a ticket: the weights it was drawn from, or a network trained under it.

    Returns:
        the network, and the masks that hold for it: after a transfer, those of the head do not.

    Raises:
        UsageError: naming the first pruned weight that is not zero; or if the ticket is for another architecture.
        FileError: if the file cannot be read.
    """
    network = load_model(path)
    if sha256_state(network.state_dict()) == ticket.base_sha256:
        return network, ticket.masks
    head = head_names(network)
    masks = fit_stem(ticket.masks.only([name for name in ticket.masks if name not in head]), network)
    for name, weight in find_parameters(network, masks.shapes()).items():
        stray = int((weight.detach()[~masks[name]] != 0).sum())
        if stray:
            raise UsageError(
                f"{path} was not trained under this ticket: {stray} pruned weights of {name} are not zero there. Give "
                "the weights of a transfer of this ticket, or those that it was drawn from."
            )
    return network, masks


def _settle(config: Path, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Take out of timm's description what belongs to other weights, and check what it says of the images."""
    described = read_json(config)
    for key in OTHERS:
        described["pretrained_cfg"].pop(key, None)
    written = described["pretrained_cfg"]
    if [*written["mean"], *written["std"]] != [*mean, *std]:
        raise UsageError(
            f"this timm does not keep the normalisation: it wrote mean {written['mean']} and std {written['std']} for "
            f"{list(mean)} and {list(std)}. Update timm."
        )
    write_json(config, described)
