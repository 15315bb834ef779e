"""The metrics of the OC20 leaderboards, by fairchem's own functions, over any number of structures.

Energies are in eV and forces in eV/Å, because two metrics have thresholds: a structure counts for EFwT if its
energy is off by less than 0.02 eV and no component of a force on a free atom by 0.03 eV/Å or more; for EwT
the first is enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fairchem.core.modules.evaluator import Evaluator

ENERGY_MAE = "energy_mae"
FORCES_MAE = "forces_mae"
FORCES_COSINE = "forces_cosine_similarity"
EFWT = "energy_forces_within_threshold"
EWT = "energy_within_threshold"

S2EF = (ENERGY_MAE, FORCES_MAE, FORCES_COSINE, EFWT)
"""eV; eV/Å, over the components of the forces on free atoms; mean over free atoms; share of structures."""
IS2RE = (ENERGY_MAE, EWT)
"""eV; share of structures."""

_S2EF = {"energy": ["mae"], "forces": ["mae", "cosine_similarity", EFWT]}
_IS2RE = {"energy": ["mae", EWT]}


class S2EFMetrics:
    """Mean errors of energies and forces over the structures given so far."""

    def __init__(self) -> None:
        self._evaluator = Evaluator("s2ef", _S2EF)
        self._sums: dict[str, Any] = {}

    def add(
        self,
        energies: np.ndarray,
        true_energies: np.ndarray,
        forces: np.ndarray,
        true_forces: np.ndarray,
        natoms: np.ndarray,
    ) -> None:
        """Add structures, of their atoms the free ones.

        Args:
            energies: (B,), eV.
            true_energies: (B,), eV.
            forces: (N, 3), eV/Å, one structure after the other.
            true_forces: (N, 3), eV/Å.
            natoms: (B,), free atoms of each structure, at least 1.
        """
        counts = torch.as_tensor(natoms, dtype=torch.long)
        self._sums = self._evaluator.eval(
            {"energy": _double(energies), "forces": _double(forces), "natoms": counts},
            {"energy": _double(true_energies), "forces": _double(true_forces), "natoms": counts},
            self._sums,
        )

    def means(self) -> dict[str, float]:
        """Return each metric of `S2EF`, once something was added."""
        return {name: float(self._sums[name]["metric"]) for name in S2EF}


def is2re(energies: np.ndarray, true_energies: np.ndarray) -> dict[str, float]:
    """Return the metrics of `IS2RE` for energies of relaxed structures.

    Args:
        energies: (B,), eV, with B from 1.
        true_energies: (B,), eV.
    """
    sums = Evaluator("is2re", _IS2RE).eval({"energy": _double(energies)}, {"energy": _double(true_energies)})
    return {name: float(sums[name]["metric"]) for name in IS2RE}


def _double(values: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))
