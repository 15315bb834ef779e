"""Writing an ``.npz`` so that it is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike


def write_npz(file: str | Path, **arrays: ArrayLike) -> None:
    """Write arrays aside and rename the file; one that is there is replaced."""
    file = Path(file)
    aside = file.with_name(f".{file.name}.partial")
    try:
        with aside.open("wb") as opened:
            # numpy 2 declares an option among the names of arrays.
            np.savez_compressed(opened, **{n: np.asarray(v) for n, v in arrays.items()})  # type: ignore[arg-type]
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
