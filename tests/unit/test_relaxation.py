"""Trajectories of relaxations in a potential whose end is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from fairchem.core.common import distutils
from fairchem.core.common.relaxation import ml_relaxation
from fairchem.core.datasets import data_list_collater
from torch_geometric.data import Batch, Data

from fairchem_dens.relaxation import CompleteTrajectories, complete_trajectories

SETTINGS = {"maxstep": 0.2, "memory": 10, "damping": 1.0, "alpha": 10.0}
DISTANCES = (0.3, 0.0, 0.02)
"""Å, of each free atom from where it rests: the second structure is relaxed, the third one soon."""


class Springs:
    """In place of a trainer: each atom is held at its own place, 2 eV/Å² times the square of its distance."""

    device = torch.device("cpu")

    def __init__(self, rest: torch.Tensor) -> None:
        self.rest = rest
        self.fails = False

    def predict(self, batch: Batch, **_: Any) -> dict[str, torch.Tensor]:
        if self.fails:
            raise RuntimeError("out of memory")
        displaced = batch.pos - self.rest
        energies = torch.zeros(len(batch.natoms)).index_add_(0, batch.batch, 2 * (displaced**2).sum(1))
        return {"energy": energies[:, None], "forces": -4 * displaced}


@pytest.fixture
def springs(structure: Callable[..., Data]) -> tuple[Springs, Batch]:
    """Three structures, and where they rest; in a cell so large that nothing is wrapped."""
    structures = [structure(seed, natoms=8 + seed) for seed in range(3)]
    for data in structures:
        data.pos, data.cell = data.pos + 10.0, 40.0 * torch.eye(3)[None]
    batch = data_list_collater(structures, otf_graph=True)
    rest = batch.pos.clone()
    along = torch.zeros_like(rest)
    along[:, 0] = torch.tensor(DISTANCES)[batch.batch] * (batch.fixed == 0)
    batch.pos = rest + along
    return Springs(rest), batch


def relax(springs: tuple[Springs, Batch], folder: Path | None, **arguments: Any) -> Batch:
    trainer, batch = springs
    settings = {"steps": 50, "fmax": 0.05, **arguments}
    with complete_trajectories():
        return ml_relaxation.ml_relax(
            batch.clone(), trainer, relax_opt={**SETTINGS, "traj_dir": folder}, **settings
        )


def trajectories(folder: Path) -> list[list[Atoms]]:
    assert sorted(path.name for path in folder.iterdir()) == ["0.traj", "1.traj", "2.traj"]
    return [ase.io.read(folder / f"{sid}.traj", ":") for sid in range(3)]


def max_force(atoms: Atoms) -> float:
    return float(np.linalg.norm(atoms.get_forces(), axis=1).max())


@pytest.mark.parametrize("whole", [True, False])
def test_each_ends_with_the_relaxed_structure(
    springs: tuple[Springs, Batch], tmp_path: Path, whole: bool
) -> None:
    relaxed = relax(springs, tmp_path, save_full_traj=whole)
    frames = trajectories(tmp_path)
    natoms = relaxed.natoms.reshape(-1).tolist()
    for sid, (found, end, start) in enumerate(
        zip(frames, relaxed.pos.split(natoms), springs[1].pos.split(natoms), strict=True)
    ):
        np.testing.assert_allclose(found[0].positions, start, atol=1e-5)
        np.testing.assert_allclose(found[-1].positions, end, atol=1e-5)
        assert max_force(found[-1]) < 0.05
        if whole:
            # Until it is converged, and no frame after that.
            assert all(max_force(atoms) >= 0.05 for atoms in found[:-1])
            energies = [atoms.get_potential_energy() for atoms in found]
            assert energies == sorted(energies, reverse=True)
        assert (len(found) == 1) is (sid == 1)
    assert len(frames[0]) == len(frames[2]) == 2 if not whole else len(frames[0]) > len(frames[2]) > 1


def test_what_fairchem_writes_lacks_the_end(springs: tuple[Springs, Batch], tmp_path: Path) -> None:
    """Why this is here; should it fail, fairchem has learned it and the class may go."""
    trainer, batch = springs
    settings = {**SETTINGS, "traj_dir": tmp_path}
    ml_relaxation.ml_relax(batch.clone(), trainer, 50, 0.05, relax_opt=settings)
    frames = trajectories(tmp_path)
    assert max_force(frames[0][-1]) >= 0.05
    assert frames[1] == []


def test_nothing_to_do(springs: tuple[Springs, Batch], tmp_path: Path) -> None:
    for name, arguments in {"relaxed": {"fmax": 100.0}, "no steps": {"steps": 0}}.items():
        relax(springs, tmp_path / name, **arguments)
        natoms = springs[1].natoms.tolist()
        for found, start in zip(trajectories(tmp_path / name), springs[1].pos.split(natoms), strict=True):
            (atoms,) = found
            np.testing.assert_allclose(atoms.positions, start, atol=1e-5)
            assert np.isfinite(atoms.get_potential_energy())


def test_steps_run_out(springs: tuple[Springs, Batch], tmp_path: Path) -> None:
    relaxed = relax(springs, tmp_path, steps=2, fmax=1e-4)
    last = trajectories(tmp_path)[0]
    assert len(last) == 3
    np.testing.assert_allclose(last[-1].positions, relaxed.pos[: len(last[-1])], atol=1e-5)


def test_two_ranks_with_the_same_structures(
    springs: tuple[Springs, Batch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank begins and ends while this one is at work."""
    write, nested = CompleteTrajectories.write, []

    def other_rank_too(self: CompleteTrajectories) -> None:
        write(self)
        if not nested:
            nested.append(True)
            with monkeypatch.context() as there:
                there.setattr(distutils, "get_rank", lambda: 1)
                relax(springs, tmp_path)

    monkeypatch.setattr(CompleteTrajectories, "write", other_rank_too)
    relax(springs, tmp_path)
    assert nested
    assert [max_force(found[-1]) < 0.05 for found in trajectories(tmp_path)] == [True] * 3


def test_a_failure_leaves_nothing_half_written(springs: tuple[Springs, Batch], tmp_path: Path) -> None:
    springs[0].fails = True
    (tmp_path / "0.traj").write_text("of before")
    with pytest.raises(RuntimeError, match="out of memory"):
        relax(springs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0.traj"]
    assert ml_relaxation.LBFGS is not CompleteTrajectories


def test_without_a_folder_nothing_is_written(springs: tuple[Springs, Batch], tmp_path: Path) -> None:
    relaxed = relax(springs, None)
    assert (relaxed.pos - springs[0].rest).norm(dim=1).max() < 0.05 / 4
    assert not list(tmp_path.iterdir())


def test_what_was_relaxed_before_is_taken_from_its_trajectory(
    springs: tuple[Springs, Batch], tmp_path: Path
) -> None:
    """Also where fairchem has moved atoms into the cell: relaxed positions are near those of the start."""
    trainer, batch = springs
    batch.cell = 5.0 * torch.eye(3).repeat(3, 1, 1)
    relaxed = relax(springs, tmp_path)
    inside = np.concatenate([found[-1].positions for found in trajectories(tmp_path)])
    assert np.abs(inside - relaxed.pos.numpy()).max() > 4.9
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    trainer.fails = True  # so nothing is predicted
    again = relax(springs, tmp_path)
    np.testing.assert_allclose(again.pos, relaxed.pos, atol=2e-6)
    np.testing.assert_allclose(again.energy, relaxed.energy, atol=1e-6)
    np.testing.assert_allclose(again.forces, relaxed.forces, atol=1e-6)
    assert again.energy.shape == relaxed.energy.shape and again.pos.dtype == relaxed.pos.dtype
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    trainer.fails = False
    (tmp_path / "2.traj").unlink()
    relax(springs, tmp_path)
    assert max_force(trajectories(tmp_path)[2][-1]) < 0.05


def test_trajectories_that_are_not_theirs(springs: tuple[Springs, Batch], tmp_path: Path) -> None:
    relax(springs, tmp_path)
    (tmp_path / "0.traj").replace(tmp_path / "1.traj")
    ase.io.write(tmp_path / "0.traj", ase.io.read(tmp_path / "1.traj"))
    with pytest.raises(ValueError, match=r"1\.traj' holds .*'task\.relax_opt\.traj_dir'"):
        relax(springs, tmp_path)
    (tmp_path / "0.traj").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0\.traj' cannot be read .* remove it"):
        relax(springs, tmp_path)
