"""From foreign checkpoints to ours, from ours to fairchem's, and to a plain model without DeNS.

Each function takes a checkpoint and returns another one; nothing is read or written. The moving average of
the weights goes the same way as the weights. Optimizer and schedule do not: only a run of the same trainer
can go on with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fairchem_dens.checkpoints import references, stock
from fairchem_dens.checkpoints.fit import load, misfit
from fairchem_dens.checkpoints.layouts import Layout, flat_settings, flattened, is_dens, recognised
from fairchem_dens.checkpoints.settings import for_fairchem, for_this_package
from fairchem_dens.checkpoints.versions import MARK, mark, upgraded
from fairchem_dens.checkpoints.weights import Weights, as_average, average_of, trained_names, weights_of
from fairchem_dens.keys import ENERGY, FORCES
from fairchem_dens.models import EquiformerDeNS, EquiformerV2DeNS, ESCNDeNS

MODELS: Mapping[str, type[nn.Module]] = {
    "equiformer_v2": EquiformerV2DeNS,
    "escn": ESCNDeNS,
    "equiformer": EquiformerDeNS,
}
"""Our model of each family."""

Average = Literal["keep", "use", "drop"]
"""What becomes of the moving average of the weights: it stays beside them, becomes the weights, or goes."""

_CARRIED = ("step", "epoch", "val_metrics", "best_val_metric", "primary_metric")
_REFERENCES_IN_MODEL = ("use_energy_lin_ref", "load_energy_lin_ref")


class Converted(NamedTuple):
    """A checkpoint, and in a few sentences what was done to it."""

    checkpoint: dict[str, Any]
    said: list[str]


class _Parts(NamedTuple):
    """A checkpoint of ours in parts.

    Attributes:
        weights: of the flat layout.
        average: their moving average, if any.
        settings: arguments of our model.
        family: see `Layout`.
        rest: everything else in it, except for the state of a run.
    """

    weights: Weights
    average: Weights | None
    settings: dict[str, Any]
    family: str
    rest: dict[str, Any]


def import_checkpoint(
    checkpoint: Mapping[str, Any],
    *,
    model: Mapping[str, Any] | None = None,
    average: Average = "keep",
    new_dens: bool = False,
) -> Converted:
    """Turn a checkpoint of the authors' code or of fairchem into one of this package.

    Args:
        checkpoint: as it was read. One of this package is only brought to the current version.
        model: settings of the model, as in a YAML, instead of those in the checkpoint.
        average: what becomes of the moving average.
        new_dens: give a plain model, which has no DeNS, a force embedding and a noise head that are not
            trained; what it predicts stays the same.

    Raises:
        ValueError: the model is none of ours, lacks DeNS, or does not fit its settings.
    """
    is_ours = MARK in (checkpoint.get("config") or {})
    checkpoint = upgraded(dict(checkpoint))
    if is_ours and average == "keep" and _is_of_our_layout(checkpoint):
        return Converted(checkpoint, ["it is of this package already, and of the current version now"])
    if model is not None:
        checkpoint = {**checkpoint, "config": {**checkpoint["config"], "model": dict(model)}}
    parts, said = _taken_apart(checkpoint, with_average=average != "drop", new_dens=new_dens)
    built = _build(parts)
    missing = {name: value for name, value in built.state_dict().items() if name not in parts.weights}
    fresh = {name: value for name, value in missing.items() if new_dens and is_dens(name)}
    if fresh:
        said.append("added a force embedding and a noise head, which are not trained")
    weights = _checked(fresh | parts.weights, built)
    # Said, because a trainer without a loss on noise would take the noise head for one that was not trained.
    settings = {"predict_noise": True, **parts.settings}
    config, about = for_this_package(parts.rest["config"], type(built), settings)
    said += about
    config[MARK] = mark()
    imported = {**parts.rest, "config": config, "state_dict": weights}
    if "optimizer" in checkpoint:
        said.append("left out optimizer and schedule: fine-tune from the new file, it cannot be resumed")
    averaged = None if parts.average is None else fresh | parts.average
    return _finished(imported, averaged, average, trained_names(built), said, "predictions use the average")


def export_checkpoint(
    checkpoint: Mapping[str, Any], *, with_dens: bool = True, average: Average = "keep"
) -> Converted:
    """Turn a checkpoint into fairchem's layout of backbone and heads, which stock fairchem-core 1.10.0 loads.

    Args:
        checkpoint: of this package, or one that `import_checkpoint` takes.
        with_dens: use fairchem's own backbone and heads for DeNS, which compute the same and lose nothing;
            else its plain ones, see `strip_checkpoint`. eSCN has only the latter.
        average: what becomes of the moving average.

    Raises:
        ValueError: see `import_checkpoint`; or fairchem has no such model or setting.
    """
    return _to_stock(checkpoint, stock.dens_hydra if with_dens else stock.plain_hydra, average)


def strip_checkpoint(checkpoint: Mapping[str, Any], *, average: Average = "keep") -> Converted:
    """Turn a checkpoint into one of a plain EquiformerV2 or eSCN that predicts exactly the same.

    Force embedding and noise head go. What the former adds to every atom also without forces, its bias on
    l = 0 and that of the encoding of σ, becomes part of the embedding of each element.

    Args:
        checkpoint: of this package, or one that `import_checkpoint` takes.
        average: what becomes of the moving average.

    Raises:
        ValueError: see `import_checkpoint`; or fairchem has no such model or setting.
    """
    return _to_stock(checkpoint, stock.plain_flat, average)


def _to_stock(
    checkpoint: Mapping[str, Any],
    target_of: Callable[[str, Mapping[str, Any]], stock.Stock],
    average: Average,
) -> Converted:
    parts, said = _taken_apart(upgraded(dict(checkpoint)), with_average=average != "drop", new_dens=False)
    ours = _build(parts)
    weights = _checked(parts.weights, ours)
    target = target_of(parts.family, parts.settings)
    of_package, _ = for_this_package(parts.rest["config"], type(ours), parts.settings)
    exported = {
        **parts.rest,
        "config": for_fairchem(of_package, target.model),
        "state_dict": _checked(target.moved(weights), target.built),
    }
    averaged = None if parts.average is None else target.moved(parts.average)
    used = "fairchem's --mode validate uses the average, its calculator the weights; --ema use makes them one"
    return _finished(exported, averaged, average, trained_names(target.built), [*said, *target.said], used)


def _is_of_our_layout(checkpoint: Mapping[str, Any]) -> bool:
    layout = recognised(weights_of(checkpoint))
    return layout.family is not None and layout.has_dens and not layout.is_hydra


def _taken_apart(
    checkpoint: Mapping[str, Any], *, with_average: bool, new_dens: bool
) -> tuple[_Parts, list[str]]:
    """Take a checkpoint of the current version and of any layout apart, as one of ours."""
    weights = weights_of(checkpoint)
    average = average_of(checkpoint) if with_average else None
    layout = recognised(weights)
    if layout.family is None:
        raise ValueError(
            "The weights are not of EquiformerV2, eSCN or Equiformer: the first ones are called "
            f"{', '.join(list(weights)[:3])}."
        )
    if not layout.has_dens and not new_dens:
        raise ValueError(
            "It is of a plain model: it has no force embedding or no noise head, so it was not trained with "
            "DeNS, or was stripped of it. `fairchem-dens checkpoint import --new-dens` adds them, untrained, "
            "to begin with DeNS from it."
        )
    said = [f"layout: {layout}"]
    settings = _settings_of(checkpoint, layout)
    if layout.is_hydra:
        weights, left_out = flattened(weights)
        average = None if average is None else flattened(average)[0]
        said += [f"left out the head '{head}' ({count:,} parameters)" for head, count in left_out.items()]
    normalizers = {
        target: {name: value.detach().clone().float().reshape(()) for name, value in state.items()}
        for target, state in checkpoint["normalizers"].items()
        if target in (ENERGY, FORCES)
    }
    said += _said_of_normalizers(checkpoint["normalizers"], normalizers)
    found = {target: state for target, state in checkpoint["elementrefs"].items() if target == ENERGY}
    weights, elementrefs, about = references.taken_out(weights, normalizers, found)
    if average is not None:
        average.pop(references.IN_MODEL, None)
    rest = {
        **{key: checkpoint[key] for key in _CARRIED if key in checkpoint},
        "normalizers": normalizers,
        "elementrefs": elementrefs,
        "config": checkpoint["config"],
        "amp": None,
        "ema": None if average is None else checkpoint["ema"],
    }
    settings = {name: value for name, value in settings.items() if name not in _REFERENCES_IN_MODEL}
    return _Parts(weights, average, settings, layout.family, rest), [*said, *about]


def _settings_of(checkpoint: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    model = checkpoint["config"].get("model")
    if not isinstance(model, Mapping):
        raise ValueError(
            f"It does not say which settings its model has ('config.model', layout: {layout}): give the YAML "
            "of its run with --config-yml."
        )
    return flat_settings(model)[1]


def _build(parts: _Parts) -> nn.Module:
    """Build our model the same way each time, without touching anybody's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[parts.family](**parts.settings)


def _checked(weights: Weights, model: nn.Module) -> Weights:
    """Give a model its weights and return its state; the model itself compares the constants among them."""
    found = misfit(weights, model)
    if found is not None:
        raise ValueError(f"The weights do not fit the settings of their model. {found}")
    load(weights, model)
    return {name: value.clone() for name, value in model.state_dict().items()}


def _finished(
    checkpoint: dict[str, Any],
    averaged: Weights | None,
    average: Average,
    trained: list[str],
    said: list[str],
    used: str,
) -> Converted:
    """Put the moving average where it is wanted; ``used`` says who uses it if it is kept."""
    weights: dict[str, Tensor] = checkpoint["state_dict"]
    if averaged is None:
        about = {
            "keep": "there is no moving average of the weights",
            "use": "there is no moving average of the weights: they are as they were",
            "drop": "left out the moving average of the weights, if there was one",
        }[average]
    elif average == "use":
        weights = weights | {name: averaged[name] for name in trained}
        checkpoint = {**checkpoint, "state_dict": weights, "ema": None}
        about = "made the moving average the weights; the file holds no other"
    else:
        checkpoint = {**checkpoint, "ema": as_average(averaged, trained, checkpoint["ema"])}
        about = f"kept the moving average beside the weights ({used})"
    return Converted(checkpoint, [*said, about])


def _said_of_normalizers(found: Mapping[str, Any], kept: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    return [
        *(
            f"normaliser of {target}: mean {float(state['mean']):.6g}, rmsd {float(state['rmsd']):.6g}"
            for target, state in kept.items()
        ),
        *(f"no normaliser of {target} in the file" for target in (ENERGY, FORCES) if target not in kept),
        *(f"left out the normaliser of {target}" for target in found if target not in kept),
    ]
