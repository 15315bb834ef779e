"""Energy drift of molecular dynamics with a small Equiformer that was trained on real frames for a moment.

    python benchmarks/md_energy.py --npz rmd17_ethanol.npz --out benchmarks/results/md_energy.json

Velocity Verlet in ASE conserves an energy that differs from the true one by something of the order of the
step squared. With forces that are exactly a gradient the total energy therefore goes up and down, by a
quarter at half the step, and does not drift. Printed are both, over the whole time; the first picosecond is
repeated with half the step.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE
from torch_geometric.data import Batch, Data

sys.path.insert(0, str(Path(__file__).resolve().parent))
from result_file import describe, write

from fairchem_dens import keys
from fairchem_dens.models import EquiformerDeNS

KCAL = units.kcal / units.mol
SMALL: dict[str, Any] = {
    "irreps_equivariant_inputs": None,
    "irreps_node_embedding": "16x0e+8x1e",
    "irreps_sh": "1x0e+1x1e",
    "irreps_pre_attn": "16x0e+8x1e",
    "irreps_head": "8x0e+4x1e",
    "irreps_mlp_mid": "16x0e+8x1e",
    "irreps_feature": "32x0e",
    "num_heads": 2,
    "num_layers": 1,
    "number_of_basis": 16,
    "fc_neurons": (16,),
}


def structure(numbers: np.ndarray, positions: np.ndarray) -> Data:
    """A molecule as the model reads it."""
    pos = torch.tensor(positions, dtype=torch.get_default_dtype())
    return Data(pos=pos, atomic_numbers=torch.tensor(numbers).long(), natoms=len(numbers))


def train(model: EquiformerDeNS, frames: Any, steps: int, scale: float) -> list[float]:
    """Fit the forces of 200 frames; returns the mean error (kcal/mol/Å) of each step."""
    chosen = np.random.default_rng(0).choice(len(frames["coords"]), size=200, replace=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    errors = []
    for step in range(steps):
        rows = chosen[np.arange(8 * step, 8 * step + 8) % len(chosen)]
        batch = Batch.from_data_list(
            [structure(frames["nuclear_charges"], frames["coords"][i]) for i in rows]
        )
        forces = torch.tensor(np.concatenate(frames["forces"][rows]), dtype=batch.pos.dtype) / scale
        error = (model(batch)[keys.FORCES] - forces).norm(dim=-1).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        errors.append(scale * float(error))
    return errors


class Trained(Calculator):  # type: ignore[misc]
    """The model in ASE's units.

    Args:
        model: predicts in units of ``scale`` kcal/mol.
        scale: the standard deviation of the forces.
    """

    implemented_properties = ("energy", "forces")

    def __init__(self, model: EquiformerDeNS, scale: float) -> None:
        super().__init__()
        self.model, self.unit = model.eval(), scale * KCAL

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        """Fill in both properties."""
        super().calculate(atoms, properties, system_changes)
        with torch.no_grad():
            outputs = self.model(Batch.from_data_list([structure(atoms.numbers, atoms.positions)]))
        self.results = {
            "energy": self.unit * float(outputs[keys.ENERGY]),
            "forces": self.unit * outputs[keys.FORCES].double().numpy(),
        }


def total_energies(start: Atoms, calculator: Calculator, step_fs: float, picoseconds: float) -> np.ndarray:
    """Energy after each step, eV."""
    atoms = start.copy()
    atoms.calc = calculator
    energies: list[float] = []
    dynamics = VelocityVerlet(atoms, timestep=step_fs * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(round(1000 * picoseconds / step_fs))
    return np.array(energies)


def slope_and_spread(energies: np.ndarray, step_fs: float) -> tuple[float, float]:
    """Drift by a straight line, meV/ps, and what is left beside it, meV rms."""
    time_ps = np.arange(len(energies)) * step_fs / 1000
    slope, start = np.polyfit(time_ps, energies, 1)
    return 1000 * float(slope), 1000 * float(np.std(energies - start - slope * time_ps))


def main() -> int:
    """Train, run, print, write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--npz", type=Path, required=True, help="a file of rMD17")
    parser.add_argument("--train-steps", type=int, default=200, help="of 8 frames each (default: 200)")
    parser.add_argument("--picoseconds", type=float, default=10.0, help="(default: 10)")
    parser.add_argument("--step-fs", type=float, default=0.5, help="time step (default: 0.5)")
    parser.add_argument("--double", action="store_true", help="in double precision")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64 if args.double else torch.float32)
    frames = np.load(args.npz)
    scale = float(frames["forces"][:1000].std())
    model = EquiformerDeNS(**SMALL).train()
    errors = train(model, frames, args.train_steps, scale)

    atoms = Atoms(frames["nuclear_charges"], frames["coords"][0])
    atoms.calc = calculator = Trained(model, scale)
    FIRE(atoms, logfile=None).run(fmax=0.05, steps=60)
    MaxwellBoltzmannDistribution(atoms, temperature_K=300, rng=np.random.default_rng(0))
    Stationary(atoms)
    ZeroRotation(atoms)
    begin = time.perf_counter()
    short = min(1.0, args.picoseconds)
    _, half = slope_and_spread(total_energies(atoms, calculator, args.step_fs / 2, short), args.step_fs / 2)
    energies = total_energies(atoms, calculator, args.step_fs, args.picoseconds)
    drift, spread = slope_and_spread(energies, args.step_fs)
    _, whole = slope_and_spread(energies[: round(1000 * short / args.step_fs) + 1], args.step_fs)
    row = {
        "force_error_at_start": round(float(np.mean(errors[:10])), 2),
        "force_error_at_end": round(float(np.mean(errors[-10:])), 2),
        "drift_meV_per_ps": drift,
        "spread_meV": spread,
        "spread_meV_short": whole,
        "spread_meV_short_half_step": half,
        "minutes": round((time.perf_counter() - begin) / 60, 1),
    }
    print("  ".join(f"{key} {value}" for key, value in row.items()))
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key not in ("npz", "out")}
        result = {
            "benchmark": "md_energy",
            **describe("cpu"),
            "settings": settings | {"molecule": args.npz.stem},
            "rows": [row],
        }
        write(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
