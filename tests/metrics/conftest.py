"""A tiny Llama that has learned a few sentences, so that its answers are neither all right nor all wrong."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from errata.lm import LanguageModel

SENTENCES = [
    "The capital of France is Paris.",
    "The capital of Norway is Oslo.",
    "The capital of Italy is Rome, an old town on a river.",
    "Ada Byron lives in London. She works as a writer of programs.",
    "Bo Ek lives in Stockholm. He works as a baker.",
    "nq question: who bakes bread in the morning baker Bo",
]


@pytest.fixture(scope="session")
def lm() -> LanguageModel:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **sizes))
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    texts = [torch.tensor([[*tokenizer(text).input_ids, 1]]) for text in SENTENCES]
    for _ in range(25):
        optimiser.zero_grad()
        torch.stack([model(ids, labels=ids).loss for ids in texts]).sum().backward()
        optimiser.step()
    return LanguageModel(model.requires_grad_(False), tokenizer, "tiny")


@pytest.fixture(scope="session")
def edited(lm: LanguageModel) -> LanguageModel:
    """The same model with noise in one matrix: some of its answers have moved."""
    model = copy.deepcopy(lm.model)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.15)
    return LanguageModel(model, lm.tokenizer, "tiny, moved")
