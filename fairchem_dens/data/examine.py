"""One structure as a data set gives it: what it holds, and what is wrong with it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree

from fairchem_dens import keys

NUM_ELEMENTS = 119
TOO_CLOSE = 0.4
"""Å. No bond is shorter than 0.6, also in hot molecular dynamics."""

_ATOM_FIELDS = (
    keys.POS, keys.ATOMIC_NUMBERS, keys.TAGS, keys.FIXED, keys.FORCES, "force", "pos_relaxed",
)  # fmt: skip
_MAX_TEXT = 160


@dataclass(frozen=True)
class FieldForm:
    """Type and shape of one field of one structure.

    Attributes:
        kind: dtype of a tensor or array, else the name of the type.
        shape: of a tensor or array, None for anything else.
        per_atom: whether the first dimension is the number of atoms.
    """

    kind: str
    shape: tuple[int, ...] | None
    per_atom: bool


@dataclass
class Facts:
    """What one structure holds. What is missing or cannot be used is None, and said in ``problems``.

    Attributes:
        problems: sentences on what is wrong.
        forms: type and shape by field name.
        natoms: number of atoms.
        composition: (119,) number of atoms of each element.
        energy: eV.
        force_norms: (free atoms,), eV/Å.
        force_square: sum of the squared components on free atoms.
        num_fixed: atoms held fixed.
        tags: number of atoms by tag.
        pbc: periodicity along the three axes.
        cell: ``none``, ``zero``, ``orthogonal`` or ``skewed``.
        md: whether it is a frame of molecular dynamics.
        identity: 64-bit hash of (sid, fid).
        label_names: what energy and forces are called.
    """

    problems: list[str] = field(default_factory=list)
    forms: dict[str, FieldForm] = field(default_factory=dict)
    natoms: int | None = None
    composition: np.ndarray | None = None
    energy: float | None = None
    force_norms: np.ndarray | None = None
    force_square: float = 0.0
    num_fixed: int | None = None
    tags: dict[int, int] | None = None
    pbc: tuple[bool, bool, bool] | None = None
    cell: str = "none"
    md: bool | None = None
    identity: int | None = None
    label_names: tuple[str | None, str | None] = (None, None)


def examine(data: Any) -> Facts:
    """Look at one structure.

    Args:
        data: a torch_geometric ``Data``, after the transforms and the key mapping of the data set.
    """
    facts = Facts()
    names = {name for name in data.keys() if data[name] is not None}  # noqa: SIM118  # not a dict
    pos = _array(data, names, keys.POS)
    if pos is None or pos.ndim != 2 or pos.shape[1] != 3 or not len(pos):
        facts.problems.append(f"'pos' must be (N, 3) with N from 1, found {_said(data, names, keys.POS)}")
        facts.forms = {name: _form(name, data[name], None) for name in names}
        return facts
    natoms = facts.natoms = len(pos)
    facts.forms = {name: _form(name, data[name], natoms) for name in names}
    _check_natoms(facts, data, names)
    _check_elements(facts, _array(data, names, keys.ATOMIC_NUMBERS), data, names)
    free = _free_atoms(facts, data, names)
    _read_tags(facts, data, names)
    _read_labels(facts, data, names, free)
    _read_ids(facts, data, names)
    if not np.isfinite(pos).all():
        facts.problems.append(f"'pos' is not finite for {int((~np.isfinite(pos)).any(1).sum())} atoms")
        return facts
    usable, cell = _read_cell(facts, data, names)
    if usable:
        _check_distances(facts, pos.astype(np.float64), cell)
    return facts


def _array(data: Any, names: set[str], name: str) -> np.ndarray | None:
    """The field as an array, None if it is missing or no array of numbers."""
    if name not in names:
        return None
    value = data[name]
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError):
        return None
    return array if array.dtype.kind in "biuf" else None


def _form(name: str, value: Any, natoms: int | None) -> FieldForm:
    if isinstance(value, torch.Tensor | np.ndarray):
        kind = str(value.dtype).removeprefix("torch.")
        shape = tuple(value.shape)
        # A cell of three rows is no field of atoms, even where there are three atoms.
        per_atom = bool(shape) and shape[0] == natoms and (shape[0] > 3 or name in _ATOM_FIELDS)
        return FieldForm(kind if isinstance(value, torch.Tensor) else f"numpy {kind}", shape, per_atom)
    return FieldForm(type(value).__name__, None, False)


def _said(data: Any, names: set[str], name: str) -> str:
    if name not in names:
        return "nothing"
    value = data[name]
    return f"the shape {tuple(value.shape)}" if hasattr(value, "shape") else repr(value)[:_MAX_TEXT]


def _check_natoms(facts: Facts, data: Any, names: set[str]) -> None:
    given = _array(data, names, keys.NATOMS)
    if given is None:
        facts.problems.append("'natoms' is missing")
    elif given.size != 1 or int(given.reshape(-1)[0]) != facts.natoms:
        facts.problems.append(f"'natoms' is {given.tolist()}, 'pos' has {facts.natoms} rows")


def _check_elements(facts: Facts, numbers: np.ndarray | None, data: Any, names: set[str]) -> None:
    if numbers is None or numbers.shape != (facts.natoms,):
        found = _said(data, names, keys.ATOMIC_NUMBERS)
        facts.problems.append(f"'atomic_numbers' must be ({facts.natoms},), found {found}")
        return
    wrong = ~np.isin(numbers, np.arange(1, NUM_ELEMENTS))
    if wrong.any():
        found = f"{numbers[wrong][0]:g} of atom {int(wrong.argmax())}"
        facts.problems.append(f"'atomic_numbers' must be whole numbers from 1 to 118, found {found}")
        return
    facts.composition = np.bincount(numbers.astype(np.int64), minlength=NUM_ELEMENTS)


def _free_atoms(facts: Facts, data: Any, names: set[str]) -> np.ndarray:
    fixed = _array(data, names, keys.FIXED)
    if fixed is not None and fixed.shape == (facts.natoms,):
        facts.num_fixed = int((fixed != 0).sum())
        return fixed == 0
    if keys.FIXED in names:
        found = _said(data, names, keys.FIXED)
        facts.problems.append(f"'fixed' must be ({facts.natoms},), found {found}")
    return np.ones(facts.natoms or 0, dtype=bool)


def _read_tags(facts: Facts, data: Any, names: set[str]) -> None:
    tags = _array(data, names, keys.TAGS)
    if tags is not None and tags.shape == (facts.natoms,):
        values, counts = np.unique(tags.astype(np.int64), return_counts=True)
        facts.tags = dict(zip(values.tolist(), counts.tolist(), strict=True))
    elif keys.TAGS in names:
        facts.problems.append(f"'tags' must be ({facts.natoms},), found {_said(data, names, keys.TAGS)}")


def _read_labels(facts: Facts, data: Any, names: set[str], free: np.ndarray) -> None:
    energy_name = next((name for name in keys.ENERGY_ALIASES if name in names), None)
    forces_name = next((name for name in keys.FORCES_ALIASES if name in names), None)
    facts.label_names = energy_name, forces_name
    if energy_name is not None:
        energy = _array(data, names, energy_name)
        if energy is None or energy.size != 1:
            found = _said(data, names, energy_name)
            facts.problems.append(f"'{energy_name}' must be one number, found {found}")
        elif not np.isfinite(energy).all():
            facts.problems.append(f"'{energy_name}' is {float(energy.reshape(-1)[0])}")
        else:
            facts.energy = float(energy.reshape(-1)[0])
    if forces_name is None:
        return
    forces = _array(data, names, forces_name)
    if forces is None or forces.shape != (facts.natoms, 3):
        found = _said(data, names, forces_name)
        facts.problems.append(f"'{forces_name}' must be ({facts.natoms}, 3), found {found}")
    elif not np.isfinite(forces).all():
        count = int((~np.isfinite(forces)).any(1).sum())
        facts.problems.append(f"'{forces_name}' is not finite for {count} atoms")
    else:
        squares = (forces[free].astype(np.float64) ** 2).sum(axis=1)
        facts.force_norms, facts.force_square = np.sqrt(squares), float(squares.sum())


def _read_ids(facts: Facts, data: Any, names: set[str]) -> None:
    ids = []
    for name in (keys.SID, keys.FID):
        value = data[name] if name in names else None
        ids.append(value.reshape(-1).tolist() if isinstance(value, torch.Tensor | np.ndarray) else [value])
    if ids[0] != [None]:
        digest = hashlib.blake2b(repr(ids).encode(), digest_size=8).digest()
        facts.identity = int.from_bytes(digest, "little", signed=True)
    md = _array(data, names, keys.MD)
    if md is not None and md.size == 1:
        facts.md = bool(md.reshape(-1)[0])


def _read_cell(facts: Facts, data: Any, names: set[str]) -> tuple[bool, np.ndarray | None]:
    """Return whether distances can be told, and the cell with zero vectors along directions that end."""
    pbc = _array(data, names, keys.PBC)
    if pbc is not None and pbc.size == 3:
        first, second, third = (bool(value) for value in pbc.reshape(-1))
        facts.pbc = first, second, third
    elif keys.PBC in names:
        facts.problems.append(f"'pbc' must be (1, 3), found {_said(data, names, keys.PBC)}")
    cell = _array(data, names, keys.CELL)
    if cell is None:
        return True, None
    if cell.size != 9:
        facts.problems.append(f"'cell' must be (1, 3, 3), found {_said(data, names, keys.CELL)}")
        return False, None
    cell = cell.reshape(3, 3).astype(np.float64)
    if not np.isfinite(cell).all():
        facts.problems.append("'cell' is not finite")
        return False, None
    if not cell.any():
        facts.cell = "zero"
        if facts.pbc is not None and any(facts.pbc):
            facts.problems.append("'pbc' says periodic, but 'cell' is zero")
        return True, None
    products = cell @ cell.T
    skew = np.abs(products - np.diag(np.diag(products))).max()
    facts.cell = "orthogonal" if skew < 1e-4 * np.diag(products).max() else "skewed"
    periodic = np.array(facts.pbc if facts.pbc is not None else (True, True, True))
    if abs(np.linalg.det(cell)) < 1e-6:
        if not periodic.any():
            return True, None
        facts.problems.append(f"'cell' has the volume {abs(np.linalg.det(cell)):.3g} Å³")
        return False, None
    return True, np.where(periodic[:, None], cell, 0.0)


def _check_distances(facts: Facts, pos: np.ndarray, cell: np.ndarray | None) -> None:
    """Say which atoms lie on top of each other, across periodic boundaries as well."""
    thinnest = min(_heights(cell), default=np.inf) if cell is not None else np.inf
    if thinnest < 2 * TOO_CLOSE:
        facts.problems.append(f"'cell' is {thinnest:.3f} Å thin")
        return
    pairs, distances = close_pairs(pos, cell, TOO_CLOSE)
    if len(pairs):
        worst = int(distances.argmin())
        more = f", {len(pairs)} pairs in all" if len(pairs) > 1 else ""
        first, second = pairs[worst]
        facts.problems.append(f"atoms {first} and {second} are {distances[worst]:.3f} Å apart{more}")


def close_pairs(pos: np.ndarray, cell: np.ndarray | None, cutoff: float) -> tuple[np.ndarray, np.ndarray]:
    """Find atoms closer than a cutoff.

    Two atoms can only be that close if along each axis the distance between the cell's planes that hold them
    is, which a tree over these three coordinates tells for a whole structure at once.

    Args:
        pos: (N, 3), Å.
        cell: (3, 3), Å, rows that are zero for directions without periodicity; None for none at all.
        cutoff: Å, at most half the distance of opposite faces of the cell.

    Returns:
        (P, 2) indices of the pairs, and their distances, (P,), Å.
    """
    if cell is None or not cell.any():
        pairs = cKDTree(pos).query_pairs(cutoff, output_type="ndarray")
        return pairs, np.linalg.norm(pos[pairs[:, 0]] - pos[pairs[:, 1]], axis=1)
    periodic = cell.any(axis=1)
    complete = _completed(cell)
    inverse = np.linalg.inv(complete)
    heights = 1 / np.linalg.norm(inverse, axis=0)
    fractional = pos @ inverse
    # Twice: -1e-17 becomes 1.0 the first time, which a tree refuses.
    fractional = np.where(periodic, fractional % 1.0 % 1.0, fractional)
    tree = cKDTree(fractional * heights, boxsize=np.where(periodic, heights, 0.0))
    pairs = tree.query_pairs(cutoff, p=np.inf, output_type="ndarray")
    difference = fractional[pairs[:, 0]] - fractional[pairs[:, 1]]
    difference[:, periodic] -= np.round(difference[:, periodic])
    distances = np.linalg.norm(difference @ complete, axis=1)
    close = distances < cutoff
    return pairs[close], distances[close]


def _heights(cell: np.ndarray) -> np.ndarray:
    """Distances of opposite faces along the periodic directions."""
    return (1 / np.linalg.norm(np.linalg.inv(_completed(cell)), axis=0))[cell.any(axis=1)]  # type: ignore[no-any-return]


def _completed(cell: np.ndarray) -> np.ndarray:
    """Put unit vectors, orthogonal to the others, in place of zero rows."""
    complete = cell.copy()
    empty = ~cell.any(axis=1)
    if empty.any():
        *_, rows = np.linalg.svd(cell)
        complete[empty] = rows[np.linalg.matrix_rank(cell) :][: int(empty.sum())]
    return complete
