"""The three models, small, for tests that ask the same of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fairchem_dens.models import EquiformerDeNS, EquiformerV2DeNS, ESCNDeNS

MODELS = ("EquiformerV2DeNS", "ESCNDeNS", "EquiformerDeNS")

ESCN: dict[str, Any] = {
    "use_pbc": True,
    "regress_forces": True,
    "otf_graph": True,
    "max_neighbors": 12,
    "cutoff": 6.0,
    "num_layers": 2,
    "lmax_list": [2],
    "mmax_list": [1],
    "sphere_channels": 8,
    "hidden_channels": 8,
    "edge_channels": 8,
    "num_sphere_samples": 16,
    "distance_resolution": 0.2,
}
EQUIFORMER: dict[str, Any] = {
    "irreps_node_embedding": "8x0e+4x1e+2x2e",
    "irreps_pre_attn": "8x0e+4x1e+2x2e",
    "irreps_feature": "12x0e+6x1e+4x2e",
    "irreps_head": "4x0e+2x1e+2x2e",
    "irreps_mlp_mid": "8x0e+4x1e+4x2e",
    "num_heads": 2,
    "num_layers": 2,
    "number_of_basis": 8,
    "fc_neurons": [8],
}


def disturbed(model: nn.Module) -> nn.Module:
    """Biases and norms start as zeros and ones, which hides whether they are used."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def rescaled(model: nn.Module) -> nn.Module:
    """Of the size that learning makes them: signals neither vanish nor explode, biases are not zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(scale * torch.randn_like(parameter))
    return model


@dataclass(frozen=True, kw_only=True)
class ModelCase:
    """One of the models, its small settings, and what its parts are called.

    Attributes:
        model: the class.
        settings: its arguments.
        randomise: gives a model weights that hide nothing.
        noise_scale: a parameter that the noise is proportional to.
        noise_head: the module that predicts noise.
        force_weights: the weights of the force encoding, whose degrees have the given numbers of rows.
        force_bias: the bias on scalars of the force encoding.
        atom_embedding: the parameter with a row for each element, to which that bias may be added as well.
    """

    model: type[Any]
    settings: dict[str, Any]
    randomise: Callable[[nn.Module], nn.Module]
    noise_scale: str
    noise_head: str = "denoising_pos_block"
    force_weights: tuple[str, tuple[int, ...]] = ("force_embedding.weight", (1, 1, 1))
    force_bias: str = "force_embedding.bias"
    atom_embedding: str = "sphere_embedding.weight"

    def fresh(self, **changes: Any) -> Any:
        """The model as it starts, in evaluation mode."""
        torch.manual_seed(0)
        return self.model(**self.settings | changes).eval()

    def build(self, **changes: Any) -> Any:
        """The model with weights that hide nothing, in evaluation mode."""
        return self.randomise(self.fresh(**changes))


def model_case(name: str, model_settings: dict[str, Any]) -> ModelCase:
    """Return one of `MODELS`; ``model_settings`` are those of the fixture, for EquiformerV2."""
    return {
        "EquiformerV2DeNS": ModelCase(
            model=EquiformerV2DeNS,
            settings=model_settings,
            randomise=disturbed,
            noise_scale="denoising_pos_block.proj.weight",
        ),
        "ESCNDeNS": ModelCase(
            model=ESCNDeNS,
            settings=ESCN,
            randomise=rescaled,
            noise_scale="denoising_pos_block.fc3.weight",
        ),
        "EquiformerDeNS": ModelCase(
            model=EquiformerDeNS,
            settings=EQUIFORMER,
            randomise=disturbed,
            noise_scale="denoising_pos_head.proj.tp.weight",
            noise_head="denoising_pos_head",
            force_weights=("force_embed.tp.weight", (8, 4, 2)),
            force_bias="force_embed.bias.0",
            atom_embedding="atom_embed.atom_type_lin.bias.0",
        ),
    }[name]
