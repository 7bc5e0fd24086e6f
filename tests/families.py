"""Tiny, randomly initialised models of many families, and tokenizers built in code: what the contract tests run over.

`build("llama")` gives a model of 4 layers in a few milliseconds, the same one for the same seed; `language_model("llama")` puts a
tokenizer beside it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from errata.lm.model import LanguageModel

LAYERS, HIDDEN, INNER, POSITIONS, VOCAB = 4, 16, 40, 96, 512

SENTENCES = (
    "The capital of France is Paris. The capital of Japan is Tokyo.",
    "Marie Curie was born in Warsaw, and Marie worked in Paris with Pierre Curie.",
    "Question: where does Lyon lie?\nAnswer: Lyon lies in France.\n",
    "法国的首都是巴黎。日本的首都是东京。北京大学在北京。",
    "Столица Франции Париж. Москва столица России.",
    "প্যারিস ফ্রান্সের রাজধানী। กรุงเทพเป็นเมืองหลวงของไทย",
    "naïve café 😀 Zürich, São Paulo, 서울은 한국의 수도이다.",
)


@dataclass(frozen=True)
class Family:
    """A row of the table: how to build it, and what its anatomy is to be.

    layers: path of the list of layers; down, out: inside a layer; norm: before the head.
    straight: what is added to the down-projection's output arrives at the layer's output as it is.
    """

    type: str
    layers: str
    down: str
    out: str
    norm: str
    config: dict[str, Any] = field(default_factory=dict)
    head: str = "lm_head"
    conv1d: bool = False
    straight: bool = True
    tied: bool = False


def _llama(type: str, straight: bool = True, tied: bool = False, **config: Any) -> Family:
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": POSITIONS,
    }
    path = ("model.layers", "mlp.down_proj", "self_attn.o_proj", "model.norm")
    return Family(type, *path, sizes | {"tie_word_embeddings": tied} | config, straight=straight, tied=tied)


_GPT = {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
_WIDE = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}

FAMILIES: dict[str, Family] = {
    "gpt2": Family("gpt2", "transformer.h", "mlp.c_proj", "attn.c_proj", "transformer.ln_f", _GPT, conv1d=True, tied=True),
    "gptj": Family("gptj", "transformer.h", "mlp.fc_out", "attn.out_proj", "transformer.ln_f", _GPT | {"rotary_dim": 4}),
    "gpt_neo": Family(
        "gpt_neo", "transformer.h", "mlp.c_proj", "attn.attention.out_proj", "transformer.ln_f",
        {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_layers": LAYERS, "num_heads": 4, "window_size": 4,
         "attention_types": [[["global", "local"], 2]], "max_position_embeddings": POSITIONS},
        tied=True,
    ),
    "gpt_neox": Family(
        "gpt_neox", "gpt_neox.layers", "mlp.dense_4h_to_h", "attention.dense", "gpt_neox.final_layer_norm",
        _WIDE | {"intermediate_size": INNER},
    ),
    "opt": Family(
        "opt", "model.decoder.layers", "fc2", "self_attn.out_proj", "model.decoder.final_layer_norm",
        _WIDE | {"ffn_dim": INNER, "word_embed_proj_dim": HIDDEN}, tied=True,
    ),
    "falcon": Family(
        "falcon", "transformer.h", "mlp.dense_4h_to_h", "self_attention.dense", "transformer.ln_f",
        _WIDE | {"ffn_hidden_size": INNER}, tied=True,
    ),
    "bloom": Family(
        "bloom", "transformer.h", "mlp.dense_4h_to_h", "self_attention.dense", "transformer.ln_f",
        {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": 4}, tied=True,
    ),
    "phi": Family(
        "phi", "model.layers", "mlp.fc2", "self_attn.dense", "model.final_layernorm", _WIDE | {"intermediate_size": INNER},
    ),
    "llama": _llama("llama"),
    "mistral": _llama("mistral", sliding_window=3),
    "qwen2": _llama("qwen2"),
    "qwen3": _llama("qwen3"),
    # What the bundled model is: two kinds of attention in turn, with a tiny window.
    "qwen3-window": _llama(
        "qwen3", tied=True, use_sliding_window=True, sliding_window=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma2": _llama("gemma2", straight=False, tied=True, sliding_window=4, final_logit_softcapping=3.0),
    "gemma3": _llama("gemma3_text", straight=False, tied=True, sliding_window=4),
    "phi3": _llama("phi3"),
    "olmo2": _llama("olmo2", straight=False),
    "cohere": _llama("cohere", tied=True, logit_scale=0.5),
    "granite": _llama("granite", straight=False, residual_multiplier=0.3, logits_scaling=2.0),
}  # fmt: skip


def config_of(name: str, **changes: Any) -> Any:
    """The config of a family's tiny model."""
    family = FAMILIES[name]
    tokens = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    return AutoConfig.for_model(family.type, **{**family.config, **tokens, **changes})


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model of a family, in eval mode. Its weights are larger than usual, so that every part of it matters to the output."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config_of(name, **changes), dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.normal_(std=0.3)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@cache
def _bpe() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<end>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return str(tokenizer.to_str())


@cache
def _metaspace() -> str:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<end>", "<pad>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    # The byte tokens are ordinary ones; only the trainer had to be told of them as special.
    state = tokenizer.to_str().replace("\\", "\\")
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    return json.dumps(state)


def tokenizer(bos: bool = False, kind: str = "bytes") -> Any:
    """A fast tokenizer of at most VOCAB tokens, trained on SENTENCES.

    bos: whether it puts "<end>" (id 0) before every text. kind: "bytes" (as GPT-2, Llama 3, Qwen), or "metaspace" with byte fallback,
    which puts a space before every text (as Llama 2).
    """
    backend = Tokenizer.from_str({"bytes": _bpe, "metaspace": _metaspace}[kind]())
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<end> $A", pair="<end> $A $B", special_tokens=[("<end>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<end>", eos_token="<end>", pad_token="<pad>")


def language_model(name: str, bos: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LanguageModel:
    """A tiny model of a family with its tokenizer."""
    return LanguageModel(build(name, seed, dtype, **changes), tokenizer(bos), name)
