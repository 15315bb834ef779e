"""The version of a checkpoint, and the way from each version to the next.

======= ==========================================================================================
version what the file is
======= ==========================================================================================
0       without our mark: written by the authors' code, by fairchem, or by what came before both
1       ``config.fairchem_dens`` holds ``checkpoint_version`` and the ``version`` of this package;
        targets of normalisers are called ``energy`` and ``forces`` and have ``mean`` and ``rmsd``
======= ==========================================================================================
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fairchem.core.common.utils import update_config

import fairchem_dens
from fairchem_dens.keys import ENERGY, FORCES

CHECKPOINT_VERSION = 1
"""What this package writes."""

MARK = "fairchem_dens"
"""The key of ``config`` under which a file says that it is ours."""

_OLD_TARGETS = {"target": ENERGY, "grad_target": FORCES}
_NOISE_TARGET = "denoising_pos_target"
"""The authors' normaliser of the noise: its σ, which is a setting of the corruption here."""


def mark() -> dict[str, Any]:
    """Return what a file of this version says under `MARK`."""
    return {"version": fairchem_dens.__version__, "checkpoint_version": CHECKPOINT_VERSION}


def version_of(checkpoint: Mapping[str, Any]) -> int:
    """Return the version of a checkpoint, 0 where it has no mark.

    Raises:
        ValueError: the mark is not one.
    """
    found = (checkpoint.get("config") or {}).get(MARK, {})
    version = found.get("checkpoint_version", 0) if isinstance(found, Mapping) else found
    if isinstance(version, bool) or not isinstance(version, int) or version < 0:
        raise ValueError(
            f"The checkpoint's 'config.{MARK}.checkpoint_version' must be a whole number, found {version!r}."
        )
    return version


def upgraded(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint of any earlier version as one of the current version; the given one stays as it is.

    Raises:
        ValueError: it is newer than this package.
    """
    while (version := version_of(checkpoint)) != CHECKPOINT_VERSION:
        if version not in _UPGRADES:
            raise ValueError(
                f"The checkpoint has version {version}, this fairchem_dens reads up to {CHECKPOINT_VERSION}: "
                "install a newer fairchem_dens."
            )
        checkpoint = _UPGRADES[version](checkpoint)
    return checkpoint


def _from_0_to_1(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Call things by the names that fairchem-core 1.10.0 has for them."""
    config = _with_new_names(copy.deepcopy(checkpoint.get("config") or {}))
    config[MARK] = {"version": None, "checkpoint_version": 1}
    normalizers = {
        _OLD_TARGETS.get(target, target): _mean_and_rmsd(state)
        for target, state in (checkpoint.get("normalizers") or {}).items()
        if target != _NOISE_TARGET
    }
    return {
        "amp": None,
        **checkpoint,
        "config": config,
        "normalizers": normalizers,
        "elementrefs": checkpoint.get("elementrefs") or {},
    }


def _with_new_names(config: dict[str, Any]) -> dict[str, Any]:
    if isinstance(config.get("model"), str):
        config["model"] = {"name": config["model"], **(config.pop("model_attributes", None) or {})}
    if "loss_fns" in config or "dataset" in (config.get("task") or {}):
        # What fairchem cannot read stays as it is: the weights do not depend on it.
        with contextlib.suppress(KeyError, NotImplementedError):
            config = update_config({"dataset": {}, "optim": {}, **config})
    return config


def _mean_and_rmsd(state: Mapping[str, Any]) -> dict[str, Any]:
    names = {"std": "rmsd"}
    return {names.get(name, name): torch.as_tensor(value) for name, value in state.items()}


_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _from_0_to_1}
"""From each version to the next."""
