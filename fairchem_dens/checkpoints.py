"""Reading and writing checkpoints so that a kill loses nothing and a file says what it is."""

from __future__ import annotations

import os
import pickle
import uuid
from pathlib import Path
from typing import Any

import torch

CHECKPOINT_VERSION = 1
"""Version of what this package adds to fairchem's checkpoints, under ``config.fairchem_dens``."""

_ASIDE = ".aside-"


def aside(file_name: str) -> str:
    """Return a name, not used before, to write ``file_name`` under until it is complete."""
    return f".{file_name}{_ASIDE}{uuid.uuid4().hex[:8]}"


def put_in_place(written: str | Path, file_name: str) -> str:
    """Give a completely written file its own name, replacing an older one in one step.

    Args:
        written: path of the file that was written aside.
        file_name: its name, in the same folder.

    Returns:
        The final path.
    """
    final = Path(written).with_name(file_name)
    with Path(written).open("rb") as file:
        os.fsync(file.fileno())
    Path(written).replace(final)
    return str(final)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what a killed run left half written."""
    for path in Path(folder).glob(f".*{_ASIDE}*"):
        path.unlink(missing_ok=True)


def read(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running any code that it may hold.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint '{path}'.")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint of tensors and plain values; it is damaged, or holds "
            "objects that only the code that wrote it can "
            f"load. torch says: {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"'{path}' holds no 'state_dict': it is not a checkpoint of a model.")
    version = (checkpoint.get("config") or {}).get("fairchem_dens", {}).get("checkpoint_version", 0)
    if version > CHECKPOINT_VERSION:
        raise ValueError(
            f"'{path}' has checkpoint version {version}, this fairchem_dens reads up to "
            f"{CHECKPOINT_VERSION}: install a newer fairchem_dens."
        )
    return checkpoint


def plain(value: Any) -> Any:
    """Return ``value`` with paths, tuples and numpy scalars made plain.

    ``torch.load(weights_only=True)`` accepts nothing else.
    """
    if isinstance(value, dict):
        return {str(key) if isinstance(key, Path) else key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "dtype") and hasattr(value, "item") and not isinstance(value, torch.Tensor):
        return value.item() if value.ndim == 0 else value.tolist()
    return value
