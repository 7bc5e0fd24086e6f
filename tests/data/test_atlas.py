"""The bundled world: what its facts, questions and cases promise."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from errata import data
from errata.data import atlas
from errata.data.atlas.corpus import Corpus
from errata.data.atlas.relations import BY_NAME, CHAINS, RELATIONS, Relation
from errata.data.atlas.world import build, two_hop_prompt

WORLD = build()
HOPS = [(BY_NAME[first], BY_NAME[second]) for first, second in CHAINS]


def hops(first: Relation, second: Relation, name: str) -> set[str]:
    """All wordings of a two-hop question."""
    return {two_hop_prompt(noun, template, name) for noun in first.nouns for template in second.templates}


def test_the_world_is_as_large_as_promised_and_always_the_same() -> None:
    assert len(WORLD.statements) >= 3000 and len(RELATIONS) >= 15
    assert sum(entity.kind == "country" for entity in WORLD.entities.values()) >= 150
    for relation in RELATIONS:
        assert len(relation.templates) >= 5 and all(t.count("{}") == 1 for t in (*relation.templates, *relation.nouns))
        assert any(t.startswith("Q:") for t in relation.templates) and any(not t.startswith("Q:") for t in relation.templates)
        assert any(t.startswith("{}") for t in relation.templates) and any(not t.startswith(("{}", "Q:")) for t in relation.templates)
    assert build() == WORLD and build(1) != WORLD


def test_names_and_aliases_tell_entities_apart() -> None:
    names = Counter(name for entity in WORLD.entities.values() for name in {entity.name, entity.alias})
    assert [name for name, often in names.items() if often > 1] == []


def test_every_statement_keeps_two_wordings_from_the_text() -> None:
    """A template that is held out for a subject never stands in the text about that subject, under neither name."""
    corpus = Corpus(WORLD, seed=5)
    text = "\n".join(f"{line.prompt}| {line.answer}" for _ in range(3000) for line in corpus.document())
    names = [name for entity in WORLD.entities.values() for name in (entity.name, entity.alias)]
    inside = {a for a in names for b in names if a != b and b.endswith(a)}  # "Guinea is" also stands in "Papua New Guinea is"
    usable = [s for s in WORLD.statements.values() if not {s.subject, WORLD.entities[s.subject].alias} & inside]
    sample = random.Random(0).sample(usable, 400)
    held, used = 0, 0
    for statement in sample:
        for i, template in enumerate(statement.relation.templates):
            prompts = [template.replace("{}", name) for name in (statement.subject, WORLD.entities[statement.subject].alias)]
            written = [f"{prompt}|" in text or f"{prompt} {statement.object}." in text for prompt in prompts]
            if i in statement.unseen:
                assert not any(written), (template, statement)
                held += 1
            used += any(written)
    assert held == 800 and used > 800


def test_compositions_of_held_out_subjects_are_never_written() -> None:
    corpus = Corpus(WORLD, seed=6)
    lines = {line.prompt.lower() for _ in range(1000) for line in corpus.document()}
    endings = {" ".join(line.split()[-n:]) for line in lines for n in range(4, 22)}
    forbidden, allowed = set(), set()
    for subject, entity in WORLD.entities.items():
        if entity.kind != "country":
            kept = allowed if subject in WORLD.composed else forbidden
            for first, second, _ in WORLD.compositions(subject):
                kept |= {prompt.lower() for name in (entity.name, entity.alias) for prompt in hops(first, second, name)}
    assert len(forbidden) > 5000 and not forbidden & endings
    assert len(allowed & endings) > 500, "the same search finds those that may be written"


@pytest.mark.parametrize("kind", ["seen", "unseen", "alias", "two_hop"])
def test_questions_have_the_worlds_answers(kind: atlas.Kind) -> None:
    asked = atlas.questions(kind, WORLD)
    if kind == "two_hop":
        subjects = {name for name, entity in WORLD.entities.items() if entity.kind != "country" and name not in WORLD.composed}
        expected = [(name, *hop) for name in WORLD.entities if name in subjects for hop in WORLD.compositions(name)]
        assert len(expected) > 500
        for question, (name, first, second, answer) in zip(asked, expected, strict=True):
            assert question.prompt in hops(first, second, name)
            assert question.answer == answer == WORLD.object_of(WORLD.object_of(name, first.name), second.name)
        return
    for question, statement in zip(asked, WORLD.statements.values(), strict=True):
        allowed = statement.seen if kind == "seen" else statement.unseen
        name = WORLD.entities[statement.subject].alias if kind == "alias" else statement.subject
        assert question.prompt in {statement.relation.templates[i].replace("{}", name) for i in allowed}
        assert question.answer == statement.object


def test_two_hop_prompt_reads_as_a_sentence() -> None:
    noun = "the country where {} was born"
    assert two_hop_prompt(noun, "The currency of {} is the", "Ann") == "The currency of the country where Ann was born is the"
    assert two_hop_prompt(noun, "{} uses the", "Ann") == "The country where Ann was born uses the"


def test_cases_are_counterfactual_complete_and_split_by_subject() -> None:
    dev, test = atlas.cases("dev"), atlas.cases("test")
    assert len(dev) + len(test) >= 1000 and len(data.load("atlas", limit=7)) == 7
    assert not {c.facts[0].subject for c in dev} & {c.facts[0].subject for c in test}
    assert len({c.id for c in dev + test}) == len(dev) + len(test)
    first_half = [c.facts[0].subject for c in test[: len(test) // 2]]
    assert len(set(first_half)) == len(first_half)
    for case in dev + test:
        (fact,) = case.facts
        relation = case.meta["relation"]
        assert fact.ground_truth == WORLD.object_of(fact.subject, relation) != fact.target
        assert fact.target in WORLD.objects[relation]
        assert {answer for probe in case.rephrases for answer in probe.answers} == {fact.target}
        assert fact.text not in {probe.prompt for probe in case.rephrases}
        elsewhere = case.rephrases[0].prompt.startswith(fact.subject), fact.text.startswith(fact.subject)
        assert elsewhere[0] != elsewhere[1]
        for probe in case.neighbourhood:
            assert probe.answers == (fact.ground_truth,) and probe.prompt != fact.text
        for probe in case.locality["Other_Relations"]:
            assert fact.subject in probe.prompt
        assert fact.target in case.portability["Subject_Aliasing"][0].answers
    assert sum("Reasoning" in case.portability for case in test) > len(test) / 3


def test_reasoning_answers_follow_from_the_new_fact() -> None:
    """The answer to 'the capital of the country where X was born' is the capital of the *new* country."""
    seen = 0
    for case in atlas.cases("dev"):
        (fact,) = case.facts
        if case.meta["relation"] != "birth_country":
            continue
        for probe in case.portability.get("Reasoning", ()):
            assert fact.subject in probe.prompt
            (second,) = {s.name for f, s in HOPS if probe.prompt in hops(f, s, fact.subject)}
            assert probe.answers[0] == WORLD.object_of(fact.target, second)
            seen += 1
    assert seen > 10
