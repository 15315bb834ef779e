"""What a run says when it starts: what DeNS will do, and whether targets look as normalisers expect."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption
from fairchem_dens.objective import NoiseLoss

_ENERGY_FACTOR = 5.0
_FORCE_FACTOR = 50.0
"""How far scales may be apart before it is worth a warning.

OC20's own constants divide forces by the spread of energies, ten times theirs.
"""


def describe_run(
    corruption: Corruption | None, noise: NoiseLoss | None, *, batch_size: int, num_ranks: int
) -> list[str]:
    """Return the five lines of the start-up summary, one if DeNS is off."""
    batch = f"effective batch: {batch_size} structures × {num_ranks} ranks = {batch_size * num_ranks}"
    if corruption is None or noise is None:
        return [f"DeNS is off (no 'dens' under dataset.train.transforms); {batch}"]
    if corruption.std is not None:
        level = f"σ = {corruption.std:g} Å"
    else:
        low, high = corruption.std_low, corruption.std_high
        level = f"one σ for each structure, from {low:g} to {high:g} Å in {corruption.num_steps} steps"
    ratio = (
        "all" if corruption.corrupt_ratio is None else f"each with probability {corruption.corrupt_ratio:g}"
    )
    unit = "each structure" if corruption.switch == "structure" else "each batch, one coin for all ranks,"
    decay = ""
    if noise.decay is not None:
        decay = f", decaying linearly to {noise.decay_floor:g} of it"
    mean = (
        "one mean over forces and noise"
        if noise.reduction == "joint"
        else "separate means of forces and noise"
    )
    return [
        f"DeNS corrupts {unit} with probability p = {corruption.prob:g}",
        f"noise: {level}",
        f"corrupted atoms: {ratio}, {'fixed ones too' if corruption.all_atoms else 'free ones only'}",
        f"loss: coefficient {noise.coefficient:g}{decay}, {mean}",
        batch,
    ]


@dataclass(frozen=True)
class Target:
    """What was seen of one target: number of structures, mean, root mean square deviation."""

    count: int
    mean: float
    rmsd: float


def sample_targets(
    structures: Iterable[Any], element_references: Tensor | None = None, force_mean: float = 0.0
) -> dict[str, Target]:
    """Look at the energies and the forces on free atoms of some structures.

    Args:
        structures: single structures with ``energy``, ``forces`` and ``fixed``.
        element_references: (Z,), eV, subtracted from energies.
        force_mean: mean that forces are measured from.
    """
    energies, forces = [], []
    for data in structures:
        if keys.ENERGY in data and data[keys.ENERGY] is not None:
            energy = torch.as_tensor(data[keys.ENERGY], dtype=torch.float64).reshape(-1)[0]
            if element_references is not None:
                numbers = data[keys.ATOMIC_NUMBERS].long()
                energy = energy - element_references.double().cpu()[numbers].sum()
            energies.append(energy)
        if keys.FORCES in data:
            forces.append(data[keys.FORCES].double()[data[keys.FIXED] == 0].reshape(-1))
    seen = {}
    if energies:
        values = torch.stack(energies)
        seen[keys.ENERGY] = Target(len(values), values.mean().item(), values.std(unbiased=False).item())
    if forces and sum(map(len, forces)):
        values = torch.cat(forces)
        rmsd = (values - force_mean).square().mean().sqrt().item()
        seen[keys.FORCES] = Target(len(forces), values.mean().item(), rmsd)
    return seen


def target_warnings(name: str, seen: Target, mean: float, rmsd: float) -> list[str]:
    """Say where targets are far from what the normaliser of ``name`` expects; usually an empty list.

    Args:
        name: ``energy`` or ``forces``.
        seen: the sample.
        mean: mean of the configured normaliser.
        rmsd: its scale.
    """
    where = f"dataset.train.transforms.normalizer.{name}"
    warnings = []
    # A handful of frames says little about a spread.
    if seen.count >= 8 and seen.rmsd > 0:
        factor = _ENERGY_FACTOR if name == keys.ENERGY else _FORCE_FACTOR
        ratio = rmsd / seen.rmsd
        if not 1 / factor <= ratio <= factor:
            warnings.append(
                f"The {name} of {seen.count} sampled structures spread by {seen.rmsd:.4g}, '{where}' says "
                f"{rmsd:.4g}: is it the normaliser of "
                "another data set?"
            )
    if name == keys.ENERGY and abs(seen.mean - mean) > 3 * max(rmsd, seen.rmsd):
        warnings.append(
            f"The energies of {seen.count} sampled structures have the mean {seen.mean:.4g}, '{where}' "
            f"says {mean:.4g}: total energies "
            "where referenced ones are expected, or the normaliser of another data set?"
        )
    return warnings
