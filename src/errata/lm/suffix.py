"""Run only the tokens from one of each text's on, and only the layers from L on: what comes before cannot change, so compute it once.

An edit of layer L that acts on one token leaves the layers below L as they are, and, the model being causal, every earlier token too.
Of those tokens later ones see nothing but keys and values. The states that enter layer L and these keys and values are recorded in one
run; after that the model itself is called as usual, as if it went on with a text whose beginning it has read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from errata.lm.asking import has_memory
from errata.lm.resume import entering, from_layer, resumable, states_at
from errata.lm.tokens import Batch, Encoded

if TYPE_CHECKING:
    from errata.lm.model import LanguageModel


class Suffix:
    """B texts, each from one of its tokens on and from layer `layer` on; everything before is computed once.

    starts: the first token of each text that runs, by default the subject's last; at most prompt_length - 1, which predicts the target.
    cached: whether the keys and values of earlier tokens are cached. None: where a probe finds it exact (`is_exact`); elsewhere the whole
        texts run, from layer `layer` on, with the same results.

    states [B, S, d]: what enters layer `layer`, without a graph; padded on the right. Pass them, changed or not, to `logits`.
    columns [B]: where in `states` token starts[b] stands: 0, or starts[b] where the whole texts run.
    targets, mask [B, Tm]: as in Batch. P: the longest prefix, S: the longest rest, T: the longest text, both without its last token.

    The model's weights are taken to stay as they are: after an edit make a new one.
    Raises ModelError if there is no such layer or later layers read keys of earlier ones, ValueError for starts that do not fit.
    """

    states: Tensor
    columns: Tensor
    targets: Tensor
    mask: Tensor

    def __init__(
        self,
        lm: LanguageModel,
        encoded: Sequence[Encoded],
        layer: int,
        starts: Sequence[int] | None = None,
        cached: bool | None = None,
    ) -> None:
        resumable(lm, layer)
        first = torch.tensor(_checked(encoded, starts), device=lm.device)  # [B]
        batch = lm.batch(encoded)
        # The last token of a target predicts nothing: it need not be read.
        # Padding on the right need not be hidden, the model is causal; so no token is left with nothing to look at, which in some models
        # (Gemma 2 in float64) gives NaN.
        batch = replace(batch, input_ids=batch.input_ids[:, :-1], attention_mask=torch.ones_like(batch.attention_mask[:, :-1]))
        self._lm, self._layer = lm, layer
        self.targets, self.mask = batch.targets, batch.mask
        self.cached = is_exact(lm, layer) if cached is None else cached
        self._prefixes: dict[int, _Prefix] = {}  # by layer; empty where the whole texts run
        self._inputs: dict[str, Tensor] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        begins = first if self.cached else torch.zeros_like(first)  # [B] where the columns of `states` begin in the texts
        self.columns, self._positions = first - begins, batch.positions - begins[:, None]
        self._ends = self._positions.masked_fill(~batch.mask, 0).amax(1) + 1  # [B] columns of `states` that are needed
        self._hidden = begins.max() - begins  # [B] columns of padding before the prefix
        if self.cached:
            self._record(batch, first)
        else:
            self.states = states_at(lm, batch, layer)
        self._cache = self._new_cache()

    def __len__(self) -> int:
        return len(self.states)

    def logits(self, states: Tensor) -> Tensor:
        """Logits that predict the targets [B, Tm, V], with `states` [B, S, d] entering the layer; zeros where `mask` is False.

        Differentiable in `states`. The values are those of `lm.target_logits` on the whole texts, with these states in their places.
        Raises ModelError for states of another shape.
        """
        return self._run(self._lm.logits_at, states)

    def rows(self, states: Tensor) -> Tensor:
        """`logits` without padding: [N, V] for the N places where `mask` is True, text by text."""
        return self._run(self._lm.rows_at, states)

    def _run(self, head: Callable[..., Tensor], states: Tensor) -> Tensor:
        with from_layer(self._lm, self._layer, states):
            return head(
                self._positions, self.mask, spare=True, **self._inputs, past_key_values=self._cache, use_cache=self._cache is not None
            )

    def keep(self, rows: Tensor) -> Suffix:
        """These texts alone (rows: indices [K], or bool [B]), without the padding that the others needed: S and Tm may shrink.

        Raises ValueError if no text is left.
        """
        rows = torch.arange(len(self), device=self.columns.device)[rows.to(self.columns.device)]
        if not len(rows):
            raise ValueError("no text is left; keep at least one")
        kept = copy(self)
        kept.columns, kept._ends, hidden = self.columns[rows], self._ends[rows], self._hidden[rows]
        width, answer, before = int(kept._ends.max()), int(self.mask[rows].sum(1).max().clamp(min=1)), int(hidden.min())
        end = self._inputs["attention_mask"].shape[1] - self.states.shape[1] + width
        kept._hidden = hidden - before
        kept.targets, kept.mask, kept._positions = (part[rows, :answer] for part in (self.targets, self.mask, self._positions))
        kept.states = self.states[rows.to(self.states.device), :width]
        kept._inputs = {name: part[rows, :width] for name, part in self._inputs.items()}
        kept._inputs["attention_mask"] = self._inputs["attention_mask"][rows, before:end]
        kept._prefixes = {i: prefix.of(rows, before) for i, prefix in self._prefixes.items()}
        kept._cache = kept._new_cache()
        return kept

    @torch.no_grad()
    def _record(self, batch: Batch, first: Tensor) -> None:
        """One run over the whole texts: what enters the layer, and what later tokens see of those before `first` [B]."""
        lm, layer = self._lm, self._layer
        layers = resumable(lm, layer)
        stores: list[Any] = [DynamicLayer() if i >= layer else _Prefix() for i in range(len(layers))]  # type: ignore[no-untyped-call]
        with entering(layers[layer]) as seen:
            lm.model.get_decoder()(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, past_key_values=Cache(layers=stores), use_cache=True
            )
        # Prefixes are padded on the left, so that each ends where its rest begins and tokens are as far apart as they were. Behind
        # a rest stands the padding of the whole texts, at positions that the longest of them has too.
        rest = torch.arange(int(self._ends.max()), device=lm.device)
        place = (first[:, None] + rest).clamp(max=batch.input_ids.shape[1] - 1)  # [B, S] in the whole texts
        length = int(first.max())
        before = torch.arange(length, device=lm.device) - length + first[:, None]  # [B, P] in the whole texts, negative: padding
        self.states = seen[0].take_along_dim(place[..., None].to(seen[0].device), 1)
        self._prefixes = {i: _Prefix(stores[i].keys, stores[i].values).at(before.clamp(min=0)) for i in range(layer, len(layers))}
        self._inputs = {
            "input_ids": batch.input_ids.gather(1, place),
            "attention_mask": torch.cat([before >= 0, torch.ones_like(place, dtype=torch.bool)], 1).long(),
        }
        if "position_ids" in inspect.signature(lm.model.forward).parameters:  # BLOOM, for one, has the mask say how far apart tokens are
            self._inputs["position_ids"] = place

    def _new_cache(self) -> Cache | None:
        """What the model is to read: it asks the first layer for lengths, so those that do not run need stand-ins of the same."""
        if not self._prefixes:
            return None
        first = self._prefixes[self._layer]
        stand_in = _Prefix(first.keys[:, :1, :, :1], first.values[:, :1, :, :1])
        return Cache(layers=[self._prefixes.get(i, stand_in) for i in range(len(self._lm.anatomy.layers))])


class _Prefix(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values [B, heads, P, head width] of one layer that are read and never added to, so every run can start from them.

    All tokens are kept, also where the layer looks through a window: the mask does the windowing. Without keys: for a layer that is to
    remember nothing.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        if keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """What the layer is to attend to: the prefix and, behind it, what it brings."""
        if not self.get_seq_length():
            return key_states, value_states
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)

    def at(self, tokens: Tensor) -> _Prefix:
        """The tokens [B, P] of each row."""
        index = tokens[:, None, :, None].to(self.keys.device)
        return _Prefix(self.keys.take_along_dim(index, 2), self.values.take_along_dim(index, 2))

    def of(self, rows: Tensor, start: int) -> _Prefix:
        """These rows, from token `start` on."""
        rows = rows.to(self.keys.device)
        return _Prefix(self.keys[rows, :, start:], self.values[rows, :, start:])


def is_exact(lm: LanguageModel, layer: int) -> bool:
    """Whether this model gives the same logits from cached prefixes as from whole texts, up to rounding: tried out, once per layer.

    Two short texts of different lengths run both ways. The answer hangs on the model, so it is asked anew for another one, for
    another type of the weights, and for another implementation of attention; and each time while a memory beside the weights answers,
    which may be another one by the next time.
    """
    if has_memory(lm):
        return _probe(lm, layer)
    known: dict[tuple[object, ...], bool] = vars(lm.model).setdefault("errata_suffix", {})
    case = (layer, lm.dtype, lm.device, getattr(lm.model.config, "_attn_implementation", None))
    if case not in known:
        known[case] = _probe(lm, layer)
    return known[case]


@torch.no_grad()
def _probe(lm: LanguageModel, layer: int) -> bool:
    """The whole texts run one by one, without padding, so that nothing but the model itself is believed."""
    size = lm.model.get_input_embeddings().weight.shape[0]
    ids = [(7 * i + 3) % size for i in range(16)]
    texts = [Encoded(tuple(ids[:11]), 8, 6), Encoded(tuple(ids[11:]), 3, 1)]
    whole = [lm.target_logits(lm.batch([text]))[0] for text in texts]  # [Tm, V] each
    try:
        suffix = Suffix(lm, texts, layer, cached=True)
        found = suffix.logits(suffix.states)
    except Exception:  # whatever a model's code makes of a cache that it was not written for
        return False
    rounding = max(torch.finfo(lm.dtype).eps, torch.finfo(torch.float32).eps)  # wider models too compute parts in float32
    for expected, row in zip(whole, found, strict=True):
        expected = expected.float() - expected.float().mean(-1, keepdim=True)  # what all logits share would hide what sets them apart
        miss = row[: len(expected)].float()
        miss = miss - miss.mean(-1, keepdim=True) - expected
        if not miss.norm() <= rounding**0.5 * expected.norm():  # rounding is far below that, and NaN is not
            return False
    return True


def _checked(encoded: Sequence[Encoded], starts: Sequence[int] | None) -> list[int]:
    if starts is None:
        if any(text.subject_last is None for text in encoded):
            raise ValueError("a text has no subject to start from; encode the prompts with their subject's place, or give starts")
        starts = [text.subject_last for text in encoded if text.subject_last is not None]
    if len(starts) != len(encoded):
        raise ValueError(f"there are {len(encoded)} texts but {len(starts)} starts; give one for each")
    for text, start in zip(encoded, starts, strict=True):
        if not 0 <= start < text.prompt_length:
            raise ValueError(
                f"a text cannot start at token {start}: its target is predicted from token {text.prompt_length - 1} on; "
                f"choose one from 0 to {text.prompt_length - 1}"
            )
    return list(starts)
