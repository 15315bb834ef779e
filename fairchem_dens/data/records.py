"""Structures as LMDBs in the wild hold them, brought into one form that any batch can be made of.

Collating takes the fields and their types from the first structure of a batch. Files of several origins
differ in both: an energy is a float here and a tensor there, numbers of atoms are floats or bytes, some have
tags. `tidy` gives each field one type and shape; a `Layout` makes sure that all structures have the same
fields.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

from fairchem_dens import keys
from fairchem_dens.data import unpickle
from fairchem_dens.data.environment import LazyEnvironment
from fairchem_dens.errors import UnreadableRecord
from fairchem_dens.shallow import with_fields

Fields = dict[str, Any]

GRAPH_FIELDS = ("edge_index", "cell_offsets", "distances", "neighbors")
"""A graph computed beforehand, of no use where positions move."""

_NEEDED = (
    keys.ATOMIC_NUMBERS,
    keys.CELL,
    keys.FIXED,
    keys.SID,
    keys.FID,
    *keys.ENERGY_ALIASES,
    *keys.FORCES_ALIASES,
)
"""What no structure may lack that others of the data set have."""
_NEEDED_GROUPS = (
    *(frozenset([name]) for name in (keys.ATOMIC_NUMBERS, keys.CELL, keys.FIXED, keys.SID, keys.FID)),
    frozenset(keys.ENERGY_ALIASES),
    frozenset(keys.FORCES_ALIASES),
)
"""The same, names of one thing together."""

_HINTS = {
    **dict.fromkeys(keys.FORCES_ALIASES, "Train on data with forces throughout, or remove the structure."),
    keys.FIXED: "Write it with the data (zeros if all atoms are free, as in molecules).",
}


class BadRecord(Exception):  # noqa: N818  # never leaves this package
    """What is wrong with a structure; who knows where it stands makes a `ValueError` of it."""


class RecordFiles:
    """Several LMDB files as one sequence of records.

    Args:
        files: the files, in fairchem's order.
        trust_length: see `LazyEnvironment.count`.

    Raises:
        ValueError: a file cannot be read, or there is no record in any.
    """

    def __init__(self, files: Iterable[Path], *, trust_length: bool = True) -> None:
        self.envs = [LazyEnvironment(file) for file in files]
        self.counts = [env.count(trust_length=trust_length) for env in self.envs]
        self._ends = list(accumulate(self.counts))
        self.close()
        if not len(self):
            raise ValueError(f"'{self.envs[0].path}' holds no structure: preprocess the data again.")

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the file and of the record in it."""
        file = bisect.bisect(self._ends, index)
        return file, int(index) - (self._ends[file] - self.counts[file])

    def read(self, file: int, record: int) -> Fields:
        """Return the fields of a record as they are stored, without those that are None.

        Raises:
            UnreadableRecord: the record is missing or does not unpickle; names file and record.
        """
        try:
            stored = self.envs[file].get(str(record).encode("ascii"))
        except ValueError as error:
            raise self.error(file, record, f"cannot be read ({error}).") from error
        if stored is None:
            raise self.error(file, record, "is missing. Preprocess the file again, or remove it.")
        try:
            return unpickle.fields(stored)
        except Exception as error:
            said = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
            message = f"cannot be unpickled as a structure ({said}). Preprocess the file again, or remove it."
            raise self.error(file, record, message) from error

    def error(
        self, file: int, record: int, problem: str, fields: Mapping[str, Any] | None = None
    ) -> UnreadableRecord:
        """Say where a bad structure stands."""
        ids = [f"{name} {fields[name]}" for name in (keys.SID, keys.FID) if fields and name in fields]
        said = ", ".join([*ids, f"id {file}_{record}"])
        where = f"ecord {record} of '{self.envs[file].path}'"
        return UnreadableRecord(f"R{where} ({said}) {problem}", f"r{where}", problem)

    def close(self) -> None:
        """Let go of all files. The next use opens them again."""
        for env in self.envs:
            env.close()


_EMPTY = Data()


def as_data(fields: Fields) -> Data:
    """Return a ``Data`` with these fields; its constructor takes ten times as long."""
    return with_fields(_EMPTY, fields)


# ------------------------------------------------------------------ one type and shape for each field


def tidy(fields: Fields) -> None:
    """Give the fields the types and shapes of `fairchem_dens.keys`, in place.

    Vectors and cells get torch's default floating-point type; atomic numbers, ``fixed`` and ``tags`` are
    int64; energies are Python floats, ``natoms``, ``sid`` and ``fid`` Python numbers or text. What is not
    known here stays, except that numpy's numbers and tensors without dimensions become Python's.

    Raises:
        BadRecord: a field has the wrong shape, or energy, forces or positions are not finite.
    """
    pos = fields.get(keys.POS)
    if pos is None:
        raise BadRecord(f"has no field '{keys.POS}', the positions. Preprocess the file again, or remove it.")
    natoms = len(pos) if np.ndim(pos) else 0
    if natoms == 0:
        raise BadRecord("has no atoms: remove it from the data set.")
    fields.setdefault(keys.NATOMS, natoms)
    for name, value in fields.items():
        rule = _RULES.get(name)
        if rule is not None:
            fields[name] = rule(name, value, natoms)
        elif isinstance(value, np.generic) or (isinstance(value, Tensor) and value.dim() == 0):
            fields[name] = value.item()


def _as_tensor(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    if isinstance(value, Tensor):
        return value if value.dtype == dtype else value.to(dtype)
    try:
        return torch.tensor(np.asarray(value), dtype=dtype)
    except (TypeError, ValueError) as error:
        raise BadRecord(
            f"has a field '{name}' that is no array of numbers. Remove the structure from the data set."
        ) from error


def _shaped(name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    if value.shape == shape:
        return value
    if name in (keys.CELL, keys.PBC, *_ONE_PER_ATOM) and value.numel() == math.prod(shape):
        return value.reshape(shape)
    raise BadRecord(
        f"has a field '{name}' of shape {tuple(value.shape)} where {shape} is right. Remove the structure "
        "from the data set, or write it anew."
    )


def _vectors(name: str, value: Any, natoms: int) -> Tensor:
    vectors = _shaped(name, _as_tensor(name, value, torch.get_default_dtype()), (natoms, 3))
    # A sum is finite only if all terms are, and takes a third of the time of looking at each.
    if not math.isfinite(vectors.sum().item()) and not bool(torch.isfinite(vectors).all()):
        raise BadRecord(f"has {name} that are not finite. Remove the structure from the data set.")
    return vectors


def _one_per_atom(name: str, value: Any, natoms: int) -> Tensor:
    return _shaped(name, _as_tensor(name, value, torch.int64), (natoms,))


def _cell(name: str, value: Any, _natoms: int) -> Tensor:
    return _shaped(name, _as_tensor(name, value, torch.get_default_dtype()), (1, 3, 3))


def _pbc(name: str, value: Any, _natoms: int) -> Tensor:
    return _shaped(name, _as_tensor(name, value, torch.bool), (1, 3))


def _md(name: str, value: Any, _natoms: int) -> Tensor:
    flag = _as_tensor(name, value, torch.bool)
    return flag.reshape(1) if flag.numel() == 1 else _shaped(name, flag, (1,))


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        if math.prod(value.shape) != 1:
            raise BadRecord(
                f"has a field '{name}' of shape {tuple(value.shape)} where one number is right. Remove the "
                "structure from the data set, or write it anew."
            )
        return value.item()
    return value


def _energy(name: str, value: Any, _natoms: int) -> float:
    energy = _plain(name, value)
    if not isinstance(energy, int | float) or not math.isfinite(energy):
        raise BadRecord(
            f"has a field '{name}' that is not a finite number ({energy}). Remove the structure from the "
            "data set."
        )
    return float(energy)


def _natoms(name: str, value: Any, natoms: int) -> int:
    if _plain(name, value) != natoms:
        raise BadRecord(
            f"has a field '{name}' that is {_plain(name, value)} where '{keys.POS}' has {natoms} rows. "
            "Remove the structure from the data set, or write it anew."
        )
    return natoms


def _identifier(name: str, value: Any, _natoms: int) -> int | str:
    identifier = _plain(name, value)
    whole = isinstance(identifier, float) and identifier.is_integer()
    return int(identifier) if whole else identifier


_ONE_PER_ATOM = (keys.ATOMIC_NUMBERS, keys.FIXED, keys.TAGS)
_RULES: dict[str, Callable[[str, Any, int], Any]] = {
    **dict.fromkeys((keys.POS, "pos_relaxed", *keys.FORCES_ALIASES), _vectors),
    **dict.fromkeys(_ONE_PER_ATOM, _one_per_atom),
    **dict.fromkeys(("y_init", "y_relaxed", *keys.ENERGY_ALIASES), _energy),
    **dict.fromkeys((keys.SID, keys.FID), _identifier),
    keys.NATOMS: _natoms,
    keys.CELL: _cell,
    keys.PBC: _pbc,
    keys.MD: _md,
}


# ------------------------------------------------------------------ the same fields in all structures


class Layout:
    """Which fields the structures of a data set have, told by the first structure of each file.

    Fields that only some files have are left out, except that ``pbc`` is filled in as fairchem's models do
    (periodic where there is a cell) and ``md`` as False; a field that training needs is refused there.

    Args:
        firsts: tidy fields of the first structure of each file, by file.
        key_mapping: fairchem's ``key_mapping``: two names that it makes one are one.
        leave_out: names that are left out of all structures.

    Raises:
        ValueError: only some files have a field that training needs; names two files.
    """

    def __init__(
        self,
        firsts: Mapping[Path, Fields],
        *,
        key_mapping: Mapping[str, str | Sequence[str]] | None = None,
        leave_out: Iterable[str] = (),
    ) -> None:
        self._key_mapping = key_mapping or {}
        self._leave_out = frozenset(leave_out)
        files = {file: self._called(fields) for file, fields in firsts.items()}
        everywhere = frozenset.intersection(*files.values())
        anywhere = frozenset.union(*files.values())
        self._filled = (anywhere - everywhere) & {keys.PBC, keys.MD}
        self._names = everywhere | self._filled
        self.left_out = sorted(anywhere - self._names)
        """Names that only some files have."""
        for name in self.left_out:
            if name in _NEEDED:
                having = next(file for file, names in files.items() if name in names)
                lacking = next(file for file, names in files.items() if name not in names)
                raise ValueError(
                    f"The structures of '{having}' have a field '{name}' and those of '{lacking}' have not, "
                    f"so they cannot share a batch: put the files into different folders{_renamed(name)}."
                )
        self._incomplete = {
            name: next(file for file, names in files.items() if not group & names)
            for group in _NEEDED_GROUPS
            if not group & self._names
            for name in group
        }
        first = firsts.values()
        self._text = {
            name
            for name in (keys.SID, keys.FID)
            if len({isinstance(fields.get(name), str) for fields in first}) > 1
        }
        self._numbers = {
            name
            for name in self._names - _RULES.keys()
            if any(isinstance(fields.get(name), int | float) for fields in first)
            and any(isinstance(fields.get(name), Tensor) for fields in first)
        }
        self._plans: dict[tuple[str, ...], tuple[str, ...]] = {}

    def apply(self, fields: Fields) -> None:
        """Give tidy fields this layout, in place.

        Raises:
            BadRecord: a field is missing.
        """
        names = tuple(fields)
        surplus = self._plans.get(names)
        if surplus is None:
            surplus = self._plans[names] = self._plan(names)
        for name in surplus:
            del fields[name]
        for name in self._filled:
            if name not in fields:
                periodic = name == keys.PBC and keys.CELL in fields
                fields[name] = torch.full((1, 3) if name == keys.PBC else (1,), periodic)
        for name in self._text:
            fields[name] = str(fields[name])
        for name in self._numbers:
            fields[name] = _plain(name, fields[name])

    def _called(self, names: Iterable[str]) -> frozenset[str]:
        """What these fields are called after ``key_mapping``."""
        called: set[str] = set()
        for name in names:
            new = self._key_mapping.get(name, name)
            called.update([new] if isinstance(new, str) else new)
        return frozenset(called) - self._leave_out

    def _plan(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return which of these fields go.

        Raises:
            BadRecord: one is missing, or ``key_mapping`` gives two the same name.
        """
        called = self._called(names)
        for name in sorted(self._names - called - self._filled):
            hint = _HINTS.get(name, "Remove the structure from the data set, or write it anew.")
            raise BadRecord(f"has no field '{name}', which other structures of the data set have. {hint}")
        for name in sorted(called & self._incomplete.keys()):
            raise BadRecord(
                f"has a field '{name}' that record 0 of '{self._incomplete[name]}' lacks, so they cannot "
                "share a batch. Remove the incomplete ones from the data set, or write them anew."
            )
        for name in names:
            for new in self._called([name]) - {name}:
                if new in names:
                    raise BadRecord(
                        f"has both '{name}' and '{new}', and 'key_mapping' calls the first as the second: "
                        f"remove '{name}' from 'dataset.*.key_mapping'."
                    )
        return tuple(name for name in names if not self._stays(name))

    def _stays(self, name: str) -> bool:
        called = self._called([name])
        # A frame that says it is from MD must not be corrupted, whatever the others say.
        return name == keys.MD or (bool(called) and called <= self._names)


def _renamed(name: str) -> str:
    for new, old in (keys.ENERGY_ALIASES, keys.FORCES_ALIASES):
        if name in (new, old):
            other = old if name == new else new
            return f", or, if the others call it '{other}', set 'key_mapping: {{{old}: {new}}}'"
    return ""
