"""Editors: one file a method, each a combination of where, objective, write rule and memory.

The names can be listed without importing torch; a class is imported when it is asked for.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from errata.facts import Fact

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.lm.model import LanguageModel
    from errata.methods.alphaedit import AlphaEdit as AlphaEdit
    from errata.methods.base import Method as Method
    from errata.methods.base import Session as Session
    from errata.methods.deltaedit import DeltaEdit as DeltaEdit
    from errata.methods.ft import FT as FT
    from errata.methods.locft import LocFT as LocFT
    from errata.methods.lora import LoRA as LoRA
    from errata.methods.melo import MELO as MELO
    from errata.methods.memit import MEMIT as MEMIT
    from errata.methods.prune import PRUNE as PRUNE
    from errata.methods.rect import RECT as RECT
    from errata.methods.retrieval import Retrieval as Retrieval
    from errata.methods.rome import ROME as ROME
    from errata.methods.wise import WISE as WISE
    from errata.objectives.base import Objective

NAMES: dict[str, tuple[str, dict[str, Any], str]] = {
    "ft-l": ("ft:FT", {"variant": "l"}, "Adam on one MLP down-projection, all target tokens asked of the last prompt position"),
    "ft-m": ("ft:FT", {"variant": "m"}, "Adam on one MLP down-projection, each target token behind the ones before it"),
    "locft": ("locft:LocFT", {}, "Adam on one MLP down-projection, breadth-first over a set of facts, with an end token on every target"),
    "lora": ("lora:LoRA", {}, "Adam on low-rank adapters of query and value, every layer"),
    "melo": ("melo:MELO", {}, "low-rank blocks beside the weights, one for each neighbourhood of edited questions"),
    "wise": ("wise:WISE", {}, "a side copy of one MLP projection that stirs at edited questions, and answers those"),
    "rome": ("rome:ROME", {}, "one rank-one write of the found value into one MLP"),
    "memit": ("memit:MEMIT", {}, "the value shared out over several MLPs, each write a ridge regression"),
    "memit+history": ("memit:MEMIT", {"history": True}, "MEMIT that also holds on to the keys of earlier edits"),
    "prune": ("prune:PRUNE", {}, "MEMIT, with the singular values of all that was written held down at the end"),
    "rect": ("rect:RECT", {}, "MEMIT, keeping the entries that change their weight most"),
    "alphaedit": ("alphaedit:AlphaEdit", {}, "writes in the null space of ordinary keys, holding on to earlier ones"),
    "deltaedit": ("deltaedit:DeltaEdit", {}, "AlphaEdit, with values orthogonal to earlier ones where their noise is loud"),
    "retrieval": ("retrieval:Retrieval", {}, "changes no weight: the facts that a question is about stand in front of it"),
}
"""Name on the command line and in plans -> ("module:Class", what makes it this method, what it is)."""

WITHOUT_OBJECTIVE = frozenset({"retrieval"})
"""Names of methods that optimise nothing (see `Method.optimises`), known without importing them: a plan runs each of them once."""

_PUBLIC = {
    "AlphaEdit": "alphaedit",
    "DeltaEdit": "deltaedit",
    "FT": "ft",
    "LoRA": "lora",
    "LocFT": "locft",
    "MELO": "melo",
    "MEMIT": "memit",
    "Method": "base",
    "PRUNE": "prune",
    "RECT": "rect",
    "ROME": "rome",
    "Retrieval": "retrieval",
    "Session": "base",
    "WISE": "wise",
}


def get(name: str, **settings: Any) -> Method:
    """The method of that name (see `NAMES`) with these hyper-parameters. Raises ValueError for an unknown name."""
    if name not in NAMES:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise ValueError(f"no method is called {name!r}; {f'did you mean {close[0]!r}? ' if close else ''}known: {', '.join(NAMES)}")
    home, own, _ = NAMES[name]
    module, _, cls_name = home.partition(":")
    method: Method = getattr(import_module(f"{__name__}.{module}"), cls_name)(**{**own, **settings})
    return method


def edit(
    lm: LanguageModel,
    facts: Fact | str | Sequence[Fact | str],
    method: Method | str = "ft-m",
    objective: Objective | str = "ce",
    seed: int = 0,
) -> Edit:
    """One edit that makes `facts` true together; the model is not changed before `edit.apply()`.

    facts: one or several, each a Fact or a line like "The capital of {France} is -> Lyon".
    method, objective: an object, or a name; a name brings the method's own values.
    Raises FactError for a fact that cannot be edited, ModelError for a model that cannot, ValueError for an unknown name.
    """
    listed = [facts] if isinstance(facts, Fact | str) else list(facts)
    editor = get(method) if isinstance(method, str) else method
    loss = editor.objective(objective) if isinstance(objective, str) else objective
    return editor.start(lm, objective=loss, seed=seed).complete([Fact.parse(fact) if isinstance(fact, str) else fact for fact in listed])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
