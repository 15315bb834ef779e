"""What the LMDBs of a test split ask for: which structures, and how many rows for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fairchem_dens import keys
from fairchem_dens.data.lmdb import lmdb_files
from fairchem_dens.data.processes import worker_pool
from fairchem_dens.data.records import BadRecord, Fields, RecordFiles, tidy
from fairchem_dens.progress import progress_bar
from fairchem_dens.submission.splits import Leaderboard, Task

_STRUCTURES_PER_TASK = 1000


@dataclass(frozen=True)
class Wanted:
    """The structures of a test split, in the order of the LMDBs.

    Attributes:
        path: of the LMDBs.
        ids: (B,) text, as fairchem's predictions have them.
        natoms: (B,) all atoms of each.
        free: (B,) free atoms of each.
        cells: (B, 3, 3) Å, and
        pos: (N, 3) Å, and
        fixed: (N,) bool of all atoms; empty where only counts are needed.
    """

    path: Path
    ids: np.ndarray
    natoms: np.ndarray
    free: np.ndarray
    cells: np.ndarray
    pos: np.ndarray
    fixed: np.ndarray


def find_lmdbs(given: list[str], board: Leaderboard) -> dict[str, Path]:
    """Find the LMDBs of the test splits.

    Args:
        given: one folder that holds ``test_id``, ``test_ood_ads`` and so on (or ``id``, ``ood_ads``, ...), as
            the data sets come, or ``split=path`` for each split. Nothing finds nothing.
        board: whose splits.

    Raises:
        FileNotFoundError: there is nothing at a path, or no LMDB in it.
        ValueError: a split is missing, named twice or not one of them.
    """
    if not given:
        return {}
    if len(given) == 1 and "=" not in given[0]:
        root = Path(given[0])
        found = {split: _of_split(root, split) for split in board.splits}
    else:
        found = _pairs(given, board)
    for path in found.values():
        lmdb_files(path)
    return found


def _of_split(root: Path, split: str) -> Path:
    for path in (root / f"test_{split}", root / split):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"'--test-lmdbs {root}' holds neither 'test_{split}' nor '{split}': name the LMDBs of each split "
        f"({split}=PATH ...)."
    )


def _pairs(given: list[str], board: Leaderboard) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        split, equals, path = text.partition("=")
        if not equals or split not in board.splits or split in found or not path:
            raise ValueError(
                f"'--test-lmdbs {text}' must be split=path, once for each of {', '.join(board.splits)}, or "
                "one folder that holds them all."
            )
        found[split] = Path(path)
    missing = [split for split in board.splits if split not in found]
    if missing:
        raise ValueError(
            f"'--test-lmdbs' names no LMDBs for the split '{missing[0]}': add {missing[0]}=PATH."
        )
    return found


def read_wanted(
    path: Path, board: Leaderboard, task: Task, *, workers: int = 0, progress: str = ""
) -> Wanted:
    """Read what the LMDBs of a split ask for.

    Args:
        path: a folder of LMDBs, or one file. They are unpickled, as in training: only from an origin you
            trust.
        board: how the reader of these LMDBs counts.
        task: which ids and atoms it is about.
        workers: processes that read; 0 is this one.
        progress: what the progress bar says; empty shows none.

    Raises:
        FileNotFoundError: there is no LMDB.
        ValueError: a record is damaged or lacks what is needed, or two structures have the same id.
    """
    total = len(RecordFiles(lmdb_files(path), trust_length=board.trust_length))
    starts = range(0, total, _STRUCTURES_PER_TASK)
    jobs = [(path, board, task, start, min(start + _STRUCTURES_PER_TASK, total)) for start in starts]
    parts = []
    with progress_bar(total=total, shown=bool(progress), desc=progress, unit="structure") as bar:
        for part in _parts(jobs, workers):
            parts.append(part)
            bar.update(len(part.ids))
    wanted = Wanted(
        path,
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("ids", "natoms", "free", "cells", "pos", "fixed")
        },
    )
    ids, counts = np.unique(wanted.ids, return_counts=True)
    if counts.max() > 1:
        hint = "" if task.frames else " For relaxations the LMDBs of initial structures are needed (IS2RE)."
        raise ValueError(
            f"'{path}' holds {counts.max()} structures with the id '{ids[counts.argmax()]}', whose "
            f"predictions could not be told apart.{hint}"
        )
    return wanted


_Job = tuple[Path, Leaderboard, Task, int, int]


def _parts(jobs: list[_Job], workers: int) -> Iterator[Wanted]:
    if workers:
        with worker_pool(workers) as pool:
            yield from pool.map(read_part, *zip(*jobs, strict=True))
    else:
        for job in jobs:
            yield read_part(*job)


def read_part(path: Path, board: Leaderboard, task: Task, start: int, stop: int) -> Wanted:
    """Read the structures from ``start`` to before ``stop``."""
    files = RecordFiles(lmdb_files(path), trust_length=board.trust_length)
    ids, natoms, free = [], [], []
    cells, pos, fixed = [np.empty((0, 3, 3))], [np.empty((0, 3))], [np.empty(0, dtype=bool)]
    for index in range(start, stop):
        place = files.locate(index)
        fields = files.read(*place)
        try:
            tidy(fields)
            _require(fields, task)
        except BadRecord as problem:
            raise files.error(*place, str(problem), fields) from None
        held = fields[keys.FIXED].numpy() != 0
        ids.append(id_of(fields, task))
        natoms.append(len(held))
        free.append(len(held) - int(held.sum()))
        if task.per_atom == keys.POS:
            cells.append(fields[keys.CELL].numpy())
            pos.append(fields[keys.POS].numpy())
            fixed.append(held)
    return Wanted(
        path,
        np.array(ids),
        np.array(natoms),
        np.array(free),
        np.concatenate(cells),
        np.concatenate(pos),
        np.concatenate(fixed),
    )


def _require(fields: Fields, task: Task) -> None:
    needed = [keys.SID, keys.FIXED, *([keys.CELL] if task.per_atom == keys.POS else [])]
    missing = [name for name in needed if name not in fields]
    if missing:
        raise BadRecord(f"has no field '{missing[0]}', which a submission needs. Preprocess the data again.")


def id_of(fields: Mapping[str, object], task: Task) -> str:
    """Return the id of a structure as fairchem's predictions and relaxations write it."""
    if task.frames and keys.FID in fields:
        return f"{fields[keys.SID]}_{fields[keys.FID]}"
    return f"{fields[keys.SID]}"
