"""The model card of a ticket on the Hub: metrics, sparsity, provenance, how to load it, licence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from sparse_robust.files import canonical_json
from sparse_robust.tickets.ticket import Ticket

TAGS = ("sparse-robust", "lottery-ticket", "pruning", "adversarial-robustness", "image-classification")
CONTENTS = {
    "ticket.safetensors": "the ticket: packed masks and where they come from",
    "weights.safetensors": "the weights it was drawn from",
    "model.safetensors": "the sparse network, as timm loads it",
    "config.json": "its architecture and preprocessing, for timm",
}


def card(
    ticket: Ticket, repo: str, sums: Mapping[str, str], *, license: str | None = None, datasets: Sequence[str] = ()
) -> str:
    """Return the text of README.md: metadata that the Hub reads, and a page for people.

    Args:
        ticket: what it is about.
        repo: ``owner/name`` on the Hub.
        sums: sha256 by name of the files beside it.
        license: identifier of the Hub, such as ``mit`` or ``cc-by-4.0``; None leaves it open, and the page says so.
        datasets: names on the Hub of what the weights were trained on; those of the evaluations are added as metrics.
    """
    from huggingface_hub import ModelCard, ModelCardData

    title, has_model = repo.rpartition("/")[2], "model.safetensors" in sums
    rows = [row for record in ticket.evaluations if (row := summary(record))]
    data = ModelCardData(
        license=license, library_name="timm" if has_model else "sparse-robust", pipeline_tag="image-classification",
        tags=[*TAGS, *(["timm"] if has_model else [])], datasets=list(datasets) or None,
        base_model=_base_model(ticket), model_name=title if rows else None, eval_results=_results(rows) or None,
    )  # fmt: skip
    template = resources.files("sparse_robust") / "tickets" / "templates" / "card.md"
    facts = {"source data": ticket.architecture.get("source"), **ticket.provenance}
    text = ModelCard.from_template(
        data, template_str=template.read_text(encoding="utf-8"), title=title, repo=repo,
        kept=f"{ticket.masks.count():,}", numel=f"{ticket.masks.numel():,}",
        sparsity=f"{100 * ticket.masks.sparsity:.2f}", architecture=cell(ticket.architecture.get("name", "unknown")),
        evaluations=[{key: cell(value) for key, value in row.items()} for row in rows],
        flags=[cell(flag) for record in ticket.evaluations for flag in _list(record.get("flags"))],
        files=[(name, CONTENTS.get(name, ""), digest) for name, digest in sums.items()],
        has_model=has_model, has_weights="weights.safetensors" in sums, base_sha256=ticket.base_sha256,
        digest=ticket.masks.digest(), version=ticket.version,
        provenance=[(cell(name), cell(value)) for name, value in facts.items() if value not in (None, "", {})],
        licence=f"`{license}`" if license else "Not stated. Ask whoever published it before you use it.",
    )  # fmt: skip
    return str(text.content)


def summary(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the row of a robustness record that people read, or None for a record of another kind."""
    if not {"dataset", "clean_acc", "robust_acc"} <= record.keys():
        return None
    attacks = [a["attack"] for a in _list(record.get("attacks")) if isinstance(a, Mapping) and "attack" in a]
    named = "AutoAttack" if "autoattack_acc" in record else ", ".join(dict.fromkeys(map(str, attacks))) or "unknown"
    return {
        "dataset": record["dataset"], "attack": f"{named}, {record.get('threat_model', '?')}",
        "eps": record.get("eps", "?"), "clean": record["clean_acc"], "robust": record["robust_acc"],
        "images": record.get("images", "?"),
    }  # fmt: skip


def printable(value: Any) -> str:
    """Return a value from a file as one line that cannot steer a terminal."""
    text = canonical_json(value) if isinstance(value, (Mapping, list, tuple)) else str(value)
    return "".join(char if char.isprintable() else " " for char in text[:400])


def cell(value: Any) -> str:
    """Return a value from a file as a cell of a Markdown table."""
    return printable(value).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _results(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the metrics in the form of the Hub's leaderboards: accuracies between 0 and 1."""
    from huggingface_hub import EvalResult

    found = []
    for row in rows:
        for metric, key in (("accuracy", "clean"), ("robust accuracy", "robust")):
            value = _number(row[key])
            if value is None:
                continue
            name = metric if key == "clean" else f"{metric} ({row['attack']}, eps {row['eps']})"
            found.append(
                EvalResult(
                    task_type="image-classification", dataset_type=_identifier(str(row["dataset"])),
                    dataset_name=str(row["dataset"]), metric_type="accuracy", metric_name=name,
                    metric_value=round(value / 100, 6),
                )
            )  # fmt: skip
    return found


def _identifier(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._/-]+", "-", name) or "unknown"


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _base_model(ticket: Ticket) -> str | None:
    """Return the Hub repository that the weights started from, where the architecture names one."""
    source = ticket.architecture.get("source")
    found = re.fullmatch(r"hf-hub:([\w.-]+/[\w.-]+)(@.*)?", source) if isinstance(source, str) else None
    return found[1] if found else None
