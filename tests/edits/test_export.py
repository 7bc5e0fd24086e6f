"""Exported edits, loaded by plain transformers and PEFT: what is served is what was edited."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import errata
from errata.cli import call
from errata.edits import Edit, EditError
from errata.edits.export import _header, export, vllm_rank
from errata.facts import Fact
from errata.lm import LanguageModel
from tests.families import language_model
from tests.methods.test_contract import method

FACTS = [Fact("The capital of {} is", "France", "Tokyo"), Fact("{} was born in", "Marie Curie", "Lyon, in France")]
IDS = torch.tensor([[5, 9, 3, 11, 2, 7]])


def on_disk(family: str, folder: Path) -> LanguageModel:
    """A model as users have it: a folder on disk, in two shards, in float64."""
    made = language_model(family, dtype=torch.float64)
    made.model.save_pretrained(folder, max_shard_size=40_000)
    made.tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return errata.load(folder, device="cpu")


@pytest.fixture(params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest, tmp_path: Path) -> LanguageModel:
    return on_disk(request.param, tmp_path / "base")


def edit(lm: LanguageModel, name: str) -> Edit:
    return method(name).start(lm).complete(FACTS)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
        return found


def edited(lm: LanguageModel, made: Edit) -> torch.Tensor:
    with made.applied_():
        return logits(lm.model)


def base(lm: LanguageModel) -> Any:
    return AutoModelForCausalLM.from_pretrained(lm.name, dtype="auto").eval()


def served(lm: LanguageModel, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(base(lm), folder))


@pytest.mark.parametrize("name", ["memit", "deltaedit", "lora"])
def test_an_adapter_of_low_rank_edits_is_exact(name: str, lm: LanguageModel, tmp_path: Path) -> None:
    made = edit(lm, name)
    done = export([made], "adapter", tmp_path / "out")
    assert done.rank and not done.residual
    expected = edited(lm, made)
    assert (expected - logits(lm.model)).abs().max() > 1e-3
    torch.testing.assert_close(served(lm, tmp_path / "out"), expected, atol=1e-9, rtol=0)


def test_a_dense_edit_is_cut_and_says_what_it_loses(lm: LanguageModel, tmp_path: Path) -> None:
    made = edit(lm, "ft-m")
    whole = export([made], "adapter", tmp_path / "whole")
    assert not whole.residual
    torch.testing.assert_close(served(lm, tmp_path / "whole"), edited(lm, made), atol=1e-6, rtol=0)
    cut = export([made], "adapter", tmp_path / "cut", max_rank=1)
    ((path, lost),) = cut.residual.items()
    change = made.deltas[0].tensors()["tensor"].double()
    values = torch.linalg.svdvals(change)
    assert path == made.deltas[0].path and cut.rank == 1
    assert lost == pytest.approx(float(values[1:].square().sum().sqrt() / values.square().sum().sqrt()), rel=1e-6)
    assert f"{lost:.2%}" in (tmp_path / "cut" / "README.md").read_text()


def test_many_edits_beyond_the_rank_are_cut_from_their_factors(lm: LanguageModel, tmp_path: Path) -> None:
    """Their sum, with less than its rank, by the best approximation there is."""
    made = edit(lm, "lora")
    done = export([made], "adapter", tmp_path / "out", max_rank=2)
    for delta in made.deltas:
        values = torch.linalg.svdvals(delta.left.double() @ delta.right.double())  # type: ignore[union-attr]
        expected = float(values[2:].norm() / values.norm())
        assert done.residual.get(delta.path, 0.0) == pytest.approx(expected, rel=1e-6, abs=2e-6)


@pytest.mark.parametrize("form", ["checkpoint", "patch"])
@pytest.mark.parametrize("name", ["rect", "ft-m"])
def test_a_checkpoint_is_the_edited_model(name: str, form: str, lm: LanguageModel, tmp_path: Path) -> None:
    made = edit(lm, name)
    before = {file.name: file.read_bytes() for file in Path(lm.name).iterdir()}
    done = export([made], form, tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    with made.applied_():
        for path, parameter in lm.model.named_parameters():
            assert torch.equal(dict(reloaded.named_parameters())[path], parameter), path
        torch.testing.assert_close(logits(reloaded), logits(lm.model), atol=1e-12, rtol=0)
    assert {file.name: file.read_bytes() for file in Path(lm.name).iterdir()} == before
    if form == "patch":
        assert done.written and any(name.endswith(".safetensors") for name in done.linked)
    assert errata.load(tmp_path / "out").generate(["The capital of France is"], 3)


def test_what_cannot_be_exported_says_why_and_leaves_nothing(lm: LanguageModel, tmp_path: Path) -> None:
    made, out = edit(lm, "memit"), tmp_path / "place" / "out"
    with pytest.raises(EditError, match="unknown format 'lora'; there is adapter, checkpoint, patch"):
        export([made], "lora", out)
    with pytest.raises(EditError, match="there is no edit"):
        export([], "adapter", out)
    with pytest.raises(EditError, match="asked at run time"):
        export([edit(lm, "melo")], "adapter", out)
    with made.applied_(), pytest.raises(EditError, match="revert"):
        export([made], "checkpoint", out)
    with pytest.raises(EditError, match="different models"):
        export([made, edit(language_model("qwen2"), "memit")], "adapter", out)
    other = errata.load(lm.name, device="cpu")
    with pytest.raises(EditError, match="different models"):
        export([made, edit(other, "memit")], "checkpoint", out)
    assert not out.parent.exists()
    index = Path(lm.name) / "model.safetensors.index.json"
    name = f"{made.deltas[0].path}.weight"
    shard = index.with_name(json.loads(index.read_text())["weight_map"][name])
    entry, raw = _header(shard)[name], bytearray(shard.read_bytes())
    raw[entry["at"] : entry["at"] + 8] = bytes(8)  # one number of a touched matrix
    shard.unlink()  # the live model's weights are mapped from this very file
    shard.write_bytes(raw)
    with pytest.raises(EditError, match=f"{name} in .* is not that of the model that was edited"):
        export([made], "patch", out)
    index.unlink()
    with pytest.raises(EditError, match="holds no safetensors, which alone can be patched"):
        export([made], "patch", out)
    assert list(out.parent.iterdir()) == []
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(EditError, match="exists already"):
        export([made], "adapter", out)


def test_from_the_command_line(lm: LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = edit(lm, "ft-m")
    made.metrics = {"before": {"fact": 0.0, "perplexity": 1.0}, "after": {"fact": 1.0, "perplexity": 1.25}}
    made.save(tmp_path / "e")
    capsys.readouterr()
    assert call(["export", str(tmp_path / "e"), "--to", str(tmp_path / "a"), "--max-rank", "1", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["rank"] == 1 and len(done["residual"]) == 1
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| The capital of {France} is -> Tokyo | ft-m | 0 → 1 | 1 → 1.25 |" in card and "--max-lora-rank 8" in card
    assert len({file.stat().st_mode for folder in ("e", "a") for file in (tmp_path / folder).iterdir()}) == 1  # readable by whoever serves
    assert call(["export", str(tmp_path / "e"), "--to", str(tmp_path / "a"), "--format", "patch"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert call(["export", str(tmp_path / "e"), "--to", str(tmp_path / "b"), "--format", "ptach"]) == 2
    assert "did you mean 'patch'" in capsys.readouterr().err
    assert call(["export", str(tmp_path / "none"), "--to", str(tmp_path / "b")]) == 2
    assert not (tmp_path / "b").exists()


def test_ranks_that_vllm_knows() -> None:
    assert [vllm_rank(rank) for rank in (1, 8, 9, 257, 512, 600)] == [8, 8, 16, 320, 512, 600]
