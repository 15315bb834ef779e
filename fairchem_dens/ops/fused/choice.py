"""What the kernels cannot do, and the plain operation in its place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from fairchem_dens.ops.fused.attend import attend
from fairchem_dens.ops.fused.edge_degree import edge_degree
from fairchem_dens.ops.fused.grid_ffn import grid_mlp
from fairchem_dens.ops.fused.launching import dot_precision, power_of_two
from fairchem_dens.ops.fused.norm import SPLIT, equivariant_norm
from fairchem_dens.ops.fused.rotate import rotate, rotate_backward, rotate_forward
from fairchem_dens.ops.fused.s2_activation import s2_activation
from fairchem_dens.ops.fused.wigner import wigner_packed
from fairchem_dens.ops.layout import Edges, Rows
from fairchem_dens.ops.operations import PLAIN, Operations
from fairchem_dens.ops.precision import product_dtype

Objection = Callable[..., str | None]

HALF_NEEDS, TF32_NEEDS = 120 * 1024, 225 * 1024
"""Bytes of shared memory that the network on the grid needs in its backward pass."""


def guarded(interpreted: bool) -> Operations:
    """Return fused operations that fall back on plain ones.

    Args:
        interpreted: kernels are interpreted, on the CPU.
    """

    def or_plain(name: str, fused: Callable[..., Tensor], objection: Objection) -> Callable[..., Tensor]:
        plain = getattr(PLAIN, name)

        def operation(x: Tensor, *others: Any) -> Tensor:
            reason = _against(x, interpreted) or objection(x, *others)
            if reason is None:
                return fused(x, *others)
            _say(name, reason)
            return plain(x, *others)

        return operation

    convolve = partial(PLAIN.rotate_and_convolve, rotation=(rotate_forward, rotate_backward))
    return Operations(
        name="triton",
        wigner_packed=or_plain("wigner_packed", wigner_packed, _none),
        edge_degree=or_plain("edge_degree", edge_degree, _none),
        rotate=or_plain("rotate", rotate, _none),
        rotate_and_convolve=or_plain("rotate_and_convolve", convolve, _none),
        s2_activation=or_plain("s2_activation", s2_activation, _against_s2_activation),
        attend=or_plain("attend", attend, _against_attend),
        grid_mlp=or_plain("grid_mlp", grid_mlp, _against_grid_mlp),
        equivariant_norm=or_plain("equivariant_norm", equivariant_norm, _against_norm),
    )


@lru_cache(maxsize=64)
def _say(name: str, reason: str) -> None:
    logging.info(f"Operation '{name}' is not fused: {reason}.")


def _against(x: Tensor, interpreted: bool) -> str | None:
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"there is no kernel for {x.dtype}"
    if x.is_cuda:
        capability = torch.cuda.get_device_capability(x.device)
        return None if capability >= (8, 0) else f"the GPU's compute capability is {capability}, below (8, 0)"
    if not interpreted:
        return f"the features are on the device '{x.device.type}'"
    return "Triton's interpreter does not know bfloat16" if product_dtype(x) == torch.bfloat16 else None


def _none(*_: Any) -> None:
    return None


def _against_s2_activation(x: Tensor, *_: Any) -> str | None:
    return None if x.shape[1] <= 64 else f"it has {x.shape[1]} rows, more than 64"


def _against_attend(
    values: Tensor, logits: Tensor, wigner: Tensor, edges: Edges, rows: Rows, dropout: Tensor | None = None
) -> str | None:
    width = values.shape[2] // max(logits.shape[1], 1)
    return None if width == power_of_two(width) else f"a head has {width} channels, not a power of two"


def _against_grid_mlp(x: Tensor, *_: Any) -> str | None:
    rows, hidden = x.shape[1:]
    if rows > 64 or hidden not in (16, 32, 64, 128):
        return f"it has {rows} rows and {hidden} channels, not at most 64 and one of 16, 32, 64 and 128"
    if not x.is_cuda:
        return None
    single = product_dtype(x) == torch.float32
    if single and dot_precision() == "ieee":
        return "the GPU's libraries multiply in full single precision faster"
    needed, there = TF32_NEEDS if single else HALF_NEEDS, _shared_memory(x.device)
    return None if there >= needed else f"a block has {there} bytes of shared memory, {needed} are needed"


def _against_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, kind: str) -> str | None:
    if kind not in SPLIT:
        return f"there is no kernel for '{kind}'"
    size = power_of_two(x.shape[1]) * power_of_two(x.shape[2])
    return None if size <= 2**14 else f"a node has {x.shape[1]} rows of {x.shape[2]} channels, too many"


@lru_cache(maxsize=16)
def _shared_memory(device: torch.device) -> int:
    """Return how many bytes of shared memory a block can have; torch 2.4 does not tell."""
    known: Sequence[tuple[tuple[int, int], int]] = [((8, 0), 166912), ((9, 0), 232448), ((10, 0), 232448)]
    told = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    return told or dict(known).get(torch.cuda.get_device_capability(device), 101376)
