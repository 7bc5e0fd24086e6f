"""Superimposed noise (DeltaEdit §3.3 and §4.1, eq. 12–15; EVALUATION §4): how the edits of a sequence disturb one another.

An edit's delta is to move what its own fact's key k_e brings out, and no other's. What the sum of all deltas makes of k_e, beyond what
the edit's own delta does, is the noise on it. A method that writes one rank a fact, Δ = α βᵀ, has it from two sources: keys that
activate other edits (kᵀβ), and edits that write in like directions (αᵀα).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from errata.edits.delta import Delta, DenseDelta, LowRankDelta, Replacement
from errata.facts import Fact, FactError
from errata.lm.anatomy import is_conv1d, matrix
from errata.lm.capture import capture, submodule
from errata.lm.tokens import encode
from errata.metrics.teacher_forced import BATCH_SIZE, batches

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.lm.model import LanguageModel

Additive = DenseDelta | LowRankDelta

ROWS = 512
"""So many keys are multiplied at a time."""


@dataclass(frozen=True, slots=True)
class Noise:
    """What the edits so far do to one another in one weight.

    noise: noise_E, the mean of `per_fact` (eq. 13).
    k_beta: mean of k_iᵀ β_j over all i ≠ j (eq. 15). None for fewer than two facts, or where a delta is not one rank a fact.
    edits: edits so far that brought keys for this weight.
    per_fact: noise_e of each fact, in the order in which they came (eq. 12).
    """

    noise: float
    k_beta: float | None
    edits: int
    per_fact: tuple[float, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the single facts."""
        return {"noise": self.noise, "k_beta": self.k_beta, "edits": self.edits}


class Trace:
    """What a sequence of edits put into each weight, and the keys at which they put it.

    Kept on the CPU in the precision in which it came: per fact and weight one key [d_in] and, of low-rank deltas, the factors; of dense
    deltas only their sum, in float64. At T = 3,000 facts, d = 4096, d_in = 14336 that is 0.4 GB a weight in float32.
    """

    def __init__(self) -> None:
        self._weights: dict[str, _Weight] = {}

    def add(self, edit: Edit, keys: Mapping[str, Tensor]) -> None:
        """Note an edit, the next of the sequence; it need not be applied.

        keys: path -> [F, d_in], the key of each of its F facts at the input of that module, in their order: the k that the edit
            was solved with (`edit.keys`), or `keys_of` in the model as it was just before. For every path that the edit writes
            to; a path that it does not write to may have keys, too.
        A delta that is to give `k_beta` has one rank a fact: left [d, F] = α, right [F, d_in] = βᵀ.
        Raises ValueError, and notes nothing, where keys are missing or have another shape, or for a `Replacement`: it adds nothing, it
        overwrites what the edits before it did.
        """
        deltas: dict[str, list[Delta]] = {path: [] for path in keys}
        for delta in edit.deltas:
            if delta.path not in deltas:
                raise ValueError(f"{edit} writes to {delta.path!r} but there are no keys for it; give those of its facts, or take keys_of")
            deltas[delta.path].append(delta)
        added = []
        for path, own in deltas.items():
            module = submodule(edit.lm.model, path)
            shape, transposed = matrix(module).shape, is_conv1d(module)
            if keys[path].shape != (len(edit.facts), shape[1]):
                wanted, got = [len(edit.facts), shape[1]], list(keys[path].shape)
                raise ValueError(f"the keys for {path!r} must be {wanted}, a row for each fact of {edit}, got {got}")
            for delta in own:
                if delta.stored_shape(transposed) != (shape[::-1] if transposed else shape):
                    raise ValueError(f"a delta of {edit} does not fit the weight of {path!r}; was it made for another model?")
            added.append((path, self._weights.get(path) or _Weight(transposed), _additive(own)))
        for path, weight, changes in added:
            self._weights[path] = weight
            weight.add(changes, keys[path])

    def measure(self, extra: Sequence[Delta] = ()) -> dict[str, Noise]:
        """Path -> the noise of all edits so far, in float64; empty before the first edit.

        noise_e = ‖(Σ_i Δ_i + extra) k_e‖² − ‖Δ_e k_e‖², a mean over facts, where Δ_e is all that e's *edit* put into the weight: facts
        that are edited together are solved to fit together, and what they do to each other is meant. k_beta, though, pairs facts.
        The paper's eq. 15 divides by T·N without saying what N is; read as the number of j for each i, T − 1, it is the average that
        the text above it announces.

        extra: what was done to the weights on top, at the end of the sequence (PRUNE); of no edit, so all of it is noise.
        """
        on_top = _additive(extra)
        return {path: weight.measure([delta for delta in on_top if delta.path == path]) for path, weight in self._weights.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as tensors, `<path>.<what>` -> tensor, fit for safetensors."""
        return {f"{path}.{name}": tensor for path, weight in self._weights.items() for name, tensor in weight.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            path, _, name = key.rpartition(".")
            tensors.setdefault(path, {})[name] = tensor
        self._weights = {path: _Weight.of(own) for path, own in tensors.items()}


class _Rows:
    """A matrix that grows by rows; they are put together when it is asked for, not at every growth."""

    def __init__(self, parts: Sequence[Tensor] = ()) -> None:
        self._parts = list(parts)

    def add(self, rows: Tensor) -> None:
        self._parts.append(rows.detach().to("cpu", copy=True))  # a copy: a key may be a row of a batch's activations

    def whole(self) -> Tensor | None:
        """[rows, width]; None without rows."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0] if self._parts else None


class _Weight:
    """The edits of one weight, in the mathematical orientation [out, in].

    keys [T, d_in]; left [R, d], right [R, d_in]: the factors of all low-rank deltas, row by row; own [T]: ‖Δ_e k_e‖²; dense [d, d_in].
    transposed: the module stores its weight as [in, out]. paired: row i of `right` is fact i's β.
    """

    def __init__(self, transposed: bool) -> None:
        self.transposed = transposed
        self.paired = True
        self.edits = 0
        self.keys, self.left, self.right, self.own = _Rows(), _Rows(), _Rows(), _Rows()
        self.dense: Tensor | None = None

    def add(self, deltas: Sequence[Additive], keys: Tensor) -> None:
        k = keys.detach().cpu().double()  # [F, d_in]
        self.own.add(_squares(sum(self._output(delta, k) for delta in deltas) if deltas else k.new_zeros(len(k), 1)))
        self.keys.add(keys)
        self.edits += 1
        ranks = [delta.rank if isinstance(delta, LowRankDelta) else None for delta in deltas]
        self.paired &= ranks == [len(k)]
        for delta in deltas:
            if isinstance(delta, LowRankDelta):
                self.left.add(delta.left.T)
                self.right.add(delta.right)
            else:
                change = self._change(delta)
                self.dense = change.clone() if self.dense is None else self.dense.add_(change)

    def measure(self, extra: Sequence[Additive]) -> Noise:
        keys, own = self.keys.whole(), self.own.whole()
        assert keys is not None and own is not None  # a weight is noted with its first edit
        left, right = (rows.whole() for rows in (self.left, self.right))
        left, right = None if left is None else left.double(), None if right is None else right.double()
        squares = []
        for k in keys.split(ROWS):
            k = k.double()  # [n, d_in]
            parts = [self._output(delta, k) for delta in extra]
            if left is not None and right is not None:
                parts.append((k @ right.T) @ left)  # G = K Bᵀ [n, R], then G Aᵀ [n, d]
            if self.dense is not None:
                parts.append(k @ self.dense.T)
            squares.append(_squares(sum(parts)) if parts else k.new_zeros(len(k)))
        noise = torch.cat(squares) - own  # [T]
        return Noise(noise.mean().item(), self._k_beta(keys, right), self.edits, tuple(noise.tolist()))

    def _k_beta(self, keys: Tensor, betas: Tensor | None) -> float | None:
        """Mean of k_iᵀ β_j over i ≠ j: over all pairs, less those of a fact with itself. No [T, T] is needed."""
        count = len(keys)
        if not self.paired or betas is None or count < 2:
            return None
        everything = keys.sum(0, dtype=torch.float64) @ betas.sum(0)
        themselves = sum((k.double() * beta).sum() for k, beta in zip(keys.split(ROWS), betas.split(ROWS), strict=True))
        return float(everything - themselves) / (count * (count - 1))

    def _output(self, delta: Additive, k: Tensor) -> Tensor:
        """Δ k for each of the keys [n, d_in] -> [n, d]."""
        if isinstance(delta, LowRankDelta):
            return (k @ delta.right.to(k).T) @ delta.left.to(k).T
        return k @ self._change(delta).T

    def _change(self, delta: DenseDelta) -> Tensor:
        tensor = delta.tensor.detach().cpu().double()
        return tensor.T if self.transposed else tensor

    def tensors(self) -> dict[str, Tensor]:
        rows = {name: getattr(self, name).whole() for name in ("keys", "left", "right", "own")}
        there = {name: tensor for name, tensor in (rows | {"dense": self.dense}).items() if tensor is not None}
        flags = torch.tensor([self.transposed, self.paired, self.edits])
        return {"flags": flags} | {name: tensor.contiguous() for name, tensor in there.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> _Weight:
        transposed, paired, edits = tensors["flags"].tolist()
        weight = cls(bool(transposed))
        weight.paired, weight.edits = bool(paired), int(edits)
        for name in ("keys", "left", "right", "own"):
            setattr(weight, name, _Rows([tensors[name]] if name in tensors else []))
        weight.dense = tensors["dense"].clone() if "dense" in tensors else None  # it is added to in place
        return weight


def _additive(deltas: Sequence[Delta]) -> list[Additive]:
    """`deltas`, all of which are added to a weight; ValueError for one that replaces it."""
    kept = []
    for delta in deltas:
        if isinstance(delta, Replacement):
            raise ValueError(
                f"a replacement of the weight of {delta.path!r} is not what one edit added; note each edit before it is folded"
            )
        kept.append(delta)
    return kept


def _squares(rows: Any) -> Tensor:
    total: Tensor = rows.square().sum(-1)
    return total


@torch.no_grad()
def keys_of(lm: LanguageModel, facts: Sequence[Fact], paths: Sequence[str], batch_size: int = BATCH_SIZE) -> dict[str, Tensor]:
    """Path -> [F, d_in]: what enters that module at each fact's subject, in the model as it is, in its precision and on its device.

    Of the bare prompt, at the subject's last token; at the prompt's last token where the subject is not in it. For editors that do not
    say what key they solved with. Raises ValueError for a prompt without tokens, ModelError for an unknown path.
    """
    encoded = [encode(lm.tokenizer, fact.text, subject_span=_span(fact)) for fact in facts]
    places = [e.prompt_length - 1 if e.subject_last is None else e.subject_last for e in encoded]
    rows: dict[str, dict[int, Tensor]] = {path: {} for path in paths}
    for chosen in batches(lm, encoded, batch_size):
        batch = lm.batch([encoded[i] for i in chosen])
        with capture(lm.model, {path: path for path in paths}, inputs=True) as entering:
            lm.model.get_decoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)  # the head is not asked
        for path in paths:
            inputs = entering[path].view(*batch.input_ids.shape, -1)  # OPT's are [B·T, d_in]
            rows[path] |= {i: inputs[row, places[i]] for row, i in enumerate(chosen)}
    return {path: torch.stack([rows[path][i] for i in range(len(facts))]) for path in paths}


def _span(fact: Fact) -> tuple[int, int] | None:
    try:
        return fact.subject_span
    except FactError:
        return None
