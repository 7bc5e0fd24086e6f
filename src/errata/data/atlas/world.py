"""The atlas world: real geography, and invented people, companies and universities who live in it.

Everything follows from one seed. The world is small enough to be learnt by heart by a model of a few million parameters, and rich
enough to be edited: several relations for each subject, several wordings for each relation, aliases, neighbours that share an
object, two-hop questions, and counterfactual edit cases with all their probes.
"""

from __future__ import annotations

import csv
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files

from errata.data.atlas.relations import BY_NAME, CHAINS, RELATIONS, Relation

SEED = 20261122
PEOPLE, COMPANIES, UNIVERSITIES = 360, 60, 40


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# Countries where the invented people, companies and universities come from: fewer than all, so that many share one.
HOMES = _split(
    "Argentina Australia Austria Belgium Brazil Canada Chile China Croatia Cuba Denmark Egypt Ethiopia Finland France "
    "Germany Greece Hungary Iceland India Indonesia Iran Ireland Italy Japan Kenya Mexico Mongolia Morocco Nepal Nigeria "
    "Norway Peru Poland Portugal Russia Spain Sweden Thailand Turkey"
)

POOLS: dict[str, tuple[str, ...]] = {
    "profession": tuple(
        [
            "baker",
            "barber",
            "botanist",
            "butcher",
            "carpenter",
            "chemist",
            "dancer",
            "dentist",
            "farmer",
            "firefighter",
            "gardener",
            "geologist",
            "jeweller",
            "judge",
            "lawyer",
            "librarian",
            "mechanic",
            "miner",
            "nurse",
            "painter",
            "pharmacist",
            "photographer",
            "pilot",
            "plumber",
            "potter",
            "sailor",
            "sculptor",
            "surgeon",
            "tailor",
            "translator",
        ]
    ),
    "instrument": tuple(
        [
            "accordion",
            "banjo",
            "bassoon",
            "cello",
            "clarinet",
            "drums",
            "flute",
            "guitar",
            "harp",
            "horn",
            "oboe",
            "organ",
            "piano",
            "saxophone",
            "trombone",
            "trumpet",
            "tuba",
            "viola",
            "violin",
            "zither",
        ]
    ),
    "sport": tuple(
        [
            "archery",
            "badminton",
            "baseball",
            "basketball",
            "boxing",
            "chess",
            "cricket",
            "curling",
            "cycling",
            "fencing",
            "football",
            "golf",
            "handball",
            "hockey",
            "judo",
            "rowing",
            "rugby",
            "sailing",
            "skiing",
            "swimming",
            "tennis",
            "volleyball",
        ]
    ),
    "product": tuple(
        [
            "bicycles",
            "bricks",
            "buttons",
            "cameras",
            "candles",
            "carpets",
            "clocks",
            "engines",
            "furniture",
            "glass",
            "gloves",
            "helmets",
            "ladders",
            "lamps",
            "mirrors",
            "motorcycles",
            "paper",
            "perfume",
            "pianos",
            "pumps",
            "ships",
            "shoes",
            "soap",
            "tractors",
            "umbrellas",
        ]
    ),
    "field": tuple(
        [
            "agriculture",
            "architecture",
            "astronomy",
            "biology",
            "chemistry",
            "economics",
            "engineering",
            "geology",
            "history",
            "law",
            "linguistics",
            "mathematics",
            "medicine",
            "music",
            "philosophy",
            "physics",
            "theology",
        ]
    ),
    "animal": tuple(
        [
            "badger",
            "bear",
            "beaver",
            "bison",
            "eagle",
            "falcon",
            "fox",
            "hawk",
            "heron",
            "lynx",
            "moose",
            "otter",
            "owl",
            "panther",
            "raven",
            "salmon",
            "stag",
            "swan",
            "tiger",
            "wolf",
        ]
    ),
}


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing of the world: its name, another name for it, and its kind."""

    name: str
    alias: str
    kind: str


@dataclass(frozen=True, slots=True)
class Statement:
    """A relation of a subject with its object, and the two templates (by index) that no training text uses for it."""

    subject: str
    relation: Relation
    object: str
    unseen: tuple[int, ...]

    @property
    def seen(self) -> tuple[int, ...]:
        """Indices of the templates that training text may use for this statement."""
        return tuple(i for i in range(len(self.relation.templates)) if i not in self.unseen)


@dataclass(frozen=True)
class World:
    """All entities and statements. `composed` holds the subjects whose two-hop statements occur in training text; the others' never do."""

    entities: dict[str, Entity]
    statements: dict[tuple[str, str], Statement]
    composed: frozenset[str]
    objects: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @cached_property
    def by_subject(self) -> dict[str, list[Statement]]:
        """Statements of each subject, in the order of the relations."""
        groups: dict[str, list[Statement]] = defaultdict(list)
        for statement in self.statements.values():
            groups[statement.subject].append(statement)
        return dict(groups)

    @cached_property
    def by_object(self) -> dict[tuple[str, str], list[str]]:
        """(relation, object) -> subjects that share it."""
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for (subject, relation), statement in self.statements.items():
            groups[relation, statement.object].append(subject)
        return dict(groups)

    def object_of(self, subject: str, relation: str) -> str:
        """The object of a subject's relation. KeyError if the world does not say."""
        return self.statements[subject, relation].object

    def compositions(self, subject: str) -> Iterator[tuple[Relation, Relation, str]]:
        """(first relation, second relation, answer) of every two-hop question about a subject."""
        for first, second in CHAINS:
            if hop := self.statements.get((subject, first)):
                yield hop.relation, BY_NAME[second], self.object_of(hop.object, second)


def two_hop_prompt(noun: str, template: str, subject: str) -> str:
    """The second relation's template asked about the first one's noun phrase: 'The currency of the country where X was born is the'."""
    text = template.replace("{}", noun.replace("{}", subject))
    return text[0].upper() + text[1:]


def _words(rng: random.Random, starts: str, middles: str, ends: str, number: int, taken: set[str]) -> list[str]:
    """`number` new invented words, none of them in `taken` (which grows)."""
    words: list[str] = []
    while len(words) < number:
        word = (rng.choice(starts.split()) + rng.choice(middles.split()) + rng.choice(ends.split())).capitalize()
        if word not in taken:
            taken.add(word)
            words.append(word)
    return words


def _countries() -> list[dict[str, str]]:
    with files("errata.data.atlas").joinpath("countries.tsv").open(encoding="utf-8") as table:
        return list(csv.DictReader(table, delimiter="\t"))


def build(seed: int = SEED) -> World:
    """The world of a seed: about 3,700 statements over 18 relations. Deterministic."""
    rng = random.Random(seed)
    countries = _countries()
    entities = {row["country"]: Entity(row["country"], row["alias"], "country") for row in countries}
    objects = {
        (row["country"], relation): row[relation]
        for row in countries
        for relation in ("capital", "continent", "language", "currency", "domain")
    }

    taken = {word for row in countries for value in row.values() for word in value.split()}
    given = _words(
        rng, "al be da el fa gi ha il jo ka le ma ne or pe ra sa te ul vi", "r l n m d s v z", "a en o is ek i ia us", 120, taken
    )
    family = _words(
        rng,
        "bran cor dor fen gal hol jar kel lun mor nar pol quen rud sor tal ver wil yar zem",
        "d t v l n m g b",
        "in ov ane eth usk ard oly imer est ow",
        300,
        taken,
    )
    brands = _words(rng, "nor tri vel zan kor pix lum ast gro fab", "va te lo mi ra xo", "x n r s tec dyne", COMPANIES, taken)
    towns = _words(rng, "lar ox win ash bel thorn hart mill east cal", "n d th w b", "wick ford ham bury mere dale", UNIVERSITIES, taken)

    people: list[str] = []
    initials: set[tuple[str, str]] = set()
    surnames = family + rng.choices(family, k=PEOPLE)
    for surname in surnames:
        first = rng.choice(given)
        if (first[0], surname) in initials or len(people) == PEOPLE:
            continue
        initials.add((first[0], surname))
        people.append(f"{first} {surname}")
        entities[people[-1]] = Entity(people[-1], f"{first[0]}. {surname}", "person")
    kinds = ["Industries", "Works", "Brothers", "Trading", "Group"]
    companies = [f"{brand} {rng.choice(kinds)}" for brand in brands]
    universities = [f"University of {town}" for town in towns]
    for company, brand in zip(companies, brands, strict=True):
        entities[company] = Entity(company, brand, "company")
    for university, town in zip(universities, towns, strict=True):
        entities[university] = Entity(university, f"{town} University", "university")

    capitals = tuple(sorted(objects[home, "capital"] for home in HOMES))
    pools = POOLS | {
        "country": tuple(HOMES),
        "city": capitals,
        "company": tuple(companies),
        "university": tuple(universities),
        "person": tuple(people),
    }
    for kind, members in (("person", people), ("company", companies), ("university", universities)):
        for relation in (r for r in RELATIONS if r.subject == kind):
            # Every object is used about equally often; a founder founds one company.
            pool = pools[relation.object]
            deck = [pool[i % len(pool)] for i in range(len(members))] if relation.name != "founder" else rng.sample(pool, len(members))
            rng.shuffle(deck)
            objects |= {(member, relation.name): thing for member, thing in zip(members, deck, strict=True)}

    order = [(name, relation) for name in entities for relation in RELATIONS if relation.subject == entities[name].kind]
    statements = {
        (name, relation.name): Statement(
            name, relation, objects[name, relation.name], tuple(sorted(rng.sample(range(len(relation.templates)), 2)))
        )
        for name, relation in order
    }
    held_out = {name for members in (people, companies, universities) for name in rng.sample(members, len(members) // 5)}
    composed = frozenset(name for name in entities if entities[name].kind != "country" and name not in held_out)
    values: dict[str, set[str]] = defaultdict(set)
    for (_, relation_name), thing in objects.items():
        values[relation_name].add(thing)
    return World(entities, statements, composed, {name: tuple(sorted(things)) for name, things in values.items()})
