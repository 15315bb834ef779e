"""Bringing a batch into the one form that models read, without touching the caller's."""

from __future__ import annotations

import copy
from typing import Any

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
