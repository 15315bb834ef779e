"""fairchem's own EquiformerV2 with DeNS, as benchmarks compare with it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from fairchem_dens import keys
from fairchem_dens.checkpoints.stock import dens_hydra
from fairchem_dens.models import EquiformerV2DeNS


class StockModel(nn.Module):
    """Backbone and heads of fairchem-core 1.10.0, with the weights and the outputs of a model of ours.

    Args:
        settings: arguments of our model.
        ours: the model whose weights are taken.
    """

    def __init__(self, settings: dict[str, Any], ours: EquiformerV2DeNS) -> None:
        super().__init__()
        made = dens_hydra("equiformer_v2", settings)
        # Its state has constant tables beside the weights.
        found = made.built.load_state_dict(made.moved(ours.state_dict()), strict=False)
        left = {name for name, _ in made.built.named_parameters()} & set(found.missing_keys)
        assert not left and not found.unexpected_keys, "the weights of the two models differ in name"
        self.hydra = made.built

    def forward(self, data: Any) -> dict[str, Tensor]:
        """As of our model; its vector head gives the noise of displaced atoms and the forces of others."""
        data = copy.copy(data)
        data.denoising_pos_forward = keys.CONDITION_FORCES in data
        if data.denoising_pos_forward:
            data.forces = data[keys.CONDITION_FORCES]
        out = self.hydra(data)
        vectors = out[keys.FORCES]
        return {
            keys.ENERGY: out[keys.ENERGY],
            keys.FORCES: vectors,
            **({keys.NOISE: vectors} if data.denoising_pos_forward else {}),
        }
