"""A live model as EleutherAI's lm-evaluation-harness sees it: its own tokens and requests, answered by errata's batches.

The harness's class for transformers gives the model bare ids, without saying where a question ends. Editors that ask a memory beside the
weights need to know that, and what stands in front of a question (retrieval), so the two calls that run the model are made here.
Imports lm-eval (`errata[ability]`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from lm_eval.models.huggingface import HFLM

from errata.lm import Encoded, LanguageModel
from errata.metrics.teacher_forced import batches


class Live(HFLM):  # type: ignore[misc]  # lm-eval has no types
    """An `errata.LanguageModel` under the harness's requests, with whatever edits are applied to it."""

    def __init__(self, lm: LanguageModel) -> None:
        # The harness gives tokenizers a token for padding; ours stays as it is.
        super().__init__(pretrained=lm.model, tokenizer=copy.deepcopy(lm.tokenizer), backend="causal", batch_size=1)
        self.lm = lm

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_more: Any
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation's tokens, whether each is the likeliest) of each context and continuation, cut on the left to fit."""
        texts = []
        for _strings, context, continuation in requests:
            room = max(0, self.max_length - len(continuation))
            before = context[len(context) - min(len(context), room) :]
            texts.append(Encoded(tuple(before + continuation), len(before)))
        found: dict[int, tuple[float, bool]] = {}
        for chosen in batches(self.lm, texts):
            batch = self.lm.batch([texts[i] for i in chosen])
            logits = self.lm.target_logits(batch).float()
            targets, mask = batch.targets.to(logits.device), batch.mask.to(logits.device)
            log_p = logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)
            sums = log_p.masked_fill(~mask, 0.0).sum(1).tolist()
            greedy = ((logits.argmax(-1) == targets) | ~mask).all(1).tolist()
            found |= {i: (total, top) for i, total, top in zip(chosen, sums, greedy, strict=True)}
        made = [found[i] for i in range(len(texts))]
        return made

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to the first of the request's stops. What is to be sampled is left to the harness."""
        wishes = [dict(request.args[1]) for request in requests]
        if any(wish.get("do_sample") or wish.get("temperature") for wish in wishes):
            return list(super().generate_until(requests, disable_tqdm))
        texts: dict[int, str] = {}
        lengths = [int(wish.get("max_gen_toks") or self.max_gen_toks) for wish in wishes]
        for length in sorted(set(lengths)):
            chosen = [i for i, own in enumerate(lengths) if own == length]
            room = max(1, self.max_length - length)
            prompts = [cast(list[int], self.tok_encode(requests[i].args[0]))[-room:] for i in chosen]
            texts |= zip(chosen, self.lm.generate(prompts, length, stop_at_newline=False), strict=True)
        said = []
        for i, wish in enumerate(wishes):
            stops = wish.get("until") or []
            text = texts[i]
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            said.append(text)
        return said
