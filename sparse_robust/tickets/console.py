"""What the command line shows of a ticket."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from sparse_robust.tickets.card import printable, summary
from sparse_robust.tickets.ticket import Ticket


def show_ticket(ticket: Ticket, path: Path, console: Console | None = None) -> None:
    """Print a ticket's identity, provenance, evaluations and per-layer densities."""
    console, masks = console or Console(), ticket.masks
    console.print(
        Text(path.name, style="bold"),
        f"{masks.count():,} of {masks.numel():,} weights kept, sparsity {100 * masks.sparsity:.2f} %",
        highlight=False,
    )
    facts = {
        "architecture": ticket.architecture.get("name", "unknown"),
        "drawn from weights": ticket.base_sha256,
        "mask digest": masks.digest(),
        "made by": f"sparse-robust {ticket.version}",
        **{str(key): value for key, value in ticket.provenance.items() if value not in (None, "", {})},
    }
    for name, value in facts.items():
        console.print(f"  {printable(name):<20} {printable(value)}", highlight=False, markup=False, soft_wrap=True)
    if ticket.evaluations:
        console.print(_evaluations(ticket))
    console.print(_layers(ticket))


def _evaluations(ticket: Ticket) -> Table:
    table = Table("data set", "attack", "eps", "clean %", "robust %", "images", title="what it reached")
    for record in ticket.evaluations:
        row = summary(record)
        if row is None:
            table.add_row(Text(printable(dict(record))))
        else:
            table.add_row(*(Text(printable(row[key])) for key in row))
    return table


def _layers(ticket: Ticket) -> Table:
    table = Table(Column("weight", overflow="fold"), "shape", "kept", "of", Column("density", no_wrap=True))
    for name, shape, kept, numel in ticket.masks.layers():
        density = kept / max(numel, 1)
        bar = f"{100 * density:5.1f} % {'█' * round(8 * density)}"
        table.add_row(Text(printable(name)), "x".join(map(str, shape)), f"{kept:,}", f"{numel:,}", bar)
    return table
