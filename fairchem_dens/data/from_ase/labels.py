"""What a frame says: energy, forces, fixed atoms, tags."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms

BULK, SURFACE, ADSORBATE = 0, 1, 2
"""OC20's tags."""


def energy_of(atoms: Atoms, key: str = "energy") -> float | None:
    """Return the energy (eV) that came with a frame, None if none did.

    Only what the file says counts: nothing is computed.

    Raises:
        ValueError: it is not one number.
    """
    value = _stored(atoms, key)
    if value is None:
        return None
    energy = np.asarray(value, dtype=np.float64)
    if energy.size != 1:
        raise ValueError(f"'{key}' has the shape {energy.shape} and must be one number")
    return float(energy.reshape(()))


def forces_of(atoms: Atoms, key: str = "forces") -> np.ndarray | None:
    """Return the forces (N, 3) in eV/Å that came with a frame, None if none did.

    They are the raw ones: constraints, which would zero those on fixed atoms, are not applied.

    Raises:
        ValueError: they have another shape.
    """
    value = _stored(atoms, key)
    if value is None:
        return None
    forces = np.asarray(value, dtype=np.float64)
    if forces.shape != (len(atoms), 3):
        raise ValueError(f"'{key}' has the shape {forces.shape} and must have {(len(atoms), 3)}")
    return forces


def _stored(atoms: Atoms, key: str) -> Any:
    for place in (getattr(atoms.calc, "results", None) or {}, atoms.arrays, atoms.info):
        if place.get(key) is not None:
            return place[key]
    return None


def fixed_atoms(atoms: Atoms) -> np.ndarray:
    """Tell which atoms constraints hold in all three directions.

    ``FixAtoms`` does, and so do ``FixScaled`` and ``FixCartesian`` (selective dynamics of VASP) where they
    fix x, y and z; an atom that may move along one direction is free.

    Returns:
        (N,) bool.
    """
    fixed = np.zeros(len(atoms), dtype=bool)
    for constraint in atoms.constraints:
        # By name: a file may name a class that ASE has moved since.
        kind = type(constraint).__name__
        if kind == "FixAtoms" or (kind in ("FixScaled", "FixCartesian") and np.all(constraint.mask)):
            fixed[constraint.get_indices()] = True
    return fixed


def tags_of(
    atoms: Atoms, fixed: np.ndarray, source: str, adsorbate_elements: Iterable[str]
) -> tuple[np.ndarray, bool]:
    """Return the tags (N,) and whether they come from the rule.

    The rule: 0 for fixed atoms, 2 for free atoms of an adsorbate's elements, 1 for other free atoms.

    Args:
        atoms: the frame.
        fixed: (N,) bool.
        source: ``file``; ``rule``; ``auto``, the file where any of its tags is not 0, else the rule;
            ``none``, all 0.
        adsorbate_elements: symbols.
    """
    stored = atoms.get_tags()
    if source == "none":
        return np.zeros(len(atoms), dtype=np.int64), False
    if source == "file" or (source == "auto" and stored.any()):
        return stored.astype(np.int64), False
    adsorbate = np.isin(np.array(atoms.get_chemical_symbols()), list(adsorbate_elements))
    return np.where(fixed, BULK, np.where(adsorbate, ADSORBATE, SURFACE)), True


def bare(atoms: Atoms, fixed: np.ndarray, tags: np.ndarray) -> Atoms:
    """Return a copy with nothing but elements, positions, cell, periodicity, tags and fixed atoms."""
    return Atoms(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=atoms.cell,
        pbc=atoms.pbc,
        tags=tags,
        constraint=FixAtoms(mask=fixed) if fixed.any() else None,
    )
