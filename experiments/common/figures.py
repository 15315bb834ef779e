"""How figures look: the palette of Okabe and Ito, which colour-blind people tell apart, and a marker each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.common.statistics import curve
from fairchem_dens.data.folder import file_aside

INK = "#22262b"
FAINT = "#d9dce0"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"


@dataclass(frozen=True)
class Style:
    """How one variant is drawn everywhere: colour, marker and dash all differ, each alone would do.

    Attributes:
        title: in the legend.
        color, marker, dash: as matplotlib takes them.
    """

    title: str
    color: str
    marker: str
    dash: Any = "-"


def new_figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure and its axes, (rows, columns), whatever the display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_curve(
    axis: Axes, records: Sequence[dict[str, Any]], style: Style, metric: str, along: str, scale: float = 1.0
) -> None:
    """Draw the mean over seeds as a line and lowest to highest as a band."""
    places, means, low, high = curve(records, metric, along, scale)
    axis.plot(
        places, means, color=style.color, marker=style.marker, ms=5, ls=style.dash, lw=1.8, label=style.title
    )
    axis.fill_between(places, low, high, color=style.color, alpha=0.15, lw=0)


def draw_points(axis: Axes, x: float, values: Sequence[float], style: Style, *, label: bool = False) -> None:
    """Draw a value for each seed, small, and their mean, large."""
    axis.plot([x] * len(values), values, ls="", marker=style.marker, ms=4, color=style.color, alpha=0.45)
    axis.plot(
        [x],
        [sum(values) / len(values)],
        ls="",
        marker=style.marker,
        ms=9,
        color=style.color,
        label=style.title if label else None,
    )


def finish(axis: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Give an axis its words and a quiet grid."""
    axis.set_title(title, fontsize=10.5, color=INK, loc="left")
    axis.set_xlabel(xlabel, fontsize=9.5, color=INK)
    axis.set_ylabel(ylabel, fontsize=9.5, color=INK)
    axis.grid(color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Figure, file: Path) -> Path:
    """Write an SVG that is the same for the same results, and return its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    # Ids are random otherwise, and the text stays text.
    with mpl.rc_context({"svg.hashsalt": file.stem, "svg.fonttype": "path"}), file_aside(file) as aside:
        figure.savefig(aside, format="svg", facecolor="white", bbox_inches="tight", metadata={"Date": None})
    return file


def caption(results: dict[str, Any], shown: str = "mean, and lowest to highest") -> str:
    """Return what a figure is of, for its last line.

    Args:
        results: of an experiment.
        shown: how seeds are drawn.
    """
    return f"{len(results['seeds'])} seeds: {shown}. {results['command']}, {results['device']}"
