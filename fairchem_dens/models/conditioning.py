"""What a model is told about a corrupted structure: the original's forces and, optionally, the noise level.

Forces enter as spherical tensors, |f|/√3 · Y(f/|f|), with Y the real spherical harmonics in e3nn's
'component' normalisation and even parity. With that scaling the l = 1 part is the force itself, in the order
x, y, z.

Source: arXiv 2403.09549, section 3.2 and equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from e3nn import o3
from torch import Tensor, nn

from fairchem_dens import keys


def force_features(forces: Tensor, lmax: int, harmonics: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return the spherical tensors of forces; exactly zero, with a finite gradient, where a force is zero.

    Args:
        forces: (N, 3), units of the data.
        lmax: highest degree.
        harmonics: of vectors of any length but zero, up to that degree; None for e3nn's, which are
            TorchScript.

    Returns:
        (N, (lmax + 1)²), degrees in ascending order.
    """
    squared = forces.square().sum(dim=-1, keepdim=True)
    is_zero = squared == 0
    norm = torch.where(is_zero, torch.ones_like(squared), squared).sqrt()
    values = (
        o3.spherical_harmonics(
            list(range(lmax + 1)), forces / norm, normalize=False, normalization="component"
        )
        if harmonics is None
        else harmonics(forces / norm)
    )
    return torch.where(is_zero, torch.zeros_like(squared), norm / math.sqrt(3.0)) * values


class ForceEmbedding(nn.Module):
    """Equivariant linear layer from one channel to many: a weight for each degree, a bias on l = 0.

    The bias is added for every atom in every mode: the mask of corrupted atoms acts on the input, as in the
    paper's code. A model without its DeNS parts therefore equals this one only after the bias has been folded
    into its atom embedding.

    Args:
        lmax: highest degree.
        channels: C.
        weight_init: ``uniform`` in ±1, ``normal`` with standard deviation 1, or a number for uniform in ±
            that number.
    """

    degrees: Tensor

    def __init__(self, lmax: int, channels: int, weight_init: str | float = "uniform") -> None:
        super().__init__()
        self.lmax = lmax
        self.weight = nn.Parameter(torch.empty(lmax + 1, channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels))
        if weight_init == "normal":
            nn.init.normal_(self.weight)
        else:
            bound = 1.0 if weight_init == "uniform" else float(weight_init)
            nn.init.uniform_(self.weight, -bound, bound)
        degrees = torch.cat([torch.full((2 * degree + 1,), degree) for degree in range(lmax + 1)])
        self.register_buffer("degrees", degrees, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map (N, (lmax + 1)²) to (N, (lmax + 1)², C)."""
        scaled = features[:, :, None] * self.weight[self.degrees, :, 0]
        return torch.cat([scaled[:, :1] + self.bias, scaled[:, 1:]], dim=1)


def add_conditioning(
    embedding: Tensor,
    data: Any,
    force_embedding: ForceEmbedding,
    sigma_embedding: nn.Linear | None = None,
    use_force_encoding: bool = True,
) -> Tensor:
    """Add the encoded forces, and the encoded σ if wanted, to the node embedding.

    Args:
        embedding: (N, (lmax + 1)², C), after the atom embedding and before the edge-degree embedding.
        data: batch; without ``condition_forces`` only biases are added.
        force_embedding: shared by all modes.
        sigma_embedding: from σ (N, 1), Å, to l = 0; σ is 0 in ordinary structures.
        use_force_encoding: False encodes zeros instead of forces (ablation).

    Returns:
        A new tensor of the same shape.
    """
    num_atoms = embedding.shape[0]
    if use_force_encoding and keys.CONDITION_FORCES in data:
        features = force_features(data[keys.CONDITION_FORCES].to(embedding.dtype), force_embedding.lmax)
    else:
        features = embedding.new_zeros(num_atoms, (force_embedding.lmax + 1) ** 2)
    embedding = embedding + force_embedding(features)
    if sigma_embedding is not None:
        sigmas = (
            data[keys.SIGMAS].to(embedding.dtype)
            if keys.SIGMAS in data
            else embedding.new_zeros(num_atoms, 1)
        )
        scalars = sigma_embedding(sigmas.reshape(num_atoms, 1))
        embedding = torch.cat([embedding[:, :1] + scalars[:, None], embedding[:, 1:]], dim=1)
    return embedding
