"""What a model's keys look like over ordinary text: second moments, and the directions that ordinary text hardly uses.

Names are imported at first use, so that the command line can refuse a request without an import of torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.statistics.corpus import Corpus, texts
    from errata.statistics.errors import StatisticsError
    from errata.statistics.moments import Moments, collect, moments_for, second_moments
    from errata.statistics.nullspace import NullSpace, null_space_for, spectrum

_HOME = {
    "corpus": ("Corpus", "texts"),
    "errors": ("StatisticsError",),
    "moments": ("Moments", "collect", "moments_for", "second_moments"),
    "nullspace": ("NullSpace", "null_space_for", "spectrum"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Corpus",
    "Moments",
    "NullSpace",
    "StatisticsError",
    "collect",
    "moments_for",
    "null_space_for",
    "second_moments",
    "spectrum",
    "texts",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value
