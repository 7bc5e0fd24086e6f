"""The picture of hidden states before and after, from clouds that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errata.report import DrawingError
from errata.report.drift import density, draw, picture
from errata.report.sequence import COLOURS


def record(moved: float, n: int = 40, seed: int = 0, **numbers: float | None) -> dict[str, Any]:
    before = np.random.default_rng(seed).normal(size=(n, 2))
    return {"points": {"before": before.tolist(), "after": (before + moved).tolist()}, **numbers}


def panels(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_xlabel() == "t-SNE 1"]


def test_a_panel_a_method_with_both_clouds_margins_and_ellipses(tmp_path: Path) -> None:
    figure = picture({"alphaedit": record(3, cosine=0.98, cka=None), "deltaedit": record(0), "rome": record(1)}, "atlas")
    assert len(panels(figure)) == 3 and figure.get_suptitle() == "atlas"
    main = panels(figure)[0]
    before, after = (np.asarray(points.get_offsets()) for points in main.collections[:2])
    assert len(before) == 40 and np.allclose(after - before, 3)
    assert tuple(main.collections[1].get_facecolor()[0][:3]) == pytest.approx(
        [int(COLOURS["alphaedit"][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    )
    first, second = main.lines
    assert first.get_linestyle() == second.get_linestyle() == "--"
    for line, points in ((first, before), (second, after)):  # each outline at the distance that holds 95 % of a normal distribution
        around = np.asarray(line.get_xydata()) - points.mean(0)
        distance = np.einsum("ni,ij,nj->n", around, np.linalg.inv(np.cov(points.T)), around)
        assert distance == pytest.approx(np.full(len(around), 5.991465), abs=1e-4)
    top, right = main.child_axes
    assert top.get_title() == "alphaedit\ncosine 0.98" and panels(figure)[1].child_axes[0].get_title() == "deltaedit"
    assert top.get_xlim() == main.get_xlim() and right.get_ylim() == main.get_ylim() and len(top.lines) == len(right.lines) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["before", "alphaedit", "deltaedit", "rome", "95 % ellipse"]
    assert len({panel.get_xlim() for panel in panels(figure)}) == 1  # the same cloud before: the same axes
    draw({"alphaedit": record(3)}, tmp_path / "drift.svg")
    assert (tmp_path / "drift.svg").stat().st_size > 1000


def test_panels_of_other_planes_have_their_own_axes_and_what_has_no_points_is_left_out() -> None:
    figure = picture({"a": record(0), "b": record(100, seed=1), "broken": {"points": None}})
    assert [panel.child_axes[0].get_title() for panel in panels(figure)] == ["a", "b"]
    assert len({panel.get_xlim() for panel in panels(figure)}) == 2
    assert len(panels(picture({name: record(0) for name in "abcd"}))) == 4
    with pytest.raises(DrawingError, match=r"errata.metrics.drift.measure"):
        picture({"broken": {"points": None}, "never": {}})


def test_clouds_without_width_are_drawn() -> None:
    flat = {"points": {"before": [[0.0, 0.0]] * 3, "after": [[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]]}}
    assert len(panels(picture({"a": flat, "b": {"points": {"before": [[1, 1]] * 2, "after": [[1, 1]] * 2}}}))) == 2


def test_density_is_one_in_all_and_has_its_kernels_width() -> None:
    values, places = np.random.default_rng(0).normal(size=200), np.linspace(-8, 8, 4001)
    heights = density(values, places)
    step = places[1] - places[0]
    assert heights.sum() * step == pytest.approx(1, abs=1e-6) and (heights * places).sum() * step == pytest.approx(values.mean(), abs=1e-4)
    spread = (heights * (places - values.mean()) ** 2).sum() * step
    assert spread == pytest.approx(values.var() + values.var(ddof=1) * 200 ** (-2 / 5), rel=1e-3)
