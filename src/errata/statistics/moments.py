"""Second moments of keys, C = E[k kᵀ]: which directions of a projection's input ordinary text uses, and how much.

k is the input of a layer's MLP down-projection, d_in wide; METHODS "Second moments". Sums and counts are kept, so pieces of a corpus
can be collected one by one, on several machines, and added.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock
from torch import Tensor

from errata.lm.model import LanguageModel
from errata.statistics import files
from errata.statistics.corpus import Corpus
from errata.statistics.corpus import texts as corpus_of
from errata.statistics.errors import StatisticsError
from errata.statistics.stream import LONGEST, Running, advance

if TYPE_CHECKING:
    Progress = Callable[[int, int, str], None]

FORMAT = 1
SUFFIX = ".safetensors"
ENVIRONMENT = "ERRATA_CACHE"


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """Sums of k kᵀ over the same tokens, for some layers of one model.

    sums: layer -> [d_in, d_in] float64, on the CPU. count: tokens. model, fingerprint: whose keys they are.
    corpus: what was read, for people. pieces: a digest for every collection in the sums, of the texts that it read.
    """

    sums: Mapping[int, Tensor]
    count: int
    model: str
    fingerprint: str
    corpus: str = ""
    pieces: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers there are sums for, ascending."""
        return tuple(sorted(self.sums))

    @property
    def width(self) -> int:
        """d_in."""
        return len(next(iter(self.sums.values())))

    def mean(self, layer: int) -> Tensor:
        """C = E[k kᵀ] [d_in, d_in] float64, a new tensor. Raises StatisticsError for a layer that was not collected."""
        self._need([layer])
        return self.sums[layer] / self.count

    def only(self, layers: Iterable[int]) -> Moments:
        """The same for these layers alone; nothing is copied. Raises StatisticsError for a layer that was not collected."""
        layers = sorted(set(layers))
        self._need(layers)
        return replace(self, sums={layer: self.sums[layer] for layer in layers})

    def matches(self, lm: LanguageModel) -> bool:
        """Whether these are the keys of this very model, in this dtype."""
        return self.fingerprint == lm.fingerprint

    def check(self, lm: LanguageModel) -> None:
        """Raises StatisticsError if they are another model's."""
        if not self.matches(lm):
            raise StatisticsError(
                f"these statistics are of the model {self.model!r} ({self.fingerprint[:12]}), this is {lm.name!r} ({lm.fingerprint[:12]}); "
                "load that model in the same dtype, without edits in its weights, or collect statistics of this one"
            )

    def merge(self, *others: Moments) -> Moments:
        """The sums over the tokens of all of them; floating-point addition in the order in which they are given.

        Raises StatisticsError for another model's statistics, other layers, or texts that are in both.
        """
        for other in others:
            if other.fingerprint != self.fingerprint:
                raise StatisticsError(
                    f"statistics of two models cannot be added: {self.model!r} ({self.fingerprint[:12]}) "
                    f"and {other.model!r} ({other.fingerprint[:12]}); collect both pieces with the same model, in the same dtype"
                )
            if other.layers != self.layers:
                raise StatisticsError(
                    f"statistics of layers {list(self.layers)} and {list(other.layers)} cannot be added; collect the same"
                )
        together = (self, *others)
        pieces = [piece for one in together for piece in one.pieces]
        if twice := {piece for piece in pieces if pieces.count(piece) > 1}:
            raise StatisticsError(f"the same piece ({min(twice)[:12]}) is in two of the files, and would count twice; leave one out")
        sums = {}
        for layer in self.layers:
            sums[layer] = self.sums[layer].clone()
            for other in others:
                sums[layer] += other.sums[layer]
        corpus = " + ".join(dict.fromkeys(one.corpus for one in together if one.corpus))
        return replace(self, sums=sums, count=sum(one.count for one in together), corpus=corpus, pieces=tuple(pieces))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, which is there whole or not at all."""
        self._save(Path(path))

    @classmethod
    def load(cls, path: str | Path, layers: Iterable[int] | None = None) -> Moments:
        """Read what `save` wrote; of some layers, only these are read.

        Raises StatisticsError for a file that is missing, damaged or newer, or lacks a layer.
        """
        wanted = None if layers is None else {_name(layer) for layer in layers}
        record, tensors = files.read(Path(path), lambda name: wanted is None or name in wanted)
        _readable(record, Path(path))
        try:
            made = cls(
                sums={layer: tensors[_name(layer)] for layer in map(int, record["layers"]) if wanted is None or _name(layer) in wanted},
                count=int(record["count"]),
                model=str(record["model"]["name"]),
                fingerprint=str(record["model"]["fingerprint"]),
                corpus=str(record["corpus"]),
                pieces=tuple(map(str, record["pieces"])),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StatisticsError(f"{path} is damaged, or holds no second moments ({error!r}); collect them again") from error
        if any(s.ndim != 2 or s.shape[0] != s.shape[1] or s.dtype != torch.float64 for s in made.sums.values()) or made.count < 1:
            raise StatisticsError(f"{path} is damaged: it does not hold square float64 matrices over some tokens; collect them again")
        if wanted is not None and len(wanted) > len(made.sums):
            missing = sorted(wanted - {_name(layer) for layer in made.sums})
            raise StatisticsError(f"{path} holds layers {record['layers']}, not {', '.join(missing)}; collect all layers that you edit")
        return made

    def _save(self, path: Path, request: Mapping[str, Any] | None = None) -> None:
        record = {
            "format": FORMAT,
            "model": {"name": self.model, "fingerprint": self.fingerprint},
            "layers": list(self.layers),
            "count": self.count,
            "corpus": self.corpus,
            "pieces": list(self.pieces),
            "request": request,
        }
        files.write(path, {_name(layer): self.sums[layer] for layer in self.layers}, record)

    def _need(self, layers: Sequence[int]) -> None:
        if missing := [layer for layer in layers if layer not in self.sums]:
            raise StatisticsError(
                f"there are statistics of {self.model} for layers {list(self.layers)}, not for {missing}; collect all layers that you edit"
            )


def collect(
    lm: LanguageModel,
    texts: Iterable[str],
    layers: Sequence[int],
    tokens: int | None = None,
    batch_size: int = 64,
    corpus: str = "",
    progress: Progress | None = None,
    path: str | Path | None = None,
    resume: bool = False,
    every: float = 20.0,
) -> Moments:
    """Run ordinary text through the model and sum k kᵀ, for all layers in one pass; layers above the highest do not run.

    texts: long ones are cut to 512 tokens, or to the model's window; blank ones are passed over.
    tokens: stop at exactly so many, special ones included; None is 10·d_in (METHODS "Second moments"). If the texts end before, the
        moments have fewer: see `count`. Fewer than d_in leave directions of which nothing is known.
    corpus: what the texts are, for people; a `Corpus` says it itself. progress(done, of, what) is called after every batch.
    path: where the result is written. About every `every` seconds (less often where writing takes long) the state goes to
        `path`.part, from which `resume` goes on; then the sums are bit for bit those of an undisturbed collection on the same machine
        with as many threads. A collection that is finished already is read.

    Products are taken in float64 on the model's device and added in float64 on the CPU: a null space asks about eigenvalues far below
    the largest, which rounding in float32 can drown. There is no smaller accumulator: five layers of d_in 14,336 take 8 GB of memory,
    and as much on the disk (twice while a state is replaced).

    Raises StatisticsError if the texts hold no tokens, a layer does not exist, the weights are not the unedited ones that `lm.fingerprint`
    names, `path` holds something else, or the texts or settings are not those that a resumed collection began with.
    """
    layers = _checked(lm, layers)
    target = 10 * lm.anatomy.key_size if tokens is None else tokens
    if target < 1 or batch_size < 1:
        raise StatisticsError(f"tokens and batch_size must be at least 1 (got {target} and {batch_size})")
    _unedited(lm)
    name = corpus or (texts.name if isinstance(texts, Corpus) else "")
    source = texts.digest if isinstance(texts, Corpus) else ""
    request = {"model": lm.fingerprint, "layers": layers, "tokens": target, "batch_size": batch_size, "corpus": [name, source]}
    place = None if path is None else Path(path)
    part = None if place is None else part_of(place)
    begun = None if place is None else _begun(place, resume, request)
    if isinstance(begun, Moments):
        return begun
    running = begun or Running.zero(lm, layers)
    written, pause = time.monotonic(), every
    for whole in advance(lm, texts, running, target, batch_size):
        if progress is not None:
            progress(running.count, target, f"tokens of {name}" if name else "tokens")
        if part is not None and whole and running.count < target and time.monotonic() - written >= pause:
            begin = time.monotonic()
            _note(part, running, request)
            written = time.monotonic()
            pause = max(every, 10 * (written - begin))
    if not running.count:
        raise StatisticsError("the texts hold no tokens; give some ordinary text, about ten times as many tokens as the projection is wide")
    piece = hashlib.sha256(f"{running.chain} {running.count}".encode()).hexdigest()
    made = Moments(running.sums, running.count, lm.name, lm.fingerprint, name, (piece,))
    if place is not None and part is not None:
        made._save(place, request)
        part.unlink(missing_ok=True)
    return made


def moments_for(
    lm: LanguageModel,
    layers: Sequence[int],
    corpus: str | Path | Corpus | None = None,
    tokens: int | None = None,
    progress: Progress | None = None,
) -> Moments:
    """What editors ask for: the moments of these layers, from memory, from the file cache, or collected now and kept in both.

    corpus: see `errata.statistics.texts`; or a file that `errata stats collect` wrote, which is read and checked. tokens: see `collect`.
    What is in memory hangs on the model and goes with it; files lie in $ERRATA_CACHE, else in $XDG_CACHE_HOME or ~/.cache, under
    errata/statistics. They are found by the model's fingerprint, the corpus, tokens and layers; one that has more layers is good too,
    and one that is damaged is collected anew.
    Raises StatisticsError as `collect` does, for a corpus that cannot be had, and for a file of another model or without these layers.
    """
    layers = _checked(lm, layers)
    target = 10 * lm.anatomy.key_size if tokens is None else tokens
    memory: dict[Any, Any] = vars(lm.model).setdefault("errata_statistics", {})
    source = corpus.digest if isinstance(corpus, Corpus) else str(corpus)
    if not isinstance(corpus, Corpus) and corpus is not None and (file := Path(corpus).expanduser()).is_file():
        source = f"{source} {file.stat().st_mtime_ns} {file.stat().st_size}"  # another text under the same name is another text
    key = ("moments", lm.fingerprint, source, target)
    held: Moments | None = memory.get(key)
    if held is None or not set(layers) <= set(held.layers):
        if isinstance(corpus, str | Path) and str(corpus).endswith(SUFFIX):
            held = Moments.load(Path(corpus).expanduser(), layers)
            held.check(lm)
        else:
            held = _from_files(lm, layers, corpus_of(corpus, lm), target, progress)
        memory[key] = held
    return held.only(layers)


def second_moments(lm: LanguageModel, texts: Iterable[str], layers: Sequence[int], batch_size: int = 64) -> Mapping[int, Tensor]:
    """Layer -> C [d_in, d_in] float64: the mean of k kᵀ over every token of `texts`, of the model as it is now, edits included.

    Raises ValueError if the texts hold no tokens.
    """
    running = Running.zero(lm, _checked(lm, layers))
    for _ in advance(lm, texts, running, None, batch_size):
        pass
    if not running.count:
        raise StatisticsError("the texts hold no tokens; give some ordinary text, about ten times as many tokens as the projection is wide")
    return {layer: total / running.count for layer, total in running.sums.items()}


def part_of(path: Path) -> Path:
    """Where a collection into `path` keeps what it has so far."""
    return path.with_name(path.name + ".part")


def _from_files(lm: LanguageModel, layers: list[int], corpus: Corpus, target: int, progress: Progress | None) -> Moments:
    folder = _cache_folder() / lm.fingerprint[:32]
    key = hashlib.sha256(f"{FORMAT} {LONGEST} {corpus.digest} {target}".encode()).hexdigest()[:16]
    if (found := _filed(lm, layers, folder, key)) is not None:
        return found
    path = folder / f"{key}-{'.'.join(map(str, layers))}{SUFFIX}"
    with ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(f"{path}.lock"))  # processes that need them at once collect them once
            if (found := _filed(lm, layers, folder, key)) is not None:
                return found
            path.unlink(missing_ok=True)  # it was no good
            _drop_if_damaged(part_of(path))
        except (OSError, NotImplementedError):  # a home that cannot be written, or locked: collect all the same, for this process
            return collect(lm, corpus, layers, target, progress=progress)
        return collect(lm, corpus, layers, target, progress=progress, path=path, resume=True)


def _filed(lm: LanguageModel, layers: list[int], folder: Path, key: str) -> Moments | None:
    for path in sorted(folder.glob(f"{key}-*{SUFFIX}")):
        try:
            if set(layers) <= set(files.read_record(path).get("layers", ())):
                found = Moments.load(path, layers)
                found.check(lm)
                if found.width == lm.anatomy.key_size:
                    return found
        except (StatisticsError, TypeError):
            continue
    return None


def _cache_folder() -> Path:
    own = os.environ.get(ENVIRONMENT)
    if own:
        return Path(own).expanduser() / "statistics"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "errata" / "statistics"


def _drop_if_damaged(part: Path) -> None:
    if part.exists():
        try:
            files.read(part)
        except StatisticsError:
            part.unlink()


def _begun(path: Path, resume: bool, request: Mapping[str, Any]) -> Moments | Running | None:
    """What is there of the same collection: all of it, a part, or nothing."""
    part = part_of(path)
    there = path if path.exists() else part if part.exists() else None
    if there is None:
        return None
    if not resume:
        raise StatisticsError(f"{there} exists already; go on with resume (--resume), give another path, or remove it")
    record, tensors = files.read(there, lambda name: there == part)
    _readable(record, there)
    before = record.get("request")
    if not isinstance(before, dict):
        raise StatisticsError(f"{there} does not come from one collection; give another path")
    for field, value in request.items():
        if before.get(field) != value:
            raise StatisticsError(
                f"{there} was begun with other settings: {field} was {before.get(field)!r} and is now {value!r}; "
                "give the same, another path, or remove it"
            )
    if there == path:
        return Moments.load(path)
    try:  # cloned: what is read is a view of the file
        sums = {layer: tensors[_name(layer)].clone() for layer in request["layers"]}
        return Running(sums, int(record["count"]), int(record["drawn"]), str(record["chain"]))
    except (KeyError, TypeError, ValueError) as error:
        raise StatisticsError(f"{part} is damaged ({error!r}); remove it and begin anew") from error


def _note(part: Path, running: Running, request: Mapping[str, Any]) -> None:
    record = {"format": FORMAT, "request": request, "count": running.count, "drawn": running.drawn, "chain": running.chain}
    files.write(part, {_name(layer): total for layer, total in running.sums.items()}, record)


def _readable(record: Mapping[str, Any], path: Path) -> None:
    version = record.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise StatisticsError(f"{path} has format {version}, this errata reads up to {FORMAT}; install a newer errata")


def _checked(lm: LanguageModel, layers: Sequence[int]) -> list[int]:
    """Ascending, each once. Raises StatisticsError for layers that do not exist, or none."""
    number = len(lm.anatomy.layers)
    if not layers or not all(0 <= layer < number for layer in layers):
        raise StatisticsError(f"{lm.name} has layers 0 to {number - 1}; choose some of these (got {list(layers)})")
    return sorted(set(layers))


def _unedited(lm: LanguageModel) -> None:
    """The statistics are filed under the fingerprint, which was taken before any edit: the weights must still be those."""
    if LanguageModel(lm.model, lm.tokenizer, lm.name).fingerprint != lm.fingerprint:
        raise StatisticsError(
            f"the weights of {lm.name} have changed since its fingerprint was taken (an edit is applied?); revert the edits, collect the "
            "statistics, and apply them again"
        )


def _name(layer: int) -> str:
    return f"layer.{layer}"
