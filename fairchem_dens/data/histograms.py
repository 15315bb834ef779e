"""Pictures of what a data set holds: sizes, energies, forces, elements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fairchem_dens.data.folder import file_aside
from fairchem_dens.data.inspection import Inspection
from fairchem_dens.data.references import symbol
from fairchem_dens.data.statistics import FORCE_BINS


def draw(file: str | Path, inspections: Sequence[Inspection]) -> None:
    """Draw one row of four histograms for each source.

    Args:
        file: the ``.png`` to write; one that is there is replaced.
        inspections: what to draw.
    """
    figure = Figure(figsize=(16, 3.6 * len(inspections)), layout="constrained")
    FigureCanvasAgg(figure)  # no display is needed
    rows = figure.subplots(len(inspections), 4, squeeze=False)
    for axes, inspection in zip(rows, inspections, strict=True):
        statistics, unit = inspection.statistics, inspection.source.labels.unit
        axes[0].set_ylabel(f"{inspection.source.name[-40:]}\nstructures")
        _bars(axes[0], np.array(statistics.natoms), "atoms per structure")
        _bars(axes[1], np.array(statistics.energies), f"energy, {unit}")
        axes[2].stairs(statistics.force_histogram, FORCE_BINS, fill=True)
        axes[2].set(xscale="log", xlabel=f"force norm on free atoms, {unit}/Å", ylabel="atoms")
        elements = statistics.elements
        axes[3].bar([symbol(number) for number in elements], statistics.element_atoms[elements])
        axes[3].set(yscale="log" if elements else "linear", ylabel="atoms")
        axes[3].tick_params(axis="x", labelrotation=90, labelsize=7 if len(elements) > 15 else 10)
    with file_aside(file) as aside:
        figure.savefig(aside, format="png", dpi=110)


def _bars(axes: Axes, values: np.ndarray, label: str) -> None:
    axes.set_xlabel(label)
    if len(values):
        axes.hist(values, bins=min(60, max(10, len(values) // 5)))
