"""The training of the bundled model: what is learnt from, and that it goes on where it was stopped."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from errata.data.atlas.train import STAGES, Rows, make_tokenizer, schedule, stage, train
from errata.data.atlas.world import build

WORLD = build()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(WORLD, documents=500)


def test_rows_weigh_answers_and_nothing_else(tokenizer: Any) -> None:
    rows = Rows(WORLD, tokenizer, length=160, other=0.25, seed=3)
    ids, weights = rows.batch(4)
    assert ids.shape == weights.shape == (4, 160) and set(weights.unique().tolist()) == {0.25, 1.0}
    answers = {f" {statement.object}." for statement in WORLD.statements.values()}
    for row, weight in zip(ids.tolist(), weights.tolist(), strict=True):
        text, spans = "", []
        for token, w in zip(row, weight, strict=True):
            if w == 1.0:
                text += tokenizer.decode([token])
            elif text:
                spans.append(text)
                text = ""
        assert spans and set(spans) <= answers


def test_the_rate_ends_each_stage_near_zero() -> None:
    assert stage(0) == STAGES[0] and stage(STAGES[0][0]) == STAGES[1]
    assert schedule(0) == pytest.approx(1 / 60) and schedule(100) == 1.0
    for end, _ in STAGES:
        assert 0 < schedule(end - 1) < 0.001
    assert schedule(STAGES[0][0]) > 0.4


@pytest.mark.slow
def test_stopped_and_resumed_training_gives_the_same_weights(tmp_path: Path) -> None:
    def options(out: str, steps: int) -> argparse.Namespace:
        sizes = {"width": 64, "inner": 32, "layers": 2, "local": 1, "window": 3, "length": 32, "batch": 2}
        rates = {"lr": 1e-3, "decay": 0.1, "drop": 0.3, "other": 0.3}
        return argparse.Namespace(
            out=tmp_path / out, steps=steps, threads=torch.get_num_threads(), seed=0, every=100, compile=False, **sizes, **rates
        )

    train(options("whole", 4))
    train(options("halves", 2))
    train(options("halves", 4))
    whole, halves = (torch.load(tmp_path / out / "checkpoint.pt", weights_only=False)["model"] for out in ("whole", "halves"))
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert (tmp_path / "halves" / "model" / "model.safetensors").is_file()
