"""Structures that tests of models share, and the state in which the corruption leaves them."""

from __future__ import annotations

import numpy as np
import torch
from torch_geometric.data import Batch, Data


def molecule(seed: int, natoms: int = 9, scale: float = 1.2) -> Data:
    """Atoms at least 1 Å apart; labels of springs between all of them, which can be learned."""
    rng = np.random.default_rng(seed)
    pos = np.zeros((1, 3))
    while len(pos) < natoms:
        place = rng.normal(scale=scale, size=3)
        if np.linalg.norm(pos - place, axis=1).min() > 1.0:
            pos = np.vstack([pos, place])
    vectors = pos[:, None] - pos[None]
    lengths = np.linalg.norm(vectors, axis=-1) + np.eye(natoms)
    strains = 2 * (lengths - 2) * (1 - np.eye(natoms))
    dtype = torch.get_default_dtype()
    return Data(
        pos=torch.tensor(pos, dtype=dtype),
        atomic_numbers=torch.tensor(rng.choice([1, 6, 8], size=natoms)),
        natoms=natoms,
        cell=torch.zeros(1, 3, 3),
        pbc=torch.zeros(1, 3, dtype=torch.bool),
        fixed=torch.zeros(natoms, dtype=torch.long),
        tags=torch.zeros(natoms, dtype=torch.long),
        energy=float((strains**2).sum() / 8),
        forces=torch.tensor(-((strains / lengths)[..., None] * vectors).sum(axis=1), dtype=dtype),
        sid=seed,
        fid=0,
    )


def conditioned(data: Data) -> Data:
    """A structure as the corruption leaves it: every other atom conditioned on its force."""
    data.noise_mask = torch.arange(data.num_nodes) % 2 == 0
    data.condition_forces = data.forces * data.noise_mask[:, None]
    data.noise_vec = torch.zeros_like(data.forces)
    data.sigmas = torch.full((data.num_nodes, 1), 0.1)
    data.corrupted = torch.tensor([True])
    return data


def partly_corrupted(batch: Batch, std: float = 0.1) -> Batch:
    """The first structure corrupted in every other atom, the others ordinary; all with all fields.

    The atoms stay where they are.
    """
    batch = batch.clone()
    first = batch.batch == 0
    batch.noise_mask = first & (torch.arange(len(first)) % 2 == 0)
    batch.noise_vec = std * torch.randn(len(first), 3) * batch.noise_mask[:, None]
    batch.condition_forces = batch.forces * batch.noise_mask[:, None]
    batch.sigmas = std * first[:, None]
    batch.corrupted = torch.arange(batch.num_graphs) == 0
    return batch
