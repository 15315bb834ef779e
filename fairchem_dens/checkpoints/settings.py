"""The configuration that a checkpoint carries, for this package and for stock fairchem."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fairchem_dens import keys
from fairchem_dens.checkpoints.versions import MARK
from fairchem_dens.config import TRANSFORM_NAMES, translate_authors_keys

TRAINER = "fairchem_dens.trainer.DeNSTrainer"
_STOCK_TRAINER = "equiformerv2_forces"
_TARGETS = (keys.ENERGY, keys.FORCES)
_OUTPUTS = {
    keys.ENERGY: {"level": "system"},
    keys.FORCES: {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
}
_LOSSES = [
    {keys.ENERGY: {"fn": "mae", "coefficient": 1}},
    {keys.FORCES: {"fn": "l2mae", "coefficient": 1}},
]
_METRICS: dict[str, Any] = {
    "metrics": {keys.ENERGY: ["mae"], keys.FORCES: ["mae"]},
    "primary_metric": "forces_mae",
}


def for_this_package(
    config: Mapping[str, Any], model: type[nn.Module], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return a foreign configuration such that our trainer, and so fairchem's calculator, runs the model.

    What concerns other targets than energy and forces goes. What is missing is filled in.

    Args:
        config: of the current version.
        model: our class.
        settings: its arguments.

    Returns:
        The configuration, and what there is to say about it.
    """
    config, said = _of_targets(config, (*_TARGETS, keys.NOISE)), []
    try:
        config["optim"], config["dataset"], config["loss_functions"] = translate_authors_keys(
            config["optim"], config["dataset"], config["loss_functions"]
        )
    except ValueError as error:
        said.append(f"left the keys for DeNS in the configuration as they are: {error}")
    config["trainer"] = TRAINER
    config["model"] = {"name": f"fairchem_dens.models.{model.__name__}", **settings}
    return config, said


def for_fairchem(config: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration such that stock fairchem-core 1.10.0 builds a model of its own, without DeNS.

    Args:
        config: of this package.
        model: settings of fairchem's model.
    """
    config = _of_targets(config, _TARGETS)
    for split in ("dataset", "val_dataset", "test_dataset", "relax_dataset"):
        transforms = (config.get(split) or {}).get("transforms")
        for name in TRANSFORM_NAMES:
            (transforms or {}).pop(name, None)
    config.pop(MARK, None)
    config["trainer"] = _STOCK_TRAINER
    config["model"] = copy.deepcopy(dict(model))
    return config


def _of_targets(foreign: Mapping[str, Any], with_loss: Sequence[str]) -> dict[str, Any]:
    config = copy.deepcopy(dict(foreign))
    outputs = config.get("outputs") or {}
    config["outputs"] = {target: outputs.get(target) or _OUTPUTS[target] for target in _TARGETS}
    losses = [
        {target: settings for target, settings in entry.items() if target in with_loss}
        for entry in config.get("loss_functions") or []
    ]
    config["loss_functions"] = [entry for entry in losses if entry] or _LOSSES
    metrics = config.get("evaluation_metrics") or _METRICS
    named = metrics.get("metrics") or {}
    kept = {name: named[name] for name in named if name in (*_TARGETS, "misc")}
    config["evaluation_metrics"] = {**metrics, "metrics": kept}
    for key in ("task", "optim", "dataset", "cmd"):
        config[key] = config.get(key) or {}
    # fairchem's calculator takes this key out, and stumbles where there is none.
    config["dataset"].setdefault("src", None)
    transforms = config["dataset"].get("transforms") or {}
    for name in ("normalizer", "element_references"):
        if isinstance(entries := transforms.get(name), dict):
            transforms[name] = {key: entries[key] for key in entries if key in (*_TARGETS, "file", "fit")}
    config["logger"] = config.get("logger") or "tensorboard"
    return copy.deepcopy(config)
