"""Reading and writing checkpoints so that a kill loses nothing and no file runs code."""

from __future__ import annotations

import _codecs
import errno
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fairchem_dens.checkpoints.versions import CHECKPOINT_VERSION, upgraded, version_of
from fairchem_dens.data.folder import refuse_existing
from fairchem_dens.errors import CheckpointNotWritten

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
    _on_disk(Path(written))
    Path(written).replace(final)
    _on_disk(final.parent)  # the new name as well
    return str(final)


def _on_disk(path: Path) -> None:
    """Wait until a file or folder would survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems do not know this for folders; of a file it says that the data are not there.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


@contextmanager
def replacing(final: str | Path) -> Iterator[Path]:
    """Give a path to write a checkpoint to, which takes the place of another one once it is complete.

    After an exception the other one is as it was, and nothing is left of the new one. A block that writes
    nothing changes nothing.

    Args:
        final: path of the checkpoint.

    Yields:
        A path in the same folder.

    Raises:
        CheckpointNotWritten: the disk is full, or writing failed for another reason.
    """
    final = Path(final)
    beside = final.with_name(aside(final.name))
    try:
        yield beside
        if beside.exists():
            put_in_place(beside, final.name)
    except (OSError, RuntimeError) as error:
        # torch writes in C++ and raises a RuntimeError that does not say why.
        if not isinstance(error, OSError) and not beside.exists() and final.parent.is_dir():
            raise  # about something else
        raise CheckpointNotWritten(_why_not_written(final, beside, error)) from error
    finally:
        beside.unlink(missing_ok=True)


def _why_not_written(final: Path, beside: Path, error: Exception) -> str:
    size = beside.stat().st_size if beside.exists() else 0
    try:
        free = shutil.disk_usage(final.parent).free
    except OSError:
        free = None
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (free is not None and free < size)
    reason = "the disk is full" if full else f"{type(error).__name__}: {str(error).splitlines()[0]}"
    room = "" if free is None else f", {free / 2**20:.1f} MiB free"
    stands = "The file that was there before is as it was" if final.exists() else "There was none before"
    return (
        f"'{final}' could not be written: {reason} ({size / 2**20:.1f} MiB were written{room}). {stands}. "
        "Make room, and start the run again: it goes on from its last checkpoint."
    )


def remove_unfinished(folder: str | Path) -> None:
    """Remove what a killed run left half written."""
    for path in Path(folder).glob(f".*{_ASIDE}*"):
        path.unlink(missing_ok=True)


def write(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint as a new file.

    Raises:
        FileExistsError: there is a file of that name.
        FileNotFoundError: its folder does not exist.
        CheckpointNotWritten: see `replacing`.
    """
    path = Path(path)
    refuse_existing(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"There is no folder '{path.parent}' to write '{path.name}' into.")
    with replacing(path) as beside:
        torch.save(plain(checkpoint), beside)


def read(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint, without running any code that it may hold, as one of the current version.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, newer than this package, or holds something else than tensors and
            plain values.
    """
    return upgraded(read_as_written(path, map_location))


def read_as_written(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint as `read` does, and leave it at the version that it has.

    Raises:
        FileNotFoundError, ValueError: see `read`.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint '{path}'.")
    try:
        with _plain_objects_allowed():
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises nearly anything on a damaged file
        raise ValueError(f"'{path}' cannot be read as a checkpoint: {_why(error)}") from error
    if not isinstance(checkpoint, dict) or not _is_state_dict(checkpoint.get("state_dict")):
        raise ValueError(f"'{path}' holds no 'state_dict' with weights: it is not a checkpoint of a model.")
    if not isinstance(checkpoint.get("config") or {}, dict):
        raise ValueError(f"'{path}' holds a 'config' that is no mapping: it is not a checkpoint of fairchem.")
    version = version_of(checkpoint)
    if version > CHECKPOINT_VERSION:
        raise ValueError(
            f"'{path}' has checkpoint version {version}, this fairchem_dens reads up to "
            f"{CHECKPOINT_VERSION}: install a newer fairchem_dens."
        )
    return checkpoint


def _is_state_dict(found: Any) -> bool:
    return isinstance(found, dict) and bool(found) and all(torch.is_tensor(v) for v in found.values())


def _why(error: Exception) -> str:
    """Say what torch did not like, without its advice to trust the file."""
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused:
        return (
            f"it holds an object that only code can load ('{refused[1]}'). Nothing of it was run: a file of "
            "weights needs no code, and one that does can run any program."
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (
        "it is damaged, cut off, or something else. torch says: "
        f"{lines[-1][:200] if lines else type(error).__name__}"
    )


@contextmanager
def _plain_objects_allowed() -> Iterator[None]:
    """Let torch's safe loader take numpy's numbers and paths, which fairchem leaves in configurations."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals(_plain_objects())
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _plain_objects() -> list[Any]:
    make_scalar = np.float64(0.0).__reduce__()[0]
    objects: list[Any] = [make_scalar, np.dtype, _codecs.encode, pathlib.PosixPath]
    objects += {type(np.dtype(kind)) for kind in "?bhilqBHILQefd"}
    if hasattr(torch.serialization, "safe_globals"):
        # Since this came, one may say under which name a file knows an object: numpy 2 moved it.
        names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
        objects += [(make_scalar, name) for name in names]
    return objects


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
