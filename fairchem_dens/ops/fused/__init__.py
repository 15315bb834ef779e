"""Triton kernels: each module has the name and the signature of its plain twin in `fairchem_dens.ops`.

The kernels keep to what Triton 3.0 knows. Their tile sizes are fixed: choosing them by timing would let the
order of sums, and with it the last bits of a result, depend on the run. Annotations in their modules are
evaluated, because Triton's interpreter looks for those of arguments that are known when a kernel is compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from fairchem_dens.ops.operations import Operations

SWITCH = "FAIRCHEM_DENS_OPS"
"""Environment variable: ``plain`` forbids fused operations, ``fused`` has them interpreted on a CPU."""


def operations() -> Operations:
    """Return the fused operations; where one cannot do what is asked, its plain twin does.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: there is no GPU, or the environment forbids fused operations.
        ValueError: the environment variable has another value.
    """
    interpreted = _are_interpreted()
    return import_module("fairchem_dens.ops.fused.choice").guarded(interpreted)


def neighbour_search(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return `fairchem_dens.ops.fused.neighbours.neighbours` if it can run on a device."""
    try:
        interpreted = _are_interpreted()
        search = import_module("fairchem_dens.ops.fused.neighbours").neighbours
    except (ImportError, RuntimeError):
        return None
    if device.type == "cuda":
        return search if torch.cuda.get_device_capability(device) >= (8, 0) else None
    return search if interpreted else None


def _are_interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter, on the CPU; raise where they cannot run at all."""
    wanted = os.environ.get(SWITCH, "auto")
    if wanted not in ("auto", "plain", "fused"):
        raise ValueError(f"The variable {SWITCH} must be 'auto', 'plain' or 'fused', found {wanted!r}.")
    if wanted == "plain":
        raise RuntimeError(f"the environment variable {SWITCH} is 'plain'")
    interpreted = wanted == "fused" and os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU")
    return interpreted
