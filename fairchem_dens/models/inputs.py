"""Bringing a batch into the one form that models read, without touching the caller's."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from fairchem.core.common import gp_utils

from fairchem_dens import keys


def check_atomic_numbers(data: Any, max_num_elements: int) -> None:
    """Refuse elements that the model has no embedding for; on a GPU, where looking would stall, do nothing.

    Args:
        data: structure or batch.
        max_num_elements: number of embeddings; the highest legal atomic number is one less.

    Raises:
        ValueError: names the atomic number, the structure and the key to raise.
    """
    numbers = data[keys.ATOMIC_NUMBERS]
    if numbers.device.type != "cpu" or numbers.numel() == 0:
        return
    highest = int(numbers.max())
    if highest < max_num_elements and int(numbers.min()) >= 0:
        return
    worst = int(numbers.argmax() if highest >= max_num_elements else numbers.argmin())
    where = f" of structure {int(data[keys.BATCH][worst])} in the batch" if keys.BATCH in data else ""
    if keys.SID in data and keys.BATCH in data:
        where += f" (sid {data[keys.SID][int(data[keys.BATCH][worst])]})"
    raise ValueError(
        f"Atomic number {int(numbers[worst])}{where} is outside the model's embedding, which ends at "
        f"{max_num_elements - 1}: raise 'model.max_num_elements' (now {max_num_elements}; Equiformer: the "
        "multiplicity of 'model.irreps_in') and train anew, or remove the structure."
    )


_CLOSEST_IMAGES = 0.1
"""Å. No crystal repeats itself over less, and a neighbour search over less never ends."""


def check_cells(data: Any) -> None:
    """Refuse cells that do not repeat in space; on a GPU, where looking would stall, do nothing.

    Args:
        data: structure or batch with ``cell``; periodic in all directions unless ``pbc`` says otherwise.

    Raises:
        ValueError: a cell is not finite, or its images along a periodic direction are closer than 0.1 Å, as
            they are where it has no volume; names the structure and what to do.
    """
    cells = data[keys.CELL].reshape(-1, 3, 3)
    if cells.device.type != "cpu":
        return
    vectors = cells.double().numpy(force=True)
    with np.errstate(invalid="ignore"):
        volumes = np.abs(np.linalg.det(vectors))
    lengths = np.sqrt((vectors**2).sum(axis=-1))
    # Two vectors span at most the product of their lengths: nearly all cells pass without a closer look.
    if (volumes > _CLOSEST_IMAGES * lengths.max(axis=1) ** 2).all() and np.isfinite(volumes).all():
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        across = np.stack([np.cross(vectors[:, i - 2], vectors[:, i - 1]) for i in range(3)], axis=1)
        distances = volumes[:, None] / np.sqrt((across**2).sum(axis=-1))
    periodic = np.ones_like(distances, dtype=bool)
    if keys.PBC in data:
        periodic = data[keys.PBC].reshape(-1, 3).bool().numpy(force=True)
    # What is not a number is not at least something.
    bad = ~np.isfinite(vectors).all(axis=(1, 2)) | (periodic & ~(distances >= _CLOSEST_IMAGES)).any(axis=1)
    if not bad.any():
        return
    worst = int(bad.argmax())
    where = f"Structure {worst} in the batch"
    if keys.SID in data:
        sids = data[keys.SID]
        where += f" (sid {sids[worst] if isinstance(sids, list) or torch.is_tensor(sids) else sids})"
    raise ValueError(
        f"{where} has a '{keys.CELL}' that does not repeat in space: {cells[worst].tolist()}, "
        f"periodic: {periodic[worst].tolist()}. Correct it, set '{keys.PBC}' to False along directions "
        "without periodicity (with a vector of any length there), or remove the structure; for molecules set "
        "'model.use_pbc: False'."
    )


def prepared(data: Any, max_num_elements: int) -> Any:
    """Return a shallow copy with ``atomic_numbers`` int64 (N,), ``pbc`` (B, 3) and ``natoms`` (B,).

    ``pbc`` of the common writers arrives as (3B,); read as it is, it would be the first structure's for all.

    Raises:
        ValueError: an atomic number is out of range, or graph parallelism is on.
    """
    if gp_utils.initialized():
        raise ValueError(
            "Graph parallelism (--gp-gpus) is not supported with DeNS models: the conditioning is not split "
            "over ranks."
        )
    check_atomic_numbers(data, max_num_elements)
    data = copy.copy(data)
    data[keys.ATOMIC_NUMBERS] = data[keys.ATOMIC_NUMBERS].long()
    data[keys.NATOMS] = torch.as_tensor(data[keys.NATOMS], device=data[keys.POS].device).reshape(-1)
    if keys.BATCH not in data or data[keys.BATCH] is None:
        data[keys.BATCH] = torch.zeros_like(data[keys.ATOMIC_NUMBERS])
    if keys.PBC in data:
        data[keys.PBC] = data[keys.PBC].reshape(-1, 3)
    return data
