"""The language model as an editor sees it: loading, anatomy, tokens, capture, resuming from a layer. Knows nothing of editing.

Names are imported at first use, so that `from errata.lm import ModelError` does not cost an import of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.lazy import lazily

if TYPE_CHECKING:
    from errata.lm.anatomy import Anatomy, find_anatomy, is_conv1d, matrix
    from errata.lm.capture import add_to_output
    from errata.lm.errors import ModelError
    from errata.lm.loading import load, refuse_uneditable
    from errata.lm.model import LanguageModel
    from errata.lm.resume import from_layer, states_at
    from errata.lm.suffix import Suffix
    from errata.lm.tokens import Batch, Encoded, collate, encode, encode_all, joint

_HOME = {
    "anatomy": ("Anatomy", "find_anatomy", "is_conv1d", "matrix"),
    "capture": ("add_to_output",),  # `capture` itself shares its module's name: from errata.lm.capture import capture
    "errors": ("ModelError",),
    "loading": ("load", "refuse_uneditable"),
    "model": ("LanguageModel",),
    "resume": ("from_layer", "states_at"),
    "suffix": ("Suffix",),
    "tokens": ("Batch", "Encoded", "collate", "encode", "encode_all", "joint"),
}

__all__ = [
    "Anatomy",
    "Batch",
    "Encoded",
    "LanguageModel",
    "ModelError",
    "Suffix",
    "add_to_output",
    "collate",
    "encode",
    "encode_all",
    "find_anatomy",
    "from_layer",
    "is_conv1d",
    "joint",
    "load",
    "matrix",
    "refuse_uneditable",
    "states_at",
]

__getattr__ = lazily(__name__, _HOME)
