"""What was measured beside the cases of a sequence, as tables: what the edits cost elsewhere, and what is written when they are asked for
in other ways (see `errata.bench.also`). Nothing where nothing was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from errata.bench.intervals import limits, resampled, wilson
from errata.report.board import Board, Shown, over_seeds, span
from errata.report.story import Line, Story, Values, cell_of

UNEDITED = "unedited"
WAYS = {"plain": "as it stands", "qa": "in a frame", "question": "as a question", "chat": "in a chat"}
"""See `errata.metrics.generation.WAYS`."""
ELSEWHERE = {
    "negation": "denied, at once",
    "negation_contains": "denied, somewhere",
    "leak": "same subject, at once",
    "leak_contains": "same subject, somewhere",
}


def costs(story: Story) -> Iterator[Board]:
    """Perplexity, general ability, drift, fluency."""
    for make in (perplexity, ability, drift, fluency):
        yield from make(story)


def perplexity(story: Story) -> Iterator[Board]:
    """Before, after, and how many times as much."""
    rows = []
    for line in story.lines:
        if found := line.at_end("perplexity"):
            before, after = ([one[when] for one in found] for when in ("before", "after"))
            rows.append((Shown(line.label), over_seeds(before, "{:.3g}"), over_seeds(after, "{:.3g}"), over_seeds(times(found), "{:.3f}")))
    if rows:
        headings = ("method", UNEDITED, "edited", "times the unedited")
        yield Board("Perplexity of held-out text", headings, tuple(rows), remarks=("1 is no cost; the lower the better.",))


def times(found: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Edited over unedited, of each seed; None where the edited model gives no number."""
    return [one["after"] / one["before"] if one["after"] is not None and one["before"] else None for one in found]


def ability(story: Story) -> Iterator[Board]:
    """A table a metric: the unedited model's score of each task, and each method's, with the difference."""
    lines = [(line, found) for line in story.lines if (found := line.at_end("ability"))]
    every = [scores for _, found in lines for one in found for when in ("before", "after") for scores in one[when].values()]
    tasks = dict.fromkeys(task for _, found in lines for one in found for task in one["after"])
    for metric in dict.fromkeys(name for scores in every for name in scores if name not in ("n", "mcc")):  # no more than the paper's F1
        if metric == "answered" and all(scores["answered"] == 100 for scores in every if "answered" in scores):
            continue
        own = [task for task in tasks if any(metric in one["after"].get(task, {}) for _, found in lines for one in found)]
        unedited = {line.run: _scores("", *_parted(found)[1:], None, own, metric) for line, found in lines}
        edited = [_scores(line.label, *_parted(found), own, metric) for line, found in lines]
        counts = dict.fromkeys(sorted(round(scores["n"]) for scores in every if "n" in scores))
        remark = f"Per cent, of {' or '.join(map(str, counts))} tests a task; below it the difference to the unedited model"
        remark += ", and the 95 % interval (Wilson) of the score itself." if metric == "accuracy" else "."
        name = {"f1": "F1"}.get(metric, metric)
        headings = ("method", *own, *(("mean",) if len(own) > 1 else ()))
        yield Board(f"General ability, {name}", headings, (*_named(unedited), *edited), remarks=(remark,))


def _named(rows: Mapping[str, tuple[Shown, ...]]) -> list[tuple[Shown, ...]]:
    """Run -> a row of the unedited model, its first cell to be filled in; runs that say the same once, others with their names."""
    different = dict.fromkeys(rows.values())
    if len(different) == 1:
        return [(Shown(UNEDITED), *row[1:]) for row in different]
    return [(Shown(f"{UNEDITED} ({run})"), *row[1:]) for run, row in rows.items()]


def _parted(found: Sequence[Mapping[str, Any]]) -> tuple[list[Any], list[Any]]:
    return [one["after"] for one in found], [one["before"] for one in found]


def _scores(label: str, now: Sequence[Any], before: Sequence[Any] | None, tasks: Sequence[str], metric: str) -> tuple[Shown, ...]:
    cells, means, moved = [], [], []
    for task in tasks:
        values = [one[task][metric] for one in now if metric in one.get(task, {})]
        cell, small = over_seeds(values), []
        means.append(fmean(values) if values else None)
        if before is not None and values:
            moved.append(fmean(values) - fmean(one[task][metric] for one in before))
            small.append(signed(moved[-1]))
        if metric == "accuracy" and len(values) == 1:
            low, high = wilson(values[0] / 100, now[0][task]["n"])
            small.append(f"{100 * low:.0f} to {100 * high:.0f}")
        cells.append(replace(cell, small=" · ".join(small)))
    if len(tasks) > 1:
        mean = over_seeds([fmean(there)] if (there := [value for value in means if value is not None]) else [])
        cells.append(replace(mean, small=signed(fmean(moved)) if moved else ""))
    return (Shown(label), *cells)


def drift(story: Story) -> Iterator[Board]:
    """How far the hidden states of other facts have moved."""
    names = {"cosine": "mean cosine", "relative_l2": "relative L2", "cka": "CKA"}
    rows: list[tuple[Shown, ...]] = []
    prompts: set[int] = set()
    for line in story.lines:
        if found := line.at_end("drift"):
            prompts |= {one["prompts"] for one in found}
            cells = [over_seeds([one[name] for one in found], "{:.3f}") for name in names]
            if len(found) == 1:
                ends = [found[0]["intervals"][name] for name in names]
                cells = [
                    replace(cell, small="" if low is None else span(low, high, 3)) for cell, (low, high) in zip(cells, ends, strict=True)
                ]
            rows.append((Shown(line.label), *cells))
    if rows:
        remark = (
            f"Hidden states of the last layer at the end of {_either(prompts)} prompts about subjects that no edit is about, before and "
            "after. Cosine and CKA (centred kernel alignment) are 1, and relative L2 is 0, where nothing moved. Below: "
            "the 95 % bootstrap interval over prompts."
        )
        yield Board("Drift of other facts", ("method", *names.values()), tuple(rows), remarks=(remark,))


def fluency(story: Story) -> Iterator[Board]:
    """n-gram entropy of what is written behind the edits' prompts."""
    rows: list[tuple[Shown, ...]] = []
    prompts: set[int] = set()
    for line in story.lines:
        if found := line.at_end("fluency"):
            prompts |= {len(one["after"]) for one in found}
            before, after = ([fmean(one[when]) if one[when] else None for one in found] for when in ("before", "after"))
            moved = [[new - old] for one in found for old, new in zip(one["before"], one["after"], strict=True)]
            low, high = limits(resampled(moved, 1)[:, 0] / 100)
            difference = Shown("–") if low is None or high is None else Shown(
                signed(fmean(value for (value,) in moved), 2), span(low, high, 2), "bad" if high < 0 else ""
            )  # fmt: skip
            rows.append((Shown(line.label), over_seeds(before, "{:.2f}"), over_seeds(after, "{:.2f}"), difference))
    if rows:
        remark = (
            f"Weighted entropy of 2- and 3-grams of words, in bits, of what is written behind {_either(prompts)} of the edits' prompts; "
            "a text that repeats itself, or is short, has little. Below the difference: its 95 % bootstrap interval."
        )
        yield Board("Fluency: n-gram entropy", ("method", UNEDITED, "edited", "difference"), tuple(rows), remarks=(remark,))


def asked_otherwise(story: Story) -> Iterator[Board]:
    """What is written when the edit is asked for with frames, and where its answer does not belong; the unedited model's rates first."""
    end = " Per cent over cases, with the 95 % bootstrap interval."
    ways = {f"{way}_exact": title for way, title in WAYS.items()}
    remark = (
        "The new answer and nothing else: behind the prompt as it stands, in the frame “Question: … Answer:”, behind those of the case's "
        "other wordings that are questions, and as a user's turn where the model has a chat template."
    )
    yield from _written(story, "Written, asked in other ways", ways, remark + end)
    some = {f"{way}_contains": title for way, title in WAYS.items()}
    some |= {f"{way}_alias": f"{title}, or an alias" for way, title in WAYS.items()}
    remark = "The new answer stands somewhere in what is written; or, of the cases that know of other names for it, one of these."
    yield from _written(story, "Contained, asked in other ways", some, remark + end)
    remark = (
        "How often the new answer is written where it does not belong: behind a prompt that denies it (“X is not”), and behind prompts "
        "about the subject's other relations. At once: the text begins with it; somewhere: it stands anywhere in the text, where “not A "
        "but B” would be right."
    )
    yield from _written(story, "Said where it should not be (lower is better)", ELSEWHERE, remark + end)


def _written(story: Story, title: str, columns: Mapping[str, str], remark: str) -> Iterator[Board]:
    lines = [(line.label, line.extended) for line in story.lines if line.extended]
    there = [name for name in columns if any(values.get(name) for _, values in lines)]
    if not there:
        return
    base: dict[str, Values] = {}
    for line in story.lines:
        for name, values in line.unasked.items():
            base.setdefault(line.run, {}).setdefault(name, {}).update(values)
    unedited = {run: (Shown(""), *(_share(values.get(name)) for name in there)) for run, values in base.items()}
    rows = (*_named(unedited), *((Shown(label), *(_share(values.get(name)) for name in there)) for label, values in lines))
    headings = ("method", *(columns[name] for name in there))
    yield Board(title, headings, rows, frozenset(range(1, len(headings))), (remark,))


def _share(values: Mapping[tuple[int, str], float] | None) -> Shown:
    cell = cell_of(values)
    return Shown("–") if cell is None else Shown(f"{cell}", span(cell.low, cell.high))


def _either(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def case_study(story: Story) -> list[Board]:
    """DeltaEdit's Tables 4 and 5: what the unedited model writes behind a prompt, and each method's after its last edit."""
    made: dict[tuple[int, str, str], list[tuple[Shown, ...]]] = {}
    knowledge: dict[tuple[int, str], str] = {}
    several = len({row["seed"] for line in story.lines for row in line.rows}) > 1
    for run in story.runs:
        knowledge |= run.known
    for line in story.lines:
        for row in line.rows:
            for said in row.get("transcripts", ()):
                rows = made.setdefault((row["seed"], said["prompt"], said["before"]), [(Shown(UNEDITED), _text(said, "before"))])
                rows.append((Shown(line.label), _text(said, "after")))
    boards = []
    for (seed, prompt, _), rows in made.items():
        title = f"Case study: {prompt} …{f' (seed {seed})' if several else ''}"
        if (seed, prompt) in knowledge:
            title += f" – edited: {knowledge[seed, prompt]}"
        boards.append(Board(title, ("method", "output"), tuple(rows), frozenset({1}), wide=True))
    return boards


def _text(said: Mapping[str, str], which: str) -> Shown:
    return Shown(" ".join(f"{said['prompt']} {said[which].strip()}".split()))


def told(story: Story) -> list[str]:
    """One sentence a method on its costs."""
    made = []
    for line in story.lines:
        words = _words(line)
        if words:
            made.append(f"{line.label}: {', '.join(words)}.")
    return made


def _words(line: Line) -> list[str]:
    words = []
    if found := [value for value in times(line.at_end("perplexity")) if value is not None]:
        words.append(f"perplexity {fmean(found):.2f} times the unedited model's")
    if able := line.at_end("ability"):
        moved = [
            one["after"][task]["accuracy"] - one["before"][task]["accuracy"] for one in able for task in one["after"]
            if "accuracy" in one["after"][task]
        ]  # fmt: skip
        if moved:
            words.append(f"accuracy in general ability {signed(fmean(moved))} points (tasks: {', '.join(able[0]['after'])})")
    if far := [one["relative_l2"] for one in line.at_end("drift") if one["relative_l2"] is not None]:
        words.append(f"hidden states of other facts moved by {100 * fmean(far):.0f} % of their size")
    return words


def signed(value: float, digits: int = 1) -> str:
    """+1.0, −1.0 or ±0.0."""
    text = f"{abs(value):.{digits}f}"
    return f"{'±' if not float(text) else '+' if value > 0 else '−'}{text}"
