"""What can be wrong with the arrays of one split of a submission."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fairchem_dens import keys
from fairchem_dens.submission.splits import CHUNK_IDX, IDS, Leaderboard, Task
from fairchem_dens.submission.wanted import Wanted

Arrays = Mapping[str, np.ndarray]
"""The arrays of one split, by name without the split."""

_FARTHEST = 0.01
"""Å; how far a fixed atom may lie from its place."""


def wrong_forms(split: str, arrays: Arrays, board: Leaderboard, task: Task) -> Iterator[str]:
    """Yield what is wrong with types and shapes; nothing else can be looked at before they are right."""
    ids = arrays[IDS]
    if ids.dtype.kind != "U":
        yield f"'{split}_{IDS}' is of type {ids.dtype}, and ids must be text"
    if ids.ndim != 1 or not len(ids):
        yield f"'{split}_{IDS}' is of shape {ids.shape}, and must be a list with at least one id"
        return
    for name in task.arrays[1:]:
        key, array = f"{split}_{name}", arrays[name]
        if name == CHUNK_IDX:
            yield from _wrong_chunk_form(key, array, len(ids), np.atleast_1d(arrays[task.per_atom or name]))
            continue
        if array.dtype.name not in board.dtypes(name):
            yield _wrong_type(key, array.dtype, board, board.dtypes(name))
        if name == keys.ENERGY and array.shape not in ((len(ids),), (len(ids), 1)):
            wanted = f"({len(ids)},) or ({len(ids)}, 1)"
            yield f"'{key}' is of shape {array.shape}, for {len(ids)} ids it must be {wanted}"
        if name == task.per_atom and (array.ndim != 2 or array.shape[1] != 3):
            yield f"'{key}' is of shape {array.shape}, it must be (atoms, 3)"


def _wrong_type(name: str, dtype: np.dtype, board: Leaderboard, wanted: tuple[str, ...]) -> str:
    said = f"'{name}' is of type {dtype}, {board.name} takes {' or '.join(wanted)}"
    if dtype == np.float16:
        return f"{said}; predict again with 'task.prediction_dtype: float32', the precision is lost"
    if wanted == ("float16",):
        return f"{said} ('submission s2ef --cast' converts predictions)"
    return said


def _wrong_chunk_form(key: str, chunk_idx: np.ndarray, count: int, per_atom: np.ndarray) -> Iterator[str]:
    if chunk_idx.dtype.kind not in "iu":
        yield f"'{key}' is of type {chunk_idx.dtype}, and must be whole numbers"
    elif chunk_idx.shape != (count - 1,):
        hint = "it must be numpy.cumsum(numbers of atoms)[:-1]"
        if chunk_idx.shape == (count,) and chunk_idx[-1] == len(per_atom):
            hint = "leave out the last entry, where nothing starts"
        elif chunk_idx.shape == (count,) and chunk_idx.sum() == len(per_atom):
            hint = "it holds numbers of atoms, and must be numpy.cumsum(numbers)[:-1]"
        yield f"'{key}' is of shape {chunk_idx.shape}, for {count} ids it must be ({count - 1},): {hint}"


def wrong_contents(split: str, arrays: Arrays, task: Task) -> Iterator[str]:
    """Yield what is wrong with the contents of arrays of the right form."""
    ids = arrays[IDS]
    distinct, counts = np.unique(ids, return_counts=True)
    if len(distinct) < len(ids):
        yield (
            f"'{split}_{IDS}' holds {counted(int((counts > 1).sum()), 'id')} more than once: "
            f"{examples(distinct[counts > 1])}"
        )
    if not task.frames and "_" in ids[0]:
        yield (
            f"'{split}_{IDS}' holds ids of frames, as '{ids[0]}', and {task.name} is about systems: cut what "
            "follows the _"
        )
    if task.per_atom is None:
        yield from _not_finite(split, arrays, keys.ENERGY, np.arange(1, len(ids)))
        return
    rows = len(arrays[task.per_atom])
    starts = arrays[CHUNK_IDX].astype(np.int64)
    ends = np.concatenate([[0], starts, [rows]])
    if np.any(np.diff(ends) < 0):
        place = int(np.argmax(np.diff(ends) < 0))
        found = f"{ends[place]} to {ends[place + 1]}"
        yield (
            f"'{split}_{CHUNK_IDX}' must rise from 0 to at most {rows}, the rows of '{split}_{task.per_atom}'"
            f": the structure '{ids[place]}' would have the rows {found}"
        )
        return
    if keys.ENERGY in arrays:
        yield from _not_finite(split, arrays, keys.ENERGY, np.arange(1, len(ids)))
    yield from _not_finite(split, arrays, task.per_atom, starts)


def _not_finite(split: str, arrays: Arrays, name: str, starts: np.ndarray) -> Iterator[str]:
    array = arrays[name]
    wrong = ~np.isfinite(array).all(axis=tuple(range(1, array.ndim)))
    if not wrong.any():
        return
    structures = np.unique(np.searchsorted(starts, np.flatnonzero(wrong), side="right"))
    hint = ""
    if array.dtype == np.float16 and np.isinf(array).any():
        hint = "; in float16 all above 65504 is infinite, so these predictions are far off"
    yield (
        f"'{split}_{name}' is not finite (nan or infinite) for {counted(len(structures), 'structure')}: "
        f"{examples(arrays[IDS][structures])}{hint}"
    )


# ------------------------------------------------------------------ compared with others


def differences(split: str, arrays: Arrays, task: Task, wanted: Wanted) -> Iterator[str]:
    """Yield where a split with sound arrays differs from its LMDBs."""
    ids = arrays[IDS]
    order = np.argsort(wanted.ids)
    sorted_ids = wanted.ids[order]
    slots = np.minimum(np.searchsorted(sorted_ids, ids), len(order) - 1)
    known = sorted_ids[slots] == ids
    absent = np.ones(len(order), dtype=bool)
    absent[order[slots[known]]] = False
    if len(ids) != len(wanted.ids):
        yield f"'{split}' has {len(ids)} structures, '{wanted.path}' has {len(wanted.ids)}"
    if absent.any():
        yield (
            f"'{split}_{IDS}' lacks {counted(int(absent.sum()), 'id')} of '{wanted.path}': "
            f"{examples(wanted.ids[absent])}"
        )
    if not known.all():
        yield (
            f"'{split}_{IDS}' has {counted(int((~known).sum()), 'id')} that '{wanted.path}' does not have: "
            f"{examples(ids[~known])}"
        )
    if task.per_atom is None or not known.all():
        return
    places = order[slots]
    counts = np.diff(np.concatenate([[0], arrays[CHUNK_IDX], [len(arrays[task.per_atom])]]).astype(np.int64))
    right = (wanted.free if task.free_atoms else wanted.natoms)[places]
    wrong = counts != right
    if wrong.any():
        yield _wrong_counts(split, ids, counts, right, wanted.natoms[places], task)
    elif task.per_atom == keys.POS:
        yield from _moved(split, arrays, wanted, places)


def _wrong_counts(
    split: str, ids: np.ndarray, counts: np.ndarray, right: np.ndarray, natoms: np.ndarray, task: Task
) -> str:
    wrong = counts != right
    first = int(np.argmax(wrong))
    atoms = "free atoms" if task.free_atoms else "atoms"
    hint = ""
    if task.free_atoms and np.array_equal(counts, natoms):
        hint = ": these are all atoms, leave out the fixed ones"
    elif counts.sum() == right.sum():
        hint = f": in all there are as many rows as atoms, so '{split}_{CHUNK_IDX}' is wrong or the ids are"
    return (
        f"'{split}_{task.per_atom}' has the wrong number of rows for "
        f"{counted(int(wrong.sum()), 'structure')}, first {counts[first]} for '{ids[first]}', which has "
        f"{right[first]} {atoms}{hint}"
    )


def _moved(split: str, arrays: Arrays, wanted: Wanted, places: np.ndarray) -> Iterator[str]:
    """Fixed atoms stay where they are, up to whole cells: atoms in another order are seen by that."""
    starts = np.concatenate([[0], np.cumsum(wanted.natoms)])
    moved, farthest = [], 0.0
    for index, (place, found) in enumerate(
        zip(places, np.split(arrays[keys.POS], arrays[CHUNK_IDX]), strict=True)
    ):
        atoms = slice(starts[place], starts[place + 1])
        shift = (found - wanted.pos[atoms])[wanted.fixed[atoms]]
        cell = wanted.cells[place].astype(np.float64)
        if abs(np.linalg.det(cell)) > 1e-6:
            shift = shift - np.round(shift @ np.linalg.inv(cell)) @ cell
        distance = float(np.linalg.norm(shift, axis=1).max(initial=0.0))
        if distance > _FARTHEST:
            moved.append(index)
            farthest = max(farthest, distance)
    if moved:
        yield (
            f"'{split}_{keys.POS}': fixed atoms of {counted(len(moved), 'structure')} are not where the LMDB "
            f"has them, up to {farthest:.2f} Å away: {examples(arrays[IDS][moved])}; the atoms are in "
            "another order, or these are other structures"
        )


def counted(count: int, noun: str) -> str:
    """Return ``1 id`` or ``3 ids``."""
    return f"{count} {noun}{'s' if count != 1 else ''}"


def examples(ids: np.ndarray, shown: int = 3) -> str:
    """Return the first few ids."""
    said = ", ".join(f"'{sid}'" for sid in ids[:shown])
    return said if len(ids) <= shown else f"{said}, ..."
