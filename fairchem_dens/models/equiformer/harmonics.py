"""Real spherical harmonics as plain tensor operations, which can be copied, pickled, traced and captured.

Those of e3nn are TorchScript functions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from e3nn import o3
from torch import Tensor, nn


class SphericalHarmonics(nn.Module):
    """All harmonics up to a degree, in e3nn's order, sign and 'component' normalisation.

    Each degree is the part of the product of degree 1 with the one before that has the highest degree.

    Args:
        lmax: highest degree, at least 1.
    """

    def __init__(self, lmax: int) -> None:
        super().__init__()
        self.lmax = lmax
        for degree in range(1, lmax):
            symbols = o3.wigner_3j(1, degree, degree + 1, dtype=torch.float64)
            # Along the polar axis, the middle component in e3nn's order, only the middle one of each degree
            # is not zero: it is √(2l + 1).
            at_pole = math.sqrt(3 * (2 * degree + 1)) * symbols[1, degree, degree + 1]
            table = symbols.flatten(0, 1) * math.sqrt(2 * degree + 3) / at_pole
            # In double precision whatever the model's, so that a model made double loses nothing.
            self.register_buffer(f"raise_{degree}", table, persistent=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map vectors of any length (E, 3) to (E, (lmax + 1)²)."""
        first = math.sqrt(3) * F.normalize(vectors, dim=-1)
        degrees = [torch.ones_like(first[:, :1]), first]
        for degree in range(1, self.lmax):
            products = (first[:, :, None] * degrees[-1][:, None]).flatten(1)
            degrees.append(products @ self.get_buffer(f"raise_{degree}").to(products.dtype))
        return torch.cat(degrees, dim=1)
