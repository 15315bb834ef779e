"""Writing an ``.npz`` so that it is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from fairchem_dens.data.folder import file_aside


def write_npz(file: str | Path, **arrays: ArrayLike) -> None:
    """Write arrays; a file that is there is replaced."""
    with file_aside(file) as aside, aside.open("wb") as opened:
        # numpy 2 declares an option among the names of arrays.
        np.savez_compressed(opened, **{n: np.asarray(v) for n, v in arrays.items()})  # type: ignore[arg-type]
