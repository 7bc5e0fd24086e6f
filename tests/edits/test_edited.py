"""A model with its edits, as one thing: saved, loaded, pushed, taken apart again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import errata
from errata import EditedModel, Ledger
from errata.edits import Edit, EditError
from errata.edits.ledger import New
from errata.lm import LanguageModel
from tests.edits.test_export import edit, logits, on_disk


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def lm(tmp_path: Path) -> LanguageModel:
    return on_disk("llama", tmp_path / "base")


@pytest.fixture
def made(lm: LanguageModel) -> list[Edit]:
    return [edit(lm, "memit"), edit(lm, "ft-m"), edit(lm, "lora")]


def test_saved_and_loaded(lm: LanguageModel, made: list[Edit], tmp_path: Path) -> None:
    edited = EditedModel(lm, made)
    done = edited.save_pretrained(tmp_path / "E")
    assert done.format == "edits" and set(done.modules) == {delta.path for one in made for delta in one.deltas}
    again = EditedModel.from_pretrained(tmp_path / "E")
    assert same(again.lm.model, lm.model) and len(again.edits) == 3 and again.lm.dtype == torch.float64
    assert same(errata.load(edits=tmp_path / "E").model, lm.model), "the ledger names its model"
    assert same(errata.load(lm.name, edits=tmp_path / "E").model, lm.model)
    again.edits[0].revert()  # each is still there by itself
    made[0].revert()
    assert same(again.lm.model, lm.model)
    with pytest.raises(EditError, match="holds a ledger already"):
        edited.save_pretrained(tmp_path / "E")


def test_its_model_is_found_from_elsewhere(lm: LanguageModel, made: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was loaded by a path relative to the folder of then, as ledger and as saved edit."""
    monkeypatch.chdir(tmp_path)
    near = errata.load("base")
    with Ledger.write("L", near) as ledger:
        ledger.add(New(edit(near, "memit")))
        assert ledger.base.name == str(tmp_path / "base")
    edit(near, "memit").save("E")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    made[0].apply()
    assert same(EditedModel.from_pretrained("../L").lm.model, lm.model)
    assert same(EditedModel.from_pretrained("../E").lm.model, lm.model)


def test_one_edit_is_enough(lm: LanguageModel, made: list[Edit], tmp_path: Path) -> None:
    made[2].save(tmp_path / "E")
    again = EditedModel.from_pretrained(tmp_path / "E", lm.name)
    with made[2].applied_():
        assert same(again.lm.model, lm.model)


@pytest.mark.parametrize("form", ["checkpoint", "patch"])
def test_written_for_plain_transformers(form: str, lm: LanguageModel, made: list[Edit], tmp_path: Path) -> None:
    edited = EditedModel(lm, made)
    here = logits(lm.model)
    edited.save_pretrained(tmp_path / "out", form)
    assert torch.equal(logits(lm.model), here), "the live model is as it was"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    torch.testing.assert_close(logits(plain), here, atol=1e-12, rtol=0)


def test_a_ledger_with_something_undone(lm: LanguageModel, made: list[Edit], tmp_path: Path) -> None:
    with Ledger.write(tmp_path / "L", lm) as ledger:
        ledger.add(*map(New, made))
        ledger.undo(2)
    again = EditedModel.from_pretrained(tmp_path / "L")
    with made[0].applied_(), made[2].applied_():
        assert len(again.edits) == 2 and same(again.lm.model, lm.model)


def test_what_came_from_a_ledger_is_written_with_its_history(lm: LanguageModel, made: list[Edit], tmp_path: Path) -> None:
    with Ledger.write(tmp_path / "L", lm) as ledger:
        ledger.add(*(New(one, seed=3, note="asked for by Ann") for one in made))
        ledger.undo(2, reason="withdrawn")
    edited = EditedModel.from_pretrained(tmp_path / "L")
    edited.save_pretrained(tmp_path / "M")
    with Ledger.open(tmp_path / "L") as one, Ledger.open(tmp_path / "M") as other:
        assert one.entries() == other.entries() and one.events() == other.events() and other.verify() == []
    with Ledger.write(tmp_path / "L") as ledger:
        ledger.undo(3)
    with pytest.raises(EditError, match="has been changed since the model was loaded"):
        edited.save_pretrained(tmp_path / "N")
    assert not (tmp_path / "N").exists()


class Hub:
    """The calls that `push_to_hub` makes, and what stood in the folder at that moment."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create", {"repo": repo_id, **options}))
        return f"hub/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> None:
        self.calls.append(("upload", {"repo": repo_id, "files": sorted(file.name for file in folder_path.iterdir()), **options}))


@pytest.mark.parametrize(("form", "file"), [("edits", "ledger.sqlite"), ("adapter", "adapter_model.safetensors")])
def test_pushed(form: str, file: str, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub()
    monkeypatch.setattr("errata.edits.edited.HfApi", lambda: hub)
    assert EditedModel(lm, [edit(lm, "lora")]).push_to_hub("ann/edited", form, private=True, commit_message="France") == "hub/ann/edited"
    (_, made), (_, sent) = hub.calls
    assert made == {"repo": "ann/edited", "private": True, "exist_ok": True}
    assert file in sent["files"] and sent["repo"] == "ann/edited" and sent["commit_message"] == "France"
    assert not [name for name in sent["files"] if name.endswith((".lock", "-wal", "-shm"))]


def test_pulled(lm: LanguageModel, made: list[Edit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited = EditedModel(lm, made)
    edited.save_pretrained(tmp_path / "downloaded")
    monkeypatch.setattr("errata.lm.loading.folder_of", lambda name, download: {"ann/edited": tmp_path / "downloaded"}[name])
    assert same(EditedModel.from_pretrained("ann/edited").lm.model, lm.model)
