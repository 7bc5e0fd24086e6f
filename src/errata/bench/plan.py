"""What is to be measured: the whole configuration of a run, as one value and as `plan.yaml`."""

from __future__ import annotations

import difflib
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, is_dataclass, replace
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from errata.facts import EditCase
from errata.methods import WITHOUT_OBJECTIVE
from errata.report import CURVES, DRAWINGS, OF_CASES

PROTOCOLS: Mapping[str, str | None] = {"single": None, "continual": "T", "sequential": "N"}
"""Name -> what the number behind it is called; None where it takes none."""
NO_OBJECTIVE = "none"
"""What stands in the column of the objective beside a method that optimises nothing."""
MEASURES = ("after-sequence", "after-each", "both")
ALSO = ("perplexity", "ability", "drift", "fluency", "extended")
"""What a sequence can measure beside its cases; see `errata.bench.also`."""
Settings = Mapping[str, Mapping[str, Any]]
T = TypeVar("T")


class PlanError(ValueError):
    """The request itself is wrong: an unknown name or setting, or a run folder that belongs to another plan."""


class Protocol(NamedTuple):
    """In which order edits and measurements follow one another; `size` is the number behind the colon."""

    name: str
    size: int | None

    @classmethod
    def parse(cls, text: str) -> Protocol:
        """Read "single", "continual:10" or "sequential:500". Raises PlanError for an unknown name, a missing or a needless number."""
        name, colon, number = text.partition(":")
        if name not in PROTOCOLS:
            known = [kind if what is None else f"{kind}:{what}" for kind, what in PROTOCOLS.items()]
            raise PlanError(f"unknown protocol {text!r}; there is {', '.join(known)}")
        if PROTOCOLS[name] is None:
            if colon:
                raise PlanError(f"the protocol {name!r} takes no number (got {text!r})")
            return cls(name, None)
        if not number.isdecimal() or int(number) < 1:
            raise PlanError(f"the protocol {name!r} needs a number of edits, for instance {name}:500 (got {text!r})")
        return cls(name, int(number))


class Row(NamedTuple):
    """One line of the table: a method trained with an objective, under one seed.

    method: its name, with a label where it stands in the plan with several settings ("deltaedit@eta=2").
    """

    method: str
    objective: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}+{self.objective}"

    def case_seed(self, case_id: str) -> int:
        """The seed of one edit, 0 to 2³¹ - 1: from what is edited, never from when.

        Objective and label have no part in it, so that two objectives, or two settings, start from the same adapters and draw the
        same dropout masks: a paired comparison.
        """
        digest = hashlib.sha256(json.dumps([self.seed, unlabelled(self.method), case_id]).encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


@dataclass(frozen=True)
class Plan:
    """The effective configuration of a run.

    methods, objectives: names of the registries; every method is run with every objective, and once if it optimises nothing. A method
        may stand there several times, each time with a label of its own behind an "@": "deltaedit@eta=2".
    only: method -> the objectives that it is run with, where these are not all.
    protocol: "single" (each case from the unedited model, measured after its edit), "continual:T" (T cases in a row, measured, then again
        from the unedited model, until all cases are edited), or "sequential:N" (N cases in a row). The last two take the cases in an
        order of the seed's own.
    checkpoints: numbers of edits after which a sequence is measured; N is always one. Empty: five equal parts.
    measure: "after-sequence": at a checkpoint, every case so far, or after a block of T all of its cases; "after-each": every case right
        after its own edit; or "both".
    batch: so many cases of a sequence are edited together, as one edit. Of single edits: so many are made and measured side by side, each
        as if it were alone, where the method can (see `errata.bench.batches`). 0: of single edits what memory takes,
        in batches of about one size; otherwise one.
    curves: single edits are looked at after every step of their training (see `errata.metrics.overfitting`).
    transcripts: prompts whose continuation by the unedited model and by each row's last model is kept.
    also: what is measured of a sequence beside its cases, at the checkpoints and of the unedited model: of ALSO.
    drawings: tables and pictures of the finished run that `errata bench` makes at the end, by name; see `errata.report`.
    limit, split: `limit` cases of the data set's `split`, drawn anew by each seed; None is all of them, and the data set's own choice.
    seeds: one set of rows for each.
    settings: hyper-parameters that differ from the defaults: method, objective, one of `also`, or "method+objective" -> name -> value;
        the last is for the objective in that company only. Those of a labelled method come on top of those of the method.
    overrides: model -> settings on top of these where the plan is run with that model; see `resolved`.
    dtype: the type of the weights; None: the checkpoint's own.
    threads: torch threads; part of the plan because sums in another order may differ in the last bit.
    data_hash, model_fingerprint, versions: filled in when the run starts, checked when it goes on.
    """

    model: str
    data: str
    methods: tuple[str, ...]
    objectives: tuple[str, ...] = ("ce",)
    _: KW_ONLY
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    protocol: str = "single"
    checkpoints: tuple[int, ...] = ()
    measure: str = "after-sequence"
    batch: int = 0
    curves: bool = False
    transcripts: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    drawings: tuple[str, ...] = ()
    limit: int | None = None
    split: str | None = None
    seeds: tuple[int, ...] = (0,)
    settings: Settings = field(default_factory=dict)
    overrides: Mapping[str, Settings] = field(default_factory=dict)
    dtype: str | None = None
    threads: int | None = None
    data_hash: str | None = None
    model_fingerprint: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.model or not self.data:
            raise PlanError("a plan needs a model and a data set")
        for name in ("methods", "objectives", "seeds"):
            values = getattr(self, name)
            if not values:
                raise PlanError(f"the plan names no {name}")
            if twice := sorted({str(value) for value in values if values.count(value) > 1}):
                raise PlanError(f"{name}: {', '.join(twice)} stands there twice")
        for name in self.methods:
            if "@" in name and not (unlabelled(name) and name.partition("@")[2]):
                raise PlanError(f"cannot read the method {name!r}; write a label as method@label, for instance deltaedit@eta=2")
        for name, chosen in self.only.items():
            for value, known in ((name, self.methods), *((objective, self.objectives) for objective in chosen)):
                if value not in known:
                    raise PlanError(f"only: {value!r} is not used here{did_you_mean(value, known)}")
            if not chosen:
                raise PlanError(f"only: {name} is left without an objective; leave the method out")
        self._check_sequence()
        if self.limit is not None and self.limit < 1:
            raise PlanError(f"limit must be at least 1 (got {self.limit}); leave it out for all cases")
        for settings in (self.settings, *self.overrides.values()):
            check_owners(settings, self.methods, (*self.objectives, *self.also))

    def _check_sequence(self) -> None:
        if self.measure not in MEASURES:
            raise PlanError(f"unknown measure {self.measure!r}{did_you_mean(self.measure, MEASURES)}")
        if unknown := [name for name in self.drawings if name not in DRAWINGS]:
            raise PlanError(f"unknown drawing {unknown[0]!r}{did_you_mean(unknown[0], DRAWINGS)}")
        if strange := [name for name in self.also if name not in ALSO]:
            raise PlanError(f"also: unknown measurement {strange[0]!r}{did_you_mean(strange[0], ALSO)}")
        if len(set(self.also)) < len(self.also):
            raise PlanError(f"also: {next(name for name in self.also if self.also.count(name) > 1)} stands there twice")
        if self.batch < 0:
            raise PlanError(f"batch must be at least 1 (got {self.batch}); leave it out for the usual number")
        size = self.sequence
        if self.curves and self.batch > 1:
            raise PlanError("curves are of edits that are made one by one; leave out batch")
        if not self.batch and (self.protocol != "single" or self.curves):
            object.__setattr__(self, "batch", 1)
        if self.curves and self.protocol != "single":
            raise PlanError(f"curves are of single edits, not of the protocol {self.protocol!r}; leave one of them out")
        if not self.curves and (drawn := [name for name in self.drawings if name in CURVES]):
            raise PlanError(f"{drawn[0]} is drawn from curves; add curves: true, or leave it out")
        if other := [name for name in self.drawings if (name in OF_CASES) != (size is None)]:
            fitting = "sequential:N" if size is None else "single or continual:T"
            raise PlanError(f"the drawing {other[0]!r} is none of the protocol {self.protocol!r}; add {fitting}, or leave it out")
        if size is None:
            alone = {"checkpoints": (), "transcripts": (), "also": ()} | ({"batch": 1} if self.block else {"measure": MEASURES[0]})
            for name, default in alone.items():
                if getattr(self, name) != default:
                    raise PlanError(f"{name} belongs to a sequence; add the protocol sequential:N, or leave it out")
            return
        if self.limit is not None:
            raise PlanError(f"the protocol {self.protocol!r} says how many cases there are; leave out limit")
        if list(self.checkpoints) != sorted({mark for mark in self.checkpoints if 0 < mark <= size}):
            raise PlanError(f"checkpoints must rise from 1 or more to {size} or less (got {list(self.checkpoints)})")
        if between := [mark for mark in self.checkpoints if mark % self.batch and mark != size]:
            raise PlanError(f"after {between[0]} edits there is no checkpoint: {self.batch} are made at a time; give a multiple of that")

    @property
    def sequence(self) -> int | None:
        """The number of cases in a sequence; None where the protocol has none."""
        name, size = Protocol.parse(self.protocol)
        return size if name == "sequential" else None

    @property
    def block(self) -> int | None:
        """The number of cases that are edited in a row before the model is the unedited one again; None where the protocol has none."""
        name, size = Protocol.parse(self.protocol)
        return size if name == "continual" else None

    @property
    def marks(self) -> tuple[int, ...]:
        """The checkpoints, the end of the sequence with them. Raises PlanError where the protocol has no sequence."""
        size = self.sequence
        if size is None:
            raise PlanError(f"the protocol {self.protocol!r} has no checkpoints")
        parts = (-(-size * part // 5) for part in range(1, 5))
        return tuple(sorted({*(self.checkpoints or (min(size, -(-mark // self.batch) * self.batch) for mark in parts)), size}))

    @property
    def rows(self) -> list[Row]:
        """The table's lines, in its order. A method that optimises nothing stands there once."""
        return [Row(method, objective, seed) for seed in self.seeds for method in self.methods for objective in self._objectives(method)]

    def _objectives(self, method: str) -> Sequence[str]:
        """Those of `only` in the plan's order; a method that optimises nothing has none of them."""
        if unlabelled(method) in WITHOUT_OBJECTIVE:
            return (NO_OBJECTIVE,)
        return [objective for objective in self.objectives if objective in self.only.get(method, self.objectives)]

    def resolved(self, model: str | None = None) -> Plan:
        """The plan as it is run with its model, or with another: with the settings that it has for that model, and no overrides."""
        model = model or self.model
        return replace(self, model=model, settings=merged(self.settings, self.overrides.get(model, {})), overrides={})

    def draw(self, cases: Sequence[EditCase], seed: int) -> list[EditCase]:
        """The cases of a seed, in the data's order; those that are edited in a row in an order that is drawn too.

        Single and continual editing draw the same cases. Another seed draws others: several seeds say how much the choice of cases
        matters. Raises PlanError for a sequence that is longer than the data.
        """
        if self.sequence is not None:
            if self.sequence > len(cases):
                raise PlanError(f"a sequence of {self.sequence} needs as many cases; {self.data} has {len(cases)}: give at most so many")
            return random.Random(seed).sample(list(cases), self.sequence)
        drawn = random.Random(seed).sample(range(len(cases)), min(self.limit or len(cases), len(cases)))
        return [cases[i] for i in (drawn if self.block else sorted(drawn))]

    def to_dict(self) -> dict[str, Any]:
        """A YAML-ready mapping; `from_dict` reads it back."""
        record = asdict(self)
        record["only"] = {method: list(chosen) for method, chosen in self.only.items()}
        plain: dict[str, Any] = _listed(record)
        return plain

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], where: str = "the plan") -> Plan:
        """Build a plan from a mapping. Raises PlanError that names an unknown, missing or mistyped field."""
        names = [f.name for f in fields(cls)]
        for name in record:
            if name not in names:
                raise PlanError(f"{where}: unknown field {name!r}{did_you_mean(str(name), names)}")
        if missing := [name for name in ("model", "data", "methods") if not record.get(name)]:
            raise PlanError(f"{where}: field {missing[0]!r} is missing")
        values = dict(record)
        texts, numbers = ("methods", "objectives", "transcripts", "also", "drawings"), ("seeds", "checkpoints")
        kinds_of_lists: dict[str, type] = {**dict.fromkeys(texts, str), **dict.fromkeys(numbers, int)}
        for name, kind in kinds_of_lists.items():
            if name in values:
                listed = values[name] if isinstance(values[name], list | tuple) else [values[name]]
                if not all(type(item) is kind for item in listed):
                    raise PlanError(f"{where}: {name} must be a list of {kind.__name__} (got {values[name]!r})")
                values[name] = tuple(listed)
        for name, kinds in {"limit": (int, type(None)), "threads": (int, type(None)), "batch": (int,)}.items():
            if name in values and type(values[name]) not in kinds:
                raise PlanError(f"{where}: {name} must be a whole number (got {values[name]!r})")
        if type(values.get("curves", False)) is not bool:
            raise PlanError(f"{where}: curves must be true or false (got {values['curves']!r})")
        only = values.get("only") or {}
        if not isinstance(only, Mapping) or not all(isinstance(chosen, list | tuple) for chosen in only.values()):
            raise PlanError(f"{where}: only must be a mapping like {{rome: [ce]}} (got {only!r})")
        values["only"] = {method: tuple(map(str, chosen)) for method, chosen in only.items()}
        values["settings"] = _settings(values.get("settings"), f"{where}: settings must be a mapping like {{lora: {{lr: 0.001}}}}")
        overrides = values.get("overrides") or {}
        wrong = f"{where}: overrides must be a mapping like {{atlas: {{lora: {{lr: 0.001}}}}}}"
        if not isinstance(overrides, Mapping):
            raise PlanError(f"{wrong} (got {overrides!r})")
        values["overrides"] = {model: _settings(settings, wrong) for model, settings in overrides.items()}
        return cls(**values)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan in a YAML file. Raises PlanError if it is not one, FileNotFoundError if there is no file."""
        try:
            record = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} is not a YAML file ({' '.join(str(error).split())})") from error
        if not isinstance(record, Mapping):
            raise PlanError(f"{path} is not a plan; it must be a mapping with model, data, methods …")
        return cls.from_dict(record, str(path))

    def dump(self) -> str:
        """The text of `plan.yaml`."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def must_equal(self, other: Plan, where: str) -> None:
        """Raises PlanError naming the first field in which `other`, the plan that wrote the records, differs."""
        mine, theirs = self.to_dict(), other.to_dict()
        for name, value in mine.items():
            if value != theirs[name]:
                raise PlanError(
                    f"{where} was started with another plan: {name} was {theirs[name]!r} and is now {value!r}; "
                    "give the same options, or another --out for the new plan"
                )


def hash_cases(cases: Iterable[EditCase]) -> str:
    """sha256 over the cases as they were loaded, in order: whatever the file's form, the same cases have the same hash."""
    digest = hashlib.sha256()
    for case in cases:
        digest.update(json.dumps(case.to_dict(), sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def parse_settings(items: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read `lora.lr=1e-3`: numbers, true, false, none and JSON lists are read as such, anything else is text.

    Raises PlanError for an item without a name, a dot or an equals sign.
    """
    settings: dict[str, dict[str, Any]] = {}
    for item in items:
        labelled = "@" in item.partition("=")[0]  # a label may have an equals sign of its own: deltaedit@eta=2.eta=2
        key, equals, text = item.rpartition("=") if labelled else item.partition("=")
        owner, dot, name = key.strip().rpartition(".")
        if not (equals and dot and owner and name):
            raise PlanError(f"cannot read the setting {item!r}; write it as method.name=value, for instance lora.lr=1e-3")
        settings.setdefault(owner, {})[name] = _scalar(text.strip())
    return settings


def check_owners(settings: Settings, methods: Iterable[str], objectives: Iterable[str]) -> None:
    """Raise PlanError for settings of a method, an objective or a pair of them that is not used: they would change nothing."""
    objectives = list(objectives)
    methods = list(dict.fromkeys(name for method in methods for name in (unlabelled(method), method)))
    known = [*methods, *objectives, *(f"{m}+{o}" for m, o in product(methods, objectives))]
    for name in settings:
        if name not in known:
            raise PlanError(f"settings for {name!r}, which is not used here{did_you_mean(name, known)}")


def merged(settings: Settings, more: Settings) -> dict[str, dict[str, Any]]:
    """`settings` with those of `more` in the place of, or beside, its own."""
    return {owner: {**settings.get(owner, {}), **more.get(owner, {})} for owner in dict.fromkeys([*settings, *more])}


def unlabelled(method: str) -> str:
    """The method's name in the registry: "deltaedit" of "deltaedit@eta=2"."""
    return method.partition("@")[0]


def known_split(split: str | None) -> Literal["dev", "test"]:
    """A split of the bundled world, "test" where none is asked for. Raises PlanError for another name."""
    if split in (None, "test"):
        return "test"
    if split == "dev":
        return "dev"
    raise PlanError(f"the bundled world has no split {split!r}{did_you_mean(split, ('dev', 'test'))}")


def _settings(given: Any, wrong: str) -> Settings:
    """What stands under `settings`, numbers read as such. Raises PlanError that begins with `wrong`."""
    settings = given or {}
    if not isinstance(settings, Mapping) or not all(isinstance(inner, Mapping) for inner in settings.values()):
        raise PlanError(f"{wrong} (got {settings!r})")
    return {owner: {name: _scalar(value) for name, value in inner.items()} for owner, inner in settings.items()}


def _scalar(value: Any) -> Any:
    """Text that spells a number, a truth value, nothing or a JSON list as what it spells (YAML 1.1 reads 1e-3 as text)."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads({"True": "true", "False": "false", "None": "null", "none": "null"}.get(value, value))
    except ValueError:
        return value


def configure(part: T, settings: Mapping[str, Any], name: str) -> T:
    """`part` (a frozen dataclass of hyper-parameters) with some of them changed.

    Raises PlanError for a hyper-parameter that it does not have, or a value of another type than the default's.
    """
    if not settings:
        return part
    if not is_dataclass(part) or isinstance(part, type):
        raise PlanError(f"{name} has no settings")
    hints = get_type_hints(type(part))
    own = [f.name for f in fields(part) if f.init and f.name != "variant"]  # a variant is a method with a name of its own
    values = {}
    for key, value in settings.items():
        if key not in own:
            raise PlanError(f"{name} has no setting {key!r}{did_you_mean(key, own)}")
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, str) and hints[key] == tuple[str, ...]:  # as everywhere on the command line: a,b
            value = tuple(part.strip() for part in value.split(",") if part.strip())
        if not _fits(value, hints[key]):
            raise PlanError(f"{name}.{key} cannot be {value!r}: it is {_spell(hints[key])} (default {getattr(part, key)!r})")
        values[key] = value
    try:
        return replace(part, **values)
    except ValueError as error:
        raise PlanError(str(error) if str(error).startswith(f"{name.partition('@')[0]}:") else f"{name}: {error}") from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from text is of the type that the field declares."""
    if hint is Any:
        return True
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    kind = get_origin(hint) or hint
    return type(value) in (int, float) if kind is float else type(value) is int if kind is int else isinstance(value, kind)


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(repr(option) for option in get_args(hint))
    return hint.__name__ if isinstance(hint, type) else str(hint)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there is {', '.join(known)}"


def _listed(value: Any) -> Any:
    """With lists for tuples, however deep: what YAML reads back."""
    if isinstance(value, Mapping):
        return {name: _listed(one) for name, one in value.items()}
    return [_listed(one) for one in value] if isinstance(value, list | tuple) else value
