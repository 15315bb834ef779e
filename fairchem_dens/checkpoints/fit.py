"""Whether the weights of a checkpoint are those of a model, and in a few words why not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import fairchem_dens
from fairchem_dens.checkpoints.layouts import is_dens, recognised
from fairchem_dens.checkpoints.versions import CHECKPOINT_VERSION, MARK, version_of
from fairchem_dens.checkpoints.weights import Weights, weights_of
from fairchem_dens.models.state import is_constant

_SHOWN = 3


def require_fit(
    checkpoint: Mapping[str, Any], model: nn.Module, settings: Mapping[str, Any], file: str
) -> None:
    """Raise unless the weights of a checkpoint have the names and shapes of a model's parameters.

    Args:
        checkpoint: of any layout.
        model: without wrappers.
        settings: of the model, as under ``config.model``.
        file: the checkpoint's, for messages.

    Raises:
        ValueError: names the first parameters on both sides, the settings that differ, and both versions.
    """
    weights = weights_of(checkpoint)
    found = misfit(weights, model)
    if found is None:
        return
    config = checkpoint.get("config") or {}
    writer = (config.get(MARK) or {}).get("version")
    raise ValueError(
        f"The checkpoint '{file}' (version {version_of(checkpoint)}, "
        f"{f'written by fairchem_dens {writer}' if writer else 'not written by this package'}) does not fit "
        f"the model '{settings.get('name', type(model).__name__)}' (version {CHECKPOINT_VERSION}, "
        f"fairchem_dens {fairchem_dens.__version__}). {found}{_other_settings(config, settings)}"
        f"{_advice(weights, model)}"
    )


def load(weights: Weights, model: nn.Module) -> None:
    """Give a model weights that fit it; constants that the weights lack stay as they are.

    Raises:
        ValueError: a constant among the weights is another one than the model's.
    """
    constants = {name: value for name, value in model.state_dict().items() if is_constant(name)}
    model.load_state_dict(constants | weights)


def misfit(weights: Mapping[str, Tensor], model: nn.Module) -> str | None:
    """Say how weights differ in name or shape from the parameters of a model; None if they do not.

    Models know best which constants of a file they pass over. So where all parameters are there, the model is
    given the weights, and asked what is left.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    # GemNet's scale factors may come in a file of their own.
    ours = [name for name in expected if not is_constant(name) and not name.endswith(".scale_factor")]
    missing = [name for name in ours if name not in found]
    surplus = [name for name in found if name not in expected and not is_constant(name)]
    reshaped = [
        f"{name} ({_shape(found[name])} in the file, {_shape(expected[name])} in the model)"
        for name in ours
        if name in found and found[name] != expected[name]
    ]
    if surplus and not missing and not reshaped:
        unexpected = model.load_state_dict(dict(weights), strict=False).unexpected_keys
        surplus = [name for name in surplus if name in unexpected]
    said = [
        f"{what}: {_first(names)}."
        for what, names in (
            ("Missing in the file", missing),
            ("Not in the model", surplus),
            ("Of another shape", reshaped),
        )
        if names
    ]
    degrees = lmax_of(weights), lmax_of(model.state_dict())
    if None not in degrees and degrees[0] != degrees[1]:
        said.append(
            f"The weights are for 'lmax_list: [{degrees[0]}]' and the model has 'lmax_list: [{degrees[1]}]'."
        )
    return " ".join(said) or None


def lmax_of(weights: Mapping[str, Tensor]) -> int | None:
    """Return the highest degree that weights of EquiformerV2 or eSCN, of the flat layout, are made for."""
    for name, value in weights.items():
        if name == "blocks.0.ga.proj.weight":
            return value.shape[0] - 1
        if name == "sphharm_weights.0":
            return math.isqrt(value.shape[1]) - 1
    return None


def _first(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a number"


def _other_settings(config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    theirs = config.get("model")
    if not isinstance(theirs, Mapping):
        return ""
    differing = [
        f"'{key}' is {theirs[key]!r} in the file and {settings[key]!r} in the model"
        for key in theirs
        if key in settings and key != "name" and theirs[key] != settings[key]
    ]
    return f" Of their settings, {_first(differing)}." if differing else ""


def _advice(weights: Weights, model: nn.Module) -> str:
    layout = recognised(weights)
    wants_dens = any(is_dens(name) for name in model.state_dict())
    if layout.is_hydra:
        return " It is of fairchem's hydra layout: make `fairchem-dens checkpoint import` of it first."
    if wants_dens and layout.family is not None and not layout.has_dens:
        return (
            " It is a plain model, which has no DeNS: `fairchem-dens checkpoint import --new-dens` of it "
            "adds that, untrained."
        )
    if layout.has_dens and not wants_dens:
        return " It has DeNS, which the model lacks: make `fairchem-dens checkpoint strip` of it first."
    if "energy_lin_ref" in weights and "energy_lin_ref" not in model.state_dict():
        return (
            " `fairchem-dens checkpoint import` of it turns 'energy_lin_ref' into element references of the "
            "checkpoint."
        )
    return ""
