"""A table of the report, before it becomes a part of the page, Markdown or LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from errata.report.tables import Sheet


@dataclass(frozen=True)
class Shown:
    """A cell: its text, what stands small below it, and "good" or "bad" where it is one of these beyond doubt."""

    text: str
    small: str = ""
    mood: str = ""


@dataclass(frozen=True)
class Board:
    """A table of the report. written: columns of what the model writes by itself, which are set off from those where it is led. wide: the
    last column holds running text."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[Shown, ...], ...]
    written: frozenset[int] = frozenset()
    remarks: tuple[str, ...] = ()
    wide: bool = False

    def sheet(self) -> Sheet:
        """For Markdown and LaTeX."""
        rows = [tuple(f"{cell.text} ({cell.small})" if cell.small else cell.text for cell in row) for row in self.rows]
        return Sheet(self.title, self.headings, tuple(rows), wide=self.wide)


def over_seeds(values: Sequence[float | None], spell: str = "{:.1f}") -> Shown:
    """The mean, and the standard deviation where there are several seeds; a dash for nothing."""
    there = [value for value in values if value is not None]
    if not there:
        return Shown("–")
    deviation = f" ± {spell.format(stdev(there))}" if len(there) > 1 else ""
    return Shown(spell.format(fmean(there)) + deviation)


def span(low: float, high: float, digits: int = 1) -> str:
    """An interval in words; with minus signs, not hyphens."""
    return f"{low:.{digits}f} to {high:.{digits}f}".replace("-", "−")
