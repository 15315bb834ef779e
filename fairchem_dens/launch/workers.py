"""Loader workers of ranks that fairchem starts on this machine (``--num-gpus N`` without ``--submit``).

fairchem sets ``optim.num_workers`` to 0 there before there is a trainer, because its own LMDB data set keeps
a file open that does not survive in another process. Our readers open their files where they are used, so
``optim.local_num_workers`` may give the loaders workers again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fairchem.core.common import distutils

from fairchem_dens.data.reader import LmdbReader

KEY = "local_num_workers"
"""The setting, under ``optim``."""


def check(optim: Mapping[str, Any]) -> None:
    """Refuse a number of workers that is none.

    Raises:
        ValueError: names the key and what was found.
    """
    workers = optim.get(KEY, 0)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"'optim.{KEY}' must be a whole number of processes, 0 or more, found {workers!r}.")


def of_local_rank(optim: Mapping[str, Any], slurm: Mapping[str, Any], dataset: Any) -> int | None:
    """Return how many workers a loader gets, or None where ``optim.num_workers`` says so.

    Args:
        optim: settings of the optimizer and the loaders.
        slurm: what fairchem tells the trainer about its job; a submitted one has a ``folder``.
        dataset: what the workers would read.

    Raises:
        ValueError: there are to be workers, and the data set is not read by one of our readers.
    """
    if KEY not in optim or "folder" in slurm or distutils.get_world_size() == 1:
        return None
    while not isinstance(dataset, LmdbReader) and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    if optim[KEY] and not isinstance(dataset, LmdbReader):
        raise ValueError(
            f"'optim.{KEY}' is {optim[KEY]}, but {type(dataset).__name__} may not be safe to read in loader "
            f"workers of several ranks: set 'optim.{KEY}' to 0, or use LMDBs (`fairchem-dens data from-ase` "
            "writes them)."
        )
    if distutils.is_master():
        logging.info(f"Loaders of each local rank: {optim[KEY]} workers ('optim.{KEY}').")
    return int(optim[KEY])
