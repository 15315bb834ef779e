"""Write and read LMDB folders in the layout of fairchem's ``lmdb`` dataset.

A folder holds ``data.0000.lmdb``, ``data.0001.lmdb``, ... and ``metadata.npz`` with the number of atoms of
every structure, which fairchem needs for ``max_atoms`` and for load balancing. Each file holds pickled
torch_geometric ``Data`` objects under the ASCII keys ``0``, ``1``, ... and their number under ``length``.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import lmdb
import numpy as np
import torch
from torch_geometric.data import Data

from fairchem_dens import keys
from fairchem_dens.data.environment import LENGTH_KEY
from fairchem_dens.data.folder import refuse_existing, written_aside
from fairchem_dens.data.records import RecordFiles, as_data

if TYPE_CHECKING:
    from ase import Atoms

METADATA_FILE = "metadata.npz"
_FIRST_MAP_SIZE = 2**24
_STRUCTURES_PER_TRANSACTION = 500


def data_from_atoms(
    atoms: Atoms,
    *,
    sid: int | str,
    fid: int,
    energy: float | None = None,
    forces: np.ndarray | None = None,
    md: bool | None = None,
) -> Data:
    """Turn an ASE structure into what fairchem's data sets hold.

    Positions are wrapped into the cell along periodic directions. Atoms held by ``FixAtoms`` become
    ``fixed``, ASE's tags become ``tags``.

    Args:
        atoms: the structure; its calculator is not asked for anything.
        sid: id of the system.
        fid: id of the frame within the system.
        energy: eV, or None for a structure without labels.
        forces: (N, 3), eV/Å, without constraints applied, or None.
        md: whether the frame is from molecular dynamics (such frames are never corrupted); None leaves the
            field out.

    Returns:
        ``pos`` (N, 3) float32, ``atomic_numbers``, ``tags``, ``fixed`` (N,) int64, ``cell`` (1, 3, 3)
        float32, ``pbc`` (1, 3) bool, ``natoms`` int, ``sid``, ``fid`` and, where given, ``energy`` float,
        ``forces`` (N, 3) float32 and ``md`` (1,) bool.
    """
    fixed = np.zeros(len(atoms), dtype=np.int64)
    for constraint in atoms.constraints:
        if type(constraint).__name__ == "FixAtoms":
            fixed[constraint.get_indices()] = 1
    fields: dict[str, Any] = {
        keys.POS: torch.tensor(atoms.get_positions(wrap=True), dtype=torch.float32),
        keys.ATOMIC_NUMBERS: torch.tensor(atoms.get_atomic_numbers(), dtype=torch.int64),
        keys.CELL: torch.tensor(atoms.cell.complete().array, dtype=torch.float32).reshape(1, 3, 3),
        # One row for each structure, so that a batch knows the periodicity of all its structures.
        keys.PBC: torch.tensor(np.asarray(atoms.pbc), dtype=torch.bool).reshape(1, 3),
        keys.TAGS: torch.tensor(atoms.get_tags(), dtype=torch.int64),
        keys.FIXED: torch.from_numpy(fixed),
        keys.NATOMS: len(atoms),
        keys.SID: sid,
        keys.FID: fid,
    }
    if energy is not None:
        fields[keys.ENERGY] = float(energy)
    if forces is not None:
        fields[keys.FORCES] = torch.tensor(np.asarray(forces), dtype=torch.float32)
    if md is not None:
        fields[keys.MD] = torch.tensor([md])
    return Data(**fields)


def check_structure(data: Data, *, labels: bool = True) -> None:
    """Refuse a structure that training would stumble over later.

    Args:
        data: what is going to be written.
        labels: whether ``energy`` and ``forces`` are required.

    Raises:
        ValueError: a field is missing, has the wrong shape or is not finite; names the structure, the field
            and what was found.
    """
    ids = ", ".join(f"{name} {data[name] if name in data else '?'}" for name in (keys.SID, keys.FID))  # noqa: SIM401  # Data.get is new
    who = f"Structure ({ids})"
    if keys.POS not in data or data[keys.POS].ndim != 2 or data[keys.POS].shape[0] == 0:
        raise ValueError(f"{who} has no atoms: '{keys.POS}' must be of shape (N, 3) with N from 1.")
    natoms = data[keys.POS].shape[0]
    shapes: dict[str, tuple[int, ...]] = {
        keys.POS: (natoms, 3),
        keys.ATOMIC_NUMBERS: (natoms,),
        keys.CELL: (1, 3, 3),
        keys.PBC: (1, 3),
        keys.TAGS: (natoms,),
        keys.FIXED: (natoms,),
    }
    if labels:
        shapes[keys.FORCES] = (natoms, 3)
    for name, shape in shapes.items():
        if name not in data:
            raise ValueError(f"{who} has no field '{name}', which must be of shape {shape}.")
        if tuple(data[name].shape) != shape:
            raise ValueError(
                f"{who}: field '{name}' must be of shape {shape}, found {tuple(data[name].shape)}."
            )
        if not bool(torch.isfinite(data[name]).all()):
            raise ValueError(f"{who}: field '{name}' is not finite everywhere. Leave the structure out.")
    if keys.NATOMS not in data or int(data[keys.NATOMS]) != natoms:
        raise ValueError(
            f"{who}: field '{keys.NATOMS}' must be {natoms}, the number of rows of '{keys.POS}'."
        )
    for name in (keys.SID, keys.FID):
        if name not in data:
            raise ValueError(f"{who} has no field '{name}': predictions are told apart by sid and fid.")
    if labels:
        if keys.ENERGY not in data:
            raise ValueError(f"{who} has no field '{keys.ENERGY}'.")
        energy = torch.as_tensor(data[keys.ENERGY])
        if energy.numel() != 1 or not bool(torch.isfinite(energy).all()):
            raise ValueError(
                f"{who}: field '{keys.ENERGY}' must be one finite number, found {energy.tolist()}."
            )


class LmdbWriter:
    """Write structures into an LMDB folder that appears under its name only once it is complete.

    Use it as a context manager. Everything is written into a hidden folder beside the target, which is
    renamed at the end; after an exception, or if the process is killed, the target is as it was before. What
    a killed writer left behind is removed by the next.

    Args:
        folder: the folder to make.
        structures_per_file: start a new ``data.NNNN.lmdb`` after so many structures; None writes one file.
        labels: whether each structure must have ``energy`` and ``forces``.
        overwrite: replace the folder if it exists.

    Raises:
        FileExistsError: the folder exists and ``overwrite`` is False.
        ValueError: on `add`, a structure is refused by `check_structure`, or one with the same sid and fid
            was added before; at the end, nothing was added.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        structures_per_file: int | None = None,
        labels: bool = True,
        overwrite: bool = False,
    ) -> None:
        if structures_per_file is not None and structures_per_file < 1:
            raise ValueError(f"'structures_per_file' must be at least 1, found {structures_per_file}.")
        self.folder = Path(folder).absolute()
        self._structures_per_file = structures_per_file
        self._labels = labels
        self._overwrite = overwrite
        if not overwrite:
            refuse_existing(self.folder)
        self._natoms: list[int] = []
        self._places: dict[tuple[str, str], int] = {}
        self._pending: list[tuple[bytes, bytes]] = []
        self._files = 0
        self._in_file = 0
        self._env: lmdb.Environment | None = None

    def __enter__(self) -> LmdbWriter:
        with ExitStack() as stack:
            self._partial = stack.enter_context(written_aside(self.folder, overwrite=self._overwrite))
            stack.callback(self._close)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._stack:
            if error is not None:
                raise error
            self._finish()

    def __len__(self) -> int:
        return len(self._natoms)

    def add(self, data: Data) -> None:
        """Check one structure and append it."""
        check_structure(data, labels=self._labels)
        ids = str(data[keys.SID]), str(data[keys.FID])
        earlier = self._places.setdefault(ids, len(self))
        if earlier != len(self):
            raise ValueError(
                f"Structure (sid {ids[0]}, fid {ids[1]}) was added before, as number {earlier}: predictions "
                "could not be told apart. Leave it out, or give it another fid."
            )
        if self._structures_per_file is not None and self._in_file == self._structures_per_file:
            self._close_file()
        if self._env is None:
            self._open_file()
        self._pending.append((str(self._in_file).encode("ascii"), pickle.dumps(data, protocol=-1)))
        self._in_file += 1
        self._natoms.append(int(data[keys.NATOMS]))
        if len(self._pending) >= _STRUCTURES_PER_TRANSACTION:
            self._commit()

    def _open_file(self) -> None:
        self._env = lmdb.open(
            str(self._partial / f"data.{self._files:04d}.lmdb"),
            map_size=_FIRST_MAP_SIZE,
            subdir=False,
            meminit=False,
            lock=False,  # nobody else knows the hidden folder
        )
        self._files += 1
        self._in_file = 0

    def _commit(self) -> None:
        """Write what is pending, in a larger map if it does not fit."""
        assert self._env is not None
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    for key, value in self._pending:
                        transaction.put(key, value)
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
            else:
                self._pending.clear()
                return

    def _close_file(self) -> None:
        assert self._env is not None
        self._pending.append((LENGTH_KEY, pickle.dumps(self._in_file, protocol=-1)))
        self._commit()
        self._env.sync(True)
        self._env.close()
        self._env = None

    def _finish(self) -> None:
        if self._env is None:
            raise ValueError(
                f"No structure was added to '{self.folder}': fairchem cannot open an empty LMDB."
            )
        self._close_file()
        np.savez_compressed(self._partial / METADATA_FILE, natoms=np.array(self._natoms, dtype=np.int64))

    def _close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None


def lmdb_files(path: str | Path) -> list[Path]:
    """Return the LMDB file itself, or those of a folder in fairchem's order.

    Raises:
        FileNotFoundError: there is no such file, or no ``*.lmdb`` in the folder.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.glob("*.lmdb"))
    if not files:
        found = "a folder without any *.lmdb file" if path.is_dir() else "nothing"
        raise FileNotFoundError(
            f"No LMDB at '{path}' (found {found}). Give an .lmdb file or a folder of them."
        )
    return files


def read_lmdb(path: str | Path) -> Iterator[Data]:
    """Yield the structures of an LMDB file or folder in fairchem's order, as they are stored.

    The file is unpickled, as fairchem does: read only files whose origin you trust.

    Raises:
        FileNotFoundError: there is no such file, or no ``*.lmdb`` in the folder.
        ValueError: a file cannot be read, or a structure is missing or damaged; names file and record.
    """
    files = RecordFiles(lmdb_files(path))
    for index in range(len(files)):
        yield as_data(files.read(*files.locate(index)))
