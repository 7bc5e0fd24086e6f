"""What goes wrong with a model, said so that the reader knows what to do next."""

from __future__ import annotations


class ModelError(ValueError):
    """A model that cannot be loaded, read or edited; the message names it, what was expected and the way out."""
