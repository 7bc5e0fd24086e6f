"""Generation's ends, limits, and looking inside."""

from __future__ import annotations

import pytest
import torch

from errata.lm.capture import add_to_output, capture
from errata.lm.errors import ModelError
from errata.lm.model import LanguageModel
from errata.lm.tokens import decode, encode
from tests.families import POSITIONS, SENTENCES, build, language_model, tokenizer


def scripted(text: str, kind: str = "bytes") -> LanguageModel:
    """A model that says `text` after the prompt "Lyon" and then its end token, whatever its weights: the head's output is replaced."""
    tok = tokenizer(kind=kind)
    lm = LanguageModel(build("llama"), tok, "scripted")
    encoded = encode(tok, "Lyon", text)
    script = [*encoded.target_ids, tok.eos_token_id]
    said = {"tokens": 0}

    def speak(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(output)
        logits[..., script[min(said["tokens"], len(script) - 1)]] = 1.0
        said["tokens"] += 1
        return logits

    lm.model.get_submodule(lm.anatomy.head).register_forward_hook(speak)
    return lm


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize(
    ("text", "stopped"),
    [
        (" lies in France", " lies in France"),
        (" lies in France.\nAnswer: no", " lies in France."),
        ("\nAnswer", ""),
        ("是法国", "是法国"),
    ],
)
def test_generation_ends_at_the_line_and_gives_only_the_new_text(kind: str, text: str, stopped: str) -> None:
    assert scripted(text, kind).generate(["Lyon"], 30) == [stopped]
    assert scripted(text, kind).complete("Lyon", 30) == text


def test_a_token_with_a_line_break_inside_ends_the_line() -> None:
    tok = tokenizer()
    tok.add_tokens([".\n\n"])
    lm = LanguageModel(build("llama", vocab_size=len(tok)), tok)
    token = tok.convert_tokens_to_ids(".\n\n")
    spoken: list[int] = []

    def speak(_: object, __: object, output: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros_like(output)
        logits[..., token if len(spoken) == 1 else 300] = 1.0
        spoken.append(token)
        return logits

    with_hook = lm.model.get_submodule(lm.anatomy.head).register_forward_hook(speak)
    assert lm.generate(["Lyon"], 20) == [decode(tok, [300]) + "."]
    assert len(spoken) == 2  # and nothing was computed after it
    with_hook.remove()


def test_generation_stops_where_the_positions_do() -> None:
    lm = language_model("gpt2")  # learned positions: one more would be an index error
    prompt = SENTENCES[1] * 3
    length = len(encode(lm.tokenizer, prompt).ids)
    assert POSITIONS - 40 < length < POSITIONS
    lm.tokenizer.eos_token = None
    lm.model.generation_config.eos_token_id = None
    new = lm._continue([encode(lm.tokenizer, prompt).ids], 1000, stop_at_newline=False)
    assert len(new[0]) == POSITIONS - length
    for call in (lambda: lm.complete(prompt * 4), lambda: lm.batch([encode(lm.tokenizer, prompt * 4, "Lyon")])):
        with pytest.raises(ModelError, match=f"too long for gpt2, which takes {POSITIONS}"):
            call()


def test_all_end_tokens_end() -> None:
    lm = language_model("llama")
    first = int(lm.model(torch.tensor([encode(lm.tokenizer, "Lyon").ids])).logits[0, -1].argmax())
    assert lm.complete("Lyon") != ""
    lm.model.generation_config.eos_token_id = [0, first]
    assert lm.complete("Lyon") == ""


def test_no_prompts_no_texts() -> None:
    assert language_model("llama").generate([], 4) == []


def test_target_logits_need_targets() -> None:
    lm = language_model("llama")
    with pytest.raises(ValueError, match="holds no targets"):
        lm.target_logits(lm.batch([encode(lm.tokenizer, "Lyon lies in")]))


def test_a_fingerprint_is_taken_once() -> None:
    lm = language_model("llama")
    base = lm.fingerprint
    with torch.no_grad():
        lm.anatomy.weight(lm.model, lm.anatomy.mlp_down[0]).add_(1.0)
    assert lm.fingerprint == base
    assert LanguageModel(lm.model, lm.tokenizer).fingerprint != base


def test_a_dense_change_of_a_large_matrix_is_seen() -> None:
    lm = language_model("llama", vocab_size=300_000)  # the embeddings are sampled now
    other = LanguageModel(lm.model, lm.tokenizer)
    base = lm.fingerprint
    with torch.no_grad():
        other.model.lm_head.weight.add_(1e-4)
    assert other.fingerprint != base


def test_add_to_output_takes_tensors_functions_and_gradients() -> None:
    lm = language_model("opt")  # its MLP works on [B·T, d]
    batch = lm.batch([encode(lm.tokenizer, "Lyon lies in", "France"), encode(lm.tokenizer, "Marie", "Curie")])
    path = lm.anatomy.mlp_down[3]
    delta = torch.zeros(*batch.input_ids.shape, lm.anatomy.hidden_size, requires_grad=True)
    with add_to_output(lm.model.get_submodule(path), delta):
        lm.target_logits(batch)[batch.mask].sum().backward()
    assert delta.grad is not None
    touched = delta.grad.abs().sum(-1) > 0  # in the last layer only the positions whose logits were asked for
    expected = torch.zeros_like(touched)
    rows, columns = batch.mask.nonzero(as_tuple=True)
    expected[rows, batch.positions[rows, columns]] = True
    assert torch.equal(touched, expected)
    with torch.no_grad(), capture(lm.model, {"out": path}) as plain:
        lm.target_logits(batch)
    with torch.no_grad(), add_to_output(lm.model.get_submodule(path), lambda out: 2 * out), capture(lm.model, {"out": path}) as tripled:
        lm.target_logits(batch)
    torch.testing.assert_close(tripled["out"], 3 * plain["out"])


def test_an_unknown_module_is_named() -> None:
    lm = language_model("llama")
    with pytest.raises(ModelError, match=r"no module 'model.layers.7'"), capture(lm.model, {"h": "model.layers.7"}):
        pass
    with pytest.raises(ModelError, match=r"'model.layers.0.mlp.act_fn' .* holds no weight"):
        lm.anatomy.weight(lm.model, "model.layers.0.mlp.act_fn")
