"""The trajectories that relaxations leave: one file for each structure, named by its sid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ase.io
from ase import Atoms

from fairchem_dens.progress import progress_bar


def last_frames(folder: Path, *, progress: str) -> Iterator[tuple[str, Atoms]]:
    """Yield sid and last frame, which has an energy, of each trajectory of a folder, sorted by sid.

    Args:
        folder: holds ``SID.traj`` files.
        progress: what the progress bar says; empty shows none.

    Raises:
        FileNotFoundError: there is no trajectory.
        ValueError: one cannot be read, or has no frame with an energy; names it.
    """
    files = sorted(folder.glob("*.traj"), key=lambda file: file.stem)
    if not files:
        raise FileNotFoundError(f"'{folder}' holds no trajectories (*.traj).")
    for file in progress_bar(files, shown=bool(progress), desc=progress, unit="trajectory"):
        yield file.stem, last_frame(file)


def last_frame(file: Path) -> Atoms:
    """Return the last frame of a trajectory, which has an energy.

    Raises:
        ValueError: it cannot be read, or has no such frame; says what to do.
    """
    try:
        atoms = ase.io.read(file, "-1")
        atoms.get_potential_energy()
    except (IndexError, StopIteration) as error:
        # fairchem's own trainers write no frame of a structure once it is converged.
        raise ValueError(
            f"'{file}' holds no frame: the forces on that structure were below 'task.relaxation_fmax' from "
            "the start. Remove it and relax it again, with a smaller one or with DeNSTrainer, which writes "
            "that frame."
        ) from error
    except Exception as error:  # whatever a damaged file makes of reading
        raise ValueError(
            f"'{file}' cannot be read as a trajectory with energies ({error}): remove it, and let 'fairchem "
            "--mode run-relaxations' make it again."
        ) from error
    return atoms
