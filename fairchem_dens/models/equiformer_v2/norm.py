"""The norms of EquiformerV2: fairchem's modules, for their parameters, with our arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from fairchem.core.models.equiformer_v2.layer_norm import (
    EquivariantLayerNormArray,
    EquivariantLayerNormArraySphericalHarmonics,
    EquivariantRMSNormArraySphericalHarmonicsV2,
)
from torch import Tensor, nn

from fairchem_dens.models.equiformer_v2.paths import FAIRCHEM, OnPath


class LayerNorm(OnPath, EquivariantLayerNormArray):
    """Each degree by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, (L+1)², C)."""
        if self.path == FAIRCHEM:
            return super().forward(x)
        return self.path.equivariant_norm(x, self.affine_weight, self.affine_bias, self.eps, "layer_norm")


class LayerNormSH(OnPath, EquivariantLayerNormArraySphericalHarmonics):
    """Scalars by themselves, all higher degrees together."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, (L+1)², C)."""
        if self.path == FAIRCHEM:
            return super().forward(x)
        weight = torch.cat([self.norm_l0.weight[None], self.affine_weight])
        return self.path.equivariant_norm(x, weight, self.norm_l0.bias, self.eps, "layer_norm_sh")


class RMSNormSH(OnPath, EquivariantRMSNormArraySphericalHarmonicsV2):
    """All degrees together."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (N, (L+1)², C)."""
        if self.path == FAIRCHEM:
            return super().forward(x)
        return self.path.equivariant_norm(x, self.affine_weight, self.affine_bias, self.eps, "rms_norm_sh")


NORMS: dict[str, Any] = {"layer_norm": LayerNorm, "layer_norm_sh": LayerNormSH, "rms_norm_sh": RMSNormSH}
"""By ``norm_type``."""


def make_norm(norm_type: str, lmax: int, channels: int) -> nn.Module:
    """Return the norm of a ``norm_type``."""
    return NORMS[norm_type](lmax, channels, 1e-5, True, "component")
