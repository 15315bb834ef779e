"""fairchem's metrics as sums over masks, which nothing waits for.

fairchem's own functions take whole tensors and return numbers on the host, so that each subset (structures
that were not corrupted, free atoms) has to be cut out first. The values here are theirs to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairchem_dens import keys
from fairchem_dens.objective import Mean

ENERGY_THRESHOLD = 0.02
"""eV; a structure is well predicted if its energy is closer than that, OC20 paper, section 4."""
FORCE_THRESHOLD = 0.03
"""eV/Å, for the largest error of a component of a force."""

PER_ROW: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mae": lambda prediction, target: (target - prediction).abs(),
    "mse": lambda prediction, target: (target - prediction).square(),
    "rmse": lambda prediction, target: (target - prediction).square().sum(dim=-1).sqrt(),
    "cosine_similarity": lambda prediction, target: torch.cosine_similarity(
        prediction.float(), target.float()
    ),
    "magnitude_error": lambda prediction, target: (prediction.norm(dim=-1) - target.norm(dim=-1)).abs(),
}
"""Metrics that are a mean over rows, or over rows and components; both arguments are (rows, D)."""

PER_ATOM: dict[str, str] = {"per_atom_mae": "mae", "per_atom_mse": "mse"}
"""Metrics of structures after division by the number of free atoms, and the metric that is then taken."""

COMPONENTS: dict[str, tuple[int, str]] = {
    f"forces{axis}_{name}": (index, name) for index, axis in enumerate("xyz") for name in ("mae", "mse")
}
"""Metrics of one component of the force."""

WITHIN = ("energy_within_threshold", "energy_forces_within_threshold")
"""Shares of structures that are predicted well."""


def metric_name(target: str, function: str) -> str:
    """Return what fairchem calls a metric."""
    return f"{target}_{function}" if target not in function and target != "misc" else function


@dataclass(frozen=True)
class Evaluated:
    """What is evaluated of a batch.

    Attributes:
        predictions: by target, (B, D) or (N, D), in physical units.
        targets: likewise.
        masks: by target, which of its rows count: (B,) or (N,) bool.
        structures: (B,) bool, the structures that count.
        natoms: (B,), free atoms of each structure.
        batch: (N,), the structure of each atom.
    """

    predictions: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    structures: Tensor
    natoms: Tensor
    batch: Tensor


def is_known(target: str, function: str, targets: Mapping[str, Any]) -> bool:
    """Whether `measure` has this metric of fairchem's, for a run with these targets."""
    if function in COMPONENTS:
        return keys.FORCES in targets
    if function in WITHIN:
        return keys.ENERGY in targets and (function == WITHIN[0] or keys.FORCES in targets)
    return target in targets and (function in PER_ROW or function in PER_ATOM)


def measure(target: str, function: str, of: Evaluated) -> Mean:
    """Return a metric as a total and a number of elements, which may be 0.

    Args:
        target: the target it is of.
        function: fairchem's name of it, one that `is_known`.
        of: what is evaluated.
    """
    if function in WITHIN:
        within = (_largest(of, keys.ENERGY) < ENERGY_THRESHOLD) & of.structures
        if function == WITHIN[1]:
            within &= _largest_on_atoms(of) < FORCE_THRESHOLD
        return Mean(within.sum(), of.structures.sum())
    prediction, wanted = of.predictions, of.targets
    if function in COMPONENTS:
        index, name = COMPONENTS[function]
        errors = PER_ROW[name](prediction[keys.FORCES][:, index], wanted[keys.FORCES][:, index])
        return _mean(errors, of.masks[keys.FORCES])
    if function in PER_ATOM:
        natoms = of.natoms.clamp(min=1)[:, None]
        errors = PER_ROW[PER_ATOM[function]](prediction[target] / natoms, wanted[target] / natoms)
        # Divided by no free atom, one structure would make the mean infinite.
        return _mean(errors, of.masks[target] & (of.natoms > 0))
    return _mean(PER_ROW[function](prediction[target], wanted[target]), of.masks[target])


def _mean(errors: Tensor, mask: Tensor) -> Mean:
    width = errors.shape[1] if errors.dim() > 1 else 1
    counted = torch.where(mask[:, None] if errors.dim() > 1 else mask, errors, torch.zeros_like(errors))
    return Mean(counted.sum(dtype=torch.float64), width * mask.sum())


def _largest(of: Evaluated, target: str) -> Tensor:
    return (of.targets[target] - of.predictions[target]).abs().amax(dim=1)


def _largest_on_atoms(of: Evaluated) -> Tensor:
    """The largest error of a component of the forces that count, for each structure."""
    errors = _largest(of, keys.FORCES)
    counted = torch.where(of.masks[keys.FORCES], errors, torch.zeros_like(errors))
    return torch.zeros_like(of.structures, dtype=errors.dtype).scatter_reduce(0, of.batch, counted, "amax")
