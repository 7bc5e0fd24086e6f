"""Token strips: how likely a model finds each token of the right answer, led by the answer itself, and what it would say in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from errata.facts import EditCase
from errata.lm import LanguageModel, encode
from errata.lm.own import Within, mapped, within_of
from errata.metrics.teacher_forced import BATCH_SIZE, batches, probes_of

Strip = dict[str, list[Any]]
"""Of one answer, JSON-ready. tokens: its tokens as text; p: the probability of each behind the ones before, three decimals; top: the
text of the likeliest token at each place, which is the token itself where the model is right."""


@torch.no_grad()
def strips(lm: LanguageModel, cases: Sequence[EditCase], batch_size: int = BATCH_SIZE, within: Within | None = None) -> list[list[Strip]]:
    """For each case the strips of its edit prompts (the "reliability" of `teacher_forced`), under the model as it is.

    within: see `teacher_forced.score_all`. Raises ModelError for a text that is too long for the model.
    """
    asked = [probes_of(case)["reliability"]["edit"] for case in cases]
    rows = [(number, encode(lm.tokenizer, probe.prompt, probe.answers[0])) for number, own in enumerate(asked) for probe in own]
    within = mapped(within, [number for number, _ in rows])
    found: dict[int, Strip] = {}
    for chosen in batches([text for _, text in rows], batch_size):
        batch = lm.batch([rows[i][1] for i in chosen])
        with within_of(within, chosen):
            logits = lm.target_logits(batch.without_last()).float()  # [B, Tm, V]
        right = logits.gather(-1, batch.targets.to(logits.device)[..., None]).squeeze(-1) - logits.logsumexp(-1)
        for i, log_p, top in zip(chosen, right.tolist(), logits.argmax(-1).tolist(), strict=True):
            ids = rows[i][1].target_ids
            found[i] = {
                "tokens": [lm.tokenizer.decode([token]) for token in ids],
                "p": [round(float(p), 3) for p in torch.tensor(log_p[: len(ids)]).exp()],
                "top": [lm.tokenizer.decode([token]) for token in top[: len(ids)]],
            }
    made = iter(found[i] for i in range(len(rows)))
    return [[next(made) for _ in own] for own in asked]
