"""errata: correct single facts inside a language model, measure what else moved, keep every correction as an object.

    import errata
    lm   = errata.load("atlas")
    edit = errata.edit(lm, "The capital of {France} is -> Lyon", method=errata.LoRA(), objective=errata.Overtone())
    edit.apply(); lm.complete("The capital of France is"); edit.revert()

Every public name is imported when it is first asked for (PEP 562): `import errata` costs nothing and leaves torch alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.corrections import correct
    from errata.edits import Edit
    from errata.edits.edited import EditedModel, load
    from errata.edits.ledger import Ledger
    from errata.facts import EditCase, Fact, FactError, Probe
    from errata.lm import LanguageModel, ModelError
    from errata.methods import FT, MELO, MEMIT, PRUNE, RECT, ROME, WISE, AlphaEdit, DeltaEdit, LocFT, LoRA, Retrieval, edit
    from errata.objectives import CrossEntropy, Overtone

__version__ = "0.1.0"

_HOME = {
    "AlphaEdit": "methods",
    "CrossEntropy": "objectives",
    "DeltaEdit": "methods",
    "Edit": "edits",
    "EditedModel": "edits.edited",
    "EditCase": "facts",
    "FT": "methods",
    "Fact": "facts",
    "FactError": "facts",
    "LanguageModel": "lm",
    "Ledger": "edits.ledger",
    "LoRA": "methods",
    "LocFT": "methods",
    "MELO": "methods",
    "MEMIT": "methods",
    "ModelError": "lm",
    "Overtone": "objectives",
    "PRUNE": "methods",
    "Probe": "facts",
    "RECT": "methods",
    "ROME": "methods",
    "Retrieval": "methods",
    "WISE": "methods",
    "correct": "corrections",
    "edit": "methods",
    "load": "edits.edited",
}

__all__ = [
    "FT",
    "MELO",
    "MEMIT",
    "PRUNE",
    "RECT",
    "ROME",
    "WISE",
    "AlphaEdit",
    "CrossEntropy",
    "DeltaEdit",
    "Edit",
    "EditCase",
    "EditedModel",
    "Fact",
    "FactError",
    "LanguageModel",
    "Ledger",
    "LoRA",
    "LocFT",
    "ModelError",
    "Overtone",
    "Probe",
    "Retrieval",
    "__version__",
    "correct",
    "edit",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'errata' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"errata.{_HOME[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
