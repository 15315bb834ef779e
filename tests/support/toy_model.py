"""A force field of a few operations that predicts noise: for tests of what is around a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fairchem_dens import keys


class ToyDeNS(nn.Module):
    """Energies and vectors of each atom from its position, its element and the force that is shown."""

    def __init__(self, otf_graph: bool = True, predict_noise: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        self.otf_graph = otf_graph
        self.elements = nn.Embedding(90, 8)
        self.hidden = nn.Linear(14, 16)
        self.dropout = nn.Dropout(dropout)
        self.energy = nn.Linear(16, 1)
        self.vectors = nn.Linear(16, 6)

    def forward(self, data: Any) -> dict[str, Tensor]:
        """Return ``energy`` (B,), ``forces`` (N, 3) and ``noise`` (N, 3)."""
        pos = data[keys.POS]
        shown = data[keys.CONDITION_FORCES] if keys.CONDITION_FORCES in data else torch.zeros_like(pos)
        seen = torch.cat([pos, shown, self.elements(data[keys.ATOMIC_NUMBERS])], dim=1)
        hidden = self.dropout(torch.nn.functional.silu(self.hidden(seen)))
        vectors = self.vectors(hidden)
        atoms = self.energy(hidden).squeeze(1)
        energy = torch.zeros(len(data[keys.NATOMS]), dtype=atoms.dtype, device=atoms.device)
        return {
            keys.ENERGY: energy.index_add(0, data[keys.BATCH], atoms),
            keys.FORCES: vectors[:, :3],
            keys.NOISE: vectors[:, 3:],
        }
