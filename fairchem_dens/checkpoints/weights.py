"""Weights and their moving average by name, whichever wrappers a model was saved from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fairchem_dens.models.state import is_constant

Weights = dict[str, Tensor]
"""Parameters, and perhaps constants, by name."""

_WRAPPER = "module."
_NEVER_TRAINED = ("energy_lin_ref", "sphere_points", "sphharm_weights")
"""Parameters of fairchem's models that no optimizer changes."""


def weights_of(checkpoint: Mapping[str, Any]) -> Weights:
    """Return the weights of a checkpoint, without the prefixes that data-parallel wrappers add."""
    return {unwrapped(name): value for name, value in checkpoint["state_dict"].items()}


def unwrapped(name: str) -> str:
    """Return the name of a parameter without the prefixes of data-parallel wrappers."""
    while name.startswith(_WRAPPER):
        name = name.removeprefix(_WRAPPER)
    return name


def average_of(checkpoint: Mapping[str, Any], trained: Sequence[str] | None = None) -> Weights | None:
    """Return the moving average of the weights, None where there is none.

    A file lists it by position: the order of the parameters that were trained. Those that were not are their
    own average.

    Args:
        checkpoint: of the current version.
        trained: names of the trained parameters, see `trained_names`; None tells them from the file.

    Raises:
        ValueError: the list does not fit the weights beside it.
    """
    average = checkpoint.get("ema")
    if average is None:
        return None
    weights = weights_of(checkpoint)
    names = _trained(weights, checkpoint["config"].get("model") or {}) if trained is None else trained
    shadow = average["shadow_params"]
    shapes = [tuple(weights[name].shape) for name in names if name in weights]
    if shapes != [tuple(value.shape) for value in shadow]:
        raise ValueError(
            f"The checkpoint's moving average has {len(shadow)} entries, which are not those of its "
            f"{len(names)} trained parameters: it cannot be told which belongs to which."
        )
    return weights | dict(zip(names, shadow, strict=True))


def predicting_weights(checkpoint: Mapping[str, Any], trained: Sequence[str] | None = None) -> Weights:
    """Return the weights that a checkpoint predicts with: their moving average, where it has one.

    Args:
        checkpoint: see `average_of`.
        trained: see `average_of`.

    Raises:
        ValueError: see `average_of`.
    """
    average = average_of(checkpoint, trained)
    return weights_of(checkpoint) if average is None else average


def as_average(average: Weights, trained: Iterable[str], ema: Mapping[str, Any]) -> dict[str, Any]:
    """Return a moving average as fairchem writes it.

    Args:
        average: by name.
        trained: names of the trained parameters, in the order of the model.
        ema: the one to take the settings from.
    """
    shadow = [average[name].clone() for name in trained]
    return {**ema, "shadow_params": shadow, "collected_params": []}


def trained_names(model: torch.nn.Module) -> list[str]:
    """Return the names of the parameters of a model that an optimizer changes, in their order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _trained(weights: Weights, settings: Mapping[str, Any]) -> list[str]:
    """Tell from a file which parameters its run trained, in the order of the model."""
    resting = [".denoising_pos_"] if settings.get("predict_noise") is False else []
    resting += [".backbone."] if settings.get("freeze_backbone") else []
    return [
        name
        for name in weights
        if not is_constant(name)
        and not any(part in name.split(".") for part in _NEVER_TRAINED)
        and not any(part in f".{name}" for part in resting)
    ]
