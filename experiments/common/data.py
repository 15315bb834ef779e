"""The data of the experiments: where it is looked for, and how it becomes LMDBs."""

from __future__ import annotations

import json
import os
from itertools import islice
from pathlib import Path
from typing import Any

from fairchem_dens.data.emt import EmtSettings, generate
from fairchem_dens.data.lmdb import LmdbWriter, read_lmdb

VARIABLE = "FAIRCHEM_DENS_REAL_DATA"


def find_real_data(given: Path | None, name: str, what: str) -> Path:
    """Return a file or folder of real data.

    Args:
        given: the folder that ``--data`` names.
        name: file or folder in it.
        what: where one gets it, for the message.

    Raises:
        FileNotFoundError: it is not there; says where it was looked for and what to do.
    """
    folder = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if folder is None:
        raise FileNotFoundError(
            f"This experiment needs real data, '{name}' ({what}). Put it into a folder and name that with "
            f"--data, or in the environment variable {VARIABLE}."
        )
    if not (folder / name).exists():
        raise FileNotFoundError(
            f"There is no '{name}' in '{folder}', which --data or {VARIABLE} names: {what}."
        )
    return folder / name


def generated_data(folder: Path, settings: EmtSettings) -> dict[str, Any]:
    """Generate the EMT set of the demo, unless it is there; return its summary."""
    return generate(folder, settings)


def first_frames(source: Path, count: int, target: Path) -> Path:
    """Write the first frames of an LMDB into another, unless it is there."""
    if not target.is_dir():
        with LmdbWriter(target) as writer:
            for structure in islice(read_lmdb(source), count):
                writer.add(structure)
    return target


def normalizers(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the settings of ``transforms.normalizer`` for the generated set, of all its train frames."""
    train = summary["splits"]["train"]
    return {
        "energy": {"mean": round(train["energy_mean"], 6), "rmsd": round(train["energy_std"], 6)},
        "forces": {"mean": 0.0, "rmsd": round(train["force_rms"], 6)},
    }


def read_summary(folder: Path) -> dict[str, Any]:
    """Return the ``summary.json`` of a data set."""
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))
