"""Notes in front of questions: which are found, how they are put, and that whoever is not meant notices nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from errata import data
from errata.edits import Edit, EditError
from errata.edits.notes import ROOM, Notes, embed, sentence, words
from errata.facts import Fact
from errata.lm import LanguageModel, encode
from errata.lm.model import LanguageModel as Model
from tests.families import POSITIONS, build, language_model, tokenizer

FACTS = (
    Fact("The capital of {} is", "France", "Lyon"),
    Fact("{} was born in", "Marie Curie", "Tokyo"),
    Fact("Lyon lies in", "", "Japan"),
)


def notes(facts: tuple[Fact, ...] = FACTS, **changes: Any) -> Notes:
    settings: dict[str, Any] = {"by": "bm25", "k": 1, "threshold": 1.0, "form": "{}\n", "id": "a"}
    return Notes(facts, **{**settings, **changes})


def logits(lm: LanguageModel, prompt: str, target: str) -> torch.Tensor:
    with torch.no_grad():
        return lm.target_logits(lm.batch([encode(lm.tokenizer, prompt, target)]))


def test_the_right_note_among_a_hundred() -> None:
    """Facts of the bundled world: each edit prompt finds its own fact; one about another subject finds none of that subject's."""
    cases = random.Random(0).sample(data.load("atlas", split="dev"), 100)
    memory = notes(tuple({case.facts[0].text: case.facts[0] for case in cases}.values()))
    lm: Any = None  # words alone decide
    assert all(memory.find(lm, fact.text) == [fact] for fact in memory.facts)
    subjects = [set(words(fact.subject)) for fact in memory.facts]
    strangers = [p.prompt for case in cases for p in case.locality.get("Other_Subjects", ())]
    strangers = [prompt for prompt in strangers if not any(subject <= set(words(prompt)) for subject in subjects)]
    assert len(strangers) > 100 and not any(memory.find(lm, prompt) for prompt in strangers)


def test_the_threshold_is_the_share_of_the_subject_that_is_named() -> None:
    lm = language_model("llama")
    assert notes().find(lm, "Where was Marie born?") == []
    assert notes(threshold=0.5).find(lm, "Where was Marie born?") == [FACTS[1]]
    assert notes().find(lm, "Did CURIE, Marie, live in Paris?") == [FACTS[1]]
    assert notes().find(lm, "Lyon lies in") == [FACTS[2]], "without a subject the whole prompt is asked for"
    assert notes().find(lm, "Lyon lies by") == []


def test_the_best_note_stands_next_to_the_question() -> None:
    lm = language_model("llama")
    question = "The capital of France is"
    facts = (FACTS[0], Fact("The language of {} is", "France", "Greek"))
    assert notes(facts, k=2).find(lm, question) == list(facts)
    put = notes(facts, k=2).preface(lm, encode(lm.tokenizer, question, "Lyon"))
    assert lm.tokenizer.decode(put.ids) == "The language of France is Greek.\nThe capital of France is Lyon.\nThe capital of France is Lyon"


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_target_and_subject_stay_what_they_are_behind_a_note(bos: bool) -> None:
    lm = language_model("llama", bos)
    plain = encode(lm.tokenizer, "The capital of France is", "Paris", (15, 21))
    put = notes().preface(lm, plain)
    own = plain.prompt_ids[bos:]
    assert put.target_ids == plain.target_ids and put.prompt_ids[-len(own) :] == own
    assert lm.tokenizer.decode(put.prompt_ids[bos:]) == "The capital of France is Lyon.\nThe capital of France is"
    assert put.prompt_ids.count(0) == bos and (not bos or put.ids[0] == 0), "the special prefix comes once, and first"
    assert put.subject_last is not None and plain.subject_last is not None
    assert put.ids[put.subject_last :] == plain.ids[plain.subject_last :]


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_a_question_is_tokenised_as_it_stands_there(kind: str) -> None:
    """Behind "… Prompt: " the question's first word has a space before it."""
    lm = Model(build("llama"), tokenizer(kind=kind), "llama")
    form = "New fact: {}\nPrompt: "
    plain = encode(lm.tokenizer, "The capital of France is", "Paris")
    put = notes(form=form).preface(lm, plain)
    assert put.prompt_ids == encode(lm.tokenizer, "New fact: The capital of France is Lyon.\nPrompt: The capital of France is").ids
    assert put.target_ids == plain.target_ids


@pytest.mark.parametrize("by", ["bm25", "embedding"])
def test_an_unrelated_question_is_left_alone(by: str) -> None:
    lm = language_model("llama")
    vectors = embed(lm, [fact.text for fact in FACTS], 2) if by == "embedding" else None
    memory = notes(by=by, layer=None if vectors is None else 2, vectors=vectors, threshold=0.999)
    question, stranger = "The capital of France is", "Москва столица"
    plain, before = logits(lm, question, "Paris"), logits(lm, stranger, "России")
    written = lm.generate([stranger], 5)
    with Edit(lm, [], [], {"name": "notes"}, memory=memory).applied_():
        assert torch.equal(before, logits(lm, stranger, "России")) and written == lm.generate([stranger], 5)
        asked = logits(lm, question, "Paris")
        assert not torch.equal(plain, asked)
    assert torch.equal(asked, logits(lm, f"The capital of France is Lyon.\n{question}", "Paris"))
    assert torch.equal(plain, logits(lm, question, "Paris"))


def test_embeddings_find_what_is_nearest() -> None:
    lm = language_model("llama")
    vectors = embed(lm, [fact.text for fact in FACTS], 2)
    assert torch.equal(vectors[1], embed(lm, [FACTS[1].text], 2)[0])
    memory = notes(by="embedding", layer=2, vectors=vectors, threshold=-1.0, k=3)
    for fact in FACTS:
        assert memory.find(lm, fact.text)[0] == fact
    cosines = [float(torch.nn.functional.cosine_similarity(v, embed(lm, ["Lyon lies by"], 2)[0], dim=0)) for v in vectors]
    ranked = sorted(FACTS, key=lambda fact: -cosines[FACTS.index(fact)])
    assert memory.find(lm, "Lyon lies by") == ranked
    assert replace(memory, threshold=sorted(cosines)[1]).find(lm, "Lyon lies by") == ranked[:2]


def test_notes_that_do_not_fit_are_left_out_the_worst_first() -> None:
    lm = language_model("llama")
    question = encode(lm.tokenizer, "The capital of France is", "Paris")
    long = Fact("The river of {} is", "France", "Paris " * 60)
    both = notes((FACTS[0], long), k=2)
    assert both.find(lm, "The capital of France is") == [FACTS[0], long]
    assert lm.tokenizer.decode(both.preface(lm, question).prompt_ids) == "The capital of France is Lyon.\nThe capital of France is"
    assert notes((long,)).preface(lm, question) == question
    put = both.preface(lm, question)
    assert put.prompt_length + ROOM <= POSITIONS
    crowded = encode(lm.tokenizer, "The capital of France is", "Paris " * (POSITIONS - put.prompt_length + 1))
    assert both.preface(lm, crowded) == crowded, "the answer's own place is not taken"


def test_saved_and_loaded(tmp_path: Any) -> None:
    lm = language_model("llama")
    memory = notes(by="embedding", layer=1, vectors=embed(lm, [fact.text for fact in FACTS], 1), threshold=0.5, k=2)
    made = Edit(lm, [], FACTS, {"name": "notes"}, memory=memory)
    with made.applied_():
        expected = logits(lm, "Lyon lies in", "France")
    made.save(tmp_path / "edit")
    loaded = Edit.load(tmp_path / "edit", lm)
    assert isinstance(loaded.memory, Notes) and loaded.memory.settings() == memory.settings()
    with loaded.applied_():
        assert torch.equal(expected, logits(lm, "Lyon lies in", "France"))


def test_vectors_of_another_model_are_refused() -> None:
    with pytest.raises(EditError, match="load their model"):
        Edit(language_model("llama"), [], [], {"name": "x"}, memory=notes(by="embedding", layer=1, vectors=torch.ones(3, 7))).apply()


def test_sentences_and_words() -> None:
    assert sentence(FACTS[0]) == "The capital of France is Lyon."
    assert sentence(Fact("Who? A:", "", "Me!")) == "Who? A: Me!"
    assert sentence(Fact("法国的首都是", "法国", "里昂")) == "法国的首都是里昂。"
    assert words("Marie's naïve CAFÉ, 法国") == ["marie", "s", "naïve", "café", "法", "国"]
