"""The loss of DeNS in a loop of your own: a notebook as a script."""

# %% [markdown]
# # The loss of DeNS in a loop of your own
#
# Corruption and objective know nothing of fairchem. This trains the network of `new_model.py` on a few
# structures in twenty lines, without a trainer or a YAML, and writes `denoise.svg`. It is a lesson, not a way
# to train: `fairchem --mode train` with `DeNSTrainer` does all that is missing here.

# %%
from __future__ import annotations

import torch
from ase.build import fcc111
from ase.calculators.emt import EMT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from new_model import ScalarsAndVectors
from torch_geometric.data import Batch

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.data.lmdb import data_from_atoms
from fairchem_dens.objective import force_and_noise_loss, supervised_atoms

# %% [markdown]
# Sixteen rattled slabs. All atoms are free.

# %%
structures = []
for seed in range(16):
    atoms = fcc111("Cu", size=(2, 2, 3), vacuum=8.0, periodic=True)
    atoms.rattle(0.15, seed=seed)
    atoms.calc = EMT()
    structures.append(
        data_from_atoms(
            atoms, sid=seed, fid=0, energy=atoms.get_potential_energy(), forces=atoms.get_forces()
        )
    )

# %% [markdown]
# Half of the structures of a step are corrupted, and in those half of the atoms. Where an atom was displaced
# the target is the noise in units of σ, elsewhere the force.

# %%
STEPS, SIGMA = 80, 0.1


def train(*, shown: bool) -> list[float]:
    """Return the error of the noise, in units of σ, in each step; 1.6 is what guessing none would give."""
    torch.manual_seed(0)
    settings = Corruption(prob=0.5, std=SIGMA, corrupt_ratio=0.5)
    model = ScalarsAndVectors(channels=16, num_layers=2, cutoff=4.0, use_force_encoding=shown)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    errors = []
    for step in range(STEPS):
        batch = Batch.from_data_list([corrupt(data, settings, seed=1, epoch=step) for data in structures])
        out = model(batch)
        force_errors = (out["forces"] - batch[keys.FORCES]).norm(dim=-1)
        noise_errors = (out["noise"] - batch[keys.NOISE_VEC] / SIGMA).norm(dim=-1)
        loss = force_and_noise_loss(
            force_errors,
            noise_errors,
            supervised_atoms(
                batch[keys.NOISE_MASK], batch[keys.FIXED], free_atoms_only=True, all_atoms=False
            ),
            force_coefficient=1.0,
            noise_coefficient=1.0,
            reduction="joint",
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(noise_errors[batch[keys.NOISE_MASK]].mean()))
    return errors


curves = {"forces shown": train(shown=True), "forces hidden": train(shown=False)}

# %%
figure = Figure(figsize=(6, 3.4), layout="constrained")
FigureCanvasAgg(figure)
axis = figure.subplots()
for (title, errors), color, dash in zip(curves.items(), ("#0072B2", "#D55E00"), ("-", "--"), strict=True):
    axis.plot(errors, color=color, ls=dash, label=title)
    print(f"{title}: error of the noise {sum(errors[-10:]) / 10:.2f} σ in the last ten steps")
axis.set(xlabel="step", ylabel="error of the noise, σ")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
figure.savefig("denoise.svg")
