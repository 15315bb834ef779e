"""The picture that explains DeNS: what is done to a structure, what the model sees, and what it is asked.

The structure is one of the generated set, its noise what `fairchem_dens.corruption` draws.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.data.colors import jmol_colors
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyArrowPatch

from experiments.common.figures import BLUE, GREEN, INK, RED, new_figure, save
from fairchem_dens import keys
from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.data.emt import EmtSettings, simulate_system
from fairchem_dens.data.lmdb import data_from_atoms

_SYSTEM = 24
_STD = 0.25  # Å; larger than in training, so that one sees it
_PALE = "#b9bec5"


def draw_idea(file: Path) -> Path:
    """Draw it and return its path."""
    settings = EmtSettings(train_systems=_SYSTEM + 1, val_systems=1, test_systems=1, frames_per_system=4)
    frames = simulate_system(_SYSTEM, settings)
    atoms, forces = frames.atoms[0], frames.forces[0]
    data = data_from_atoms(atoms, sid=0, fid=0, energy=frames.energies[0], forces=forces)
    noisy = corrupt(data, Corruption(prob=1.0, std=_STD, corrupt_ratio=0.5), seed=3, epoch=0, selected=True)
    noise, mask = noisy[keys.NOISE_VEC].numpy(), noisy[keys.NOISE_MASK].numpy()
    free = data[keys.FIXED].numpy() == 0
    arrow = 0.9 / np.linalg.norm(forces[free], axis=1).max()

    figure, axes = new_figure(2, 2, width=9, height=8.2)
    one, two, three, four = axes.flat
    _atoms(one, atoms, np.zeros_like(noise), free, np.zeros(len(atoms), dtype=bool))
    _arrows(one, atoms.positions, np.where(free[:, None], arrow * forces, 0), GREEN)
    _words(
        one,
        "1  A structure out of equilibrium",
        "Energy E and forces F (green) are known.",
    )
    _atoms(two, atoms, noise, free, mask)
    _arrows(two, atoms.positions + noise, np.where(mask[:, None], arrow * forces, 0), GREEN)
    _words(
        two,
        "2  Corrupted",
        "Some atoms (red rims) are displaced at random.\nThe model sees this, and the forces that they had.",
    )
    _atoms(three, atoms, noise, free, mask)
    _arrows(three, atoms.positions + noise, -2.5 * noise, RED)
    others = free & ~mask
    _arrows(three, atoms.positions, np.where(others[:, None], arrow * forces, 0), BLUE)
    _words(
        three,
        "3  What it is asked",
        "The displacements (red, × 2.5, drawn backwards),\nthe forces of the others (blue), the energy of 1.",
    )
    _why_forces(four)
    return save(figure, file)


def _side(points: np.ndarray) -> np.ndarray:
    return points[:, [0, 2]]


def _atoms(axis: Axes, atoms: Atoms, shift: np.ndarray, free: np.ndarray, mask: np.ndarray) -> None:
    for index in np.argsort(atoms.positions[:, 1])[::-1]:  # from the back to the front
        number = atoms.numbers[index]
        white = 0.25 if free[index] else 0.75
        axis.add_patch(
            Circle(
                _side(atoms.positions + shift)[index],
                radius=0.62 * covalent_radii[number],
                facecolor=(1 - white) * jmol_colors[number] + white,
                edgecolor=RED if mask[index] else INK if free[index] else _PALE,
                linewidth=2.6 if mask[index] else 1.0,
                zorder=2,
            )
        )
        if mask[index]:  # where it was
            axis.add_patch(
                Circle(
                    _side(atoms.positions)[index], radius=0.62 * covalent_radii[number], fill=False,
                    edgecolor=INK, linewidth=0.9, linestyle=(0, (3, 2)), zorder=3,
                )
            )  # fmt: skip
    low, high = _side(atoms.positions).min(axis=0) - 1.2, _side(atoms.positions).max(axis=0) + 1.2
    axis.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal", xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _arrows(axis: Axes, starts: np.ndarray, arrows: np.ndarray, color: str) -> None:
    for start, arrow in zip(_side(starts), _side(arrows), strict=True):
        if np.linalg.norm(arrow) > 0.1:
            axis.add_patch(
                FancyArrowPatch(
                    start, start + arrow, arrowstyle="-|>", mutation_scale=11, lw=2, color=color,
                    shrinkA=0, shrinkB=0, zorder=4,
                )
            )  # fmt: skip


def _words(axis: Axes, title: str, text: str) -> None:
    axis.set_title(title, fontsize=12.5, weight="bold", color=INK, loc="left")
    axis.annotate(
        text, (0, 0), xycoords="axes fraction", xytext=(0, -6), textcoords="offset points", va="top",
        fontsize=9.5, color=INK, annotation_clip=False,
    )  # fmt: skip


def _why_forces(axis: Axes) -> None:
    """One bond: several structures may have become the corrupted one; the force says which."""
    place = np.linspace(0.75, 2.6, 300)
    energy = partial(_morse, depth=1.0, width=2.4, centre=1.3)
    corrupted, candidates = 1.52, (1.08, 1.95)
    axis.plot(place, energy(place), color=INK, lw=1.6)
    axis.axvline(corrupted, color=RED, lw=1.6, ls=":")
    axis.text(corrupted + 0.03, 1.0, "corrupted: where was it\nbefore?", color=RED, fontsize=9.5)
    for candidate, known in zip(candidates, (True, False), strict=True):
        step = 1e-4
        force = -(energy(candidate + step) - energy(candidate - step)) / (2 * step)
        size = 0.42 * np.sign(force) * min(abs(force), 1.0)
        height = float(energy(candidate))
        axis.plot(candidate, height, "o" if known else "s", ms=11, color=GREEN if known else _PALE, mec=INK)
        axis.annotate(
            "", (candidate + size, height), (candidate, height),
            arrowprops={"arrowstyle": "-|>", "lw": 2, "color": GREEN if known else _PALE},
        )  # fmt: skip
        axis.annotate(
            "", (corrupted, height - 0.12), (candidate, height - 0.12),
            arrowprops={"arrowstyle": "->", "lw": 1.2, "ls": "--", "color": RED if known else _PALE},
        )  # fmt: skip
    axis.text(1.12, float(energy(1.08)) + 0.06, "pushed outwards:\nthis one", color=GREEN, fontsize=9.5)
    axis.text(
        2.03, float(energy(1.95)) - 0.12, "pulled inwards:\nnot this one", color="#6b7078", fontsize=9.5
    )
    axis.set(xlim=(0.85, 2.6), ylim=(-0.15, 1.15), xticks=[], yticks=[])
    axis.set_xlabel("length of a bond", fontsize=9.5, color=INK)
    axis.set_ylabel("energy", fontsize=9.5, color=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Why it sees the forces", fontsize=12.5, weight="bold", color=INK, loc="left")


def _morse(place: np.ndarray, *, depth: float, width: float, centre: float) -> np.ndarray:
    return depth * (1 - np.exp(-width * (place - centre))) ** 2
