"""Tickets on the Hugging Face Hub: pushed with a card and checksums, pulled at a revision and checked."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_robust.errors import FileError, SparseRobustError, UsageError
from sparse_robust.files import sha256_file, sha256_state, write_text
from sparse_robust.models import load_model
from sparse_robust.tickets.card import CONTENTS, card
from sparse_robust.tickets.export import export_timm, trained_under
from sparse_robust.tickets.ticket import Ticket

TICKET, BASE, SUMS, CARD = "ticket.safetensors", "weights.safetensors", "SHA256SUMS", "README.md"


@dataclass(frozen=True)
class Pushed:
    """Where a ticket went: ``repo``, the commit ``revision`` that holds it, its ``url`` and the file's ``sha256``."""

    repo: str
    revision: str
    url: str
    sha256: str


@dataclass(frozen=True)
class Pulled:
    """What came: the ticket, its file and the folder it lies in, and the commit ``revision`` it is from."""

    ticket: Ticket
    file: Path
    folder: Path
    revision: str
    sha256: str


def push(
    path: str | Path,
    repo: str,
    *,
    weights: str | Path | None = None,
    model: str | Path | None = None,
    image_size: int | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    revision: str | None = None,
    message: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> Pushed:
    """Publish a ticket file in one commit: the file, a model card, SHA-256 sums, and networks if given.

    The repository is made if there is none. Nothing is sent before everything is checked.

    Args:
        path: the ticket file.
        repo: ``owner/name`` on the Hub.
        weights: the weights file it was drawn from; published as it is, so that others can transfer the ticket.
        model: a weights file trained under the ticket; published as timm loads it.
        image_size: side of the images that ``model`` is meant for; None takes what the network was built for.
        license, datasets: for the card, see `sparse_robust.tickets.card.card`.
        revision: a branch; it is made if there is none. None is the main branch.
        message: of the commit.
        private: whether a repository that is made is private.
        endpoint: of another Hub than huggingface.co.

    Raises:
        UsageError: if the weights are not those the ticket was drawn from, the model was not trained under it, timm
            cannot build it, or the repository's name is none.
        FileError: if a file cannot be read, or the Hub does not take it; the message says what it answered.
    """
    from huggingface_hub import HfApi

    _check_name(repo)
    ticket = Ticket.load(path)
    with tempfile.TemporaryDirectory(prefix="ticket-") as folder:
        stage = Path(folder)
        shutil.copyfile(path, stage / TICKET)
        if weights is not None:
            ticket.require_base(sha256_state(load_model(weights).state_dict()))
            shutil.copyfile(weights, stage / BASE)
        if model is not None:
            network, masks = trained_under(ticket, model)
            export_timm(network, stage, masks, image_size=image_size)
        sums = {file.name: sha256_file(file) for file in sorted(stage.iterdir())}
        write_text(stage / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        write_text(stage / CARD, card(ticket, repo, sums, license=license, datasets=datasets))
        api = HfApi(endpoint=endpoint)
        with _answers(f"push {path} to {repo}"):
            api.create_repo(repo, private=private or None, exist_ok=True)
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            about = f"Ticket of {ticket.masks.count()} weights, sparsity {100 * ticket.masks.sparsity:.2f} %"
            commit = api.upload_folder(
                repo_id=repo, folder_path=stage, revision=revision, commit_message=message or about
            )
    return Pushed(repo, commit.oid, commit.commit_url, sums[TICKET])


def pull(
    repo: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    endpoint: str | None = None,
) -> Pulled:
    """Fetch a ticket, with the networks published beside it, into ``folder``, and check all of it.

    Every file must have the sum that the repository's SHA256SUMS states and be sound; ``folder`` gets all of them or,
    when anything is wrong, none.

    Args:
        repo: ``owner/name`` on the Hub.
        folder: created; files of an earlier pull there are replaced.
        revision: a commit, branch or tag; None is the main branch. Only a commit always means the same files.
        sha256: what the ticket file must have, 64 hexadecimal digits (`Pushed.sha256`); None takes what is stated.
        endpoint: of another Hub than huggingface.co.

    Raises:
        UsageError: if the repository's name or ``sha256`` is none.
        FileError: if the Hub does not give it, a file is not the one that was published, or the ticket is damaged.
    """
    _check_name(repo)
    if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
        raise UsageError(f"a sha256 has 64 hexadecimal digits, got {sha256!r}.")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".pull-") as temporary:
            stage = Path(temporary)
            commit = _download(repo, revision, stage, endpoint)
            names = _verify(repo, stage, sha256)
            try:
                ticket = Ticket.load(stage / TICKET)
            except SparseRobustError as error:
                raise FileError(f"{repo} holds no sound ticket: {error}") from error
            digest = sha256_file(stage / TICKET)
            for name in names:
                (stage / name).replace(folder / name)
    except OSError as error:
        raise (error if isinstance(error, FileError) else FileError(f"cannot write {folder}: {error}.")) from error
    return Pulled(ticket, folder / TICKET, folder, commit, digest)


def _download(repo: str, revision: str | None, stage: Path, endpoint: str | None) -> str:
    """Fetch the files that may belong to a ticket, all of one commit, and return it."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint)
    with _answers(f"pull {repo}" + (f" at {revision}" if revision else "")):
        info = api.model_info(repo, revision=revision)
        there = {entry.rfilename for entry in info.siblings or ()}
        if TICKET not in there:
            raise FileError(f"{repo} holds no ticket: it has no {TICKET}, only {', '.join(sorted(there)[:8])}.")
        for name in (*CONTENTS, SUMS, CARD):
            if name in there:
                # Not through the cache: what once came damaged would come from there again.
                api.hf_hub_download(repo, name, revision=info.sha, local_dir=stage)
    return str(info.sha)


def _verify(repo: str, stage: Path, sha256: str | None) -> list[str]:
    """Check the sums of what was fetched, and return the names."""
    names = sorted(file.name for file in stage.iterdir() if file.is_file())
    stated = _stated(repo, stage / SUMS) if SUMS in names else {}
    for absent in stated.keys() - set(names):
        raise FileError(f"{repo} should hold {absent!r}, which its {SUMS} lists, and does not. Nothing was kept.")
    if sha256 is not None and stated.get(TICKET, sha256.lower()) != sha256.lower():
        raise FileError(f"{repo} holds another ticket: {stated[TICKET]}, expected sha256 {sha256.lower()}.")
    if sha256 is not None:
        stated[TICKET] = sha256.lower()
    for name in names:
        if name in stated and (got := sha256_file(stage / name)) != stated[name]:
            raise FileError(
                f"{name} of {repo} has sha256 {got}, expected {stated[name]}: it was changed or came incomplete. "
                "Nothing was kept; pull it again, or ask whoever published it."
            )
    return names


def _stated(repo: str, file: Path) -> dict[str, str]:
    """Return the sums that a file of `sha256sum` states, by name."""
    stated = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        found = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if not found:
            raise FileError(f"{file.name} of {repo} is damaged: {line[:80]!r} is no sum and name. Nothing was kept.")
        stated[found[2]] = found[1]
    return stated


def _check_name(repo: str) -> None:
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repo, re.ASCII) or ".." in repo or "--" in repo:
        raise UsageError(f"a repository on the Hub is named owner/name, such as me/resnet18-ticket; got {repo!r}.")


@contextmanager
def _answers(what: str) -> Iterator[None]:
    """Turn what the Hub and the network answer into errors of ours, which say what was tried and what can be done."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    advice: tuple[tuple[Any, str], ...] = (
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE is set: unset it"),
        (GatedRepoError, "ask its owner for access, and log in (hf auth login)"),
        (RepositoryNotFoundError, "check the name, and log in if it is private (hf auth login)"),
        (RevisionNotFoundError, "check the revision: a branch, a tag or a commit"),
        (LocalEntryNotFoundError, "check the connection"),
        (HfHubHTTPError, "log in with a token that may write there (hf auth login), or try again later"),
    )
    try:
        yield
    except SparseRobustError:
        raise
    except HFValidationError as error:
        raise UsageError(f"cannot {what}: {_line(error)}") from error
    except Exception as error:  # the client lets errors of every layer below it through
        way = next((text for kind, text in advice if isinstance(error, kind)), "check the connection and try again")
        raise FileError(f"cannot {what}: {_line(error)}. What can be done: {way}.") from error


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".")[:300]
