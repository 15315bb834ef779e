"""Functions of the distance: the basis, and the network that makes weights of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpNormalBasis(nn.Module):
    """Gaussians in exp(−5 d / cutoff), damped by a cosine that is zero from the cutoff on.

    Source: Unke and Meuwly, PhysNet, arXiv 1902.08408, equation 8, with one width for all.

    Args:
        cutoff: Å.
        number: of functions.
    """

    means: Tensor

    def __init__(self, cutoff: float, number: int) -> None:
        super().__init__()
        self.cutoff = cutoff
        lowest = math.exp(-cutoff)
        self.beta = (2 / number * (1 - lowest)) ** -2
        # In double precision whatever the model's, so that a model made double loses nothing.
        self.register_buffer(
            "means", torch.linspace(lowest, 1, number, dtype=torch.float64), persistent=False
        )

    def forward(self, distances: Tensor) -> Tensor:
        """Map (E,), Å, to (E, number)."""
        damping = 0.5 * (torch.cos(distances * (math.pi / self.cutoff)) + 1)
        damping = damping * (distances < self.cutoff)
        places = torch.exp(distances * (-5 / self.cutoff))[:, None] - self.means.to(distances.dtype)
        return damping[:, None] * torch.exp(-self.beta * places.square())


class RadialProfile(nn.Module):
    """Linear layers with layer norm and SiLU between them; the last has an ``offset`` for its bias.

    Args:
        channels: of input, hidden layers and output.
        order: (W,) int64, which outputs to compute, and in which order.
    """

    order: Tensor

    def __init__(self, channels: Sequence[int], order: Tensor) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size_in, size_out in pairwise(channels[:-1]):
            linear = nn.Linear(size_in, size_out)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.LayerNorm(size_out), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(channels[-2], channels[-1], bias=False))
        bound = 1 / math.sqrt(channels[-2])
        self.offset = nn.Parameter(torch.empty(channels[-1]).uniform_(-bound, bound))
        self.register_buffer("order", order, persistent=False)

    def forward(self, basis: Tensor) -> Tensor:
        """Map (E, number) to (E, W)."""
        return self.from_hidden(self.net[:-1](basis))

    def from_hidden(self, hidden: Tensor) -> Tensor:
        """Apply the last layer to what `hidden_features` returns for this network, (E, C) to (E, W)."""
        last: Any = self.net[-1]
        weight, offset = (one.index_select(0, self.order) for one in (last.weight, self.offset))
        return F.linear(hidden, weight, offset)


def hidden_features(profiles: Sequence[RadialProfile], basis: Tensor) -> list[Tensor]:
    """Compute all but the last layers of networks of equal hidden sizes, all of them at once.

    Each layer is a batched product, one for the networks of all blocks: they differ in weights alone, and a
    layer of a single one is too small to keep a GPU busy.

    Args:
        profiles: at least one.
        basis: (E, number), which all of them read.

    Returns:
        For each network (E, C).
    """
    nets: list[Any] = [profile.net[:-1] for profile in profiles]
    x = basis.expand(len(nets), -1, -1)
    for linears, norms, activations in zip(*[iter(zip(*nets, strict=True))] * 3, strict=True):
        weight, bias = (torch.stack([getattr(one, name) for one in linears]) for name in ("weight", "bias"))
        x = torch.baddbmm(bias[:, None], x, weight.mT)
        scale, shift = (
            torch.stack([getattr(one, name) for one in norms])[:, None] for name in ("weight", "bias")
        )
        x = F.layer_norm(x, x.shape[-1:], eps=norms[0].eps) * scale + shift
        x = activations[0](x)
    return list(x.unbind())
