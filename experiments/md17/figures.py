"""The figure and the table of the experiment on MD17."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.common.figures import BLUE, INK, Style, caption, draw_curve, finish, new_figure, save
from experiments.common.statistics import gains, last, over_seeds, select
from experiments.md17.runs import KCAL_PER_MOL

STYLES = {
    "baseline": Style("without DeNS", INK, "s", "--"),
    "dens": Style("with DeNS", BLUE, "o"),
}
PAPER = {
    ("aspirin", "baseline"): "7.2 / 5.3",
    ("aspirin", "dens"): "5.7 / 5.1",
    ("ethanol", "baseline"): "3.1 / 2.2",
    ("ethanol", "dens"): "2.6 / 2.2",
}
"""Of the whole model: 950 frames, 1500 epochs; force in meV/Å, energy in meV (arXiv 2403.09549)."""
FORCES, ENERGY = last("forces_mae", KCAL_PER_MOL), last("energy_mae", KCAL_PER_MOL)


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw learning curves over epochs and over time, a row for each molecule."""
    molecules = [name for name in results["plan"]["molecules"] if select(results["runs"], molecule=name)]
    figure, axes = new_figure(len(molecules), 3, width=12.5, height=3.4 * len(molecules) + 0.5)
    for row, molecule in enumerate(molecules):
        for name, style in STYLES.items():
            runs = select(results["runs"], molecule=molecule, variant=name)
            if runs:
                draw_curve(axes[row, 0], runs, style, "forces_mae", "epoch", KCAL_PER_MOL)
                draw_curve(axes[row, 1], runs, style, "forces_mae", "seconds", KCAL_PER_MOL)
                draw_curve(axes[row, 2], runs, style, "energy_mae", "epoch", KCAL_PER_MOL)
        finish(axes[row, 0], f"{molecule}: force MAE, test frames", "epoch", "meV/Å")
        finish(axes[row, 1], "the same over time", "seconds of training", "meV/Å")
        finish(axes[row, 2], f"{molecule}: energy MAE", "epoch", "meV")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(caption(results), fontsize=8, color=INK)
    return [save(figure, folder / f"md17_{results['scale']}.svg")]


def tell(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| molecule | | force MAE, meV/Å | energy MAE, meV | seconds | lower force error, % | paper, F / E |",
        "|---|---|---|---|---|---|---|",
    ]
    for molecule in results["plan"]["molecules"]:
        base = select(results["runs"], molecule=molecule, variant="baseline")
        for name, style in STYLES.items():
            these = select(results["runs"], molecule=molecule, variant=name)
            if these:
                gain = "" if name == "baseline" else gains(these, base, FORCES).text()
                lines.append(
                    f"| {molecule} | {style.title} | {over_seeds(these, FORCES).text()} "
                    f"| {over_seeds(these, ENERGY).text()} | {over_seeds(these, last('seconds')).text(0)} "
                    f"| {gain} | {PAPER[molecule, name]} |"
                )
    return "\n".join(lines)
