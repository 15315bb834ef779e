"""The paper's network on the paper's molecules, small: real labels, shipped configurations, then dynamics.

``benchmarks/md_energy.py`` has dynamics of ten picoseconds.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.mixing import LinearCombinationCalculator
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

from fairchem_dens.cli.main import main

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs" / "md17"
SMALL = {
    "irreps_node_embedding": "8x0e+4x1e+2x2e",
    "irreps_pre_attn": "8x0e+4x1e+2x2e",
    "irreps_head": "8x0e+4x1e+2x2e",
    "irreps_mlp_mid": "16x0e+8x1e+4x2e",
    "num_heads": 2,
    "num_layers": 1,
    "number_of_basis": 16,
    "fc_neurons": "[16]",
}
FEATURES = {True: "32x0e+16x1e+8x2e", False: "32x0e"}
EPOCHS = 1
KCAL = units.kcal / units.mol


def train(name: str, dens: bool, folder: Path, monkeypatch: Any, real_data: Any, fairchem: Any) -> np.ndarray:
    """Run a shipped configuration with a small model for an epoch; return the losses of all steps."""
    file = real_data(f"rmd17/rmd17_{name}.npz")
    out = folder / "data" / "md17" / name
    command = ["data", "md17", name, "--labels", "original", "--npz", str(file), "--out", str(out)]
    assert main([*command, "--test-size", "50"]) == 0
    monkeypatch.setenv("FAIRCHEM_DENS_DATA", str(folder / "data"))
    options = [f"--model.{key}={value}" for key, value in SMALL.items()]
    options += [f"--model.irreps_feature={FEATURES[dens]}", "--logger=tensorboard", "--seed=1"]
    # The paper's schedule over two epochs would warm up for ten.
    options += [f"--optim.max_epochs={EPOCHS}", "--optim.num_workers=0", "--optim.lr_initial=0.005"]
    options += ["--optim.batch_size=8", "--optim.eval_batch_size=50"]
    options += ["--optim.scheduler_params.warmup_epochs=0.1"]
    output = fairchem("train", CONFIGS / f"{name}{'' if dens else '_baseline'}.yml", *options)
    assert ("DeNS is off" in output) is not dens
    losses = np.array([float(value) for value in re.findall(r"\bloss: (\S+e\S+),.* lr:", output)])
    assert len(losses) == EPOCHS * 119
    return losses


def assert_falls(losses: np.ndarray) -> None:
    """The loss falls by more than batches differ: a mean over 20 steps varies by some 3 %."""
    first, last = losses[:20].mean(), losses[-20:].mean()
    print(f"loss {first:.2f} in steps 1-20, {last:.2f} in the last 20 of {len(losses)}")
    assert last < 0.9 * first


@pytest.mark.parametrize(("name", "dens"), [("aspirin", True), ("aspirin", False), ("ethanol", False)])
def test_losses_fall_on_real_molecules(name, dens, tmp_path, monkeypatch, real_data, fairchem):
    assert_falls(train(name, dens, tmp_path, monkeypatch, real_data, fairchem))


def total_energies(atoms: Atoms, calculator: Any, step_fs: float, duration_fs: float) -> np.ndarray:
    """Energy per step (eV) of molecular dynamics at constant energy."""
    atoms = atoms.copy()
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, timestep=step_fs * units.fs)
    energies: list[float] = []
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(round(duration_fs / step_fs))
    return np.array(energies)


def slope_and_spread(energies: np.ndarray, step_fs: float) -> tuple[float, float]:
    """Drift of the energy (eV/ps), by a straight line, and what is left beside it (eV, rms)."""
    time = np.arange(len(energies)) * step_fs / 1000
    slope, start = np.polyfit(time, energies, 1)
    return float(slope), float(np.std(energies - start - slope * time))


def test_a_model_trained_with_dens_conserves_the_energy(tmp_path, monkeypatch, real_data, fairchem):
    """Ethanol at constant energy in ASE, through fairchem's calculator.

    Velocity Verlet conserves an energy that differs from the true one by something of the order of the step
    squared: with forces that are a gradient the total energy goes up and down by that much, a quarter at half
    the step, and does not drift. So over the whole time the drift must stay below the going up and down.
    """
    from fairchem.core import OCPCalculator

    assert_falls(train("ethanol", True, tmp_path, monkeypatch, real_data, fairchem))
    # The model predicts kcal/mol, ASE reads eV.
    trained = OCPCalculator(checkpoint_path=str(fairchem.file()), cpu=True, seed=0)
    calculator = LinearCombinationCalculator([trained], [KCAL])
    frames = np.load(real_data("rmd17/rmd17_ethanol.npz"))
    atoms = Atoms(frames["nuclear_charges"], frames["coords"][0])
    atoms.calc = calculator
    FIRE(atoms, logfile=None).run(fmax=0.05, steps=60)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    Stationary(atoms)
    ZeroRotation(atoms)

    picoseconds = 1.0
    energies = total_energies(atoms, calculator, 0.5, 1000 * picoseconds)
    drift, spread = slope_and_spread(energies, 0.5)
    _, whole = slope_and_spread(energies[:401], 0.5)
    _, half = slope_and_spread(total_energies(atoms, calculator, 0.25, 200), 0.25)
    print(
        f"ethanol, {picoseconds} ps: drift {1000 * drift:.4f} meV/ps, spread {1000 * spread:.4f} meV; over "
        f"0.2 ps {1000 * whole:.4f} meV at 0.5 fs, {1000 * half:.4f} meV at 0.25 fs"
    )
    assert abs(drift) * picoseconds < spread
    assert 2.5 < whole / half < 6
