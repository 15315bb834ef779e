"""How far the predicted noise is from the real one, by σ and by the size of the force."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch_geometric.data import Batch, Data

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.demo.results import load_trained

_BATCH_SIZE = 32
_SEED = 7


def noise_errors(checkpoint: Path, settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return errors of the noise on unseen structures, as shares of the error of guessing none.

    Args:
        checkpoint: of the end of the run.
        settings: of the run.
        given: ``val``, an LMDB; ``levels``, values of σ; ``level_of_bins``, the σ at which errors are taken
            by |F|; ``bins``, edges of |F|.

    Returns:
        ``by_level`` and ``by_force``: norm of the error over norm of the noise, both summed over the
        corrupted atoms. 1 is as good as guessing none. ``atoms_by_force`` has the number of atoms.
    """
    model = load_trained(checkpoint).model
    trained = Corruption.from_config(settings["dataset"]["train"]["transforms"]["dens"])
    structures = list(read_lmdb(given["val"]))
    by_level = []
    for level in given["levels"]:
        errors, sizes, _ = _errors(model, structures, trained, level)
        by_level.append(float(errors.sum() / sizes.sum()))
    errors, sizes, forces = _errors(model, structures, trained, given["level_of_bins"])
    place = torch.bucketize(forces, torch.tensor(given["bins"])[1:-1], right=True)
    count = len(given["bins"]) - 1

    def sums(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, dtype=values.dtype).index_add(0, place, values)

    return {
        "by_level": by_level,
        "by_force": (sums(errors) / sums(sizes)).tolist(),
        "atoms_by_force": torch.bincount(place, minlength=count).tolist(),
    }


def _errors(
    model: torch.nn.Module, structures: Sequence[Data], trained: Corruption, level: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return norms of error and noise (Å) and of the force (eV/Å) of each corrupted atom."""
    corruption = Corruption(prob=1.0, std=level, corrupt_ratio=trained.corrupt_ratio)
    errors, sizes, forces = [], [], []
    for start in range(0, len(structures), _BATCH_SIZE):
        chunk = structures[start : start + _BATCH_SIZE]
        batch = Batch.from_data_list(
            [corrupt(data, corruption, seed=_SEED, epoch=0, selected=True) for data in chunk]
        )
        with torch.no_grad():
            # The model predicts in units of the σ that it was trained with, whatever the noise is now.
            predicted = model(batch)[keys.NOISE] * trained.noise_scale
        mask = batch[keys.NOISE_MASK]
        errors.append((predicted - batch[keys.NOISE_VEC]).norm(dim=-1)[mask])
        sizes.append(batch[keys.NOISE_VEC].norm(dim=-1)[mask])
        forces.append(batch[keys.FORCES].norm(dim=-1)[mask])
    return torch.cat(errors), torch.cat(sizes), torch.cat(forces)
