"""The code book: the geometry of its neighbourhoods, and which block answers which text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.edits import Edit, EditError
from errata.edits.clusters import NEAR, Cluster, Member, place, route
from errata.edits.codebook import Block, CodeBook
from errata.lm import Encoded, LanguageModel, encode
from errata.lm.anatomy import matrix
from errata.lm.capture import capture, submodule
from tests.families import FAMILIES, language_model

TEXT = Encoded((5, 6, 7), 2)
QUESTION, OTHER = ("The capital of France is", "Paris"), ("Marie Curie was born in", "Warsaw, and Marie")


def build(*points: tuple[float, float, str], initial: float = 1.0) -> tuple[Cluster, ...]:
    """A plane of questions with their answers, placed in order; each new cluster has a new block."""
    clusters: tuple[Cluster, ...] = ()
    for x, y, label in points:
        free = max((cluster.block for cluster in clusters), default=-1) + 1
        clusters, _ = place(clusters, Member(torch.tensor([x, y]), TEXT), label, initial, free)
    return clusters


def found(clusters: tuple[Cluster, ...], x: float, y: float) -> int:
    centres, radii = torch.stack([cluster.centre for cluster in clusters]), torch.tensor([cluster.radius for cluster in clusters])
    return int(route(centres, radii, torch.tensor([[x, y]])))


class TestClusters:
    def test_far_away_a_new_one(self) -> None:
        clusters = build((0, 0, "a"), (2.1, 0, "b"), (0, 2.1, "a"))
        assert [cluster.radius for cluster in clusters] == [1, 1, 1]
        assert [cluster.block for cluster in clusters] == [0, 1, 2]

    def test_the_same_answer_nearby_joins(self) -> None:
        (cluster,) = build((0, 0, "a"), (1.8, 0, "a"))
        assert cluster.centre.tolist() == pytest.approx([0.9, 0]) and cluster.radius == 1, "the initial radius covers both"
        clusters = build((0, 0, "a"), (1.8, 0, "a"), (0.9, 1.9, "a"))
        assert len(clusters) == 1 and clusters[0].radius == pytest.approx(1.9 * 2 / 3 / 0.99), "grown, to hold the farthest"

    def test_another_answer_nearby_cuts_both_to_half_the_distance(self) -> None:
        clusters = build((0, 0, "a"), (1.2, 0, "b"))
        assert [cluster.radius for cluster in clusters] == pytest.approx([0.6, 0.6])
        assert [found(clusters, x, 0) for x in (0.5, 0.7, 1.9)] == [0, 1, -1]

    def test_a_cut_never_widens(self) -> None:
        """As published, the second cut would give the first cluster 0.55 instead of 0.15, and it would reach into its neighbour."""
        clusters = build((0, 0, "a"), (0.3, 0, "b"), (-1.1, 0, "c"))
        radii = {cluster.label: cluster.radius for cluster in clusters}
        assert radii["a"] == pytest.approx(0.15) and radii["c"] == pytest.approx(0.55)

    def test_members_that_a_cut_leaves_outside_keep_their_block(self) -> None:
        clusters = build((0, 0, "a"), (1.8, 0, "a"), (0.9, 0.2, "b"))
        assert sorted((cluster.label, cluster.block) for cluster in clusters) == [("a", 0), ("a", 0), ("b", 1)]
        assert [clusters[found(clusters, *p)].label for p in ((0, 0), (1.8, 0), (0.9, 0.2))] == ["a", "a", "b"]

    def test_a_question_asked_again_replaces_its_answer(self) -> None:
        clusters = build((0, 0, "a"), (5, 0, "a"), (0, NEAR / 2, "b"))
        assert [cluster.label for cluster in clusters] == ["a", "b"]
        assert clusters[found(clusters, 0, 0)].label == "b" and clusters[-1].radius == 1
        assert len(build((0, 0, "a"), (0, 0, "a"))[0].members) == 1

    def test_the_nearest_neighbourhood_answers_not_the_nearest_centre(self) -> None:
        """A small neighbourhood whose centre is nearer does not take a question from the large one that it lies in."""
        clusters = [Cluster(torch.tensor([x, 0.0]), radius, "a", 0, ()) for x, radius in ((0.0, 2.0), (2.5, 0.4))]
        assert found(tuple(clusters), 1.9, 0) == 0

    # A grid a hundred times finer than the radius, so that questions fall onto, beside and far from each other.
    points = st.lists(st.tuples(st.integers(-300, 300), st.integers(-300, 300), st.sampled_from("abc")), min_size=1, max_size=14)

    @settings(max_examples=300, deadline=None)
    @given(points)
    def test_whatever_comes(self, points: list[tuple[int, int, str]]) -> None:
        """Neighbourhoods of different answers never meet, and each question finds the last answer that it was given."""
        given = [(x / 100, y / 100, label) for x, y, label in points]
        clusters = build(*given)
        for i, one in enumerate(clusters):
            assert one.radius > 0 and one.members
            for other in clusters[:i]:
                if one.label != other.label:
                    assert one.radius + other.radius <= float((one.centre.double() - other.centre.double()).norm()) + 1e-9
        for i, (x, y, label) in enumerate(given):
            later = [b for (a, c, b) in given[i + 1 :] if (a - x) ** 2 + (c - y) ** 2 <= (2.5 * NEAR) ** 2]
            if all(b == label for b in later):  # nobody asked the same, or almost the same, with another answer
                index = found(clusters, x, y)
                assert index >= 0 and clusters[index].label == label


def book(lm: LanguageModel, question: str = QUESTION[0], radius: float = 1e-2) -> CodeBook:
    """One question, one random block on two layers."""
    torch.manual_seed(0)
    down = lm.anatomy.mlp_down
    with capture(lm.model, {"q": down[1]}) as seen, torch.no_grad():
        batch = lm.batch([encode(lm.tokenizer, question)])
        lm.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    query = seen["q"][0, -1].float()
    shapes = [matrix(submodule(lm.model, path)).shape for path in down[2:]]
    block = Block(tuple(torch.randn(2, width) for _, width in shapes), tuple(torch.randn(out, 2) for out, _ in shapes))
    member = Member(query, encode(lm.tokenizer, question))
    return CodeBook("b", None, down[1], down[2:], 0.7, radius, (Cluster(query, radius, "x", 0, (member,)),), (block,))


def logits(lm: LanguageModel, *texts: tuple[str, str]) -> list[torch.Tensor]:
    """Of each text, in one batch, without padding."""
    with torch.no_grad():
        batch = lm.batch([encode(lm.tokenizer, *text) for text in texts])
        return [row[mask] for row, mask in zip(lm.target_logits(batch), batch.mask, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_is_a_low_rank_change_of_the_weights_for_its_question_alone(family: str) -> None:
    """Against W + scale · B A written into the weights; the other text in the batch, longer, is answered as ever."""
    lm = language_model(family)
    made = book(lm)
    plain = logits(lm, QUESTION, OTHER)
    with made.attached(lm) as blocks:
        routed = logits(lm, QUESTION, OTHER)
        chosen = blocks()
    assert chosen is not None and chosen.tolist() == [0, -1]
    assert torch.equal(routed[1], plain[1])
    assert all(map(torch.equal, logits(lm, QUESTION, OTHER), plain)), "everything is as it was"
    with torch.no_grad():
        for path, a, b in zip(made.modules, made.blocks[0].down, made.blocks[0].up, strict=True):
            matrix(submodule(lm.model, path)).add_(made.scale * b @ a)
    written = logits(lm, QUESTION, OTHER)
    assert not torch.allclose(written[0], plain[0], atol=1e-2)
    torch.testing.assert_close(routed[0], written[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "falcon", "qwen3-window"])
def test_what_is_decided_at_the_question_holds_while_the_answer_is_written(family: str) -> None:
    """Batched, padded on the left, with a cache: the text of the model with the block in its weights."""
    lm = language_model(family)
    prompts = [QUESTION[0], OTHER[0]]
    plain = lm.generate(prompts, 6, stop_at_newline=False)
    made = book(lm)
    with made.attached(lm):
        routed = lm.generate(prompts, 6, stop_at_newline=False)
    with torch.no_grad():
        for path, a, b in zip(made.modules, made.blocks[0].down, made.blocks[0].up, strict=True):
            matrix(submodule(lm.model, path)).add_(made.scale * b @ a)
    written = lm.generate(prompts, 6, stop_at_newline=False)
    assert routed == [written[0], plain[1]] and written[0] != plain[0]


def test_the_answer_does_not_change_the_decision() -> None:
    """The same question scored with two answers has the same block, and so has the question alone."""
    lm = language_model("llama")
    with book(lm).attached(lm) as blocks:
        for answer in ("Paris", "Lyon, in France"):
            logits(lm, (QUESTION[0], answer))
            chosen = blocks()
            assert chosen is not None and chosen.tolist() == [0]


def test_saved_and_loaded(tmp_path: Any) -> None:
    lm = language_model("gpt2")
    edit = Edit(lm, [], [], {"name": "melo"}, memory=book(lm))
    with edit.applied_():
        expected = logits(lm, QUESTION, OTHER)
    edit.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit", lm)
    with loaded.applied_():
        assert all(map(torch.equal, expected, logits(lm, QUESTION, OTHER)))
    assert loaded.memory is not None and edit.memory is not None and loaded.memory.settings() == edit.memory.settings()


def test_another_model_is_refused() -> None:
    lm, other = language_model("llama"), language_model("gpt2")
    with pytest.raises(EditError, match="does not fit gpt2"):
        Edit(other, [], [], {"name": "melo"}, memory=book(lm)).apply()
    wide = language_model("llama", intermediate_size=44)
    with pytest.raises(EditError, match="fit a weight"):
        Edit(wide, [], [], {"name": "melo"}, memory=book(lm)).apply()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in (*other.model.modules(), *wide.model.modules()))
