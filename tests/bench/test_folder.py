from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from errata.bench.folder import append, claim, key_of, read_records, start, write_whole
from errata.bench.plan import Plan, PlanError

PLAN = Plan(model="atlas", data="atlas", methods=("ft-m",), limit=3)
ROW = PLAN.rows[0]


def record(case: str) -> dict[str, object]:
    return {"method": ROW.method, "objective": ROW.objective, "seed": ROW.seed, "case": case, "metrics": {"reliability": 1.0}}


@pytest.mark.parametrize("keep", range(1, 40, 3))
def test_a_torn_last_line_is_cut_off(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "records.jsonl"
    append(path, record("α\u2028β"))
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps(record("torn")).encode()[:keep])
    assert set(read_records(path)) == {key_of(ROW, "α\u2028β")}
    assert path.read_bytes() == whole, "what is appended next must begin a line of its own"


def test_a_complete_line_without_its_break_counts_as_torn(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(json.dumps(record("a")))
    assert read_records(path) == {}
    append(path, record("b"))
    assert set(read_records(path)) == {key_of(ROW, "b")}


def test_damage_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append(path, record("a"))
    path.write_bytes(path.read_bytes() + b'{"method": "ft\n')
    append(path, record("b"))
    with pytest.raises(PlanError, match=r"records\.jsonl, line 2 is damaged"):
        read_records(path)


def test_a_record_is_returned_as_it_will_be_read(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    odd = record("a") | {"diagnostics": {"loss": math.nan, "layers": (1, 2), "path": Path("x")}}
    assert append(path, odd) == read_records(path)[key_of(ROW, "a")]
    assert read_records(path)[key_of(ROW, "a")]["diagnostics"] == {"loss": None, "layers": [1, 2], "path": "x"}


def test_who_may_write_into_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert claim(PLAN, run, resume=False) == PLAN
    assert claim(PLAN, run, resume=True) == PLAN, "nothing there yet: --resume begins"
    begun = replace(PLAN, threads=2, data_hash="d", model_fingerprint="f", versions={"torch": "2"})
    start(begun, run)
    with pytest.raises(PlanError, match="--resume"):
        claim(PLAN, run, resume=False)
    assert claim(PLAN, run, resume=True) == begun
    for change, field in (
        ({"limit": 4}, "limit"),
        ({"threads": 3}, "threads"),
        ({"methods": ("lora",)}, "methods"),
        ({"seeds": (1,)}, "seeds"),
    ):
        with pytest.raises(PlanError, match=f"another plan: {field} was"):
            claim(replace(PLAN, **change), run, resume=True)
    with pytest.raises(PlanError, match="data_hash was 'd' and is now 'e'"):
        start(replace(begun, data_hash="e"), run)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(PlanError, match=r"not empty and holds no plan\.yaml"):
        claim(PLAN, other, resume=True)
    with pytest.raises(PlanError, match="is a file"):
        claim(PLAN, other / "thesis.tex", resume=False)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    for text in ("old" * 100, "new"):
        write_whole(path, text)
        assert path.read_text() == text
    assert [item.name for item in tmp_path.iterdir()] == ["results.json"]


def test_killed_before_the_plan_was_whole(tmp_path: Path) -> None:
    """Only the draft of the plan is there: nothing was measured, so the run begins."""
    (tmp_path / ".plan.yaml.4711.tmp").write_text("model: atl")
    assert claim(PLAN, tmp_path, resume=True) == PLAN == claim(PLAN, tmp_path, resume=False)
