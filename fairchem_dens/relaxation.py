"""fairchem's relaxations, with trajectories that are complete, on any number of ranks, and after a stop."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.geometry import find_mic
from fairchem.core.common import distutils
from fairchem.core.common.relaxation import ml_relaxation
from fairchem.core.common.relaxation.optimizers.lbfgs_torch import LBFGS
from fairchem.core.trainers import ocp_trainer

from fairchem_dens import keys
from fairchem_dens.data.trajectories import last_frame


class CompleteTrajectories(LBFGS):
    """fairchem's L-BFGS, except that each trajectory ends with the relaxed structure.

    fairchem writes a structure's frame while it is not converged: the frame in which it has converged is
    missing, and the file of a structure that needs no step is empty. On several ranks it may give the same
    structure to two of them, which then write and rename the same file. And a run that goes on after a stop
    leaves the structures with a trajectory out of its other results; here they are read from it.
    """

    traj_dir: Path | None

    def run(self, fmax: float, steps: int) -> bool:
        """Relax until no force on a free atom is above ``fmax``, in eV/Å, in at most ``steps`` steps.

        Raises:
            ValueError: all structures have a trajectory, and one of these is not theirs.
        """
        folder = self.traj_dir
        if folder is None:
            return bool(super().run(fmax, steps))
        files = [folder / f"{name}.traj" for name in self.traj_names]
        if all(file.is_file() for file in files):
            self._take_from(files)
            return True
        self._unfinished = torch.ones(len(files), dtype=torch.bool)
        self._wrote = False
        self.traj_dir = folder / f".rank-{distutils.get_rank()}"
        try:
            converged = bool(super().run(fmax, steps))
            written = [self.traj_dir / file.name for file in files]
            if not self._wrote:
                for file, atoms in zip(written, self.optimizable.get_atoms_list(), strict=True):
                    ase.io.write(file, atoms)
            for file, final in zip(written, files, strict=True):
                file.replace(final)
        finally:
            shutil.rmtree(self.traj_dir, ignore_errors=True)
            self.traj_dir = folder
        return converged

    def write(self) -> None:
        """Write a frame of each structure that was not converged when this was last called."""
        frames = zip(self.optimizable.get_atoms_list(), self.trajectories, self._unfinished, strict=True)
        for atoms, trajectory, unfinished in frames:
            if unfinished:
                trajectory.write(atoms)
        self._unfinished = self.optimizable.update_mask.cpu()
        self._wrote = True

    def _take_from(self, files: Sequence[Path]) -> None:
        """Give the batch the positions, energies and forces of the last frames."""
        logging.info(f"Relaxed before: {', '.join(file.name for file in files)}.")
        batch = self.optimizable.batch
        sizes = batch[keys.NATOMS].tolist()
        starts = batch[keys.POS].split(sizes)
        numbers = batch[keys.ATOMIC_NUMBERS].split(sizes)
        frames = [_relaxed(file, number.cpu().numpy()) for file, number in zip(files, numbers, strict=True)]
        ends = [_end(frame, start.cpu().numpy()) for frame, start in zip(frames, starts, strict=True)]
        batch[keys.POS] = torch.from_numpy(np.concatenate(ends)).to(batch[keys.POS])
        energies = [[frame.get_potential_energy()] for frame in frames]
        batch[keys.ENERGY] = torch.tensor(energies).to(batch[keys.POS])
        forces = np.concatenate([frame.get_forces() for frame in frames])
        batch[keys.FORCES] = torch.from_numpy(forces).to(batch[keys.POS])


def _relaxed(file: Path, numbers: np.ndarray) -> Atoms:
    atoms = last_frame(file)
    if not np.array_equal(atoms.numbers, numbers):
        raise ValueError(
            f"'{file}' holds {atoms.get_chemical_formula()}, which is not what the structure of that sid in "
            "'dataset.relax' consists of: set 'task.relax_opt.traj_dir' to another folder."
        )
    return atoms


def _end(frame: Atoms, start: np.ndarray) -> np.ndarray:
    """Return the positions of a frame, which fairchem has moved into the cell, near those of the start."""
    moved = frame.positions - start
    shortest, _ = find_mic(moved, frame.cell, pbc=True)
    return np.asarray(frame.positions + (shortest - moved))


@contextlib.contextmanager
def complete_trajectories() -> Iterator[None]:
    """Let fairchem's relaxations write trajectories with `CompleteTrajectories`, which looks for old ones."""
    theirs = ml_relaxation.LBFGS, ocp_trainer.check_traj_files
    ml_relaxation.LBFGS = CompleteTrajectories
    ocp_trainer.check_traj_files = lambda *_: False
    try:
        yield
    finally:
        ml_relaxation.LBFGS, ocp_trainer.check_traj_files = theirs
