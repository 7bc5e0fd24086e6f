"""ZsRE as MEND prepared it (Mitchell et al. 2022), with or without the one-hop questions of Yao et al. 2023.

`src` is the question, `alt` the new answer, `answers` the old ones, `rephrase` another wording, `loc` / `loc_ans` a question of Natural
Questions that the edit must not touch. `loc` begins with "nq question: ": that is part of the data set's prompt, and it stays.
KnowEdit's form of ZsRE is read by `knowedit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from errata.data.fields import Record
from errata.facts import EditCase


def recognises(record: Mapping[str, Any]) -> bool:
    """Is this a question with an alternative answer?"""
    return "src" in record and "alt" in record


def cases(records: Sequence[Record]) -> Iterator[EditCase]:
    """One case a record. Raises DataError naming the field of a broken one."""
    for record in records:
        fact = record.fact(prompt=("src",), target=("alt",), truth=("answers",))
        locality = {}
        if record.raw.get("loc") is not None:
            locality["nq_question"] = tuple(record.probe(record.raw["loc"], record.raw.get("loc_ans"), "loc", "loc_ans"))
        yield EditCase(
            record.id,
            (fact,),
            record.rephrases(fact.target),
            record.groups("portability"),
            {name: probes for name, probes in locality.items() if probes},
            meta=record.meta(),
        )
