"""General ability: what a model can do beside the facts that are edited (DeltaEdit, Figures 3 and 7), through lm-evaluation-harness.

Six tasks from local JSON, without a network: CoLA, MMLU, MRPC, NLI, RTE, SST-2, with no examples in the prompt. Any other task of the
harness goes by its own name, with what it downloads. `errata[ability]` brings the harness.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from errata.lm import LanguageModel

LIMIT = 100
"""Tests of a task, as in the paper's scripts: the first so many of the file."""
GENERATED = 5
"""Tokens of a generated answer, as in the paper's scripts."""
VARIANTS = ("probability", "generate")
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "exact", "em", "contains", "f1", "mcc", "likelihood", "pass@1")
"""The harness's metrics that are fractions, by name; all others are told as they are, since no value says what scale it has."""


Scores = dict[str, float]


class AbilityError(ValueError):
    """A task or variant that nobody knows, or tests that are missing or broken."""


@dataclass(frozen=True)
class Task:
    """text: the prompt of a record; answers: of all records, in the labels' order; label: the right one's number."""

    text: Callable[[Mapping[str, Any]], str]
    answers: tuple[str, ...]
    label: Callable[[Mapping[str, Any]], int]


def _number(name: str, values: Sequence[Any]) -> Callable[[Mapping[str, Any]], int]:
    """Which of `values` a record's field holds; numbers may stand there as text. KeyError or ValueError where it holds none."""
    spelled = [str(value) for value in values]
    return lambda record: spelled.index(str(record[name]))


def _question(record: Mapping[str, Any]) -> str:
    lines = [f"({letter}) {choice}" for letter, choice in zip("ABCD", record["choices"], strict=True)]
    return "\n".join([f"Question: {record['question']}", *lines, "Answer:"])


TASKS: Mapping[str, Task] = {
    "cola": Task(
        lambda r: f"Is this sentence linguistically acceptable?\nSentence: {r['sentence']}\nAnswer (yes or no):",
        ("no", "yes"),
        _number("label", (0, 1)),
    ),
    "mmlu": Task(_question, ("A", "B", "C", "D"), _number("answer", (0, 1, 2, 3))),
    "mrpc": Task(
        lambda r: f"Do both sentences say the same?\nSentence 1: {r['sentence1']}\nSentence 2: {r['sentence2']}\nAnswer (yes or no):",
        ("no", "yes"),
        _number("label", (0, 1)),
    ),
    "nli": Task(
        lambda r: f"{r['sentence1']}\nDoes it follow that {r['sentence2']}\nAnswer (yes or no):",
        ("yes", "no"),
        _number("label", ("entailment", "not_entailment")),
    ),
    "rte": Task(
        lambda r: f"{r['sentence1']}\nQuestion: {r['sentence2']} True or false?\nAnswer:",
        ("true", "false"),
        _number("label", (1, 0)),
    ),
    "sst2": Task(
        lambda r: f"Review: {r['sentence']}\nSentiment (positive or negative):",
        ("negative", "positive"),
        _number("label", (0, 1)),
    ),
}
"""The six. An answer is written behind its prompt with a space."""


def measure(
    lm: LanguageModel,
    tasks: Sequence[str] = tuple(TASKS),
    variant: str = "probability",
    limit: int | None = LIMIT,
    data_dir: str | Path | None = None,
) -> dict[str, Scores]:
    """Task -> {"n", "accuracy", "f1", …} in per cent, of the model as it is, edits and all. It is left as it was.

    variant: "probability": the answer whose tokens have the greatest log p; "generate": the answer that stands first in GENERATED greedy
        tokens, in letters of any size; a text with none of them is wrong (and "answered" says how many have one).
    limit: the first so many tests of each task; None is all of them. data_dir: where NAME.json of the six lies, or a folder "ability" in
        it.
    f1: the F1 of each label, weighted by how often the label is right; mcc (CoLA alone): Matthews' correlation.
    Other tasks of the harness have the harness's own numbers, SHARES in per cent.

    Raises AbilityError for an unknown task or variant, or a broken file, ImportError without lm-eval.
    """
    if variant not in VARIANTS:
        raise AbilityError(f"unknown variant {variant!r}; there is {', '.join(VARIANTS)}")
    known = check(tasks, data_dir, limit)
    others = [name for name in tasks if name not in TASKS]
    found = {name: _scores(TASKS[name], *_asked(lm, name, records, variant)) for name, records in known.items()}
    return {**found, **_others(lm, others, limit)} if others else found


def check(tasks: Sequence[str], data_dir: str | Path | None = None, limit: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """The records of those of the six, before minutes of loading. Raises what `measure` does for tasks that cannot be measured."""
    if limit is not None and limit < 1:
        raise AbilityError(f"limit must be at least 1 (got {limit}); leave it out for all tests")
    known = {name: read(name, data_dir, limit) for name in tasks if name in TASKS}
    if find_spec("lm_eval") is None:
        raise ImportError("general ability is measured with lm-eval; install errata[ability]")
    if others := [name for name in tasks if name not in TASKS]:
        _check_names(others)
    return known


def read(name: str, data_dir: str | Path | None, limit: int | None = None) -> list[dict[str, Any]]:
    """The first records of one of the six. Raises AbilityError naming file and record where something is missing."""
    path = find(name, data_dir)
    task = TASKS[name]
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AbilityError(f"{path}: not valid JSON ({error}); expected an array of records") from error
    if not isinstance(records, list) or not records:
        raise AbilityError(f"{path} must hold an array of records, and at least one")
    for number, record in enumerate(records[:limit]):
        try:
            task.text(record)
            task.label(record)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise AbilityError(f"{path}, record {number}: not a test of {name} ({type(error).__name__}: {error})") from error
    return list(records[:limit])


def find(name: str, data_dir: str | Path | None = None) -> Path:
    """The file of one of the six. Raises AbilityError where there is none."""
    if data_dir is None:
        raise AbilityError(f"where are the tests of {name!r}? say the folder that holds {name}.json (data_dir, --data-dir or $ERRATA_DATA)")
    for place in (Path(data_dir) / f"{name}.json", Path(data_dir) / "ability" / f"{name}.json"):
        if place.is_file():
            return place
    raise AbilityError(f"no {name}.json in {data_dir} or its folder 'ability'; put it there, or leave out {name!r}")


def difference(before: Mapping[str, Scores], after: Mapping[str, Scores]) -> dict[str, dict[str, dict[str, float]]]:
    """Task -> metric -> before, after, difference; of what both have, and no counts."""
    return {
        task: {
            name: {"before": before[task][name], "after": value, "difference": value - before[task][name]}
            for name, value in scores.items()
            if name != "n" and name in before[task]
        }
        for task, scores in after.items()
        if task in before
    }


def _asked(lm: LanguageModel, name: str, records: Sequence[Mapping[str, Any]], variant: str) -> tuple[list[int], list[int | None]]:
    """The right labels, and those that the model gives; None where it gives none."""
    task = TASKS[name]
    right = [task.label(record) for record in records]
    docs = [{"text": task.text(record), "label": label} for record, label in zip(records, right, strict=True)]
    config: dict[str, Any] = {
        "task": name,
        "custom_dataset": lambda **_: _splits(docs),
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": " ",
        "num_fewshot": 0,
    }
    if variant == "probability":
        config |= {"output_type": "multiple_choice", "doc_to_choice": list(task.answers), "doc_to_target": "label"}
    else:
        generation = {"until": ["\n"], "max_gen_toks": GENERATED, "do_sample": False}
        config |= {"output_type": "generate_until", "doc_to_target": "{{label}}", "generation_kwargs": generation}
    samples = _harness(lm, [config], None)["samples"][name]
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    if variant == "generate":
        return right, [_first_said(sample["filtered_resps"][0], task.answers) for sample in samples]
    scores = [[float(answer[0]) for answer in sample["filtered_resps"]] for sample in samples]
    return right, [max(range(len(own)), key=own.__getitem__) for own in scores]


def _splits(docs: Sequence[Mapping[str, Any]]) -> Any:
    from datasets import Dataset

    return {"test": Dataset.from_list(list(docs))}


def _first_said(text: str, answers: Sequence[str]) -> int | None:
    """The answer that stands first in a text, as a word of its own; None where there is none."""
    words = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    places = {words.index(answer.lower()): number for number, answer in enumerate(answers) if answer.lower() in words}
    return places[min(places)] if places else None


def _scores(task: Task, right: Sequence[int], given: Sequence[int | None]) -> Scores:
    from sklearn.metrics import f1_score, matthews_corrcoef

    said = [-1 if label is None else label for label in given]
    scores = {
        "n": float(len(right)),
        "accuracy": 100 * fmean(one == other for one, other in zip(right, said, strict=True)),
        "f1": 100 * float(f1_score(right, said, labels=range(len(task.answers)), average="weighted", zero_division=0.0)),
        "answered": 100 * fmean(label is not None for label in given),
    }
    if task is TASKS["cola"]:
        scores["mcc"] = 100 * float(matthews_corrcoef(right, said))
    return {name: round(value, 6) for name, value in scores.items()}


def _harness(lm: LanguageModel, tasks: Sequence[Any], limit: int | None) -> dict[str, Any]:
    """What lm-eval finds. The model is left as it was, its tokenizer too."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from errata.metrics.harness import Live

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = any(isinstance(task, dict) for task in tasks)
    manager = TaskManager(include_defaults=not own)  # the index of all tasks takes a quarter of a minute
    # Its bars, several a task, and what git says of a folder that is no repository, are of no use to whoever asked.
    with redirect_stderr(io.StringIO()), patch("lm_eval.evaluator.get_git_commit_hash", lambda: ""):
        found: dict[str, Any] = simple_evaluate(
            model=Live(lm), tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=own, verbosity="ERROR"
        )
    return found


def _check_names(names: Sequence[str]) -> None:
    """Raise AbilityError for what is neither one of the six nor a task of the harness."""
    from lm_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    for name in names:
        if name not in known:
            near = get_close_matches(name, [*TASKS, *known], n=1)
            raise AbilityError(f"no task {name!r}{f'; did you mean {near[0]!r}?' if near else ''} (errata's own: {', '.join(TASKS)})")


def _others(lm: LanguageModel, names: Sequence[str], limit: int | None) -> dict[str, Scores]:
    """The harness's own numbers of its own tasks; shares in per cent."""
    found = _harness(lm, names, limit)
    made: dict[str, Scores] = {}
    for name in names:
        numbers = {key.partition(",")[0]: value for key, value in found["results"].get(name, {}).items() if isinstance(value, int | float)}
        counts = found["n-samples"].get(name, {})
        made[name] = {"n": float(counts.get("effective", 0))}
        made[name] |= {key: round(100 * value if key in SHARES else value, 6) for key, value in numbers.items() if "stderr" not in key}
    return made
