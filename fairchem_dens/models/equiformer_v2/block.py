"""One layer: attention, then a feed-forward network, each behind a norm and beside a bypass."""

from __future__ import annotations

from typing import Any

import torch
from fairchem.core.models.equiformer_v2.drop import EquivariantDropoutArraySphericalHarmonics
from torch import Tensor, nn

from fairchem_dens.models.equiformer_v2.attention import Attention
from fairchem_dens.models.equiformer_v2.feed_forward import FeedForward
from fairchem_dens.models.equiformer_v2.geometry import Geometry
from fairchem_dens.models.equiformer_v2.memory import recomputed
from fairchem_dens.models.equiformer_v2.norm import make_norm
from fairchem_dens.models.equiformer_v2.paths import FAIRCHEM
from fairchem_dens.ops.precision import at_least_single


class Block(nn.Module):
    """A layer.

    Args:
        norm_type: kind of the norms.
        attention: arguments of `Attention`.
        feed_forward: arguments of `FeedForward`.
        drop_path_rate: probability that a structure skips attention, and again the feed-forward network.
        proj_drop: dropout of channels of both outputs.
    """

    def __init__(
        self,
        norm_type: str,
        attention: dict[str, Any],
        feed_forward: dict[str, Any],
        drop_path_rate: float,
        proj_drop: float,
    ) -> None:
        super().__init__()
        lmax, channels = attention["lmax_list"][0], attention["sphere_channels"]
        # In the order of the paper's code, as everything that has parameters.
        self.norm_1 = make_norm(norm_type, lmax, channels)
        self.ga = Attention(**attention)
        self.norm_2 = make_norm(norm_type, lmax, channels)
        self.ffn = FeedForward(**feed_forward)
        self.drop_path_rate = drop_path_rate
        self.proj_drop = EquivariantDropoutArraySphericalHarmonics(proj_drop) if proj_drop > 0 else None
        self.keeps_inputs_only = attention["recompute"] == "layers"

    def forward(self, x: Tensor, geometry: Geometry, batch: Tensor, num_graphs: int) -> Tensor:
        """Map (N, (L+1)², C) to the same; ``batch`` (N,) tells the structure of an atom."""
        dropout = self.ga.draw_dropout(geometry)

        def attention(x: Tensor) -> Tensor:
            return self.ga(self.norm_1(x), geometry, dropout)

        def feed_forward(x: Tensor) -> Tensor:
            return self.ffn(self.norm_2(x))

        # fairchem's code draws random numbers in between.
        again = self.keeps_inputs_only and self.ga.path != FAIRCHEM
        for layer in (attention, feed_forward):
            out = recomputed(layer, x) if again else layer(x)
            # In this order: it decides on strides, and these on how fairchem's modules round.
            x = self._dropped(out, batch, num_graphs) + x
        return x

    def _dropped(self, x: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
        if self.training and self.drop_path_rate > 0:
            kept = 1 - self.drop_path_rate
            # One number for each structure; how many there are is known without asking the device.
            draws = torch.rand(num_graphs, 1, 1, dtype=at_least_single(x).dtype, device=x.device)
            x = x * ((draws + kept).floor() / kept)[batch]
        return x if self.proj_drop is None else self.proj_drop(x)
