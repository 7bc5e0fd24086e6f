"""What people look at: tables, plots, pages.

The names of what can be drawn stand here, so that a plan can be checked without importing what draws.
"""

from __future__ import annotations

from collections.abc import Mapping

PICTURES: Mapping[str, str] = {
    "efficacy-and-noise": "efficacy on top, and the superimposed noise of the last edited layer, over the number of edits",
    "k-beta": "the mean kᵀβ of different edits over the number of edits",
    "noise-by-layer": "the superimposed noise over the number of edits, a panel for each edited layer",
    "figure1": "loss of the edits', the rephrased and the portability answers over the steps of an edit (OVERTONE; curves: true)",
    "figure2": "initial loss and underfitting degree by token, share of over-fitted tokens over the steps (OVERTONE; curves: true)",
    "figure3": "Avg. over the number T of edits in a row, each method with cross-entropy and with OVERTONE (OVERTONE; several runs)",
    "eta": "efficacy, generalization, specificity on top over DeltaEdit's η, of the rows labelled deltaedit@eta=…",
}
TABLES: Mapping[str, str] = {
    "table1": "efficacy, generalization, specificity at the end, on top and larger",
    "noise-table": "the superimposed noise of the last edited layer at each checkpoint",
    "k-beta-table": "the mean kᵀβ of different edits at each checkpoint",
    "overtone-table": "Rel. … Loc., Avg., exact generation: each method, with OVERTONE, the difference (OVERTONE; one run or several)",
    "case-study": "what is written behind the transcripts' prompts, by the unedited model and after each method's last edit",
}
DRAWINGS: Mapping[str, str] = {**PICTURES, **TABLES}
"""Name -> what it shows. A picture becomes NAME.png, a table NAME.md."""
CURVES = ("figure1", "figure2")
"""What is drawn from the curves of single edits."""
TOGETHER = ("figure3", "overtone-table")
"""What is drawn of several runs together."""
OF_CASES = frozenset({*CURVES, "figure3", "overtone-table"})
"""What is drawn of single and continual edits; all else is drawn of a sequence."""


class DrawingError(ValueError):
    """A run does not hold what a drawing shows."""
