"""One file's frames, read, labelled and kept on disk until everything is written.

A part is two files: ``KEY.frames`` with the pickled structures one after the other, and ``KEY.npz`` with a
row for every frame. The second is written last, so a part that has it is complete. The key is made of the
source's path, size and time of change and of all that reading depends on: what changed since is read anew.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ase
import numpy as np
from ase import Atoms

from fairchem_dens.data.from_ase import labels, sources
from fairchem_dens.data.from_ase.filters import Reason, reason_of_frame
from fairchem_dens.data.from_ase.settings import ReadSettings
from fairchem_dens.data.npz import write_npz

_LAYOUT = 1
"""Raised whenever a part made by older code must not be used."""

_FIELDS = {
    "number": "i8",  # in the source
    "offset": "i8",  # of the structure in the part, -1 where the frame is left out
    "system": "i4",  # place in `names`, -1 where the frame names none
    "fid": "i8",  # -1 where the frame names none
    "composition": "i4",  # place in `compositions`
    "natoms": "i4",
    "free": "i4",  # atoms that are not fixed
    "energy": "f8",  # eV, not a number where there is none
    "max_force": "f8",  # eV/Å, of any atom
    "free_squares": "f8",  # (eV/Å)², sum over the components of the forces on free atoms
    "reason": "u1",
    "tags_by_rule": "?",
}
FRAME = np.dtype(list(_FIELDS.items()))
"""What is remembered of a frame."""


@dataclass(frozen=True)
class Part:
    """What is known of a file's frames.

    Attributes:
        frames: (n,) of type `FRAME`, in the order of the file.
        names: systems that frames name.
        compositions: chemical formulas of frames.
        database: whether each frame is a row of its own, not a step of a trajectory.
        unreadable: why the file could not be read, empty if it could.
    """

    frames: np.ndarray
    names: list[str]
    compositions: list[str]
    database: bool
    unreadable: str = ""


@dataclass(frozen=True)
class Task:
    """A file to read.

    Attributes:
        path: the file.
        settings: how to read it.
        file: part to make, without suffix; None keeps no structures.
        skip_unreadable: return a part that says so instead of raising.
    """

    path: Path
    settings: ReadSettings
    file: Path | None
    skip_unreadable: bool


def key_of(path: Path, settings: ReadSettings) -> str:
    """Name a part by all that its content depends on."""
    stat = path.stat()
    content = [_LAYOUT, ase.__version__, str(path), stat.st_size, stat.st_mtime_ns, asdict(settings)]
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


def load(task: Task) -> Part | None:
    """Return what is on disk of a task, None if that is not complete.

    A file that could not be read counts only where such files are left out.
    """
    if task.file is None or not (index := task.file.with_suffix(".npz")).is_file():
        return None
    with np.load(index, allow_pickle=False) as arrays:
        part = Part(frames=arrays["frames"], **json.loads(str(arrays["rest"])))
    return part if task.skip_unreadable or not part.unreadable else None


def make(task: Task) -> Part:
    """Read a file; on disk, leave the structures of the frames that are not left out.

    Raises:
        UnreadableError: it cannot be read, and ``skip_unreadable`` is False.
        ValueError: a label has the wrong shape, or a frame does not name its system; names file and frame.
    """
    try:
        part = _read(task)
    except sources.UnreadableError as error:
        if not task.skip_unreadable:
            raise
        part = Part(np.empty(0, FRAME), [], [], database=False, unreadable=str(error))
    if task.file is not None:
        rest = {name: value for name, value in vars(part).items() if name != "frames"}
        write_npz(task.file.with_suffix(".npz"), frames=part.frames, rest=np.array(json.dumps(rest)))
    return part


def structures(file: Path, frames: np.ndarray) -> Iterator[tuple[Atoms, np.ndarray]]:
    """Yield structure and forces (N, 3) of frames of a part."""
    with file.with_suffix(".frames").open("rb") as stream:
        for offset in frames["offset"].tolist():
            stream.seek(offset)
            yield pickle.load(stream)


def _read(task: Task) -> Part:
    format_name = sources.format_of(task.path, task.settings.format)
    rows: list[tuple[Any, ...]] = []
    names: dict[str, int] = {}
    compositions: dict[str, int] = {}
    frames = task.file.with_suffix(".frames") if task.file is not None else None
    with frames.open("wb") if frames is not None else nullcontext() as stream:
        for number, atoms in sources.read_frames(task.path, format_name):
            try:
                rows.append(_frame(number, atoms, task.settings, names, compositions, stream))
            except ValueError as error:
                raise ValueError(f"'{task.path}', frame {number}: {error}.") from error
    return Part(
        frames=np.array(rows, dtype=FRAME),
        names=list(names),
        compositions=list(compositions),
        database=format_name in sources.DATABASES,
    )


def _frame(
    number: int,
    atoms: Atoms,
    settings: ReadSettings,
    names: dict[str, int],
    compositions: dict[str, int],
    stream: BinaryIO | None,
) -> tuple[Any, ...]:
    energy = labels.energy_of(atoms, settings.energy_key)
    forces = labels.forces_of(atoms, settings.forces_key)
    fixed = labels.fixed_atoms(atoms) if settings.fixed == "file" else np.zeros(len(atoms), dtype=bool)
    tags, by_rule = labels.tags_of(atoms, fixed, settings.tags, settings.adsorbate_elements)
    reason = reason_of_frame(atoms, energy, forces, settings)
    offset = -1
    if reason == Reason.KEPT and stream is not None:
        offset = stream.tell()
        pickle.dump((labels.bare(atoms, fixed, tags), forces), stream, protocol=5)
    max_force = free_squares = np.nan
    if forces is not None and len(atoms) > 0:
        max_force = np.linalg.norm(forces, axis=1).max()
        free_squares = np.square(forces[~fixed]).sum()
    name = _system(atoms, settings)
    fid = atoms.info.get("fid")
    values = {
        "number": number,
        "offset": offset,
        "system": -1 if name is None else names.setdefault(name, len(names)),
        "fid": int(fid) if fid is not None else -1,
        "composition": compositions.setdefault(atoms.get_chemical_formula(), len(compositions)),
        "natoms": len(atoms),
        "free": int((~fixed).sum()),
        "energy": np.nan if energy is None else energy,
        "max_force": max_force,
        "free_squares": free_squares,
        "reason": reason,
        "tags_by_rule": by_rule,
    }
    return tuple(values[field] for field in _FIELDS)


def _system(atoms: Atoms, settings: ReadSettings) -> str | None:
    for key in settings.system_keys:
        if key in atoms.info:
            return str(atoms.info[key])
    if settings.system_required:
        known = ", ".join(sorted(map(str, atoms.info))) or "nothing"
        raise ValueError(
            f"it has no '{settings.system_keys[0]}', which '--split-by key:{settings.system_keys[0]}' needs "
            f"(in its info, or its row's key-value pairs and data: {known})"
        )
    return None
