"""What the leaderboards of OC20 and OC22 want: splits, arrays, types.

A submission is one ``.npz`` with the arrays of all test splits, each under ``{split}_{array}``. Fixed here is
what fairchem-core 1.10.0 writes, so a file made by its ``make_submission_file`` has the same arrays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fairchem_dens import keys

IDS = "ids"
"""(B,) text: ``{sid}_{fid}`` of a frame, ``{sid}`` of a relaxation."""
CHUNK_IDX = "chunk_idx"
"""(B - 1,) int: the rows at which the second to the last structure start, as `numpy.split` takes them."""

_ANY_FLOAT = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Leaderboard:
    """The test set of a data set.

    Attributes:
        name: of the data set.
        splits: of its test set, in the order of the file.
        prediction_dtype: the type of forces, and the least precise one of energies.
        trust_length: how fairchem's reader of its LMDBs counts, see `LazyEnvironment.count`.
    """

    name: str
    splits: tuple[str, ...]
    prediction_dtype: str
    trust_length: bool

    def dtypes(self, array: str) -> tuple[str, ...]:
        """Return the types that an array of numbers may have."""
        if array == keys.FORCES:
            return (self.prediction_dtype,)
        if array == keys.ENERGY:
            return _ANY_FLOAT[_ANY_FLOAT.index(self.prediction_dtype) :]
        return ("float32", "float64")


OC20 = Leaderboard("OC20", ("id", "ood_ads", "ood_cat", "ood_both"), "float16", trust_length=True)
OC22 = Leaderboard("OC22", ("id", "ood"), "float32", trust_length=False)
LEADERBOARDS = {"oc20": OC20, "oc22": OC22}
ALL_SPLITS = tuple(dict.fromkeys(split for board in LEADERBOARDS.values() for split in board.splits))


@dataclass(frozen=True)
class Task:
    """What is predicted.

    Attributes:
        name: of the task.
        arrays: of each split.
        per_atom: the array with a row for each atom, or None.
        free_atoms: whether it has rows for free atoms alone.
        frames: whether structures are frames, told apart by sid and fid, and not systems.
    """

    name: str
    arrays: tuple[str, ...]
    per_atom: str | None
    free_atoms: bool
    frames: bool


S2EF = Task("S2EF", (IDS, keys.ENERGY, keys.FORCES, CHUNK_IDX), keys.FORCES, free_atoms=True, frames=True)
IS2RE = Task("IS2RE", (IDS, keys.ENERGY), None, free_atoms=False, frames=False)
IS2RS = Task("IS2RS", (IDS, keys.POS, CHUNK_IDX), keys.POS, free_atoms=False, frames=False)
TASKS = {"s2ef": S2EF, "is2re": IS2RE, "is2rs": IS2RS}


def guess(names: Iterable[str]) -> tuple[Leaderboard, Task]:
    """Tell by the names of its arrays which submission a file is.

    Raises:
        ValueError: they do not tell.
    """
    present = set(names)

    def has(splits: Iterable[str], arrays: Iterable[str]) -> bool:
        return any(f"{split}_{array}" in present for split in splits for array in arrays)

    everything = (IDS, keys.ENERGY, keys.FORCES, keys.POS, CHUNK_IDX)
    board = next(
        (board for board in LEADERBOARDS.values() if has(set(board.splits) - {"id"}, everything)), None
    )
    if board is None:
        raise ValueError(
            f"The names of the arrays do not tell the data set (found: {', '.join(sorted(present)[:8])}): "
            "give --dataset and --task."
        )
    if has(board.splits, [keys.FORCES]):
        return board, S2EF
    return board, IS2RS if has(board.splits, [keys.POS]) else IS2RE
