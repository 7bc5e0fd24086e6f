"""What a run consists of: tasks that do not hang on one another, so they may be done one by one or in several processes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from errata.bench.folder import Record
from errata.facts import EditCase

if TYPE_CHECKING:
    from errata.bench.plan import Row
    from errata.methods import Method
    from errata.objectives import Objective


class Task(NamedTuple):
    """From the unedited model and back to it: cases of one row that are edited singly, side by side, in a block or in a sequence.

    row: its number in the plan. cases: in the order of their edits. missing: how many of them have no line yet. number: of a block, from 1.
    known: of a sequence, the lines that it has, by step. elsewhere: of a sequence, prompts about other subjects, for drift.
    """

    row: int
    cases: tuple[EditCase, ...]
    missing: int
    number: int = 1
    known: Mapping[str, Record] = {}
    elsewhere: tuple[str, ...] = ()


Setup = tuple["Row", "Method", "Objective"]
"""A row of the plan and what it is made with."""

Work = Callable[[Task], Generator[Record]]
"""A task's lines, each as soon as it is there; it goes on to the next once that line is on the disk."""
