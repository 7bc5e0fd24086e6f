"""The relations of the atlas world: what is said about whom, and in which words.

A template is a text with `{}` for the subject; the object always comes last, so that every template is a prompt. `noun` phrases
name the object without saying it ("the country where {} was born") and take the subject's place in a second relation's template:
that is a two-hop question.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Relation:
    """One relation: kinds of its subject and object, its wordings (statements first, then questions), and noun phrases for its object."""

    name: str
    subject: str
    object: str
    templates: tuple[str, ...]
    nouns: tuple[str, ...] = ()


def _relation(name: str, subject: str, object: str, templates: str, nouns: str = "") -> Relation:
    def lines(text: str) -> tuple[str, ...]:
        return tuple(line.strip() for line in text.strip().splitlines() if line.strip())

    return Relation(name, subject, object, lines(templates), lines(nouns))


RELATIONS: tuple[Relation, ...] = (
    _relation(
        "capital",
        "country",
        "city",
        """
        The capital of {} is
        The capital city of {} is
        {} has its capital in
        {} is governed from
        The government of {} sits in
        Q: What is the capital of {}? A:
        Q: Which city is the capital of {}? A:
        """,
    ),
    _relation(
        "continent",
        "country",
        "continent",
        """
        {} is a country in
        {} lies on the continent of
        The continent of {} is
        On the map, {} belongs to
        Q: On which continent is {}? A:
        Q: Which continent does {} belong to? A:
        """,
    ),
    _relation(
        "language",
        "country",
        "language",
        """
        The official language of {} is
        The language spoken in {} is
        People in {} speak
        {} has the official language
        Q: What is the official language of {}? A:
        Q: Which language do people speak in {}? A:
        """,
    ),
    _relation(
        "currency",
        "country",
        "currency",
        """
        The currency of {} is the
        The money used in {} is the
        In {}, people pay with the
        {} uses the
        Q: What is the currency of {}? A: the
        Q: Which currency is used in {}? A: the
        """,
    ),
    _relation(
        "domain",
        "country",
        "domain",
        """
        The internet domain of {} is
        Web pages in {} end in
        {} has the internet domain
        Sites from {} carry the ending
        Q: What is the internet domain of {}? A:
        Q: How do web pages in {} end? A:
        """,
    ),
    _relation(
        "birth_country",
        "person",
        "country",
        """
        {} was born in
        {} comes from
        {} is a native of
        The birthplace of {} is
        The country of birth of {} is
        Q: Where was {} born? A:
        Q: In which country was {} born? A:
        """,
        """
        the country where {} was born
        the birth country of {}
        the native country of {}
        """,
    ),
    _relation(
        "home_city",
        "person",
        "city",
        """
        {} lives in
        {} has a home in
        The city where {} lives is
        The home of {} is in
        Q: Where does {} live? A:
        Q: In which city does {} live? A:
        """,
    ),
    _relation(
        "profession",
        "person",
        "profession",
        """
        {} works as a
        {} earns a living as a
        The profession of {} is
        By trade, {} is a
        Q: What is the profession of {}? A:
        Q: What does {} do for a living? A:
        """,
    ),
    _relation(
        "employer",
        "person",
        "company",
        """
        {} works for
        {} is employed by
        The employer of {} is
        The company that employs {} is
        Q: Who employs {}? A:
        Q: Which company does {} work for? A:
        """,
        """
        the company that employs {}
        the employer of {}
        the firm {} works for
        """,
    ),
    _relation(
        "alma_mater",
        "person",
        "university",
        """
        {} studied at
        {} graduated from
        The alma mater of {} is
        The degree of {} is from
        Q: Where did {} study? A:
        Q: Which university did {} attend? A:
        """,
        """
        the university that {} attended
        the alma mater of {}
        """,
    ),
    _relation(
        "instrument",
        "person",
        "instrument",
        """
        {} plays the
        In the evenings, {} practises the
        The instrument of {} is the
        The instrument that {} plays is the
        Q: Which instrument does {} play? A: the
        Q: What does {} play in the orchestra? A: the
        """,
    ),
    _relation(
        "sport",
        "person",
        "sport",
        """
        {} is a fan of
        On weekends, {} enjoys
        The favourite sport of {} is
        The sport that {} likes best is
        Q: What is the favourite sport of {}? A:
        Q: Which sport does {} like best? A:
        """,
    ),
    _relation(
        "headquarters",
        "company",
        "country",
        """
        {} is based in
        {} has its headquarters in
        The headquarters of {} are in
        The main office of {} is in
        Q: Where is {} based? A:
        Q: In which country is {} based? A:
        """,
        """
        the country where {} is based
        the home country of {}
        """,
    ),
    _relation(
        "product",
        "company",
        "product",
        """
        {} makes
        {} is known for its
        The main product of {} is
        The factories of {} produce
        Q: What does {} make? A:
        Q: What is the main product of {}? A:
        """,
    ),
    _relation(
        "founder",
        "company",
        "person",
        """
        {} was founded by
        {} was started by
        The founder of {} is
        The person who founded {} is
        Q: Who founded {}? A:
        Q: Who is the founder of {}? A:
        """,
    ),
    _relation(
        "location",
        "university",
        "country",
        """
        {} is located in
        {} stands in
        The campus of {} is in
        The lecture halls of {} are in
        Q: Where is {} located? A:
        Q: In which country is {}? A:
        """,
        """
        the country where {} is located
        the country around {}
        """,
    ),
    _relation(
        "field",
        "university",
        "field",
        """
        {} is famous for its school of
        {} is strongest in
        The best department of {} is
        Students go to {} to learn
        Q: What is {} famous for? A:
        Q: Which department of {} is the best? A:
        """,
    ),
    _relation(
        "mascot",
        "university",
        "animal",
        """
        The mascot of {} is the
        The teams of {} are named after the
        The animal on the crest of {} is the
        {} has as its mascot the
        Q: What is the mascot of {}? A: the
        Q: Which animal stands for {}? A: the
        """,
    ),
)

BY_NAME = {relation.name: relation for relation in RELATIONS}

#: Two-hop questions: first relation (its noun phrase stands for the bridge), second relation (its templates ask about the bridge).
CHAINS: tuple[tuple[str, str], ...] = (
    *(
        (first, second)
        for first in ("birth_country", "headquarters", "location")
        for second in ("capital", "continent", "language", "currency")
    ),
    ("employer", "product"),
    ("employer", "headquarters"),
    ("alma_mater", "location"),
    ("alma_mater", "mascot"),
)
