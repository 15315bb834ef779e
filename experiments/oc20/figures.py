"""The figure and the table of the experiment on OC20 trajectories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.common.figures import (
    BLUE,
    INK,
    ORANGE,
    PURPLE,
    RED,
    Style,
    caption,
    draw_curve,
    finish,
    new_figure,
    save,
)
from experiments.common.statistics import gains, last, over_seeds, select

STYLES = {
    "baseline": Style("without DeNS", INK, "s", "--"),
    "baseline_equal_time": Style("without DeNS, the time of DeNS", ORANGE, "v", (0, (5, 1, 1, 1))),
    "dens": Style("with DeNS", BLUE, "o"),
    "no_force_encoding": Style("with DeNS, forces hidden", RED, "X", "-."),
    "full_corruption": Style("with DeNS, all free atoms displaced", PURPLE, "D", ":"),
}
FORCES, ENERGY = last("forces_mae", 1000), last("energy_mae", 1000)


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw learning curves over steps and over time."""
    figure, axes = new_figure(1, 3, width=13, height=4.3)
    for name, style in STYLES.items():
        runs = select(results["runs"], variant=name)
        if runs:
            draw_curve(axes[0, 0], runs, style, "forces_mae", "step", 1000)
            draw_curve(axes[0, 1], runs, style, "forces_mae", "seconds", 1000)
            draw_curve(axes[0, 2], runs, style, "energy_mae", "step", 1000)
    finish(axes[0, 0], "force MAE, unseen systems", "step", "meV/Å")
    finish(axes[0, 1], "the same over time", "seconds of training", "meV/Å")
    finish(axes[0, 2], "energy MAE, unseen systems", "step", "meV")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(caption(results), fontsize=8, color=INK)
    return [save(figure, folder / f"oc20_{results['scale']}.svg")]


def tell(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    runs = results["runs"]
    base = select(runs, variant="baseline")
    lines = [
        "| | steps | force MAE, meV/Å | energy MAE, meV | seconds | lower force error, % |",
        "|---|---|---|---|---|---|",
    ]
    for name, style in STYLES.items():
        these = select(runs, variant=name)
        if these:
            gain = "" if name == "baseline" else gains(these, base, FORCES).text()
            spreads = (
                str(these[0]["history"][-1]["step"]),
                over_seeds(these, FORCES).text(),
                over_seeds(these, ENERGY).text(0),
                over_seeds(these, last("seconds")).text(0),
                gain,
            )
            lines.append(f"| {style.title} | " + " | ".join(spreads) + " |")
    return "\n".join(lines)
