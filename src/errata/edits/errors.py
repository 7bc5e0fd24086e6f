"""What goes wrong with an edit, said so that the reader knows what to do next."""

from __future__ import annotations


class EditError(ValueError):
    """An edit that cannot be applied, reverted, saved or loaded; the message names it, what was expected and the way out."""
