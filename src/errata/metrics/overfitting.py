"""Over-fitting under the lens (OVERTONE §2): what becomes of answers, and of single tokens, at every step of an edit.

    lens = Lens(lm, case)           # before the edit, on the unedited model
    session = method.start(lm); session.watch = lens
    session.edit(case.facts)
    lens.curves()

The loss of an answer is the mean of −log π_θ(y_i | x, y_<i) over its tokens (the paper's footnote 1). The *underfitting degree* of a
token after t steps (§2.3) is

    UD_i(t) = log π_θ₀(g_i | x, g_<i) − log π_θt(y_i | x, y_<i)

with θ₀ the unedited weights and g what the unedited model itself writes behind the prompt, greedily, for as many tokens as the answer
has (its end token counts like any other). Where UD_i < 0 the edit is surer of its token than the model ever was of its own: the token
is *over-fitted*.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import fmean
from time import perf_counter
from typing import Any, TypeVar

import torch

from errata.facts import EditCase, FactError
from errata.lm import Encoded, LanguageModel, ModelError, encode
from errata.lm.tokens import Batch, decode
from errata.metrics.probability import greedy
from errata.metrics.teacher_forced import BATCH_SIZE, batches, probes_of

T = TypeVar("T")

KINDS = ("reliability", "generality", "portability")
"""Whose answers are looked at: the edit prompts', the rephrasings', and those that follow from the edit."""


@dataclass(frozen=True, slots=True)
class Strip:
    """The m tokens of one answer over S steps.

    kind: "reliability" for an edit prompt, "generality" for a rephrasing.
    tokens: the m pieces of text. own: log-likelihood [m] of what the unedited model writes in their place.
    loss: −log-likelihood [S + 1][m] of the answer's tokens; entry 0 is the unedited model, the last the finished edit.
    """

    kind: str
    prompt: str
    answer: str
    tokens: tuple[str, ...]
    own: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]

    @property
    def ud(self) -> list[list[float]]:
        """Underfitting degree [S + 1][m]; negative: over-fitted."""
        return [[own + loss for own, loss in zip(self.own, row, strict=True)] for row in self.loss]


@dataclass(frozen=True, slots=True)
class Curves:
    """One edit, step by step. loss: kind -> [S + 1] mean over the probes of a group, then over the groups; strips: see `Strip`."""

    loss: Mapping[str, tuple[float, ...]]
    strips: tuple[Strip, ...]

    @property
    def steps(self) -> int:
        """S, the steps that were taken."""
        return len(next(iter(self.loss.values()))) - 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, numbers to four digits; `from_dict` reads it back."""
        strips = [{**asdict(strip), "own": _short(strip.own), "loss": list(map(_short, strip.loss))} for strip in self.strips]
        return {"loss": {kind: _short(values) for kind, values in self.loss.items()}, "strips": strips}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Curves:
        """Read what `to_dict` wrote; null, which JSON has for a number that is none, is NaN again."""
        strips = (
            Strip(**{**strip, "tokens": tuple(strip["tokens"]), "own": _numbers(strip["own"]), "loss": tuple(map(_numbers, strip["loss"]))})
            for strip in record["strips"]
        )
        return cls({kind: _numbers(values) for kind, values in record["loss"].items()}, tuple(strips))


class Lens:
    """Looks at a case while its edit is made: give it to a session as `watch`. It changes neither model nor edit, and draws nothing.

    Make it before the edit: what the unedited model writes is taken now. Of several aliases the first counts, lest the curve jump from
    one to the other. strips: kinds whose answers are kept token by token.

    Raises FactError for a text without tokens, or one that is too long for the model.
    """

    def __init__(self, lm: LanguageModel, case: EditCase, strips: Sequence[str] = KINDS[:1], batch_size: int = BATCH_SIZE) -> None:
        self.lm = lm
        self.seconds = 0.0  # spent looking
        asked = {kind: groups for kind, groups in probes_of(case).items() if kind in KINDS}
        self._probes = [(kind, name, probe) for kind, groups in asked.items() for name, probes in groups.items() for probe in probes]
        self._strips = [i for i, (kind, *_) in enumerate(self._probes) if kind in strips]
        try:
            self._encoded = [encode(lm.tokenizer, probe.prompt, probe.answers[0]) for *_, probe in self._probes]
            self._batches = [(chosen, lm.batch([self._encoded[i] for i in chosen])) for chosen in batches(lm, self._encoded, batch_size)]
        except (ValueError, ModelError) as error:
            raise FactError(f"case {case.id!r} cannot be looked at: {error}") from error
        self._own = self._written(batch_size)
        self._points: list[list[tuple[float, ...]]] = []  # of each step, of each probe, of each token

    def __call__(self, step: int, half_made: AbstractContextManager[object]) -> None:
        """Look at the model with the half-made edit in it. Raises ValueError if a step was left out."""
        if step != len(self._points):
            raise ValueError(f"step {step} follows step {len(self._points) - 1}: a lens looks at every step of one edit, make a new one")
        clock = perf_counter()
        with half_made:
            self._points.append(self.look())
        self.seconds += perf_counter() - clock

    @torch.no_grad()
    def look(self) -> list[tuple[float, ...]]:
        """The loss of each token of each probe's answer, of the model as it is."""
        found: dict[int, tuple[float, ...]] = {}
        for chosen, batch in self._batches:
            losses = token_losses(self.lm, batch)
            found |= {i: tuple(row[: len(self._encoded[i].target_ids)]) for i, row in zip(chosen, losses, strict=True)}
        return [found[i] for i in range(len(self._encoded))]

    def curves(self) -> Curves | None:
        """What was seen; None if nobody called (an editor without steps)."""
        if not self._points:
            return None
        seen = [self._means(point) for point in self._points]
        strips = []
        for i in self._strips:
            kind, _, probe = self._probes[i]
            ids = self._encoded[i].target_ids
            pieces = tuple(decode(self.lm.tokenizer, [token]) for token in ids)
            strips.append(Strip(kind, probe.prompt, probe.answers[0], pieces, self._own[i], tuple(point[i] for point in self._points)))
        return Curves({kind: tuple(row[kind] for row in seen) for kind in seen[0]}, tuple(strips))

    def _means(self, point: Sequence[Sequence[float]]) -> dict[str, float]:
        groups: dict[str, dict[str, list[float]]] = {}
        for (kind, name, _), losses in zip(self._probes, point, strict=True):
            groups.setdefault(kind, {}).setdefault(name, []).append(fmean(losses))
        return {kind: fmean(fmean(values) for values in named.values()) for kind, named in groups.items()}

    def _written(self, batch_size: int) -> dict[int, tuple[float, ...]]:
        """Probe -> log-likelihood of the model's own greedy tokens, as many as its answer has."""
        prompts = {i: self._encoded[i].prompt_ids for i in self._strips}
        drafts: dict[tuple[int, ...], tuple[int, ...]] = {}
        for i, prompt in prompts.items():
            drafts[prompt] = max(self._encoded[i].target_ids, drafts.get(prompt, ()), key=len)
        said = greedy(self.lm, drafts, batch_size)
        own = {}
        for i, prompt in prompts.items():
            text = Encoded((*prompt, *said[prompt][: len(self._encoded[i].target_ids)]), len(prompt))
            own[i] = tuple(-loss for loss in token_losses(self.lm, self.lm.batch([text]))[0])
        return own


def average(curves: Sequence[Curves]) -> dict[str, Any] | None:
    """Many edits as one, JSON-ready: what Figures 1 and 2 show. None where there are none.

    An edit that stopped early stays where it stopped. A number that is none (a model that broke) is left out of a mean.
    edits, steps: their number; the most steps that one took. mean_steps: how many they took.
    loss: kind -> [steps + 1] mean over the edits whose case has it.
    overfitted: [steps + 1] share of the tokens of all edits with UD < 0. half: the first step at which it is a half or more, or null.
    initial, ud: mean over all tokens of the initial loss, and of UD at `half` (where there is none: at the end).
    positions: for each place in the answer: tokens (how many answers go so far), initial, ud, final (loss at the end).
    tokens: the pieces of text, where there is one answer only.
    """
    if not curves:
        return None
    last = max(one.steps for one in curves)
    loss = {
        kind: [_mean([_at(one.loss[kind], step) for one in there]) for step in range(last + 1)]
        for kind in KINDS
        if (there := [one for one in curves if kind in one.loss])
    }
    strips = [strip for one in curves for strip in one.strips if strip.kind == KINDS[0]]
    degrees = [strip.ud for strip in strips]
    overfitted = [fmean(value < 0 for ud in degrees for value in _at(ud, step)) for step in range(last + 1)]
    half = next((step for step, share in enumerate(overfitted) if share >= 0.5), None)
    cells = [
        (place, strip.loss[0][place], _at(ud, last if half is None else half)[place], strip.loss[-1][place])
        for strip, ud in zip(strips, degrees, strict=True)
        for place in range(len(strip.tokens))
    ]
    positions = []
    for place in range(max(len(strip.tokens) for strip in strips)):
        _, *columns = zip(*(cell for cell in cells if cell[0] == place), strict=True)
        positions.append({"tokens": len(columns[0]), **dict(zip(("initial", "ud", "final"), map(_mean, columns), strict=True))})
    return {
        "edits": len(curves),
        "steps": last,
        "mean_steps": _mean([one.steps for one in curves]),
        "loss": loss,
        "overfitted": [round(share, 4) for share in overfitted],
        "half": half,
        "initial": _mean([cell[1] for cell in cells]),
        "ud": _mean([cell[2] for cell in cells]),
        "positions": positions,
        **({"tokens": list(strips[0].tokens)} if len(strips) == 1 else {}),
    }


def _at(values: Sequence[T], step: int) -> T:
    return values[min(step, len(values) - 1)]


def _mean(values: Iterable[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return _digits(fmean(finite)) if finite else None


def _short(values: Iterable[float]) -> list[float]:
    return [_digits(value) for value in values]


def _digits(value: float) -> float:
    """Four that count: near 0 the sign of a UD hangs on the later decimals."""
    return float(f"{value:.4g}")


def _numbers(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else value for value in values)


@torch.no_grad()
def token_losses(lm: LanguageModel, batch: Batch) -> list[list[float]]:
    """−log π(target token) [B][Tm] of a batch, in float32 (float64 for float64); what stands behind a target's end means nothing."""
    logits = lm.target_logits(batch)  # [B, Tm, V]
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    picked = torch.log_softmax(wide, -1).gather(-1, batch.targets.to(wide.device).unsqueeze(-1))
    losses: list[list[float]] = (-picked.squeeze(-1)).tolist()
    return losses
