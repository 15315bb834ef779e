"""What the corruption does to a structure: a notebook as a script."""

# %% [markdown]
# # What the corruption does to a structure
#
# A notebook as a script: open it in an editor that knows `# %%` cells, or run it. It writes `corruption.svg`.

# %%
from __future__ import annotations

import numpy as np
from ase.build import add_adsorbate, fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.data.lmdb import data_from_atoms

# %% [markdown]
# A structure out of equilibrium, with energy and forces. The lowest layer is held fixed.

# %%
atoms = fcc111("Cu", size=(3, 3, 3), vacuum=8.0)
add_adsorbate(atoms, "O", height=1.4, position="bridge")
atoms.pbc = True
atoms.set_constraint(FixAtoms(mask=atoms.get_tags() == 3))
atoms.rattle(0.1, seed=1)
atoms.calc = EMT()
data = data_from_atoms(
    atoms,
    sid=0,
    fid=0,
    energy=atoms.get_potential_energy(),
    forces=atoms.get_forces(apply_constraint=False),
)

# %% [markdown]
# `corrupt` returns a copy with five fields more. It is a pure function: the same seed, epoch and structure
# give the same noise, whatever process asks.

# %%
settings = Corruption(prob=1.0, std=0.1, corrupt_ratio=0.5)
noisy = corrupt(data, settings, seed=1, epoch=0)
again = corrupt(data, settings, seed=1, epoch=0)
later = corrupt(data, settings, seed=1, epoch=1)
assert (noisy[keys.POS] == again[keys.POS]).all() and (noisy[keys.POS] != later[keys.POS]).any()

moved = noisy[keys.NOISE_MASK]
assert not moved[data[keys.FIXED] == 1].any()  # fixed atoms stay
assert (noisy[keys.POS] - noisy[keys.NOISE_VEC] - data[keys.POS]).abs().max() < 1e-5
assert (noisy[keys.CONDITION_FORCES][~moved] == 0).all()  # forces are shown for displaced atoms alone
assert (noisy[keys.FORCES] == data[keys.FORCES]).all()  # labels stay labels
print(f"{int(moved.sum())} of {len(atoms)} atoms displaced, {int((data[keys.FIXED] == 0).sum())} are free")

# %% [markdown]
# Over many epochs: how many atoms move, and how far.

# %%
shares, lengths = [], []
free = int((data[keys.FIXED] == 0).sum())
for epoch in range(400):
    item = corrupt(data, settings, seed=1, epoch=epoch)
    shares.append(int(item[keys.NOISE_MASK].sum()) / free)
    lengths.append(item[keys.NOISE_VEC][item[keys.NOISE_MASK]].norm(dim=-1).numpy())

figure = Figure(figsize=(9, 3.4), layout="constrained")
FigureCanvasAgg(figure)
left, right = figure.subplots(1, 2)
left.hist(shares, bins=np.linspace(0, 1, 19), color="#0072B2", edgecolor="white")
left.axvline(settings.corrupt_ratio, color="#22262b", ls="--", label="corrupt_ratio")
left.set(xlabel="share of the free atoms that is displaced", ylabel="epochs")
right.hist(np.concatenate(lengths), bins=40, density=True, color="#56B4E9", edgecolor="white")
place = np.linspace(0, 0.5, 200)
maxwell = np.sqrt(2 / np.pi) * place**2 / settings.std**3 * np.exp(-((place / settings.std) ** 2) / 2)
right.plot(place, maxwell, color="#D55E00", ls="--", label="three normal coordinates of σ = 0.1 Å")
right.set(xlabel="displacement of an atom, Å", ylabel="density")
for axis in (left, right):
    axis.legend(frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
figure.savefig("corruption.svg")
