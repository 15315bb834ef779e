"""The figures and the table of the experiment on generated data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.common.figures import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    RED,
    Style,
    caption,
    draw_points,
    finish,
    new_figure,
    save,
)
from experiments.common.statistics import gains, last, over_seeds, select

STYLES = {
    "baseline": Style("without DeNS", INK, "s", "--"),
    "dens": Style("with DeNS", BLUE, "o"),
}
SWEEP = {
    "dens": "DeNS: p 0.5, σ 0.1 Å,\nratio 0.5, λ 10",
    "prob_0.25": "p 0.25",
    "prob_0.75": "p 0.75",
    "std_0.03": "σ 0.03 Å",
    "std_0.3": "σ 0.3 Å",
    "ratio_0.25": "ratio 0.25",
    "ratio_1": "all free atoms",
    "coefficient_3": "λ 3",
    "coefficient_30": "λ 30",
    "switch_batch": "a coin for a batch",
    "fairchem_loss": "… and the loss of\nfairchem 1.10.0",
}
MARKS = "large marks are means, small ones a seed each"
FORCES = last("forces_mae", 1000)
ENERGY = last("energy_mae", 1000)


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw errors against the number of frames, and the sweep."""
    runs, plan = results["runs"], results["plan"]
    sizes = [size for size in plan["sizes"] if select(runs, frames=size, variant="dens")]
    figure, axes = new_figure(1, 3, width=12.5, height=4.2)
    for axis, metric, title, unit in (
        (axes[0, 0], "forces_mae", "force MAE on unseen systems", "meV/Å"),
        (axes[0, 1], "energy_mae", "energy MAE on unseen systems", "meV"),
    ):
        for name, style in STYLES.items():
            means = []
            for size in sizes:
                values = [last(metric, 1000)(run) for run in select(runs, frames=size, variant=name)]
                draw_points(axis, size, values, style, label=size == sizes[0])
                means.append(sum(values) / len(values))
            axis.plot(sizes, means, color=style.color, ls=style.dash, lw=1.5)
        _by_size(axis, sizes)
        finish(axis, title, "frames for training", unit)
    for name, style in STYLES.items():
        means = [
            1000 * over_seeds(select(runs, frames=size, variant=name), _train_error).mean for size in sizes
        ]
        axes[0, 2].plot(sizes, means, color=style.color, ls=style.dash, marker=style.marker, lw=1.5)
    _by_size(axes[0, 2], sizes)
    finish(axes[0, 2], "force MAE on the training frames, undisturbed", "frames for training", "meV/Å")
    axes[0, 0].legend(frameon=False, fontsize=9)
    figure.suptitle(caption(results, MARKS), fontsize=8, color=INK, y=-0.02, va="top")
    written = [save(figure, folder / f"generated_sizes_{results['scale']}.svg")]

    size = plan["sweep_size"]
    baseline = select(runs, frames=size, variant="baseline")
    present = [name for name in SWEEP if select(runs, frames=size, variant=name)]
    figure, axes = new_figure(1, 2, width=11.5, height=0.42 * len(present) + 1.4)
    for axis, value, title in ((axes[0, 0], FORCES, "force error"), (axes[0, 1], ENERGY, "energy error")):
        base = {run["seed"]: value(run) for run in baseline}
        for row, name in enumerate(reversed(present)):
            found = [
                100 * (value(run) / base[run["seed"]] - 1)
                for run in select(runs, frames=size, variant=name)
                if run["seed"] in base
            ]
            color, marker = {"fairchem_loss": (RED, "X"), "dens": (BLUE, "o")}.get(name, (GREEN, "D"))
            if name == "switch_batch":
                color, marker = ORANGE, "^"
            axis.plot(found, [row] * len(found), ls="", marker=marker, ms=4, alpha=0.5, color=color)
            axis.plot([sum(found) / len(found)], [row], ls="", marker=marker, ms=9, color=color)
        axis.axvline(0, color=INK, lw=1.2, ls="--")
        axis.set_yticks(range(len(present)), [SWEEP[name] for name in reversed(present)])
        finish(
            axis, f"{title} against the run without DeNS, {size} frames", "% (left of the line: lower)", ""
        )
    axes[0, 1].tick_params(labelleft=False)
    figure.suptitle(caption(results, MARKS), fontsize=8, color=INK, y=-0.02, va="top")
    return [*written, save(figure, folder / f"generated_sweep_{results['scale']}.svg")]


def _by_size(axis: Any, sizes: list[int]) -> None:
    axis.set_xscale("log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()


def _train_error(run: dict[str, Any]) -> float:
    return float(run["after"]["train_forces_mae"])


def tell(results: dict[str, Any]) -> str:
    """Return the results as a Markdown table."""
    runs = results["runs"]
    lines = [
        "| frames | | force MAE, meV/Å | energy MAE, meV | force MAE, training set | lower force error, % |",
        "|---|---|---|---|---|---|",
    ]
    names = ["baseline", *SWEEP]
    for size in results["plan"]["sizes"]:
        base = select(runs, frames=size, variant="baseline")
        for name in names:
            these = select(runs, frames=size, variant=name)
            if not these:
                continue
            title = "without DeNS" if name == "baseline" else SWEEP[name].replace("\n", " ")
            gain = "" if name == "baseline" else gains(these, base, FORCES).text()
            spreads = (
                over_seeds(these, FORCES).text(),
                over_seeds(these, ENERGY).text(0),
                over_seeds(these, lambda run: 1000 * _train_error(run)).text(),
                gain,
            )
            lines.append(f"| {size} | {title} | " + " | ".join(spreads) + " |")
    return "\n".join(lines)
