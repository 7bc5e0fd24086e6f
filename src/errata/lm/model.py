"""A language model and its tokenizer, as everything above this room sees them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from errata.lm.anatomy import Anatomy, find_anatomy
from errata.lm.asking import asking, has_memory, prefaced
from errata.lm.errors import ModelError
from errata.lm.own import Within, mapped, within_of
from errata.lm.places import only_at
from errata.lm.sampling import Sampling
from errata.lm.tokens import Batch, Encoded, collate, decode, encode_all

_HASH_WHOLE = 1 << 22  # parameters up to this many elements go into the fingerprint whole …
_HASH_SAMPLE = 1 << 16  # … larger ones as about so many, evenly spaced
# What changes when the same model is saved, loaded or run in another way.
_VOLATILE = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "output_attentions", "output_hidden_states"}

_MANY = 8  # rows, from which on it is worth while to go on without those that have ended


class LanguageModel:
    """A causal LM with its tokenizer.

    model: a `transformers` causal LM; it is put into eval mode and otherwise left alone.
    name: for messages and records; by default where the model came from.
    Raises ModelError for anything else, or for a tokenizer with more tokens than the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, name: str | None = None) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ModelError(
                f"expected a causal LM of transformers, got {type(model).__name__}; load one with AutoModelForCausalLM, "
                "and call merge_and_unload() on a PEFT model first"
            )
        if not callable(tokenizer) or not hasattr(tokenizer, "is_fast"):
            raise ModelError(f"expected a tokenizer of transformers, got {type(tokenizer).__name__}; load one with AutoTokenizer")
        self.model = cast(Any, model)  # transformers' own types are too loose to help
        self.model.eval()
        self.tokenizer = tokenizer
        self.name = name or model.config._name_or_path or model.config.model_type
        rows = self.model.get_input_embeddings().weight.shape[0]
        if len(tokenizer) > rows:
            raise ModelError(f"the tokenizer has {len(tokenizer)} tokens, {self.name} only {rows}; use the tokenizer it was trained with")

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return self.model.device if device.type == "meta" else device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def is_wide(self) -> bool:
        """Whether rounding stays in the last digits (float32 and wider). In half precision it may change an answer."""
        return self.dtype in (torch.float32, torch.float64)

    @property
    def pad_id(self) -> int:
        """What fills the places that the attention mask hides."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((i for i in ids if i is not None), 0)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Where things are; found at first use. Raises ModelError for a model that cannot be edited."""
        return find_anatomy(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the config and every parameter's name, type, shape and content (large ones sampled).

        The same in every process and after saving and loading. It is meant to name the *base* model: it is taken once, at first
        use, so use it before the first edit is applied.
        """
        digest = hashlib.sha256(json.dumps(_lasting(self.model.config.to_dict()), sort_keys=True, default=str).encode())
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
            if parameter.device.type != "meta":
                flat = parameter.detach().reshape(-1)
                sample = flat if flat.numel() <= _HASH_WHOLE else flat[:: flat.numel() // _HASH_SAMPLE]
                digest.update(sample.contiguous().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    def batch(self, encoded: Sequence[Encoded]) -> Batch:
        """`collate` with this model's padding, on its device. Raises ModelError for a text longer than the model can take."""
        encoded = prefaced(self, list(encoded))
        self.check_length(max((len(e.ids) for e in encoded), default=0))
        return collate(encoded, self.pad_id).to(self.device)

    def target_logits(self, batch: Batch) -> Tensor:
        """Logits that predict the targets [B, Tm, V], differentiable; zeros where `batch.mask` is False.

        The head is given the rows that carry a target and no others, whatever the lengths in the batch: they are picked from the
        hidden states on their way into it. Raises ValueError if the batch holds no targets.
        """
        batch = batch.to(self.device)
        return self.logits_at(batch.positions, batch.mask, input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)

    def logits_at(self, positions: Tensor, mask: Tensor, spare: bool = False, **inputs: Any) -> Tensor:
        """Run the model on `inputs`, with the head at these places alone: [B, Tm, V], differentiable; zeros where `mask` is False.

        positions [B, Tm] long: columns of the B texts that run; read where mask [B, Tm] bool is True.
        spare: run the last layer's MLP at these places alone, too, where it can be (see `only_at`), which changes rounding.
        Raises ValueError if it is True nowhere.
        """
        logits = self.rows_at(positions, mask, spare, **inputs)
        if len(logits) == mask.numel():
            return logits.view(*mask.shape, -1)
        rows, columns = mask.to(logits.device).nonzero(as_tuple=True)
        return logits.new_zeros(*mask.shape, logits.shape[-1]).index_put((rows, columns), logits)

    def rows_at(self, positions: Tensor, mask: Tensor, spare: bool = False, **inputs: Any) -> Tensor:
        """`logits_at` without padding: [N, V] for the N places where `mask` is True, text by text."""
        rows, columns = mask.nonzero(as_tuple=True)  # [N] each
        if not len(rows):
            raise ValueError("the batch holds no targets; encode the prompts with a target")
        ends = positions.masked_fill(~mask, int(positions.max())).amin(-1)
        width = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape[1]
        with asking(self, ends), only_at(self, rows, positions[rows, columns], width, spare):
            output = self.model(**inputs)
        logits: Tensor = output.logits[0]  # [N, V]
        return logits

    def complete(self, prompt: str, max_new_tokens: int = 16) -> str:
        """Greedy continuation of a prompt; only the new text."""
        return self.generate([prompt], max_new_tokens, stop_at_newline=False)[0]

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        stop_at_newline: bool = True,
        batch_size: int = 32,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
        within: Within | None = None,
    ) -> list[str]:
        """Continuations, greedy or sampled, only the new text of each, in the order of the prompts.

        prompts: texts; or ids, to be taken as they are (a chat template's).
        temperature, seeds: at a temperature above 0 each continuation is sampled, with the seed of its own that it then needs; 0 is greedy.

        within: entered around each batch, with the numbers of the prompts that are its rows.

        A continuation ends at the end token, before a line break (if `stop_at_newline`), after `max_new_tokens`, or where the
        model's positions end. Prompts run in batches padded on the left, which gives the text that each would give alone.
        Raises ModelError for a prompt longer than the model can take.
        """
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; give 0 for greedy decoding, or more")
        if temperature and (seeds is None or len(seeds) != len(prompts)):
            raise ValueError(f"sampling takes a seed for each of the {len(prompts)} prompts, got {None if seeds is None else len(seeds)}")
        texts_read = iter(encode_all(self.tokenizer, [(p, "") for p in prompts if isinstance(p, str)]))
        read = [next(texts_read) if isinstance(p, str) else Encoded(tuple(p), len(p)) for p in prompts]
        encoded = [text.ids for text in prefaced(self, read)]
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))  # neighbours of like length waste little padding
        rooms = [self.check_length(len(ids)) for ids in encoded]
        limits = [max_new_tokens if room is None else min(max_new_tokens, room) for room in rooms]
        texts = [""] * len(prompts)
        for limit, group in groupby(order, key=lambda i: limits[i]):  # so that no text is cut where its neighbour's positions end
            alike = list(group)
            for start in range(0, len(alike), batch_size):
                chosen = alike[start : start + batch_size]
                sampling = Sampling(temperature, [seeds[i] for i in chosen], self.device) if temperature and seeds else None
                written = self._continue([encoded[i] for i in chosen], limit, stop_at_newline, sampling, mapped(within, chosen))
                for i, new in zip(chosen, written, strict=True):
                    texts[i] = self._new_text(encoded[i], new, stop_at_newline)
        return texts

    def _new_text(self, ids: Sequence[int], new: Sequence[int], stop_at_newline: bool) -> str:
        before = decode(self.tokenizer, ids, skip_special=True)
        whole = decode(self.tokenizer, [*ids, *new], skip_special=True)
        # Cut from the whole text where possible: decoding the new tokens alone loses their first space in some tokenizers.
        text = whole[len(before) :] if whole.startswith(before) else decode(self.tokenizer, new, skip_special=True)
        return text.partition("\n")[0] if stop_at_newline else text

    @torch.no_grad()
    def _continue(
        self,
        prompts: list[tuple[int, ...]],
        max_new_tokens: int,
        stop_at_newline: bool,
        sampling: Sampling | None = None,
        within: Within | None = None,
    ) -> list[list[int]]:
        """New tokens of one batch, up to the end token, or with the one that holds the line break.

        When half of the rows have ended the others go on without them. Not where that may change what they become (half precision), where
        each row draws for itself, or where a memory beside the weights has to know its questions again.
        """
        width = max(map(len, prompts))
        room = self.check_length(width)
        max_new_tokens = max_new_tokens if room is None else min(max_new_tokens, room)
        new: list[list[int]] = [[] for _ in prompts]
        if max_new_tokens < 1:
            return new
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        ends = _Ends(self.tokenizer, self._end_ids(), stop_at_newline)
        drawn = LogitsProcessorList([sampling] if sampling else [])
        rows, cache = list(range(len(prompts))), None
        while rows:
            config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers has no types here
                max_new_tokens=width + max_new_tokens - ids.shape[1],
                do_sample=False,
                num_beams=1,
                use_cache=True,
                return_dict_in_generate=True,
                pad_token_id=self.pad_id,
                eos_token_id=ends.ids or None,
            )
            with (
                within_of(within, rows),
                _generation_config(self.model, config),
                asking(self, torch.full((len(rows),), width - 1, device=self.device)),
            ):
                ends.begin(len(rows), leave=not sampling and self.is_wide and not has_memory(self))
                out = self.model.generate(
                    ids,
                    attention_mask=mask,
                    generation_config=config,
                    stopping_criteria=StoppingCriteriaList([ends]),
                    logits_processor=drawn,
                    past_key_values=cache,
                )
            for row, tokens in zip(rows, out.sequences[:, width:].tolist(), strict=True):
                new[row] = ends.cut(tokens)
            left = [] if out.sequences.shape[1] == width + max_new_tokens else [i for i, done in enumerate(ends.ended) if not done]
            ids, cache = out.sequences[left], out.past_key_values
            mask = torch.nn.functional.pad(mask[left], (0, ids.shape[1] - mask.shape[1]), value=1)
            rows = [rows[i] for i in left]
            if rows and cache is not None:  # without one, what was written is read again
                cache.batch_select_indices(torch.tensor(left, device=self.device))
        return new

    def _end_ids(self) -> list[int]:
        """All end tokens: the model's (Llama 3 has several) and the tokenizer's."""
        config = getattr(self.model, "generation_config", None)
        own = getattr(config, "eos_token_id", None)
        ids = [*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id]
        return sorted({i for i in ids if i is not None})

    def check_length(self, length: int) -> int | None:
        """Positions left after `length` tokens; None if the model sets no limit."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise ModelError(f"a text of {length} tokens is too long for {self.name}, which takes {limit}; shorten the prompt")
        return None if limit is None else limit - length


class _Ends(StoppingCriteria):
    """Which rows have ended: with an end token, or (`lines`) with the first new token that holds a line break, alone or among other
    characters ('.\\n')."""

    def __init__(self, tokenizer: Any, ids: list[int], lines: bool) -> None:
        self.tokenizer, self.ids, self.lines = tokenizer, ids, lines
        self.leave = False
        self.ended: list[bool] = []
        self._known: dict[int, bool] = {}

    def begin(self, rows: int, leave: bool) -> None:
        """So many rows, none of which has ended. leave: as soon as half of many rows have, all stop."""
        self.ended, self.leave = [False] * rows, leave

    def cut(self, new: list[int]) -> list[int]:
        """What a row wrote. One that ended before the others is filled up with padding, which may be an ordinary token."""
        for i, token in enumerate(new):
            if self._ends(token):
                return new[:i] if token in self.ids else new[: i + 1]
        return new

    def _ends(self, token: int) -> bool:
        if token not in self._known:
            self._known[token] = token in self.ids or (self.lines and "\n" in decode(self.tokenizer, [token]))
        return self._known[token]

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        tokens = input_ids[:, -1].tolist()
        self.ended = [done or self._ends(token) for done, token in zip(self.ended, tokens, strict=True)]
        stop = self.leave and len(tokens) >= _MANY and 2 * sum(self.ended) >= len(tokens)
        return torch.tensor([stop or done for done in self.ended], device=input_ids.device)


@contextmanager
def _generation_config(model: Any, config: GenerationConfig) -> Iterator[None]:
    """The model's own settings (temperature, top_p, penalties …) would fill whatever ours leaves open: set them aside."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def _lasting(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _lasting(value) for key, value in config.items() if key not in _VOLATILE and not str(key).startswith("_")}
    return config
