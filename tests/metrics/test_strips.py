"""Token strips against one text at a time."""

from __future__ import annotations

import pytest
import torch

from errata.lm import LanguageModel
from errata.metrics.strips import strips
from tests.metrics.test_teacher_forced import CASES


def test_each_token_has_its_probability_and_its_rival(lm: LanguageModel) -> None:
    for case, found in zip(CASES, strips(lm, CASES), strict=True):
        assert len(found) == len(case.facts)
        for fact, strip in zip(case.facts, found, strict=True):
            start = len(lm.tokenizer(fact.text).input_ids)
            ids = lm.tokenizer(f"{fact.text} {fact.target}").input_ids
            with torch.no_grad():
                p = lm.model(torch.tensor([ids])).logits[0, start - 1 : -1].float().softmax(-1)
            assert strip["tokens"] == [lm.tokenizer.decode([token]) for token in ids[start:]]
            assert strip["p"] == pytest.approx([float(row[token]) for row, token in zip(p, ids[start:], strict=True)], abs=6e-4)
            assert strip["top"] == [lm.tokenizer.decode([int(row.argmax())]) for row in p]
