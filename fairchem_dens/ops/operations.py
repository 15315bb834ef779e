"""The operations that a model needs, as one set: so that another set can do the same in another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fairchem_dens.ops.attend import attend
from fairchem_dens.ops.edge_degree import edge_degree
from fairchem_dens.ops.grid_ffn import grid_mlp
from fairchem_dens.ops.norm import equivariant_norm
from fairchem_dens.ops.rotate import rotate
from fairchem_dens.ops.s2_activation import s2_activation
from fairchem_dens.ops.so2 import rotate_and_convolve
from fairchem_dens.ops.wigner import wigner_packed


@dataclass(frozen=True)
class Operations:
    """Functions of the names and signatures of the plain ones, which are the defaults.

    Attributes:
        name: how this set is called.
    """

    name: str = "plain"
    wigner_packed: Callable[..., Tensor] = wigner_packed
    edge_degree: Callable[..., Tensor] = edge_degree
    rotate: Callable[..., Tensor] = rotate
    rotate_and_convolve: Callable[..., Tensor] = rotate_and_convolve
    s2_activation: Callable[..., Tensor] = s2_activation
    attend: Callable[..., Tensor] = attend
    grid_mlp: Callable[..., Tensor] = grid_mlp
    equivariant_norm: Callable[..., Tensor] = equivariant_norm


PLAIN = Operations()
"""PyTorch, anywhere."""
