"""Data of relaxations (IS2RE, IS2RS), as OC20 publishes them."""

from __future__ import annotations

import pickle
from collections.abc import Iterable
from pathlib import Path

import lmdb
from torch_geometric.data import Data


def write_initial_structures(folder: Path, structures: Iterable[Data]) -> Path:
    """Write an LMDB as that of a test split: without labels and without the number of a frame."""
    folder.mkdir(parents=True)
    env = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, map_size=2**24, lock=False)
    with env.begin(write=True) as transaction:
        for index, data in enumerate(structures):
            blank = data.clone()
            for name in ("energy", "forces", "fid"):
                if name in blank:
                    del blank[name]
            transaction.put(str(index).encode(), pickle.dumps(blank, protocol=-1))
        transaction.put(b"length", pickle.dumps(index + 1, protocol=-1))
    env.close()
    return folder
