"""Model families that papers give hyper-parameters for, recognised by their shape (a name may be a local folder)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel

#: (model_type, layers, hidden size, vocabulary) -> family. A vocabulary of 0 stands for any: fine-tunes add tokens.
_SHAPES = {
    ("gpt2", 48, 1600, 0): "gpt2-xl",
    ("gptj", 28, 4096, 0): "gpt-j-6b",
    ("llama", 32, 4096, 32000): "llama-2-7b",
    ("llama", 32, 4096, 128256): "llama-3-8b",
    ("qwen2", 28, 3584, 0): "qwen2.5-7b",
    ("qwen3", 6, 256, 3072): "atlas",
}


def family(lm: LanguageModel) -> str | None:
    """The family's name, None for a model that no paper speaks of."""
    config = lm.model.config.get_text_config()
    shape = (config.model_type, config.num_hidden_layers, config.hidden_size)
    found = _SHAPES.get((*shape, config.vocab_size)) or _SHAPES.get((*shape, 0))
    # Llama 3 and 3.1 have one shape; the younger one stretches its positions.
    stretched = (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "llama3"
    return "llama-3.1-8b" if found == "llama-3-8b" and stretched else found
