"""Stand-in for torch_scatter.utils."""

from __future__ import annotations

import torch


def broadcast(src: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
    """Expands an index to the shape of the values that it belongs to.

    Plain enough for TorchScript, because fairchem's GemNet-GP scripts a function that calls it.

    Args:
        src: The index. One-dimensional: it runs along `dim` of `other`. Otherwise its dimensions are the
            leading ones of `other`, size 1 standing for any size.
        other: The values.
        dim: Dimension of `other` that a one-dimensional index runs along; may be negative.

    Returns:
        A view of `src` with the shape of `other`.
    """
    if dim < 0:
        dim = other.dim() + dim
    if src.dim() == 1:
        for _ in range(dim):
            src = src.unsqueeze(0)
    for _ in range(other.dim() - src.dim()):
        src = src.unsqueeze(-1)
    return src.expand(other.size())
