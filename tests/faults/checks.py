"""What must hold of the files of a run, at any moment and at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

CHECKPOINTS = ("checkpoint.pt", "best_checkpoint.pt")
_OF_THE_RUN = ("config",)
"""What differs between two runs of one YAML: their names and folders."""


def read(file: Path) -> dict[str, Any]:
    """Return a checkpoint as torch 2.6 and later read it by default."""
    return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]


def readable(folder: Path, before: dict[str, int]) -> tuple[dict[str, int], list[str]]:
    """Look at the checkpoints of a run that has just died.

    Args:
        folder: its folder of checkpoints.
        before: step of each checkpoint when it was last looked at; that of the best one is -1.

    Returns:
        The same for now, and what is wrong.
    """
    now, wrong = {}, []
    for name in CHECKPOINTS:
        file = folder / name
        if not file.exists():
            if name in before:
                wrong.append(f"{name} was there and is gone")
            continue
        try:
            now[name] = read(file).get("step", -1)
        except Exception as error:
            wrong.append(f"{name} cannot be read ({type(error).__name__}: {error})")
            continue
        if now[name] < before.get(name, -1):
            wrong.append(f"{name} went back from step {before[name]} to step {now[name]}")
    return now, wrong


def half_written(folder: Path) -> int:
    """Return how many files beside the checkpoints a kill has left half written."""
    return len(list(folder.glob(".*"))) if folder.is_dir() else 0


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Return the places at which two values, such as checkpoints, are not the same to the last bit."""
    if isinstance(one, torch.Tensor | np.ndarray):
        equal = torch.equal if isinstance(one, torch.Tensor) else np.array_equal
        return [] if type(one) is type(other) and one.dtype == other.dtype and equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        return [
            place
            for name in names
            if where or name not in _OF_THE_RUN
            for place in (
                differences(one[name], other[name], f"{where}.{name}".lstrip("."))
                if name in one and name in other
                else [f"{where}.{name}".lstrip(".")]
            )
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [where]
        pairs = enumerate(zip(one, other, strict=True))
        return [place for index, (a, b) in pairs for place in differences(a, b, f"{where}[{index}]")]
    return [] if one == other else [where]


def mismatches(run_dir: Path, undisturbed: str, name: str) -> list[str]:
    """Return what differs between a run and the undisturbed one: checkpoints, and predictions of the best."""
    found = []
    for file in CHECKPOINTS:
        if not (run_dir / "checkpoints" / name / file).exists():
            found.append(f"{file} is missing")
            continue
        one, other = (read(run_dir / "checkpoints" / run / file) for run in (undisturbed, name))
        found += [f"{file}: {place}" for place in differences(one, other)]
    results = run_dir / "results"
    for file in sorted((results / undisturbed).glob("*.npz")):
        if not (results / name / file.name).exists():
            found.append(f"{file.name} is missing")
            continue
        with np.load(file) as one, np.load(results / name / file.name) as other:
            found += [f"{file.name}: {place}" for place in differences(dict(one), dict(other))]
    return found
