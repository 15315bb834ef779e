"""Dropout that keeps equivariance: whole channels, or whole branches of a structure."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fairchem_dens.models.equiformer.features import Features


def dropout_channels(x: Features, probability: float, training: bool) -> Features:
    """Zero channels of atoms with all their components."""
    if not training or probability == 0:
        return x
    return [one * F.dropout(one.new_ones(len(one), 1, one.shape[-1]), probability) for one in x]


def drop_path(x: Features, probability: float, training: bool, batch: Tensor, size: int) -> Features:
    """Zero all atoms of structures.

    Args:
        x: of the atoms.
        probability: to be dropped; what is kept is scaled.
        training: else ``x`` is returned as it is.
        batch: (N,), the structure of each atom.
        size: number of structures.
    """
    if not training or probability == 0:
        return x
    kept = F.dropout(x[0].new_ones(size, 1, 1), probability)[batch]
    return [one * kept for one in x]
