"""Objectives: what is minimised on the target tokens, by any editor that optimises. Nothing here knows about models.

The names can be listed without importing torch; a class is imported when it is asked for.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.objectives.base import Objective as Objective
    from errata.objectives.base import ObjectiveValue as ObjectiveValue
    from errata.objectives.cross_entropy import CrossEntropy as CrossEntropy
    from errata.objectives.overtone import Overtone as Overtone

NAMES = {"ce": "cross_entropy:CrossEntropy", "overtone": "overtone:Overtone"}
"""Name on the command line and in plans -> "module:Class"."""

_PUBLIC = {"Objective": "base", "ObjectiveValue": "base", "CrossEntropy": "cross_entropy", "Overtone": "overtone"}


def get(name: str, **settings: Any) -> Objective:
    """The objective of that name (see `NAMES`) with these settings, for instance `get("overtone", epsilon=0.01)`.

    Raises ValueError for an unknown name or setting (with the nearest known one) or a value out of range.
    """
    module, _, cls_name = NAMES[_known("objective", name, list(NAMES))].partition(":")
    cls = getattr(import_module(f"{__name__}.{module}"), cls_name)
    for setting in settings:
        _known(f"setting of the objective {name!r}", setting, [field.name for field in fields(cls)])
    objective: Objective = cls(**settings)
    return objective


def _known(what: str, name: str, known: list[str]) -> str:
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    raise ValueError(f"no {what} is called {name!r}; " + (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(known)}")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
