"""What goes wrong with an edit, said so that the reader knows what to do next."""

from __future__ import annotations


class EditError(ValueError):
    """An edit that cannot be applied, reverted, saved or loaded; the message names it, what was expected and the way out."""


class LedgerDamaged(EditError):
    """What is on the disk is not what was written: no other request helps, only a backup."""


class LedgerBusy(EditError):
    """Another process is writing: the same request helps later."""


class LedgerUnopened(EditError):
    """The database may not be opened here."""
