"""fairchem-core 1.10.0's own models: which of them hold what ours hold, and how the weights get there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fairchem.core.models.base import HydraModel
from fairchem.core.models.equiformer_v2.equiformer_v2 import EquiformerV2Backbone
from fairchem.core.models.equiformer_v2.equiformer_v2_dens import EqV2DeNSBackbone
from fairchem.core.models.equiformer_v2.equiformer_v2_deprecated import EquiformerV2
from fairchem.core.models.escn.escn import eSCN, eSCNBackbone
from torch import nn

from fairchem_dens.checkpoints.layouts import ENERGY_BLOCK, FORCE_BLOCK, NOISE_BLOCK, is_dens, with_heads
from fairchem_dens.checkpoints.weights import Weights
from fairchem_dens.models import EquiformerV2DeNS, ESCNDeNS
from fairchem_dens.models.arguments import argument_names

_OURS: Mapping[str, type[nn.Module]] = {"equiformer_v2": EquiformerV2DeNS, "escn": ESCNDeNS}
_FLAT: Mapping[str, type[nn.Module]] = {"equiformer_v2": EquiformerV2, "escn": eSCN}
_BACKBONES: Mapping[str, type[nn.Module]] = {"equiformer_v2": EquiformerV2Backbone, "escn": eSCNBackbone}
_HEADS = {
    "equiformer_v2": ("equiformerV2_scalar_head", "equiformerV2_vector_head"),
    "escn": ("escn_energy_head", "escn_force_head"),
}
_DENS_HEADS = ("eqV2_DeNS_scalar_head", "eqV2_DeNS_vector_head")
_OF_DENS = (
    "use_force_encoding",
    "use_noise_schedule_sigma_encoding",
    "use_denoising_energy",
    "predict_noise",
)
_REFERENCES = ("use_energy_lin_ref", "load_energy_lin_ref")
_WITHOUT_EFFECT = ("use_tp_reparam", "use_grid", *_REFERENCES, *_OF_DENS)
"""Arguments of ours that change nothing in what an exported model predicts for ordinary structures."""


@dataclass(frozen=True)
class Stock:
    """A model of fairchem's.

    Attributes:
        model: its settings, as under ``config.model``.
        built: with any weights.
        moved: from our weights to its own.
        said: what there is to say about the way.
    """

    model: dict[str, Any]
    built: nn.Module
    moved: Callable[[Weights], Weights]
    said: list[str]


def plain_flat(family: str, settings: Mapping[str, Any]) -> Stock:
    """Return fairchem's flat model without DeNS: ``equiformer_v2`` or ``escn``.

    Args:
        family: see `fairchem_dens.checkpoints.layouts.Layout`.
        settings: arguments of our model.

    Raises:
        ValueError: there is no such model or setting.
    """
    arguments = _arguments(family, settings, _flat_class(family))
    return Stock(
        {"name": family, **arguments}, _flat_class(family)(**arguments), _without_dens, _said_of_stripping()
    )


def plain_hydra(family: str, settings: Mapping[str, Any]) -> Stock:
    """Return fairchem's backbone and heads without DeNS.

    Args:
        family: see `plain_flat`.
        settings: arguments of our model.

    Raises:
        ValueError: there is no such model or setting.
    """
    _flat_class(family)
    blocks = {ENERGY_BLOCK: f"energy.{ENERGY_BLOCK}", FORCE_BLOCK: f"forces.{FORCE_BLOCK}"}
    return _hydra(
        f"{family}_backbone",
        _arguments(family, settings, _BACKBONES[family]),
        {name: {"module": module} for name, module in zip(("energy", "forces"), _HEADS[family], strict=True)},
        lambda weights: with_heads(_without_dens(weights), blocks),
        _said_of_stripping(),
    )


def dens_hydra(family: str, settings: Mapping[str, Any]) -> Stock:
    """Return fairchem's own EquiformerV2 with DeNS: the same network in backbone and heads.

    Args:
        family: see `plain_flat`.
        settings: arguments of our model.

    Raises:
        ValueError: there is no such model or setting.
    """
    if family != "equiformer_v2":
        raise ValueError(
            f"fairchem-core 1.10.0 has DeNS for EquiformerV2 alone, and the checkpoint is of {family}: leave "
            "DeNS out with --plain."
        )
    arguments = _arguments(family, settings, EqV2DeNSBackbone)
    energy, forces = _DENS_HEADS
    return _hydra(
        "equiformer_v2_dens_backbone",
        arguments,
        {
            "energy": {"module": energy, "use_denoising": settings.get("use_denoising_energy", True)},
            "forces": {"module": forces},
        },
        lambda weights: with_heads(
            weights,
            {
                ENERGY_BLOCK: "energy.scalar_block",
                FORCE_BLOCK: "forces.vector_block",
                NOISE_BLOCK: f"forces.{NOISE_BLOCK}",
            },
        ),
        ["force embedding and noise head are those of fairchem's own backbone and heads with DeNS"],
    )


def _hydra(
    backbone: str,
    arguments: Mapping[str, Any],
    heads: dict[str, Any],
    moved: Callable[[Weights], Weights],
    said: list[str],
) -> Stock:
    model = {
        "otf_graph": arguments["otf_graph"],
        # Energies and forces at the top of the output, where trainers look for them.
        "pass_through_head_outputs": True,
        "backbone": {"model": backbone, **arguments},
        "heads": heads,
    }
    return Stock({"name": "hydra", **model}, HydraModel(**model), moved, said)


def _flat_class(family: str) -> type[nn.Module]:
    if family not in _FLAT:
        raise ValueError(
            f"fairchem-core 1.10.0 has no {family} like that of the paper: it cannot be exported."
        )
    return _FLAT[family]


def _arguments(family: str, settings: Mapping[str, Any], model: type[nn.Module]) -> dict[str, Any]:
    """Return the arguments of a stock model, all of them written out: defaults differ."""
    ours = inspect.signature(_OURS[family]).parameters
    full = {name: ours[name].default for name in argument_names(_OURS[family])} | dict(settings)
    if not full["regress_forces"]:
        raise ValueError("'model.regress_forces' is False: only models with a force head are exported.")
    known = argument_names(model)
    changed = [
        name
        for name, value in full.items()
        if name not in (*known, *_WITHOUT_EFFECT) and value != ours[name].default
    ]
    if changed:
        raise ValueError(
            f"fairchem's {model.__name__} has no 'model.{changed[0]}', which is {full[changed[0]]!r} here: "
            "it would predict something else."
        )
    return {name: value for name, value in full.items() if name in known and name not in _REFERENCES}


def _without_dens(weights: Weights) -> Weights:
    """Fold what DeNS adds to every atom into the embedding of its element, and leave the rest out.

    The sums are taken in the order of the forward pass, so that they round alike.
    """
    plain = {name: value for name, value in weights.items() if not is_dens(name)}
    embedding = plain["sphere_embedding.weight"]
    for part in ("force_embedding", "noise_schedule_sigma_embedding"):
        if f"{part}.bias" in weights:
            embedding = embedding + weights[f"{part}.bias"].to(embedding.dtype)
    return plain | {"sphere_embedding.weight": embedding}


def _said_of_stripping() -> list[str]:
    return [
        "left out force embedding and noise head; what the former adds without forces is in the embedding of "
        "the elements"
    ]
