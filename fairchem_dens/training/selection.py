"""Cutting some structures out of a batch, for metrics that only fairchem's own functions know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch_geometric.data import Data

from fairchem_dens import keys


def select(
    out: Mapping[str, Tensor], batch: Any, sizes: Sequence[int], chosen: Sequence[int], atomic: Sequence[str]
) -> tuple[dict[str, Tensor], Data]:
    """Return predictions and batch of some structures, with what fairchem's metrics read.

    Args:
        out: predictions by target; a target that is not in the batch is left out.
        batch: the batch.
        sizes: number of atoms of each of its structures.
        chosen: the structures, at least one.
        atomic: the targets with one row for each atom; others have one for each structure.
    """
    device = batch[keys.POS].device if keys.POS in batch else batch[keys.NATOMS].device
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    ranges = [torch.arange(starts[index], starts[index] + sizes[index]) for index in chosen]
    structures, atoms = torch.tensor(chosen).to(device), torch.cat(ranges).to(device)

    def rows(target: str, value: Tensor) -> Tensor:
        return value[atoms if target in atomic else structures]

    targets = [target for target in out if target in batch]
    selected = Data(
        natoms=batch[keys.NATOMS][structures],
        batch=torch.repeat_interleave(torch.tensor([len(r) for r in ranges])).to(device),
        **{key: batch[key][atoms] for key in (keys.FIXED, keys.ATOMIC_NUMBERS)},
        **{target: rows(target, batch[target]) for target in targets},
    )
    return {target: rows(target, out[target]) for target in targets}, selected
