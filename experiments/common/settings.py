"""From an experiment's YAMLs to the settings of its runs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a plain YAML."""
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def read_run_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML of fairchem with all that it includes; where both set a key, the file itself counts.

    Raises:
        ValueError: two includes set the same key.
    """
    from fairchem.core.common.utils import load_config

    settings, _, conflicts = load_config(str(file))
    if conflicts:
        raise ValueError(f"'{file}': two of its includes set the same keys: {conflicts}")
    return copy.deepcopy(settings)


def merged(settings: Mapping[str, Any], *others: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with others put over them, key by key; lists are replaced."""
    result = copy.deepcopy(dict(settings))
    for other in others:
        for key, value in other.items():
            if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
                result[key] = merged(result[key], value)
            else:
                result[key] = copy.deepcopy(value)
    return result


def schedule(frames: int, batch_size: int, steps: int, evaluations: int) -> dict[str, int]:
    """Return ``max_epochs`` and ``eval_every`` for about so many steps, the last of which is evaluated.

    Args:
        frames: of the training set.
        batch_size: structures in a step.
        steps: wanted; rounded to whole epochs.
        evaluations: wanted at most, evenly spread.
    """
    per_epoch = math.ceil(frames / batch_size)
    epochs = max(1, round(steps / per_epoch))
    total = epochs * per_epoch
    between = min(
        (count for count in range(1, total + 1) if total % count == 0 and total // count <= evaluations),
        default=total,
    )
    # An evaluation costs time and a checkpoint nothing to learn from: both at the same steps.
    return {"max_epochs": epochs, "eval_every": between, "checkpoint_every": between}
