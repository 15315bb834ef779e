"""The figures and the table of the experiment on denoising."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.common.figures import BLUE, INK, ORANGE, RED, SKY, Style, caption, finish, new_figure, save
from experiments.common.statistics import Spread, select
from experiments.denoising.picture import draw_idea

STYLES = {
    "forces_half": Style("sees the forces; half of the atoms displaced", BLUE, "o"),
    "no_forces_half": Style("does not see them; half displaced", RED, "s", "--"),
    "forces_all": Style("sees the forces; all free atoms displaced", SKY, "D", "-."),
    "no_forces_all": Style("does not see them; all displaced", ORANGE, "^", ":"),
}


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw the error of the noise against σ and |F|, and what DeNS is."""
    figure, axes = new_figure(1, 2, width=11.5, height=4.4)
    plan = results["plan"]
    bins = plan["bins"]
    for name, style in STYLES.items():
        runs = select(results["runs"], variant=name)
        if not runs:
            continue
        for axis, key, places in (
            (axes[0, 0], "by_level", plan["levels"]),
            (axes[0, 1], "by_force", list(range(len(bins) - 1))),
        ):
            columns = list(zip(*(run["after"][key] for run in runs), strict=True))
            axis.plot(
                places,
                [fmean(column) for column in columns],
                color=style.color,
                marker=style.marker,
                ls=style.dash,
                lw=1.8,
                label=style.title,
            )
            axis.fill_between(
                places,
                [min(column) for column in columns],
                [max(column) for column in columns],
                color=style.color,
                alpha=0.15,
                lw=0,
            )
    # Where the lines of the panel are not.
    for axis, place, side in ((axes[0, 0], 0.98, "right"), (axes[0, 1], 0.02, "left")):
        axis.axhline(1, color=INK, lw=1, ls=(0, (1, 2)))
        axis.annotate(
            "guessing no noise",
            (place, 1),
            xycoords=("axes fraction", "data"),
            va="bottom",
            ha=side,
            fontsize=8.5,
        )
        axis.set_ylim(bottom=0)
    axes[0, 0].set_xscale("log")
    axes[0, 0].set_xticks(plan["levels"], [f"{level:g}" for level in plan["levels"]])
    axes[0, 0].minorticks_off()
    finish(axes[0, 0], "error of the predicted noise, as a share of the noise", "σ, Å", "")
    axes[0, 1].set_xticks(range(len(bins) - 1), [f"{low:g}–{high:g}" for low, high in pairwise(bins)])
    finish(axes[0, 1], f"the same at σ = {plan['level_of_bins']:g} Å, by the atom's force", "|F|, eV/Å", "")
    axes[0, 0].legend(frameon=False, fontsize=8.5)
    figure.suptitle(caption(results), fontsize=8, color=INK, y=-0.02, va="top")
    written = [save(figure, folder / f"denoising_{results['scale']}.svg")]
    return [*written, draw_idea(folder / "dens.svg")]


def tell(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    levels = results["plan"]["levels"]
    lines = [
        "| error of the noise / the noise, at σ = | " + " | ".join(f"{level:g} Å" for level in levels) + " |",
        "|---" * (len(levels) + 1) + "|",
    ]
    for name, style in STYLES.items():
        runs = select(results["runs"], variant=name)
        if runs:
            spreads = [
                Spread.of(run["after"]["by_level"][index] for run in runs) for index in range(len(levels))
            ]
            lines.append(f"| {style.title} | " + " | ".join(spread.text(2) for spread in spreads) + " |")
    return "\n".join(lines)
