"""Radial functions: what the length of an edge and its elements say about its messages."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fairchem_dens.models.equiformer_v2.geometry import Geometry
from fairchem_dens.models.equiformer_v2.memory import recomputed
from fairchem_dens.ops.radial import first_layer


def radial_hidden(block: Any, radial_function: nn.Module, geometry: Geometry, recompute: bool) -> Tensor:
    """Apply all of a radial function but its last layer.

    Args:
        block: holds ``source_embedding`` and ``target_embedding``, or None for them.
        radial_function: fairchem's; linear layers, each but the last followed by a norm and SiLU.
        geometry: of E edges.
        recompute: keep nothing for the gradient but the inputs.

    Returns:
        (E, hidden channels).
    """
    embeddings = geometry.shared_embeddings
    if block.source_embedding is not None:
        embeddings = (block.source_embedding.weight, block.target_embedding.weight)
    net: Any = radial_function.net

    def apply() -> Tensor:
        hidden = first_layer(net[0].weight, net[0].bias, geometry.inputs, embeddings)
        for layer in net[1:-1]:
            hidden = layer(hidden)
        return hidden

    return recomputed(apply) if recompute else apply()
