"""Correcting a model for good: requests are looked at, edits are measured before they stay, and what stays is in a ledger."""

from __future__ import annotations

from errata.corrections.gate import Gate, Limits
from errata.corrections.requests import read_requests
from errata.corrections.run import Outcome, correct, rebase

__all__ = ["Gate", "Limits", "Outcome", "correct", "read_requests", "rebase"]
