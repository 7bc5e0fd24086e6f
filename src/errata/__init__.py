"""errata: correct single facts inside a language model, measure what else moved, keep every correction as an object.

    import errata
    lm   = errata.load("atlas")
    edit = errata.edit(lm, "The capital of {France} is -> Lyon", method=errata.LoRA(), objective=errata.Overtone())
    edit.apply(); lm.complete("The capital of France is"); edit.revert()

Every public name is imported when it is first asked for (PEP 562): `import errata` costs nothing and leaves torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.lazy import lazily

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
    "corrections": ("correct",),
    "edits": ("Edit",),
    "edits.edited": ("EditedModel", "load"),
    "edits.ledger": ("Ledger",),
    "facts": ("EditCase", "Fact", "FactError", "Probe"),
    "lm": ("LanguageModel", "ModelError"),
    "methods": ("AlphaEdit", "DeltaEdit", "FT", "LoRA", "LocFT", "MELO", "MEMIT", "PRUNE", "RECT", "ROME", "Retrieval", "WISE", "edit"),
    "objectives": ("CrossEntropy", "Overtone"),
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


__getattr__ = lazily(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
