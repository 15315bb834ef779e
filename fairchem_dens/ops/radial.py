"""The first layer of a radial function, without its input.

The input would be [Gaussians of the distance | embedding of the source's element | of the target's], 856
numbers for each edge in the paper's model. The elements are few: their part of the layer is a table with
a row for each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussians(distances: Tensor, offsets: Tensor, coefficient: float) -> Tensor:
    """Return exp(coefficient · (d - offset)²), (E, G), of distances (E,), Å."""
    differences = distances[:, None] - offsets
    return torch.exp(coefficient * differences.square())


@dataclass(frozen=True)
class EdgeInputs:
    """What radial functions see of the edges.

    Attributes:
        gaussians: (E, G).
        source, target: (E,) int64, atomic numbers.
    """

    gaussians: Tensor
    source: Tensor
    target: Tensor


def first_layer(
    weight: Tensor, bias: Tensor, inputs: EdgeInputs, embeddings: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Apply a linear layer to [Gaussians | source's embedding | target's embedding].

    Args:
        weight: (O, G + 2K), or (O, G) without embeddings.
        bias: (O,).
        inputs: of E edges.
        embeddings: of elements, (Z, K) each, for sources and targets; None if the layer has no such inputs.

    Returns:
        (E, O).
    """
    if embeddings is None:
        return F.linear(inputs.gaussians, weight, bias)
    of_source, of_target = embeddings
    sizes = [inputs.gaussians.shape[1], of_source.shape[1], of_target.shape[1]]
    of_gaussians, source_weight, target_weight = weight.split(sizes, dim=1)
    out = F.linear(inputs.gaussians, of_gaussians, bias)
    out = out + F.embedding(inputs.source, F.linear(of_source, source_weight))
    return out + F.embedding(inputs.target, F.linear(of_target, target_weight))
