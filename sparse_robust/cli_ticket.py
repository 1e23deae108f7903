"""``sparse-robust ticket``: its actions, and what they do."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparse_robust.errors import FileError, UsageError

Action = Callable[[argparse.Namespace], int]
SUMMARY = "show, verify, import, export, push or pull a ticket"


def add_actions(actions: Any, add: Callable[[Any, str, Action, str], argparse.ArgumentParser]) -> None:
    """Add the actions to a group of subparsers; ``add`` makes a parser that calls a function."""
    show = add(actions, "show", show_action, "what a ticket holds, layer by layer")
    show.add_argument("ticket", type=Path)
    show.add_argument("--picture", type=Path, metavar="FILE", help="also draw the density of the layers: .png, .svg")

    verify = add(actions, "verify", verify_action, "check a ticket file, and that it belongs to given weights")
    verify.add_argument("ticket", type=Path)
    verify.add_argument("--weights", type=Path, help="the weights file it should have been drawn from")
    verify.add_argument("--model", type=Path, help="a weights file that should have been trained under it")

    annotate = add(actions, "annotate", annotate_action, "add evaluations to a ticket file")
    annotate.add_argument("ticket", type=Path)
    annotate.add_argument("records", type=Path, nargs="+", help="record.json of sparse-robust evaluate")
    annotate.add_argument("--out", type=Path, help="write another file instead of changing this one")

    _add_import(add(actions, "import", import_action, "make weights and a ticket of another program's checkpoint"))

    export = add(actions, "export", export_action, "write the sparse network as a folder that timm loads")
    export.add_argument("ticket", type=Path)
    export.add_argument("folder", type=Path)
    export.add_argument("--weights", type=Path, required=True, help="weights it was drawn from, or trained under it")
    export.add_argument("--image-size", type=int, help="side of the images the network is meant for")

    _add_push(add(actions, "push", push_action, "publish a ticket on the Hugging Face Hub, with a model card"))

    pull = add(actions, "pull", pull_action, "fetch a ticket from the Hugging Face Hub, and check it")
    pull.add_argument("repo", metavar="OWNER/NAME")
    pull.add_argument("--out", type=Path, help="the folder (default: NAME)")
    pull.add_argument("--revision", help="commit, branch or tag (default: the main branch)")
    pull.add_argument("--sha256", help="what the ticket file must have; push prints it")


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", help="timm's name of the architecture (default: what the file says)")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights.safetensors and ticket.safetensors")
    parser.add_argument("--num-classes", type=int, help="default: the size of the head in the file")
    parser.add_argument("--in-chans", type=int, default=3, help="channels of the images (default: 3)")
    parser.add_argument("--stem", default="default", help="default, or small (3x3, for small images)")
    parser.add_argument("--density", type=float, help="popup_scores: the share of each layer that is kept (HYDRA's k)")
    parser.add_argument("--zeros", action="store_true", help="weights that are exactly zero count as pruned")
    parser.add_argument("--trust-pickle", action="store_true", help="let the file run the code it contains")


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ticket", type=Path)
    parser.add_argument("repo", metavar="OWNER/NAME")
    parser.add_argument("--weights", type=Path, help="publish the weights it was drawn from, too")
    parser.add_argument("--model", type=Path, help="publish a network trained under it, too, for timm to load")
    parser.add_argument("--image-size", type=int, help="side of the images that network is meant for")
    parser.add_argument("--license", help="identifier of the Hub, such as mit or cc-by-4.0")
    parser.add_argument(
        "--dataset", action="append", default=[], help="trained on this data set of the Hub; repeatable"
    )
    parser.add_argument("--revision", help="a branch (default: the main branch)")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--private", action="store_true", help="make a new repository private")


def show_action(options: argparse.Namespace) -> int:
    """Print a ticket, and draw it if asked."""
    from sparse_robust.tickets.console import show_ticket
    from sparse_robust.tickets.picture import draw_density
    from sparse_robust.tickets.place import ticket_file
    from sparse_robust.tickets.ticket import Ticket

    path = ticket_file(options.ticket)
    ticket = Ticket.load(path)
    if options.picture is not None:
        title = f"{ticket.architecture.get('name', '')} {path.stem}: sparsity {100 * ticket.masks.sparsity:.2f} %"
        draw_density(ticket.masks, options.picture, title.strip())
    show_ticket(ticket, path)
    if options.picture is not None:
        _say(f"picture: {options.picture}")
    return 0


def verify_action(options: argparse.Namespace) -> int:
    """Check a ticket, and the weights it belongs to."""
    from sparse_robust.files import sha256_state
    from sparse_robust.models import load_model
    from sparse_robust.tickets.export import trained_under
    from sparse_robust.tickets.place import ticket_file
    from sparse_robust.tickets.ticket import Ticket

    path = ticket_file(options.ticket)
    ticket = Ticket.load(path)
    _say(f"{path}: sound, {ticket.masks.count()} of {ticket.masks.numel()} weights kept")
    if options.weights is not None:
        ticket.verify(load_model(options.weights))
        _say(f"{options.weights}: the weights this ticket was drawn from")
    if options.model is not None:
        network, _ = trained_under(ticket, options.model)
        drawn_from = sha256_state(network.state_dict()) == ticket.base_sha256
        found = "the weights this ticket was drawn from, not pruned yet" if drawn_from else "zero wherever it prunes"
        _say(f"{options.model}: {found}")
    return 0


def annotate_action(options: argparse.Namespace) -> int:
    """Add evaluations to a ticket."""
    from sparse_robust.files import read_json
    from sparse_robust.tickets.place import ticket_file
    from sparse_robust.tickets.ticket import Ticket

    path = ticket_file(options.ticket)
    ticket = Ticket.load(path)
    for file in options.records:
        record = read_json(file)
        if not isinstance(record, Mapping):
            raise FileError(f"{file} holds a {type(record).__name__}, expected the object that evaluate writes.")
        try:
            ticket = ticket.with_evaluation(record)
        except UsageError as error:
            raise UsageError(f"{file} cannot be added: {error}") from error
    ticket.save(options.out or path)
    _say(f"{options.out or path}: {len(ticket.evaluations)} evaluations")
    return 0


def import_action(options: argparse.Namespace) -> int:
    """Make our files of another program's checkpoint."""
    from rich.console import Console

    from sparse_robust.files import ensure_writable
    from sparse_robust.models import CheckpointMismatch, save_model
    from sparse_robust.tickets.importing import import_checkpoint

    try:
        found = import_checkpoint(
            options.checkpoint, options.model, num_classes=options.num_classes, in_chans=options.in_chans,
            stem=options.stem, density=options.density, zeros=options.zeros, trust_pickle=options.trust_pickle,
        )  # fmt: skip
    except CheckpointMismatch as error:
        Console(stderr=True).print(error.report.table())
        raise
    Console().print(found.report.table(title=str(options.checkpoint)))
    ensure_writable(options.out)
    save_model(found.model, options.out / "weights.safetensors", extra={"source": found.provenance})
    _say(f"{options.out / 'weights.safetensors'}: weights")
    if found.ticket is None:
        _say("no ticket: the file holds no masks (--zeros takes exact zeros for pruned)")
    else:
        found.ticket.save(options.out / "ticket.safetensors")
        masks = found.ticket.masks
        _say(f"{options.out / 'ticket.safetensors'}: {masks.count()} of {masks.numel()} weights kept")
    return 0


def export_action(options: argparse.Namespace) -> int:
    """Write a folder for timm."""
    from sparse_robust.tickets.export import export_timm, trained_under
    from sparse_robust.tickets.place import ticket_file
    from sparse_robust.tickets.ticket import Ticket

    ticket = Ticket.load(ticket_file(options.ticket))
    network, masks = trained_under(ticket, options.weights)
    export_timm(network, options.folder, masks, image_size=options.image_size)
    _say(f'{options.folder}: timm.create_model("local-dir:{options.folder}", pretrained=True)')
    return 0


def push_action(options: argparse.Namespace) -> int:
    """Publish a ticket."""
    from sparse_robust.tickets.hub import push
    from sparse_robust.tickets.place import ticket_file

    pushed = push(
        ticket_file(options.ticket), options.repo, weights=options.weights, model=options.model,
        image_size=options.image_size, license=options.license, datasets=options.dataset, revision=options.revision,
        message=options.message, private=options.private,
    )  # fmt: skip
    _say(
        f"{pushed.url}\nfetch exactly this with: sparse-robust ticket pull {pushed.repo} --revision {pushed.revision} "
        f"--sha256 {pushed.sha256}"
    )
    return 0


def pull_action(options: argparse.Namespace) -> int:
    """Fetch a ticket."""
    from sparse_robust.tickets.hub import pull

    folder = options.out or Path(options.repo.rpartition("/")[2] or ".")
    pulled = pull(options.repo, folder, revision=options.revision, sha256=options.sha256)
    masks = pulled.ticket.masks
    _say(
        f"{pulled.file}: {masks.count()} of {masks.numel()} weights kept\n"
        f"revision {pulled.revision}, sha256 {pulled.sha256}"
    )
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
