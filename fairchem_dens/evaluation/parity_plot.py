"""Predicted against true energies and forces, as one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fairchem_dens.evaluation import metrics
from fairchem_dens.evaluation.scorecard import Scorecard

_INK = "#22262b"
_DOTS = "#c8102e"
_DPI = 130
_MOST_DOTS = 3000


def draw(file: str | Path, card: Scorecard) -> None:
    """Draw a column for each split: energies above and, where they are scored, forces below.

    Many points are drawn as the number of points in hexagons, on a logarithmic scale.

    Args:
        file: PNG to write.
        card: what was scored.
    """
    with_forces = any(score.forces is not None for score in card.scores)
    rows, columns = 1 + with_forces, len(card.scores)
    figure = Figure(figsize=(0.6 + 3.4 * columns, 0.4 + 3.4 * rows), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False)
    for column, score in enumerate(card.scores):
        error = 1000.0 * score.metrics[metrics.ENERGY_MAE]
        title = f"{score.split.name}: energy, MAE {error:.1f} meV"
        _panel(panels[0, column], score.energies, title, "eV")
        if score.forces is not None:
            error = 1000.0 * score.metrics[metrics.FORCES_MAE]
            title = f"{score.split.name}: force components, MAE {error:.2f} meV/Å"
            _panel(panels[1, column], score.forces, title, "eV/Å")
    figure.savefig(file)


def _panel(axis: Axes, pairs: np.ndarray, title: str, unit: str) -> None:
    low, high = float(pairs.min()), float(pairs.max())
    margin = 0.04 * (high - low) or 0.5
    limits = (low - margin, high + margin)
    if len(pairs) > _MOST_DOTS:
        axis.hexbin(
            pairs[:, 0],
            pairs[:, 1],
            gridsize=60,
            extent=(*limits, *limits),
            bins="log",
            mincnt=1,
            cmap="magma_r",
        )
    else:
        axis.plot(
            pairs[:, 0],
            pairs[:, 1],
            linestyle="none",
            marker="o",
            markersize=3,
            alpha=0.5,
            color=_DOTS,
            mew=0,
        )
    axis.axline((0.0, 0.0), slope=1.0, color=_INK, linewidth=0.8, linestyle=":")
    axis.set(xlim=limits, ylim=limits, aspect="equal")
    axis.set_title(title, fontsize=8.5, color=_INK, loc="left")
    axis.set_xlabel(f"label, {unit}", fontsize=8.5, color=_INK)
    axis.set_ylabel(f"prediction, {unit}", fontsize=8.5, color=_INK)
    axis.tick_params(labelsize=8, colors=_INK)
    axis.spines[["top", "right"]].set_visible(False)
