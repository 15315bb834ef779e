"""Runs the commands of the documentation that are marked with ``<!-- run -->``, page by page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io.trajectory import Trajectory

from pages import PAGES, commands

RUN = {page: [block.code for block in commands(page) if block.mark == "run"] for page in PAGES}


def write_calculations(folder: Path) -> None:
    """What the pages call `calculations`: trajectories of several systems."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    for system in range(10):
        atoms = fcc111("Cu", size=(2, 2, 3), vacuum=8.0)
        add_adsorbate(atoms, "O", 1.3 + 0.05 * system, "fcc")
        atoms.pbc = True
        atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 3))
        with Trajectory(folder / f"system{system}.traj", "w") as trajectory:
            for _ in range(3):
                moved = atoms.copy()
                moved.positions += rng.normal(scale=0.05, size=moved.positions.shape)
                moved.calc = EMT()
                moved.get_forces()
                trajectory.write(moved)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if RUN[page]], ids=lambda page: page.name)
def test_commands_run_as_they_stand(page: Path, tmp_path: Path, installed: None) -> None:
    write_calculations(tmp_path / "calculations")
    beside = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{beside}{os.pathsep}{os.environ['PATH']}"}
    for code in RUN[page]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", code],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def test_there_are_such_commands() -> None:
    assert sum(map(len, RUN.values())) >= 4
