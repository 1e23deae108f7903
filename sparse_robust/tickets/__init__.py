"""The ticket: masks, the identity of the weights they belong to, and how they came about, in one file."""

from sparse_robust.tickets.export import export_timm
from sparse_robust.tickets.hub import Pulled, Pushed, pull, push
from sparse_robust.tickets.importing import Imported, import_checkpoint, zero_masks
from sparse_robust.tickets.place import ticket_file
from sparse_robust.tickets.ticket import Ticket, TicketWarning

__all__ = [
    "Imported",
    "Pulled",
    "Pushed",
    "Ticket",
    "TicketWarning",
    "export_timm",
    "import_checkpoint",
    "pull",
    "push",
    "ticket_file",
    "zero_masks",
]
