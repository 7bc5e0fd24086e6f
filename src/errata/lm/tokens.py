"""Text to tokens: a prompt and its target as ids, where the target's tokens are predicted, and where the subject ends.

Two facts rule this file. The model at question time sees the prompt alone, so the prompt's ids are always those of the prompt
encoded alone (EVALUATION §1), whatever the tokenizer would do with the whole text. And a target is scored at the positions that
predict it: token i of the target by the logits one place before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

# Scripts written without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, Chinese, Japanese, Yi, with their punctuation and
# the full-width forms. Not Korean, which writes spaces.
_WITHOUT_SPACES = re.compile(
    "[\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u2e80-\u312f\u3190-\ua4cf\uf900-\ufaff\ufe30-\ufe4f\uff00-\uff9f\U00020000-\U0003ffff]"
)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt and its target as ids.

    ids: special prefix (BOS where the tokenizer has one) + prompt + target.
    prompt_length: tokens before the target, the special prefix included; at least 1.
    subject_last: index in `ids` of the token that holds the subject's last character, None where no subject was asked for.
    """

    ids: tuple[int, ...]
    prompt_length: int
    subject_last: int | None = None

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        """What the model sees at question time."""
        return self.ids[: self.prompt_length]

    @property
    def target_ids(self) -> tuple[int, ...]:
        """What it is to answer."""
        return self.ids[self.prompt_length :]


def joint(prompt: str, target: str) -> str:
    """What stands between prompt and target: one space, or nothing.

    Nothing where the prompt ends or the target begins in white space, or in a script that writes no spaces between words.
    """
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return ""
    return "" if _WITHOUT_SPACES.match(prompt[-1]) or _WITHOUT_SPACES.match(target[0]) else " "


def encode(tokenizer: Any, prompt: str, target: str = "", subject_span: tuple[int, int] | None = None) -> Encoded:
    """Encode `prompt`, the joint and `target`.

    The whole text is encoded once. If it begins with the ids of the prompt alone, the rest is the target. If the tokenizer merges over
    the joint ("is " + "Lyon" gives "␣Lyon"; Chinese words), the prompt keeps its own ids and the target is encoded as the text that goes
    on from there. So `ids` always splits into the prompt as it will be asked and a target whose text is the joint and `target`.

    subject_span: characters [start, end) of the subject in `prompt`; its last token is found through character offsets, for a slow
        tokenizer by decoding ever longer prefixes.
    Raises ValueError for a prompt or target without tokens, or a subject that no token covers.
    """
    (encoded,) = encode_all(tokenizer, [(prompt, target)])
    if subject_span is None:
        return encoded
    return replace(encoded, subject_last=_last_token(tokenizer, prompt, encoded.prompt_ids, subject_span))


def encode_all(tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[Encoded]:
    """`encode` of many (prompt, target), without subjects: the tokenizer is called twice in all, and most of what it takes is the call.

    Raises ValueError as `encode` does, for the first of them that is wrong.
    """
    prompts = _tokenize(tokenizer, [prompt for prompt, _ in texts])
    tails = [joint(prompt, target) + target for prompt, target in texts]
    wholes = iter(_tokenize(tokenizer, [prompt + tail for (prompt, _), tail in zip(texts, tails, strict=True) if tail]))
    found = []
    for (prompt, target), prompt_ids, tail in zip(texts, prompts, tails, strict=True):
        if not prompt.strip() or not prompt_ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens; write some text before the target")
        target_ids: list[int] = []
        if tail:
            whole = next(wholes)
            goes_on = whole[: len(prompt_ids)] == prompt_ids
            target_ids = whole[len(prompt_ids) :] if goes_on else _continuation(tokenizer, prompt_ids, tail)
            if not target_ids:
                raise ValueError(f"the target {target!r} has no tokens in this tokenizer; write another answer")
        found.append(Encoded((*prompt_ids, *target_ids), len(prompt_ids)))
    return found


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text with the special prefix but without a special suffix: an EOS would end the text before its target."""
    if not texts:
        return []
    encoding = tokenizer(list(texts), return_special_tokens_mask=True, verbose=False)
    return [
        list(ids[: len(ids) - sum(1 for _ in takewhile(bool, reversed(special)))])
        for ids, special in zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True)
    ]


def _continuation(tokenizer: Any, prompt_ids: list[int], text: str) -> list[int]:
    """Ids of `text` as something that goes on after `prompt_ids`, not as the beginning of a text.

    Tokenizers of the SentencePiece kind put a space before every text; encoding behind an anchor and cutting that off avoids it.
    The first candidate that decodes to exactly the text is taken.
    """

    def bare(piece: str) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])

    candidates = [bare(text)]
    for anchor in ("\n", ".", "a", "0"):
        head, both = bare(anchor), bare(anchor + text)
        if both[: len(head)] == head:
            candidates.append(both[len(head) :])
    before = decode(tokenizer, prompt_ids)
    exact = (ids for ids in candidates if decode(tokenizer, prompt_ids + ids) == before + text)
    return next(exact, candidates[0])


def _last_token(tokenizer: Any, prompt: str, ids: Sequence[int], span: tuple[int, int]) -> int:
    start, end = span
    if not 0 <= start < end <= len(prompt):
        raise ValueError(f"the subject's place {span} is not inside the prompt {prompt!r} of {len(prompt)} characters")
    if tokenizer.is_fast:  # offsets grow, so the last token that begins before the subject's end holds its last character
        offsets = tokenizer(prompt, return_offsets_mapping=True, verbose=False)["offset_mapping"][: len(ids)]
        covering = [i for i, (low, high) in enumerate(offsets) if low < end and high > start and high > low]
        found = covering[-1] if covering else None
    else:
        wanted = prompt[:end].strip()
        prefixes = (decode(tokenizer, ids[: i + 1], skip_special=True).lstrip() for i in range(len(ids)))
        found = next((i for i, text in enumerate(prefixes) if text.startswith(wanted)), None)
    if found is None:
        raise ValueError(f"no token covers the subject {prompt[start:end]!r} in {prompt!r}; the tokenizer drops or rewrites it")
    return found


def decode(tokenizer: Any, ids: Sequence[int], skip_special: bool = False) -> str:
    """The text of `ids`, untouched by any beautification."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))


@dataclass(frozen=True, slots=True)
class Batch:
    """Encoded texts side by side, padded on the RIGHT. T: longest text, Tm: longest target (both at least 1).

    Fields (all long but `mask`):
    input_ids, attention_mask [B, T]
    targets [B, Tm]: ids of the target; 0 where padded.
    positions [B, Tm]: index of the logits that predict them, prompt_length - 1 + i; 0 where padded.
    mask [B, Tm] bool: True where there is a target.
    subject_last [B]: index of the subject's last token; -1 where there is none.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor
    subject_last: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def without_last(self) -> Batch:
        """The same without the last column: nothing that is asked for is predicted from it. `subject_last` must not lie there."""
        return replace(self, input_ids=self.input_ids[:, :-1], attention_mask=self.attention_mask[:, :-1])


def collate(encoded: Sequence[Encoded], pad_id: int) -> Batch:
    """Put texts side by side. Raises ValueError for an empty list."""
    if not encoded:
        raise ValueError("there is nothing to put into a batch; give at least one encoded text")

    def padded(rows: list[Sequence[int]], fill: int) -> Tensor:
        width = max(1, *map(len, rows))
        return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows], dtype=torch.long)

    return Batch(
        input_ids=padded([e.ids for e in encoded], pad_id),
        attention_mask=padded([[1] * len(e.ids) for e in encoded], 0),
        targets=padded([e.target_ids for e in encoded], 0),
        positions=padded([range(e.prompt_length - 1, len(e.ids) - 1) for e in encoded], 0),
        mask=padded([[1] * len(e.target_ids) for e in encoded], 0).bool(),
        subject_last=torch.tensor([-1 if e.subject_last is None else e.subject_last for e in encoded]),
    )
