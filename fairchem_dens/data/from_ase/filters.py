"""What is left out, and why: each frame under the first reason that applies."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from ase import Atoms
from ase.neighborlist import neighbor_list

from fairchem_dens.data.from_ase.settings import ReadSettings, Settings


class Reason(IntEnum):
    """Why a frame is left out; the first that applies counts."""

    KEPT = 0
    NO_ATOMS = 1
    NO_ENERGY = 2
    NO_FORCES = 3
    NOT_FINITE = 4
    MAX_ATOMS = 5
    MAX_FORCE = 6
    MIN_DISTANCE = 7
    # These depend on the other frames of a system.
    MAX_ENERGY_ABOVE = 8
    SKIP_FIRST = 9
    EVERY = 10
    MAX_FRAMES = 11


def describe(reason: Reason, settings: Settings) -> str:
    """Say a reason with its bound."""
    return {
        Reason.KEPT: "kept",
        Reason.NO_ATOMS: "no atoms",
        Reason.NO_ENERGY: "no energy",
        Reason.NO_FORCES: "no forces",
        Reason.NOT_FINITE: "positions, cell, energy or forces not finite",
        Reason.MAX_ATOMS: f"more than {settings.max_atoms} atoms",
        Reason.MAX_FORCE: f"a force above {settings.max_force} eV/Å",
        Reason.MIN_DISTANCE: f"atoms closer than {settings.min_distance} Å",
        Reason.MAX_ENERGY_ABOVE: (
            f"energy more than {settings.max_energy_above} eV above the {settings.relative_to} frame"
        ),
        Reason.SKIP_FIRST: f"among the first {settings.skip_first} of the system",
        Reason.EVERY: f"not one in {settings.every}",
        Reason.MAX_FRAMES: f"more than {settings.max_frames} of a system",
    }[reason]


def reason_of_frame(
    atoms: Atoms, energy: float | None, forces: np.ndarray | None, settings: ReadSettings
) -> Reason:
    """Decide on a frame by itself."""
    if len(atoms) == 0:
        return Reason.NO_ATOMS
    if energy is None:
        return Reason.NO_ENERGY
    if forces is None:
        return Reason.NO_FORCES
    if not all(np.isfinite(values).all() for values in (energy, forces, atoms.positions, atoms.cell.array)):
        return Reason.NOT_FINITE
    if settings.max_atoms is not None and len(atoms) > settings.max_atoms:
        return Reason.MAX_ATOMS
    if settings.max_force is not None and np.linalg.norm(forces, axis=1).max() > settings.max_force:
        return Reason.MAX_FORCE
    if settings.min_distance is not None and len(neighbor_list("i", atoms, settings.min_distance)) > 0:
        return Reason.MIN_DISTANCE
    return Reason.KEPT


def reasons_in_system(reasons: np.ndarray, above: np.ndarray, settings: Settings) -> np.ndarray:
    """Decide on the frames of one system, in their order.

    Args:
        reasons: (n,) what `reason_of_frame` decided.
        above: (n,) eV above the reference frame, not a number where the energy is unknown.
        settings: the filters.

    Returns:
        (n,) the reasons, with those of this function where a frame had been kept.
    """
    reasons = reasons.copy()
    place = np.arange(len(reasons)) - settings.skip_first

    def drop(which: np.ndarray, reason: Reason) -> None:
        reasons[which & (reasons == Reason.KEPT)] = reason

    if settings.max_energy_above is not None:
        drop(above > settings.max_energy_above, Reason.MAX_ENERGY_ABOVE)
    drop(place < 0, Reason.SKIP_FIRST)
    drop(place % settings.every != 0, Reason.EVERY)
    kept = np.flatnonzero(reasons == Reason.KEPT)
    if settings.max_frames is not None and len(kept) > settings.max_frames:
        chosen = kept[np.linspace(0, len(kept) - 1, settings.max_frames).round().astype(int)]
        rest = np.ones(len(reasons), dtype=bool)
        rest[chosen] = False
        drop(rest, Reason.MAX_FRAMES)
    return reasons
