"""The side memory: how shards are kept and merged, and which side answers which text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from errata.edits import Edit, EditError
from errata.edits.side import SideMemory, distances, packed, side, unpacked
from errata.edits.ties import ties
from errata.lm import Encoded, LanguageModel, encode
from errata.lm.anatomy import matrix
from errata.lm.capture import capture, submodule
from tests.families import FAMILIES, language_model

QUESTION, OTHER = ("The capital of France is", "Paris"), ("Marie Curie was born in", "Warsaw, and Marie")


def reference_ties(changes: list[Tensor], weights: list[float], density: float) -> Tensor:
    """Algorithm 1 of arXiv 2306.01708, entry by entry."""
    kept = []
    for change in changes:
        flat = change.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: -abs(flat[i]))[: int(density * len(flat))]
        kept.append([value if i in order else 0.0 for i, value in enumerate(flat)])
    merged = []
    for values in zip(*kept, strict=True):
        total = sum(w * v for w, v in zip(weights, values, strict=True))
        agreeing = [(w, v) for w, v in zip(weights, values, strict=True) if v * total > 0]
        merged.append(sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0)
    return torch.tensor(merged, dtype=torch.float64).view_as(changes[0])


@pytest.mark.parametrize("density", [0.1, 0.53, 1.0])
def test_ties_is_the_algorithm(density: float) -> None:
    draw = torch.Generator().manual_seed(0)
    changes = [torch.randn(7, 9, dtype=torch.float64, generator=draw) * (torch.rand(7, 9, generator=draw) < 0.6) for _ in range(3)]
    weights = [1.0, 2.0, 1.0]
    torch.testing.assert_close(ties(changes, weights, density), reference_ties(changes, weights, density))


def test_ties_of_shards_that_do_not_overlap_is_their_sum() -> None:
    """Nothing is trimmed of a shard that may change fewer entries than the density keeps: no edit is lost for being in company."""
    draw = torch.Generator().manual_seed(1)
    place = torch.randint(5, (8, 8), generator=draw)
    change = torch.randn(8, 8, generator=draw)
    shards = [torch.where(place == k, change, 0.0) for k in range(5)]
    assert torch.equal(ties(shards, [1.0] * 5, 0.53), change)


@pytest.mark.parametrize("count", [1, 8, 30])
def test_a_side_is_kept_to_the_bit(count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    allowed = torch.rand(count, 3, generator=draw) < 0.3
    change = torch.randn(count, 3, generator=draw).where(allowed, 0.0)
    kept = side(change, allowed, 1.0, ())
    assert torch.equal(kept.change((count, 3)), change) and len(kept.mask) == -(-count * 3 // 8)
    assert torch.equal(unpacked(packed(allowed.flatten()), count * 3), allowed.flatten())


def test_distances_are_the_mean_over_the_questions_tokens() -> None:
    draw = torch.Generator().manual_seed(0)
    x, change = torch.randn(2, 4, 5, dtype=torch.float64, generator=draw), torch.randn(3, 5, dtype=torch.float64, generator=draw)
    asked = torch.tensor([[True, True, False, False], [False, True, True, True]])
    expected = [
        sum(float((change @ x[b, t]).norm()) for t in range(4) if asked[b, t]) / int(asked[b].sum()) for b in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(distances(x, asked, change), torch.tensor(expected, dtype=torch.float64))


def stirred(lm: LanguageModel, module: str, change: Tensor, *prompts: str) -> list[float]:
    """The distance of each prompt, asked alone."""
    found = []
    for prompt in prompts:
        with capture(lm.model, {"x": module}, inputs=True) as seen, torch.no_grad():
            lm.model(input_ids=torch.tensor([encode(lm.tokenizer, prompt).ids]))
        x = seen["x"].reshape(1, -1, change.shape[1])
        found.append(float(distances(x, torch.ones(x.shape[:2], dtype=torch.bool), change)))
    return found


def memory(lm: LanguageModel) -> SideMemory:
    """Two sides: one answers QUESTION, whose threshold lies between what QUESTION and OTHER stir; what the other has, nothing stirs."""
    module = lm.anatomy.mlp_down[2]
    shape = lm.anatomy.hidden_size, lm.anatomy.key_size
    draw = torch.Generator().manual_seed(0)
    for _ in range(200):
        allowed = torch.rand(shape, generator=draw) < 0.5
        change = torch.outer(torch.randn(shape[0], generator=draw), torch.randn(shape[1], generator=draw)).where(allowed, 0.0)
        yes, no = stirred(lm, module, change, QUESTION[0], OTHER[0])
        if yes > 1.2 * no:
            break
    else:
        pytest.fail("no change stirs at the one question more than at the other")
    texts = (Encoded((1, 2, 3), 2),)
    return SideMemory("s", None, module, shape, (side(change, allowed, 1e9, texts), side(change, allowed, (yes + no) / 2, texts, True)))


def logits(lm: LanguageModel, *texts: tuple[str, str]) -> list[Tensor]:
    """Of each text, in one batch, without padding."""
    with torch.no_grad():
        batch = lm.batch([encode(lm.tokenizer, *text) for text in texts])
        return [row[mask] for row, mask in zip(lm.target_logits(batch), batch.mask, strict=True)]


def write(lm: LanguageModel, made: SideMemory) -> None:
    with torch.no_grad():
        matrix(submodule(lm.model, made.module)).add_(made.sides[1].change(made.shape))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_side_is_other_weights_for_its_question_alone(family: str) -> None:
    """Against W′ written into the model; the other text in the batch, longer, is answered as ever. So it is in generation."""
    lm = language_model(family)
    made, prompts = memory(lm), [QUESTION[0], OTHER[0]]
    plain, said = logits(lm, QUESTION, OTHER), lm.generate(prompts, 4, stop_at_newline=False)
    with made.attached(lm) as chosen:
        routed = logits(lm, QUESTION, OTHER)
        which = chosen()
        written = lm.generate(prompts, 4, stop_at_newline=False)  # padded on the left, with a cache
        logits(lm, (QUESTION[0], "Lyon, in France"))
        again = chosen()
    assert which is not None and which.tolist() == [1, -1]
    assert again is not None and again.tolist() == [1], "another answer, the same decision"
    assert torch.equal(routed[1], plain[1])
    assert all(map(torch.equal, logits(lm, QUESTION, OTHER), plain)), "everything is as it was"
    write(lm, made)
    expected = logits(lm, QUESTION, OTHER)
    assert not torch.allclose(expected[0], plain[0], atol=1e-2)
    torch.testing.assert_close(routed[0], expected[0], atol=1e-4, rtol=1e-4)
    assert written == [lm.generate(prompts, 4, stop_at_newline=False)[0], said[1]]


def test_the_side_that_is_stirred_most_answers() -> None:
    """Beyond its threshold, that is: one that is stirred more but not enough stays silent."""
    lm = language_model("llama")
    made = memory(lm)
    weak, strong = made.sides[1], made.sides[1]
    for factor, open, expected in ((2.0, True, 1), (2.0, False, 0), (0.5, True, 0)):
        strong = side(made.sides[1].change(made.shape) * factor, unpacked(weak.mask, 640).view(made.shape), 0.0 if open else 1e9, ())
        with SideMemory("s", None, made.module, made.shape, (weak, strong)).attached(lm) as chosen:
            logits(lm, QUESTION)
            which = chosen()
        assert which is not None and which.tolist() == [expected]


def test_saved_and_loaded(tmp_path: Any) -> None:
    lm = language_model("gpt2")
    edit = Edit(lm, [], [], {"name": "wise"}, memory=memory(lm))
    with edit.applied_():
        expected = logits(lm, QUESTION, OTHER)
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit", lm)
    with loaded.applied_():
        assert all(map(torch.equal, expected, logits(lm, QUESTION, OTHER)))
    assert loaded.memory is not None and edit.memory is not None and loaded.memory.settings() == edit.memory.settings()
    size = (tmp_path / "edit" / "deltas.safetensors").stat().st_size
    assert size < 2 * 640 * 4 * 0.75, "the entries that differ and a bit for each of all, not two copies"


def test_another_model_is_refused() -> None:
    lm, other = language_model("llama"), language_model("gpt2")
    with pytest.raises(EditError, match="does not fit gpt2"):
        Edit(other, [], [], {"name": "wise"}, memory=memory(lm)).apply()
    wide = language_model("llama", intermediate_size=44)
    with pytest.raises(EditError, match="fits a weight"):
        Edit(wide, [], [], {"name": "wise"}, memory=memory(lm)).apply()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*other.model.modules(), *wide.model.modules()))
