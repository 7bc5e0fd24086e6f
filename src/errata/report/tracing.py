"""The picture of a causal trace."""

from __future__ import annotations

from pathlib import Path

from errata.metrics.tracing import PLACES, Trace


def draw(trace: Trace, to: str | Path, title: str) -> None:
    """Layers × places, coloured by how much of the answer one restored state brings back; written as PNG or SVG by the name's ending."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    effect = (trace.restored - trace.corrupted).T.numpy()  # [places, layers]
    full = max(trace.clean - trace.corrupted, 1e-9)
    image = axes.imshow(effect, cmap="Purples", vmin=0, vmax=full, aspect="auto")
    axes.set_yticks(range(len(PLACES)), PLACES)
    axes.set_xticks(range(effect.shape[1]))
    axes.set_xlabel("layer whose output is restored")
    for place, row in enumerate(effect):
        for layer, value in enumerate(row):
            axes.text(layer, place, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 * full else "black")
    axes.set_title(f"{title}\np(answer): {trace.clean:.2f} clean, {trace.corrupted:.2f} with noise on the subject", fontsize=10)
    figure.colorbar(image, label="p(answer) brought back")
    figure.savefig(to, dpi=150)
