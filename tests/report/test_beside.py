"""What was measured beside the cases of a sequence, in the report: numbers that are known, and nothing where nothing was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from errata.cli import call
from errata.cli.report import read_run
from errata.report.beside import ability, asked_otherwise, case_study, costs, drift, fluency, perplexity, signed, told, wilson
from errata.report.board import Board
from errata.report.figures import pictures
from errata.report.page import parts, sheets
from errata.report.sequence import COLOURS, styles
from errata.report.story import Story, story
from tests.report.made import sequence, single

FOUR = {"memit": [1.0] * 4, "rome": [0.0] * 4}


@pytest.fixture
def measured(tmp_path: Path) -> Story:
    return story([read_run(sequence(tmp_path / "S", FOUR, also=True))])


def cells(board: Board) -> list[list[str]]:
    return [[f"{cell.text} ({cell.small})" if cell.small else cell.text for cell in row] for row in board.rows]


def test_the_costs_before_and_after(measured: Story) -> None:
    (board,) = perplexity(measured)
    assert cells(board)[0] == ["memit", "8", "16", "2.000"]
    accuracy, f1 = ability(measured)
    assert cells(f1) == [["unedited", "75.0"], ["memit", "35.0 (−40.0)"], ["rome", "35.0 (−40.0)"]]
    assert cells(accuracy)[:2] == [["unedited", "80.0 (65 to 90)"], ["memit", "40.0 (−40.0 · 26 to 55)"]]
    (board,) = drift(measured)
    assert cells(board)[0] == ["memit", "0.600 (0.600 to 0.600)", "0.400 (0.400 to 0.400)", "0.900 (0.900 to 0.900)"]
    (board,) = fluency(measured)
    assert cells(board)[0] == ["memit", "4.50", "3.50", "−1.00 (−1.00 to −1.00)"] and board.rows[0][-1].mood == "bad"
    assert told(measured)[0] == (
        "memit: perplexity 2.00 times the unedited model's, accuracy in general ability −40.0 points (tasks: cola), "
        "hidden states of other facts moved by 40 % of their size."
    )


def test_what_is_written_beside_the_unedited_model(measured: Story) -> None:
    written, contained, elsewhere = asked_otherwise(measured)
    assert written.headings == ("method", "as it stands", "as a question"), "in a frame and in a chat nothing was asked"
    assert [row[0].text for row in written.rows] == ["unedited", "memit", "rome"]
    assert [cell.text for cell in written.rows[1]] == ["memit", "100.0", "50.0"]
    assert contained.headings == ("method", "as a question") and elsewhere.headings == ("method", "same subject, at once")
    assert [row[1].text for row in elsewhere.rows] == ["25.0", "100.0", "100.0"]
    (ways,) = {str(case["ways"]) for case in measured.cases}
    assert "['leak', 'Land 0 lies in', 'Town 0', 'Town 0.']" in ways


def test_the_case_study(measured: Story) -> None:
    (board,) = case_study(measured)
    assert board.title == "Case study: Land 1 lies in …" and board.wide
    assert cells(board)[:2] == [["unedited", "Land 1 lies in the north."], ["memit", "Land 1 lies in the south, says memit."]]


def test_several_seeds_have_a_deviation_and_no_interval(tmp_path: Path) -> None:
    two = story([read_run(sequence(tmp_path / "S", FOUR, seeds=(0, 1), also=True))])
    assert cells(next(iter(perplexity(two))))[0] == ["memit", "8 ± 0", "16 ± 0", "2.000 ± 0.000"]
    assert cells(next(iter(drift(two))))[0][1] == "0.600 ± 0.000"
    assert [board.title for board in case_study(two)] == ["Case study: Land 1 lies in … (seed 0)", "Case study: Land 1 lies in … (seed 1)"]


def test_the_curves_begin_at_the_unedited_model(measured: Story) -> None:
    drawn = pictures(measured)
    (clouds,) = drawn["cost"]
    by_title = {picture.title: picture for picture in drawn["goes-on"]}
    assert clouds.rows[0] == ("memit", "0.600", "0.400", "0.900")
    assert by_title["Perplexity as edits go on"].rows[0] == ("memit", "1.000", "2.000", "2.000")
    assert by_title["Perplexity as edits go on"].headings == ("method", "0", "2", "4")
    assert by_title["General ability as edits go on"].rows[0] == ("memit", "cola, F1", "75.0", "35.0", "35.0")
    assert by_title["Drift as edits go on"].rows[0] == ("memit", "0.000", "0.200", "0.400")
    assert all(picture.about and "<svg" in picture.svg for some in drawn.values() for picture in some)


def test_nothing_is_shown_where_nothing_was_measured(tmp_path: Path) -> None:
    runs = [read_run(sequence(tmp_path / "S", FOUR)), read_run(single(tmp_path / "R", {"lora": [(1.0, True)]}))]
    plain = story(runs)
    assert [*costs(plain), *asked_otherwise(plain), *case_study(plain), *told(plain)] == []
    titles = [picture.title for some in pictures(plain).values() for picture in some]
    assert not any("Perplexity" in title or "ability" in title or "Drift" in title for title in titles)
    assert pictures(plain)["cost"] == [] and len(list(parts(plain, {}))) == 5


def test_beside_a_run_that_measured_less(tmp_path: Path, measured: Story) -> None:
    both = story([*measured.runs, read_run(sequence(tmp_path / "P", {"lora": [1.0] * 4}))])
    assert [row[0].text for row in next(iter(perplexity(both))).rows] == ["memit", "rome"]


def test_everything_is_in_the_tables_for_papers(tmp_path: Path, measured: Story) -> None:
    titles = [sheet.title for sheet in sheets(measured)]
    assert len(titles) == len(set(titles)) and {
        "Written, asked in other ways", "Said where it should not be (lower is better)", "Perplexity of held-out text",
        "General ability, accuracy", "General ability, F1", "Drift of other facts", "Fluency: n-gram entropy",
        "Perplexity as edits go on", "General ability as edits go on", "Drift as edits go on", "Case study: Land 1 lies in …",
    } <= set(titles)  # fmt: skip
    for name in ("t.md", "t.tex"):
        assert call(["report", str(tmp_path / "S"), "--to", str(tmp_path / name), "--json"]) == 0
    assert "| memit | 8 | 16 | 2.000 |" in (tmp_path / "t.md").read_text()
    assert r"\begin{tabular}{lp{0.7\linewidth}}" in (tmp_path / "t.tex").read_text()


def test_a_method_has_its_colour_whatever_its_objective() -> None:
    looks = styles(["alphaedit + ce", "lora + overtone", "deltaedit"])
    assert looks["alphaedit + ce"][0] == COLOURS["alphaedit"] and looks["deltaedit"][0] == COLOURS["deltaedit"]
    two = styles(["alphaedit + ce", "alphaedit + overtone"])
    assert len({colour for colour, _ in two.values()}) == 2, "and two of one method are told apart"


def test_small_parts() -> None:
    assert [signed(value) for value in (1.25, -0.04, -2.0)] == ["+1.2", "±0.0", "−2.0"]
    low, high = wilson(0.5, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)  # as in textbooks
    assert wilson(0.0, 10)[0] == 0 and wilson(1.0, 10)[1] == pytest.approx(1) and wilson(0.0, 0) == (0.0, 1.0)
