"""Every field of a structure or batch that this package reads or writes, named once.

``N`` is the number of atoms and ``B`` the number of structures. On a single structure ``B`` is 1. No field
changes
the meaning of another: labels (``energy``, ``forces``) always belong to the original, uncorrupted structure.
"""

from __future__ import annotations

from typing import Final

# What a data set brings.
POS: Final = "pos"
"""(N, 3) float, Å. Corrupted positions where ``noise_mask`` is True."""
CELL: Final = "cell"
"""(B, 3, 3) float, Å, rows are lattice vectors."""
PBC: Final = "pbc"
"""(B, 3) bool."""
ATOMIC_NUMBERS: Final = "atomic_numbers"
"""(N,), any integer or float type."""
NATOMS: Final = "natoms"
"""(B,) int64, atoms of each structure."""
BATCH: Final = "batch"
"""(N,) int64, the structure that an atom belongs to."""
FIXED: Final = "fixed"
"""(N,), 1 where the atom is held fixed and 0 where it is free."""
TAGS: Final = "tags"
"""(N,) int, OC20's 0 (bulk), 1 (surface), 2 (adsorbate)."""
ENERGY: Final = "energy"
"""(B,) float, eV (MD17: kcal/mol)."""
FORCES: Final = "forces"
"""(N, 3) float, eV/Å (MD17: kcal/mol/Å)."""
MD: Final = "md"
"""(B,) bool or int: the frame is from molecular dynamics and is never corrupted."""
SID: Final = "sid"
"""System id."""
FID: Final = "fid"
"""Frame id within the system."""

ENERGY_ALIASES: Final = (ENERGY, "y")
FORCES_ALIASES: Final = (FORCES, "force")
"""Old OC20 LMDBs use the second name; transforms run before fairchem's ``key_mapping`` renames it."""

# What the corruption writes: all five on every structure of an armed train split, none elsewhere.
NOISE_VEC: Final = "noise_vec"
"""(N, 3) float, Å. The displacement that was added; zero where the atom was not corrupted."""
NOISE_MASK: Final = "noise_mask"
"""(N,) bool. True where the atom was corrupted."""
CONDITION_FORCES: Final = "condition_forces"
"""(N, 3) float, units of ``forces``. What the model may see of them; zero where ``noise_mask`` is False."""
SIGMAS: Final = "sigmas"
"""(N, 1) float, Å. The structure's σ on all its atoms if it is corrupted, else 0."""
CORRUPTED: Final = "corrupted"
"""(B,) bool. True where at least one atom of the structure was corrupted."""

DENS_FIELDS: Final = (NOISE_VEC, NOISE_MASK, CONDITION_FORCES, SIGMAS, CORRUPTED)

LARGEST: Final = "largest"
"""int, atoms of the largest structure of a batch, where the host knows it: else models ask the device."""

# What a model returns, besides ``energy`` (B,) and ``forces`` (N, 3).
NOISE: Final = "noise"
"""(N, 3) float, in units of σ: the predicted displacement of the corrupted atoms."""
