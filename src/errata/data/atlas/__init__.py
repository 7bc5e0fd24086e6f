"""The bundled world as data: questions that its model should answer, and counterfactual edit cases."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from errata.data.atlas.relations import BY_NAME, CHAINS, Relation
from errata.data.atlas.world import SEED, Statement, World, build, two_hop_prompt
from errata.facts import EditCase, Fact, Probe

Split = Literal["dev", "test"]
Kind = Literal["seen", "unseen", "alias", "two_hop"]


@dataclass(frozen=True, slots=True)
class Question:
    """What the world's model is asked, and the only right answer."""

    prompt: str
    answer: str


def questions(kind: Kind, world: World | None = None) -> list[Question]:
    """One question a statement ("seen": a template that training text uses for it; "unseen": one it never uses; "alias": the same with
    the subject's other name), or all two-hop questions about subjects whose compositions were kept out of training ("two_hop").
    """
    world, rng = world or build(), random.Random(f"{SEED} {kind}")
    if kind == "two_hop":
        return [
            Question(two_hop_prompt(rng.choice(first.nouns), rng.choice(second.templates), name), answer)
            for name, entity in world.entities.items()
            if entity.kind != "country" and name not in world.composed
            for first, second, answer in world.compositions(name)
        ]
    asked = []
    for statement in world.statements.values():
        template = statement.relation.templates[rng.choice(statement.seen if kind == "seen" else statement.unseen)]
        name = world.entities[statement.subject].alias if kind == "alias" else statement.subject
        asked.append(Question(template.replace("{}", name), statement.object))
    return asked


def cases(split: Split | None = None) -> list[EditCase]:
    """Counterfactual edit cases, two a subject; the split is by subject and never changes. Tune on "dev", report on "test".

    The new object is of the old one's type. Rephrasings are other wordings (the first has the subject in another place), portability
    asks through the alias and for what follows in two hops, locality asks for other relations of the subject and the same relation of
    others, the neighbourhood for subjects that share the old object. The first half of a split edits each subject once.
    """
    world, rng = build(), random.Random(f"{SEED} cases")
    subjects = list(world.entities)
    rng.shuffle(subjects)
    dev = set(subjects[: len(subjects) * 2 // 5])
    chosen = {name: rng.sample(world.by_subject[name], 2) for name in subjects}
    bridged = _bridged(world)
    made = [_case(world, chosen[name][turn], bridged, rng) for turn in range(2) for name in subjects]
    numbered = []
    counts: dict[str, int] = defaultdict(int)
    for case in made:
        side = "dev" if case.facts[0].subject in dev else "test"
        if split in (None, side):
            numbered.append(replace(case, id=f"atlas-{side}-{counts[side]:04d}"))
        counts[side] += 1
    return numbered


def _bridged(world: World) -> dict[tuple[str, str], list[tuple[str, Relation]]]:
    """(bridge, second relation) -> (subject, first relation) of the two-hop questions that run through it."""
    through: dict[tuple[str, str], list[tuple[str, Relation]]] = defaultdict(list)
    for (subject, relation), statement in world.statements.items():
        for first, second in CHAINS:
            if first == relation:
                through[statement.object, second].append((subject, statement.relation))
    return dict(through)


def _case(world: World, statement: Statement, bridged: dict[tuple[str, str], list[tuple[str, Relation]]], rng: random.Random) -> EditCase:
    relation, subject, old = statement.relation, statement.subject, statement.object
    new = rng.choice([thing for thing in world.objects[relation.name] if thing != old])
    wordings = [t for t in relation.templates if not t.startswith("Q:")]
    template = rng.choice(wordings)
    elsewhere = [t for t in wordings if t.startswith("{}") != template.startswith("{}")]
    question = rng.choice([t for t in relation.templates if t.startswith("Q:")])
    rephrases = [rng.choice(elsewhere or [t for t in wordings if t != template]), question]

    def ask(template: str, name: str, answer: str) -> Probe:
        return Probe(template.replace("{}", name), (answer,))

    reasoning = []
    for first, second in CHAINS:
        if first == relation.name and (answer := world.object_of(new, second)) != world.object_of(old, second):
            reasoning.append(Probe(two_hop_prompt(rng.choice(relation.nouns), rng.choice(BY_NAME[second].templates), subject), (answer,)))
    through = bridged.get((subject, relation.name), [])
    for name, first_relation in rng.sample(through, min(2, len(through))):
        reasoning.append(Probe(two_hop_prompt(rng.choice(first_relation.nouns), rng.choice(relation.templates), name), (new,)))

    sharers = [name for name in world.by_object[relation.name, old] if name != subject]
    strangers = [name for (name, r), s in world.statements.items() if r == relation.name and name != subject and s.object not in (old, new)]
    siblings = [s for s in world.by_subject[subject] if s.relation is not relation]
    same = partial(ask, template)
    return EditCase(
        id="",
        facts=(Fact(template, subject, new, old),),
        rephrases=tuple(ask(t, subject, new) for t in rephrases),
        portability={
            "Subject_Aliasing": (same(world.entities[subject].alias, new),),
            **({"Reasoning": tuple(reasoning)} if reasoning else {}),
        },
        locality={
            "Other_Relations": tuple(
                ask(s.relation.templates[rng.choice(s.seen)], subject, s.object) for s in rng.sample(siblings, min(3, len(siblings)))
            ),
            "Other_Subjects": tuple(same(name, world.object_of(name, relation.name)) for name in rng.sample(strangers, 3)),
        },
        neighbourhood=tuple(same(name, old) for name in rng.sample(sharers, min(5, len(sharers)))),
        meta={"relation": relation.name},
    )
