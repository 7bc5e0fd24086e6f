"""OVERTONE's figures, from results that are made up, so that every number is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errata.report import DrawingError
from errata.report.overfitting import draw, picture, together


def curves(steps: int, half: int | None = None, **more: Any) -> dict[str, Any]:
    falling = [10.0 - step for step in range(steps + 1)]
    return {
        "edits": 10,
        "steps": steps,
        "mean_steps": float(steps),
        "loss": {"reliability": falling, "generality": falling, "portability": [10.0 + step for step in range(steps + 1)]},
        "overfitted": [step / steps for step in range(steps + 1)],
        "half": half,
        "initial": 4.0,
        "ud": -0.5,
        "positions": [{"tokens": 10, "initial": 6.0, "ud": 1.0, "final": 0.1}, {"tokens": 5, "initial": None, "ud": -2.0, "final": 0.1}],
    } | more


def results(*rows: dict[str, Any], data: str = "data/zsre.json") -> dict[str, Any]:
    return {"rows": list(rows), "environment": {"model": "meta/llama-2-7b", "data": data}}


def row(method: str = "lora", objective: str = "ce", protocol: str = "single", average: float = 60.0, seed: int = 0, **more: Any) -> Any:
    return {"method": method, "objective": objective, "protocol": protocol, "seed": seed, "metrics": {"average": average}} | more


TWO = results(row(curves=curves(6, half=3)), row(objective="overtone", curves=curves(2)))


def test_figure1_has_the_papers_axes_and_edits_that_stopped_stay_there() -> None:
    figure = picture("figure1", TWO)
    assert [axes.get_title() for axes in figure.axes] == ["the edit itself", "generality (rephrased)", "portability (reasoning)"]
    assert {axes.get_xlabel() for axes in figure.axes} == {"training step"} and figure.axes[0].get_ylabel() == "loss of the answer"
    plain, smooth = (line for line in figure.axes[2].lines if len(line.get_xdata()) > 2)
    assert list(plain.get_ydata()) == [10, 11, 12, 13, 14, 15, 16]
    assert list(smooth.get_ydata()) == [10, 11, 12, 12, 12, 12, 12] and smooth.get_linestyle() == "--"
    assert figure.get_suptitle() == "llama-2-7b on zsre, 10 edits"
    assert [text.get_text() for text in figure.legends[0].texts] == ["lora+ce (6 steps an edit)", "lora+overtone (2 steps an edit)"]


def test_figure1_is_the_mean_of_the_seeds_and_leaves_out_what_the_data_does_not_ask() -> None:
    high = curves(2)
    high["loss"] = {"reliability": [12.0, 11.0, 10.0], "portability": [None, 1.0, 1.0]}
    low = curves(2)
    low["loss"] = {"reliability": [10.0, 9.0, 8.0], "portability": [3.0, 3.0, 3.0]}
    figure = picture("figure1", results(row(curves=high), row(curves=low, seed=1)))
    assert len(figure.axes) == 2 and list(figure.axes[0].lines[0].get_ydata()) == [11, 10, 9]
    assert list(figure.axes[1].lines[0].get_ydata()) == [3, 2, 2]


def test_figure2_shows_tokens_their_means_and_the_share() -> None:
    first, second, third = picture("figure2", TWO).axes
    assert (first.get_ylabel(), second.get_ylabel(), third.get_ylabel()) == ("initial loss", "UD (< 0: over-fitted)", "% of all tokens")
    assert first.patches[0].get_height() == 6.0
    assert [line.get_ydata()[0] for line in first.lines] == [4.0] and first.lines[0].get_linestyle() == "--"
    assert [bar.get_height() for bar in second.patches] == [1.0, -2.0, 1.0, -2.0]
    assert [label.get_text() for label in second.get_xticklabels()] == ["1 (10)", "2 (5)"]
    assert list(third.lines[0].get_ydata()) == pytest.approx([100 * step / 6 for step in range(7)])


def test_figure2_of_one_edit_names_its_tokens() -> None:
    figure = picture("figure2", results(row(curves=curves(3, edits=1, tokens=[" $5", "!"]))))
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [r" \$5", "!"]
    assert "one edit" in figure.get_suptitle()


def test_figure3_has_a_panel_for_each_data_set_and_a_bar_on_the_bar() -> None:
    pairs = [(method, objective) for method in ("ft-m", "lora") for objective in ("ce", "overtone")]
    runs = [
        results(*(row(*pair, protocol, average) for pair in pairs), data=f"{data}.json")
        for data in ("zsre", "wiki_recent")
        for protocol, average in (("single", 80.0), ("continual:10", 60.0), ("continual:100", 20.0))
    ]
    figure = picture("figure3", together(runs))
    assert [axes.get_title() for axes in figure.axes] == ["zsre", "wiki_recent"]
    axes = figure.axes[1]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10", "100"]
    assert axes.get_xlabel() == "edits in a row, T" and figure.axes[0].get_ylabel() == "Avg. (%)"
    assert sorted({bar.get_height() for bar in axes.patches}) == [20.0, 60.0, 80.0] and len(axes.patches) == 12
    assert {bar.get_facecolor()[3] for bar in axes.patches} == {1.0, 0.3}
    assert [text.get_text() for text in figure.legends[0].texts] == ["ft-m", "lora", "ce (solid)", "overtone (transparent)"]


@pytest.mark.parametrize(
    ("name", "message"), [("figure1", "has no curves"), ("figure2", "has no curves"), ("figure3", "no single or continual edits")]
)
def test_what_a_run_does_not_hold(name: str, message: str) -> None:
    with pytest.raises(DrawingError, match=message):
        picture(name, results(row(protocol="sequential:10", curves=None)))


@pytest.mark.parametrize("name", ["figure1", "figure2", "figure3"])
def test_they_are_written_without_a_screen(name: str, tmp_path: Path) -> None:
    draw(name, TWO, tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
