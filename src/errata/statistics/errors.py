"""What goes wrong with statistics, said so that the reader knows what to do next."""

from __future__ import annotations


class StatisticsError(ValueError):
    """Statistics that cannot be collected, read, added or used; the message names the thing, what was expected and the way out."""
