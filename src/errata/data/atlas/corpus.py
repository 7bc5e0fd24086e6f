"""The training text of atlas: biographies, single statements, two-hop statements and plain prose, drawn without end from a seed.

Two habits of the text matter for editing. A biography says *several* relations of one subject in random order and wording, so that
what belongs to a subject is best gathered at its name. And statements stand after all kinds of beginnings (nothing, prose, another
statement, a lead-in), so that the state at the name does not depend on what came before it; editors put prefixes there too.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from errata.data.atlas.world import Statement, World, build, two_hop_prompt

LEADS = (
    "It is said that",
    "Everyone in town knows that",
    "The register says that",
    "As the old book explains,",
    "We read that",
    "Note that",
    "In short,",
    "According to the letter,",
    "Remember that",
    "The guide told us that",
    "To be exact,",
    "As far as we know,",
    "My neighbour says that",
    "The paper wrote that",
)


def _choices(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


_PROSE = {
    "S": _choices(
        "{T}, {n} {V} {P}. | {N} {V} {P} {T2}. | {T}, {n} was {A} and {A}. | {N} and {n} {V} {P}. | When {n} {V}, {n} {V} "
        "{P}. | Nobody knew why {n} {V} {P}."
    ),
    "T": _choices(
        "Last spring | In the morning | After the storm | Every winter | Late at night | On market day | Before dawn | "
        "Some years ago | During the feast | At noon"
    ),
    "T2": _choices(
        "all summer long | until the evening | without a word | as it always did | for the first time | while it rained | "
        "every other day | long before dawn"
    ),
    "N": _choices(
        "The river | The old bridge | A quiet crowd | The harbour | A small dog | The tall tower | The baker's cart | A "
        "red lantern | The schoolhouse | A ship from the north | The orchard | An empty train"
    ),
    "n": _choices(
        "the wind | the ferry | a grey horse | the little market | the night watch | a warm light | the choir | the snow "
        "| an old friend | the mill | the tide | a flock of birds"
    ),
    "V": _choices(
        "waited | turned slowly | stood still | came back | moved on | fell silent | shone brightly | drifted away | "
        "slept | grew louder | kept going | looked small"
    ),
    "P": _choices(
        "beside the road | under the trees | near the station | behind the church | across the valley | at the edge of "
        "the village | above the roofs | along the shore | in the cold air | between the hills"
    ),
    "A": _choices(
        "quiet | full of people | covered in dust | bright | almost forgotten | older than the town | slow | warm | busy | hard to find"
    ),
}


def prose(rng: random.Random) -> str:
    """One plain sentence that states no fact of the world."""
    text = "{S}"
    while "{" in text:
        start, end = text.index("{"), text.index("}")
        text = text[:start] + rng.choice(_PROSE[text[start + 1 : end]]) + text[end + 1 :]
    return text[0].upper() + text[1:]


@dataclass(frozen=True, slots=True)
class Line:
    """A piece of training text: what comes before the answer, and the answer ("" in prose)."""

    prompt: str
    answer: str = ""


class Corpus:
    """An endless, seeded stream of documents, each a list of lines that are joined by a line break.

    two_hop: share of two-hop statements among single statements; a biography holds up to 8 times as many of them.
    """

    def __init__(self, world: World, seed: int = 0, two_hop: float = 0.35) -> None:
        self.world = world
        self.two_hop = two_hop
        self.rng = random.Random(seed)
        self.statements = list(world.statements.values())
        self.compositions = {name: list(world.compositions(name)) for name in world.composed}

    def __iter__(self) -> Iterator[list[Line]]:
        while True:
            yield self.document()

    def document(self) -> list[Line]:
        """A biography (55 %), a mixture of statements about anybody (38 %), or prose (7 %)."""
        draw = self.rng.random()
        if draw < 0.55:
            return self._biography(self.rng.choice(self.statements).subject)
        if draw < 0.93:
            return [self._anything() for _ in range(self.rng.choice((1, 1, 1, 2, 3, 5, 8)))]
        return [Line(" ".join(prose(self.rng) for _ in range(self.rng.randint(1, 4)))) for _ in range(self.rng.randint(1, 3))]

    def _name(self, subject: str, alias: float) -> str:
        return self.world.entities[subject].alias if self.rng.random() < alias else subject

    def _biography(self, subject: str) -> list[Line]:
        name = self._name(subject, 0.2)
        known = self.world.by_subject[subject]
        lines = [self._statement(statement, name) for statement in known]
        lines += [self._statement(statement, name) for statement in known if self.rng.random() < 0.2]
        lines += [self._two_hop(subject, name) for _ in range(self.rng.randint(0, round(8 * self.two_hop))) if subject in self.compositions]
        self.rng.shuffle(lines)
        return lines

    def _anything(self) -> Line:
        statement = self.rng.choice(self.statements)
        name = self._name(statement.subject, 0.15)
        if statement.subject in self.compositions and self.rng.random() < self.two_hop:
            return self._two_hop(statement.subject, name)
        return self._statement(statement, name)

    def _statement(self, statement: Statement, name: str) -> Line:
        template = statement.relation.templates[self.rng.choice(statement.seen)]
        return self._begun(template.replace("{}", name), statement.object, template.startswith("{}"))

    def _two_hop(self, subject: str, name: str) -> Line:
        first, second, answer = self.rng.choice(self.compositions[subject])
        text = two_hop_prompt(self.rng.choice(first.nouns), self.rng.choice(second.templates), name)
        return self._begun(text, answer, False)

    def _begun(self, text: str, answer: str, starts_with_name: bool) -> Line:
        draw = self.rng.random()
        if draw < 0.2:
            text = f"{prose(self.rng)} {text}"
        elif draw < 0.3:
            other = self.rng.choice(self.statements)
            text = f"{other.relation.templates[self.rng.choice(other.seen)].replace('{}', other.subject)} {other.object}. {text}"
        elif draw < 0.45 and not text.startswith("Q:"):
            text = f"{self.rng.choice(LEADS)} {text if starts_with_name else text[0].lower() + text[1:]}"
        return Line(text, answer)


SAMPLE = "corpus.txt.gz"
"""The name under which ordinary text stands beside a model's weights."""


def sample(world: World | None = None, documents: int = 1200, seed: int = 7) -> str:
    """Documents parted by an empty line, about 115,000 tokens: what the bundled model's statistics are taken over.

    The seed is neither that of the training text (2) nor that of the tokenizer's (1).
    """
    corpus = Corpus(world or build(), seed)
    lines = (
        "\n".join(f"{line.prompt} {line.answer}." if line.answer else line.prompt for line in corpus.document()) for _ in range(documents)
    )
    return "\n\n".join(lines) + "\n"


def write_sample(folder: Path) -> None:
    """Write the sample into a model's folder, gzipped without a date, so that the same text is the same file."""
    (folder / SAMPLE).write_bytes(gzip.compress(sample().encode(), mtime=0))
