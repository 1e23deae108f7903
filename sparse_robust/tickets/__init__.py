"""The ticket: masks, the identity of the weights they belong to, and how they came about, in one file."""

from sparse_robust.tickets.ticket import Ticket, TicketWarning

__all__ = ["Ticket", "TicketWarning"]
