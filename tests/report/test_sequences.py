"""Tables and pictures of sequences, from results that are made up, so that every number is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.bench.plan import Plan, PlanError
from errata.cli import call
from errata.facts import Fact
from errata.report import DRAWINGS, OF_CASES, PICTURES, TABLES, DrawingError
from errata.report.sequence import Curve, draw, layer_of, picture
from errata.report.tables import Sheet, by_checkpoint, case_study, edited, sheets, table1

TOP = ("efficacy_top", "generalization_top", "specificity_top")
LARGER = ("efficacy_larger", "generalization_larger", "specificity_larger")
PATHS = ("model.layers.10.mlp.down_proj", "model.layers.9.mlp.down_proj")  # in an order that is not theirs


def row(method: str, seed: int = 0, noise: tuple[float | None, ...] = (1.0, 2.0), top: float = 90.0, **more: Any) -> dict[str, Any]:
    marks = [
        {
            "edits": 10 * (i + 1),
            **{name: top - i for name in TOP},
            **{name: top / 2 for name in LARGER},
            "noise": value,
            "k_beta": None if value is None else value / 100,
            "noise_by_layer": {} if value is None else {path: value * (j + 1) for j, path in enumerate(PATHS)},
            "k_beta_by_layer": {},
            "by_age": [],
        }
        for i, value in enumerate(noise)
    ]
    last = {name: value for name, value in marks[-1].items() if not isinstance(value, dict | list)}
    base = {"method": method, "objective": "ce", "seed": seed, "settings": {"method": {}}, "transcripts": []}
    return base | {"metrics": {**last, "checkpoints": marks}} | more


def results(*rows: Mapping[str, Any]) -> dict[str, Any]:
    return {"rows": list(rows), "environment": {"model": "some/where/gpt2-xl", "data": "data/counterfact.json", "data_hash": "?"}}


TWO = results(row("alphaedit"), row("deltaedit", top=91.5, noise=(0.5, 3.0)))


def lines(figure: Any, axes: int = 0) -> list[Any]:
    return [line for line in figure.axes[axes].lines]


# Tables


def test_table1_is_mean_and_deviation_over_the_seeds_with_the_best_in_bold() -> None:
    ends = {"alphaedit": (80.0, 90.0, 85.0), "deltaedit": (95.0, 91.0, 96.0)}
    sheet = table1(results(*(row(name, seed, top=top) for name, tops in ends.items() for seed, top in enumerate(tops))))
    assert sheet.title == "gpt2-xl on counterfact, 20 edits"
    assert sheet.headings == ("method", "Eff↑ top", "Gen↑ top", "Spe↑ top", "Eff↑ larger", "Gen↑ larger", "Spe↑ larger")
    for line, (name, tops) in zip(sheet.rows, ends.items(), strict=True):
        after = [top - 1 for top in tops]  # at the second and last checkpoint
        assert line[:2] == (name, f"{fmean(after):.2f} ±{stdev(after):.2f}")
    assert sheet.best == {(1, column) for column in range(1, 7)}
    assert sheet.markdown().splitlines()[-1].startswith("| deltaedit | **93.00 ±2.65** |")


def test_equals_share_the_bold_and_what_was_not_measured_has_no_column() -> None:
    same = [row("memit"), row("rect")]
    for made in same:
        for name in LARGER:
            made["metrics"][name] = None
    sheet = table1(results(*same))
    assert len(sheet.headings) == 4 and sheet.best == {(i, j) for i in (0, 1) for j in (1, 2, 3)}


def test_the_tables_by_checkpoint_leave_out_who_has_no_numbers() -> None:
    made = results(
        row("memit", noise=(1.7911, 111939.21)), row("memit", seed=1, noise=(1.7911, 111939.21)), row("lora", noise=(None, None))
    )
    sheet = by_checkpoint(made, "noise", "noise_E")
    assert sheet.headings == ("number of edits", "10", "20")
    assert sheet.rows == (("memit noise_E", "1.79 ±0", "111939.2 ±0"),)
    with pytest.raises(DrawingError, match="no row of this run has kᵀβ"):
        sheets("k-beta-table", results(row("lora", noise=(None, None))))


def test_a_case_study_says_what_was_edited_what_was_asked_and_what_was_written() -> None:
    prompt = "Danielle Darrieux was born in"
    said = {"prompt": prompt, "before": " Paris,\nFrance", "after": " London"}
    (page,) = case_study(results(row("memit", transcripts=[said])), {(0, prompt): "The mother tongue of Danielle Darrieux is English"})
    assert page.title.endswith(
        "edited knowledge: The mother tongue of Danielle Darrieux is English · prompt: Danielle Darrieux was born in"
    )
    assert page.rows == (("Original", f"{prompt} Paris, France"), ("memit", f"{prompt} London"))
    both = case_study(results(row("memit", transcripts=[said]), row("memit", seed=1, transcripts=[said])), {(1, prompt): "that"})
    assert ["seed 0 · edited knowledge: –" in both[0].title, "seed 1 · edited knowledge: that" in both[1].title] == [True, True]
    with pytest.raises(DrawingError, match="has no transcripts"):
        case_study(TWO, {})


def test_a_fact_is_found_by_its_subject_as_whole_words() -> None:
    facts = [Fact("The mother tongue of {} is", "Ann", "English"), Fact("{} lives in", "Annika", "Rome")]
    assert edited(["Annika was", "Who is Ann?", "Anna was"], facts) == {
        "Annika was": "Annika lives in Rome",
        "Who is Ann?": "The mother tongue of Ann is English",
    }


def test_markdown_does_not_take_a_model_at_its_word() -> None:
    """What a broken model writes may hold bars and stars."""
    text = Sheet("a | b", ("x", "y"), (("*", "| <b>_"),), wide=True).markdown()
    assert text.splitlines() == [r"**a \| b**", "", "| x | y |", "| --- | --- |", r"| \* | \| \<b\>\_ |"]


def test_several_objectives_are_told_apart() -> None:
    made = results(row("memit"), row("memit", objective="overtone"))
    assert [line[0] for line in table1(made).rows] == ["memit+ce", "memit+overtone"]


# Pictures


@given(st.dictionaries(st.integers(1, 9), st.lists(st.floats(-1e6, 1e6), max_size=4), max_size=5))
def test_a_curve_runs_within_its_band(points: dict[int, list[float]]) -> None:
    curve = Curve.through(points)
    assert curve.x == sorted(x for x, values in points.items() if values)
    for low, mean, high in zip(curve.low, curve.mean, curve.high, strict=True):
        assert low <= mean + 1e-6 and mean <= high + 1e-6


def test_efficacy_is_solid_and_left_noise_is_dashed_and_right_in_one_colour() -> None:
    figure = picture("efficacy-and-noise", TWO)
    left, right = figure.axes
    assert [list(line.get_ydata()) for line in left.lines] == [[90, 89], [91.5, 90.5]]
    assert [list(line.get_ydata()) for line in right.lines] == [[1, 2], [0.5, 3]]
    assert [line.get_color() for line in left.lines] == [line.get_color() for line in right.lines] != [left.lines[0].get_color()] * 2
    assert {line.get_linestyle() for line in left.lines} == {"-"} and {line.get_linestyle() for line in right.lines} == {"--"}
    assert right.yaxis.get_label_position() == "right"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["alphaedit", "deltaedit"]


def test_seeds_are_one_line_with_a_band() -> None:
    figure = picture("k-beta", results(row("memit", 0, (1.0, 2.0)), row("memit", 1, (3.0, 8.0))))
    (line,) = lines(figure)
    assert list(line.get_ydata()) == pytest.approx([0.02, 0.05])
    (band,) = figure.axes[0].collections
    ys = band.get_paths()[0].vertices[:, 1]
    assert (ys.min(), ys.max()) == pytest.approx((0.01, 0.08))


@pytest.mark.parametrize(
    ("noises", "scale"),
    [
        (((1.0, 2.0), (3.0, 9.0)), "linear"),
        (((-1.0, 2.0), (3.0, 9.0)), "linear"),
        (((1.0, 2.0), (300.0, 9000.0)), "log"),
        (((-1.0, 2.0), (300.0, 9000.0)), "symlog"),
        (((0.0, 0.0), (0.0, 0.0)), "linear"),
    ],
)
def test_values_of_other_sizes_get_an_axis_on_which_both_are_seen(noises: tuple[tuple[float, float], ...], scale: str) -> None:
    figure = picture("efficacy-and-noise", results(*(row(name, noise=noise) for name, noise in zip("ab", noises, strict=True))))
    right = figure.axes[1]
    assert right.get_yscale() == scale
    low, high = right.get_ylim()
    assert all(low <= value <= high for noise in noises for value in noise)


def test_a_panel_for_each_layer_from_low_to_high() -> None:
    figure = picture("noise-by-layer", TWO)
    assert [axes.get_title() for axes in figure.axes] == ["layer 9", "layer 10"]
    assert [list(line.get_ydata()) for line in lines(figure, 0)] == [[2, 4], [1, 6]], "the second of the paths is layer 9"
    assert len(figure.legends) == 1
    assert layer_of("lm_head") == -1 < layer_of("transformer.h.0.mlp.c_proj")


def test_eta_is_taken_from_the_settings_of_labelled_rows() -> None:
    swept = [row(f"deltaedit@eta={value:g}", top=90 + value, settings={"method": {"eta": value}}) for value in (3.0, 1.5)]
    figure = picture("eta", results(row("alphaedit"), row("deltaedit@strict", settings={"method": {"eta": 9.0}}), *swept))
    assert [list(line.get_xdata()) for line in lines(figure)] == [[1.5, 3.0]] * 3
    assert list(lines(figure)[0].get_ydata()) == [90.5, 92.0]
    with pytest.raises(DrawingError, match="at least two values of η"):
        picture("eta", results(swept[0]))


@pytest.mark.parametrize("name", sorted(PICTURES.keys() - OF_CASES))
def test_a_single_protocol_has_nothing_to_draw(name: str) -> None:
    with pytest.raises(DrawingError, match="holds no sequence"):
        picture(name, results({"method": "memit", "objective": "ce", "seed": 0, "metrics": {"reliability": 1.0}}))


def test_nothing_of_low_rank_nothing_to_draw(tmp_path: Path) -> None:
    dense = results(row("ft-m", noise=(None, None)))
    for name in ("k-beta", "noise-by-layer"):
        with pytest.raises(DrawingError, match="no row of this run has"):
            draw(name, dense, tmp_path / "picture.png")
    draw("efficacy-and-noise", dense, tmp_path / "picture.svg")
    assert (tmp_path / "picture.svg").read_text().startswith("<?xml")


# The command, and plans


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    said = {"prompt": "Danielle Darrieux was born in", "before": " Paris", "after": " London"}
    (folder / "results.json").write_text(json.dumps(results(row("alphaedit", transcripts=[said]), row("deltaedit", transcripts=[said]))))
    plan = Plan(
        "gpt2-xl", "counterfact", ("alphaedit", "deltaedit"), protocol="sequential:20", transcripts=("Danielle Darrieux was born in",)
    )
    (folder / "plan.yaml").write_text(plan.dump())
    return folder


def test_draw_makes_all_that_the_run_can_give(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ERRATA_DATA", raising=False)
    assert call(["draw", str(run), "--to", str(run / "drawn")]) == 0
    assert {path.stem for path in (run / "drawn").iterdir()} == set(DRAWINGS) - OF_CASES - {"eta"}
    said = capsys.readouterr()
    assert "deltaedit noise_E" in said.out and "Danielle Darrieux was born in London" in said.out
    assert "what was edited cannot be said: where is data set 'counterfact'?" in said.err


def test_draw_makes_what_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["draw", str(run), "--what", "table1,k-beta", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": [str(run / "table1.md"), str(run / "k-beta.png")]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "k-betta"], "unknown drawing 'k-betta'; did you mean 'k-beta'?"),
        (["--what", "table1,eta"], "this picture needs rows deltaedit@eta=…"),
    ],
)
def test_draw_refuses_what_cannot_be(run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["draw", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_draw_needs_a_finished_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["draw", str(tmp_path / "nowhere")]) == 2
    assert "holds no finished run" in capsys.readouterr().err


def test_without_matplotlib_tables_are_made_and_pictures_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("errata.cli.draw.find_spec", lambda name: None)
    assert call(["draw", str(run), "--what", "k-beta"]) == 1
    assert "install errata[plots]" in capsys.readouterr().err
    assert call(["draw", str(run), "--to", str(run / "drawn")]) == 0
    assert {path.name for path in (run / "drawn").iterdir()} == {f"{name}.md" for name in TABLES.keys() - OF_CASES}
    assert "k-beta: pictures need matplotlib" in capsys.readouterr().err


def test_a_plan_s_drawings_are_known_by_name_and_belong_to_a_sequence() -> None:
    plan = Plan("m", "d", ("memit",), protocol="sequential:9", drawings=tuple(TABLES.keys() - OF_CASES))
    assert Plan.from_dict(plan.to_dict()) == plan
    with pytest.raises(PlanError, match="unknown drawing 'tabel1'; did you mean 'table1'"):
        Plan("m", "d", ("memit",), protocol="sequential:9", drawings=("tabel1",))
    with pytest.raises(PlanError, match="'table1' is none of the protocol 'single'"):
        Plan("m", "d", ("memit",), drawings=("table1",))
    with pytest.raises(PlanError, match="drawings must be a list of str"):
        Plan.from_dict({"model": "m", "data": "d", "methods": ["memit"], "protocol": "sequential:9", "drawings": [1]})
