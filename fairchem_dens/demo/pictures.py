"""The demo's two pictures: learning curves of both runs, and one structure clean, corrupted and denoised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch

from fairchem_dens import keys
from fairchem_dens.data.folder import file_aside
from fairchem_dens.demo.plan import PRINT_EVERY, RUNS, TITLES
from fairchem_dens.demo.results import Curve, Denoised

COLORS = {"baseline": "#7a7f87", "dens": "#c8102e"}
_INK = "#22262b"
_PALE_INK = "#8b9098"
_FAINT = "#d9dce0"
_DPI = 160


def draw_curves(
    file: str | Path,
    curves: Mapping[str, Mapping[str, Curve]],
    *,
    steps_per_epoch: int,
    no_denoising: float,
    title: str,
) -> None:
    """Draw the learning curves of both runs.

    Args:
        file: PNG to write.
        curves: by run and tag, as `fairchem_dens.demo.results.read_curves` returns them.
        steps_per_epoch: curves of the training are averaged over epochs.
        no_denoising: Å, the mean absolute error of the noise when guessing zero.
        title: line above the panels.
    """
    figure = Figure(figsize=(13, 7.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    panels = (
        (axes[0, 0], "forces_mae", "force MAE, meV/Å", 1000.0, True),
        (axes[0, 2], "forces_cosine_similarity", "force cosine", 1.0, False),
        (axes[1, 0], "energy_mae", "energy MAE, meV", 1000.0, True),
        (axes[1, 1], "loss", "loss (that of training with DeNS includes the noise)", 1.0, True),
    )
    for axis, name, label, scale, logarithmic in panels:
        for run in RUNS:
            train = _by_epoch(curves[run].get(f"train/{name}", {}), steps_per_epoch)
            _plot(axis, train, run, scale, dashed=True)
            _plot(axis, curves[run].get(f"val/{name}", {}), run, scale)
        _finish(axis, label, logarithmic)

    lowest, last = [], []
    for run in RUNS:
        validation = curves[run].get("val/forces_mae", {})
        _plot(axes[0, 1], validation, run, 1000.0)
        lowest += [1000 * min(validation.values())] if validation else []
        last += [(1000 * validation[max(validation)], run)] if validation else []
    _finish(axes[0, 1], "the same, validation alone", False)
    if lowest:
        axes[0, 1].set_ylim(0.95 * min(lowest), 1.3 * max(lowest))
    for position, (value, run) in enumerate(sorted(last)):
        # The lower curve's number below it, the higher one's above.
        axes[0, 1].annotate(
            f"{value:.0f}",
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 5 if position else -5),
            textcoords="offset points",
            ha="right",
            va="bottom" if position else "top",
            fontsize=11,
            weight="bold",
            color=COLORS[run],
        )

    noise = _by_epoch(curves["dens"].get("train/denoising_pos_mae", {}), steps_per_epoch)
    _plot(axes[1, 2], noise, "dens", dashed=True)
    axes[1, 2].axhline(no_denoising, color=_INK, linewidth=1, linestyle=":")
    axes[1, 2].annotate(
        "guessing no noise",
        (1, no_denoising),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 4),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
        color=_INK,
    )
    _finish(axes[1, 2], "noise MAE of corrupted atoms, Å", False)
    axes[1, 2].set_ylim(0, 1.25 * no_denoising)

    figure.suptitle(title, fontsize=13, color=_INK)
    handles = [Line2D([], [], color=COLORS[run], linewidth=2, label=TITLES[run]) for run in RUNS]
    handles += [
        Line2D([], [], color=_INK, linewidth=1.6, label="validation (unseen systems)"),
        Line2D([], [], color=_INK, linewidth=1.2, linestyle="--", label="training"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=11)
    _save(figure, file)


def _by_epoch(curve: Curve, steps_per_epoch: int) -> Curve:
    """Average over epochs.

    fairchem's metrics are running means that start anew after each line of its log: their last values count.
    """
    epochs: dict[int, list[float]] = {}
    for step in [step for step in curve if step % PRINT_EVERY == 0 or step == max(curve)]:
        epochs.setdefault((step - 1) // steps_per_epoch, []).append(curve[step])
    return {(epoch + 1) * steps_per_epoch: float(np.mean(values)) for epoch, values in epochs.items()}


def _plot(axis: Axes, curve: Curve, run: str, scale: float = 1.0, *, dashed: bool = False) -> None:
    axis.plot(
        list(curve),
        [scale * value for value in curve.values()],
        color=COLORS[run],
        linewidth=1.2 if dashed else 2.0,
        linestyle="--" if dashed else "-",
        marker="o" if len(curve) == 1 else None,  # a line of one point would not be seen
        zorder=3 if run == "dens" else 2,
    )


def _finish(axis: Axes, label: str, logarithmic: bool) -> None:
    axis.set_title(label, fontsize=11, color=_INK, loc="left")
    axis.set_xlabel("step", fontsize=9, color=_INK)
    if logarithmic:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
        axis.tick_params(which="minor", labelsize=8)
    axis.grid(color=_FAINT, linewidth=0.6, which="both", axis="y")
    axis.tick_params(colors=_INK, labelsize=9, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(left=0)


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """A column of the picture: positions are those of the clean structure plus ``shift``."""

    name: str
    note: str
    arrows: np.ndarray
    shift: np.ndarray
    color: str


def draw_structure(file: str | Path, item: Denoised, *, std: float, title: str) -> None:
    """Draw one structure three times, from the side and from above: with its forces, corrupted, denoised.

    Displacements are far smaller than atoms, so their arrows are drawn longer than they are; the picture says
    by how much.

    Args:
        file: PNG to write.
        item: the structure.
        std: σ of the noise, Å.
        title: line above the panels.
    """
    clean = item.clean
    forces = clean[keys.FORCES].numpy()
    numbers = clean[keys.ATOMIC_NUMBERS].numpy()
    fixed = clean[keys.FIXED].numpy() != 0
    cell = clean[keys.CELL][0].numpy()
    noise = item.corrupted_pos - clean[keys.POS].numpy()
    left = item.denoised_pos - clean[keys.POS].numpy()
    positions = _adsorbate_in_one_piece(clean[keys.POS].numpy(), cell, clean[keys.TAGS].numpy() == 2)
    magnified = round(0.8 / std)
    longest = np.linalg.norm(forces[~fixed], axis=1).max()
    force_scale = 1.6 / max(longest, 1e-6)
    share = 100 * (1 - item.gain)
    before, after = item.rmsd(item.corrupted_pos), item.rmsd(item.denoised_pos)
    count = int(item.noise_mask.sum())
    panels = (
        _Panel(
            name="clean",
            note=f"arrows: forces, the longest {longest:.2f} eV/Å",
            arrows=force_scale * np.where(fixed[:, None], 0.0, forces),
            shift=np.zeros_like(positions),
            color="#1f6f43",
        ),
        _Panel(
            name="corrupted",
            note=f"RMSD {before:.3f} Å over {count} atoms · arrows: noise × {magnified}",
            arrows=magnified * noise,
            shift=noise,
            color=COLORS["dens"],
        ),
        _Panel(
            name="denoised by the model",
            note=f"RMSD {after:.3f} Å, {abs(share):.0f} % {'less' if share >= 0 else 'more'}"
            f" · arrows: what is left × {magnified}",
            arrows=magnified * left,
            shift=left,
            color="#1d4e9e",
        ),
    )

    figure = Figure(figsize=(14, 9.2), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, height_ratios=_heights(positions, cell))
    from_side, from_above = (0, 2), (0, 1)
    for column, panel in enumerate(panels):
        for row, view in enumerate((from_side, from_above)):
            axis = axes[row, column]
            # What is nearer is drawn later. From the side one looks along +y, from above along -z.
            order = np.argsort(-positions[:, 1] if view == from_side else positions[:, 2], kind="stable")
            marked = item.noise_mask if column > 0 else np.zeros_like(item.noise_mask)
            _draw_images(axis, positions, numbers, cell, order, view)
            _draw_atoms(axis, positions + panel.shift, numbers, fixed, marked, order, view, panel.color)
            _draw_arrows(axis, positions, panel.arrows, view, panel.color)
            _draw_cell(axis, cell, positions, view)
            _frame(axis, positions, cell, view)
        axes[0, column].set_title(panel.name, fontsize=14, color=_INK, weight="bold", pad=24)
        axes[0, column].annotate(
            panel.note,
            (0.5, 1.0),
            xycoords="axes fraction",
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
            color=panel.color,
        )
    axes[0, 0].set_ylabel("from the side", fontsize=11, color=_INK)
    axes[1, 0].set_ylabel("from above", fontsize=11, color=_INK)
    figure.suptitle(f"{title}\n", fontsize=13, color=_INK)
    _legend(figure, numbers)
    _save(figure, file)


def _adsorbate_in_one_piece(positions: np.ndarray, cell: np.ndarray, adsorbate: np.ndarray) -> np.ndarray:
    """Move the adsorbate by lattice vectors: its first atom to the middle, the others next to that."""
    if not adsorbate.any():
        return positions
    moved = positions.copy()
    target = 0.5 * (cell[0] + cell[1])
    for index in np.flatnonzero(adsorbate):
        fractions = np.linalg.solve(cell.T, moved[index] - target)
        moved[index] -= np.round(fractions[:2]) @ cell[:2]
        target = moved[np.flatnonzero(adsorbate)[0]]
    return moved


def _draw_images(
    axis: Axes,
    positions: np.ndarray,
    numbers: np.ndarray,
    cell: np.ndarray,
    order: np.ndarray,
    view: tuple[int, int],
) -> None:
    """Hint at the periodic images around the cell: along x from the side, all around from above."""
    repeats_y = (-1, 0, 1) if view == (0, 1) else (0,)
    for repeat_x in (-1, 0, 1):
        for repeat_y in repeats_y:
            if repeat_x == repeat_y == 0:
                continue
            image = positions + repeat_x * cell[0] + repeat_y * cell[1]
            for index in order:
                axis.add_patch(
                    Circle(
                        _point(image[index], view),
                        radius=_radius(numbers[index]),
                        facecolor="#f6f7f8",
                        edgecolor="#dfe2e6",
                        linewidth=0.8,
                        zorder=0.5,
                    )
                )


def _draw_atoms(
    axis: Axes,
    positions: np.ndarray,
    numbers: np.ndarray,
    fixed: np.ndarray,
    marked: np.ndarray,
    order: np.ndarray,
    view: tuple[int, int],
    color: str,
) -> None:
    for rank, index in enumerate(order):
        axis.add_patch(
            Circle(
                _point(positions[index], view),
                radius=_radius(numbers[index]),
                facecolor=_softened(jmol_colors[numbers[index]], 0.55 if fixed[index] else 0.15),
                edgecolor=color if marked[index] else _PALE_INK if fixed[index] else _INK,
                linewidth=2.2 if marked[index] else 0.9,
                linestyle=(0, (2, 2)) if fixed[index] else "-",
                zorder=2 + rank / len(numbers),
            )
        )


def _point(position: np.ndarray, view: tuple[int, int]) -> tuple[float, float]:
    return float(position[view[0]]), float(position[view[1]])


def _radius(number: int) -> float:
    """In Å; smaller than the atom, so that the arrows and the atoms behind are seen."""
    return float(0.72 * covalent_radii[number])


def _draw_arrows(
    axis: Axes, positions: np.ndarray, arrows: np.ndarray, view: tuple[int, int], color: str
) -> None:
    for start, arrow in zip(positions[:, list(view)], arrows[:, list(view)], strict=True):
        length = float(np.linalg.norm(arrow))
        if length < 0.06:
            continue
        head = min(5.0, 9 * length)
        axis.add_patch(
            FancyArrowPatch(
                start,
                start + arrow,
                arrowstyle=f"-|>,head_length={head:.1f},head_width={0.6 * head:.1f}",
                shrinkA=0,
                shrinkB=0,
                linewidth=2.0,
                color=color,
                zorder=5,
            )
        )


def _draw_cell(axis: Axes, cell: np.ndarray, positions: np.ndarray, view: tuple[int, int]) -> None:
    if view == (0, 1):
        corners = np.array([np.zeros(3), cell[0], cell[0] + cell[1], cell[1], np.zeros(3)])[:, :2]
        axis.add_collection(LineCollection([corners], colors="#b9bec5", linewidths=1.2, zorder=1.5))
    else:
        bottom = positions[:, 2].min() - 1.2
        axis.plot([0, cell[0, 0]], [bottom, bottom], color="#b9bec5", linewidth=1.2, zorder=1.5)


def _extent(positions: np.ndarray, cell: np.ndarray, view: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    points = [positions[:, list(view)]]
    if view == (0, 1):
        points.append(np.array([np.zeros(2), cell[0, :2], cell[1, :2], cell[0, :2] + cell[1, :2]]))
    both = np.concatenate(points)
    return both.min(axis=0) - 1.5, both.max(axis=0) + 1.5


def _heights(positions: np.ndarray, cell: np.ndarray) -> list[float]:
    heights = []
    for view in ((0, 2), (0, 1)):
        low, high = _extent(positions, cell, view)
        heights.append(float(high[1] - low[1]))
    return heights


def _frame(axis: Axes, positions: np.ndarray, cell: np.ndarray, view: tuple[int, int]) -> None:
    low, high = _extent(positions, cell, view)
    wide_low, wide_high = _extent(positions, cell, (0, 1))
    axis.set_xlim(min(low[0], wide_low[0]), max(high[0], wide_high[0]))
    axis.set_ylim(low[1], high[1])
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _legend(figure: Figure, numbers: np.ndarray) -> None:
    def dot(color: Any, edge: str, label: str) -> Line2D:
        return Line2D([], [], ls="none", marker="o", ms=11, mfc=color, mec=edge, label=label)

    handles = [
        dot(_softened(jmol_colors[number], 0.15), _INK, chemical_symbols[number])
        for number in sorted(set(numbers.tolist()))
    ]
    handles.append(dot("#f2f3f4", _PALE_INK, "pale: held fixed"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=11)


def _softened(color: np.ndarray, white: float) -> tuple[float, float, float]:
    red, green, blue = (1 - white) * np.asarray(color) + white
    return float(red), float(green), float(blue)


def _save(figure: Figure, file: str | Path) -> None:
    with file_aside(file) as aside:
        figure.savefig(aside, format="png", facecolor="white")
