"""A small OC20-like data set: adsorbates on metal slabs, computed with ASE's effective medium theory (EMT).

EMT takes two milliseconds for a slab of fifteen atoms, so a set with energies, forces and structures far from
equilibrium is made on the spot. Its H, C, N and O are no description of nature; they are a smooth many-body
potential with the same elements and shapes.

What is as in OC20: slabs of several facets and alloys, periodic in all directions with vacuum above; tag 0
    for the atoms below the
surface, which are held fixed, 1 for free metal atoms, 2 for the adsorbate; frames from relaxations and from
molecular dynamics; energies of adsorption, E(frame) − E(relaxed clean slab) − E(adsorbate in the gas phase),
the last a sum over atoms with references from H2, H2O, CO and N2; splits by system, so that no validation
frame shares its slab with a training frame.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.build import fcc100, fcc110, fcc111, fcc211, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.data import atomic_numbers, covalent_radii, reference_states
from ase.md.langevin import Langevin
from ase.optimize import BFGS

from fairchem_dens.data.folder import write_text
from fairchem_dens.data.labels import SUMMARY_FILE
from fairchem_dens.data.processes import worker_pool
from fairchem_dens.progress import progress_bar
from fairchem_dens.randomness import generator

SPLITS = ("train", "val", "test")
METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")
ADSORBATES = ("H", "C", "N", "O", "OH", "CH", "NH", "CO", "N2", "CH2", "NH2", "H2O")

_VACUUM = 6.0  # Å on either side of the slab
_CHOSEN_ALONG_RELAXATION = 0.5  # share of the frames; the rest is from molecular dynamics
_MAX_HEIGHT = 3.5  # Å above the highest metal atom; an adsorbate that is farther away has left


@dataclass(frozen=True, kw_only=True)
class EmtSettings:
    """What the generated set is like.

    Attributes:
        train_systems, val_systems, test_systems: number of systems (a slab with an adsorbate) in each split.
        frames_per_system: frames taken from the relaxation and the molecular dynamics of each system.
        seed: seed; the same settings give the same set.
        max_force: frames in which an atom feels a larger force, in eV/Å, are left out.
        relaxation_steps: most steps of a relaxation.
        md_steps: steps of molecular dynamics.
    """

    train_systems: int
    val_systems: int
    test_systems: int
    frames_per_system: int
    seed: int = 0
    max_force: float = 10.0
    relaxation_steps: int = 50
    md_steps: int = 80

    def __post_init__(self) -> None:
        for name in (
            "train_systems",
            "val_systems",
            "test_systems",
            "frames_per_system",
            "relaxation_steps",
            "md_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"'{name}' must be at least 1, found {getattr(self, name)}.")
        if not self.max_force > 0:
            raise ValueError(f"'max_force' must be above 0 eV/Å, found {self.max_force}.")
        if self.frames_per_system > (self.relaxation_steps + self.md_steps) // 4:
            raise ValueError(
                f"'frames_per_system' ({self.frames_per_system}) is more than a quarter of all computed, "
                f"{self.relaxation_steps} + {self.md_steps}: frames would be near copies of each other."
            )

    def systems(self, split: str) -> int:
        """Number of systems of ``split``."""
        return int(getattr(self, f"{split}_systems"))

    def sids(self, split: str) -> range:
        """Ids of the systems of ``split``; those of different splits are disjoint."""
        start = sum(self.systems(before) for before in SPLITS[: SPLITS.index(split)])
        return range(start, start + self.systems(split))


@dataclass
class Frames:
    """The frames of one system.

    Attributes:
        sid: id of the system.
        name: what it is, for people, such as ``Cu3Pt-111 + OH``.
        atoms: structures without calculator, in the order of time.
        energies: eV of adsorption, one for each structure.
        forces: (N, 3), eV/Å, without constraints, one for each structure.
        computed: number of frames computed.
        dropped: how many were left out and why.
    """

    sid: int
    name: str
    atoms: list[Atoms] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    forces: list[np.ndarray] = field(default_factory=list)
    computed: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


@cache
def gas_phase_energy(symbol: str) -> float:
    """Energy (eV) that an adsorbate's atom is counted from: relaxed H2, H2O, CO and N2, as in OC20."""

    def relaxed(name: str) -> float:
        atoms = molecule(name, vacuum=6.0)
        atoms.calc = EMT()
        BFGS(atoms, logfile=None).run(fmax=0.01, steps=100)
        return float(atoms.get_potential_energy())

    if symbol == "H":
        return relaxed("H2") / 2
    if symbol == "N":
        return relaxed("N2") / 2
    if symbol == "O":
        return relaxed("H2O") - relaxed("H2")
    if symbol == "C":
        return relaxed("CO") - gas_phase_energy("O")
    raise ValueError(f"There is no gas-phase reference for '{symbol}': adsorbates are made of H, C, N and O.")


def build_slab(rng: np.random.Generator) -> tuple[Atoms, str]:
    """Return a clean slab of a random alloy and facet, its lowest layers fixed with tag 0, and its name."""
    metals = rng.choice(METALS, size=rng.choice([1, 2, 3], p=[0.25, 0.5, 0.25]), replace=False)
    builders: dict[str, tuple[Callable[..., Atoms], tuple[int, int, int], int]] = {
        # The number of repeats along x, y and layers, and how many of these layers are fixed.
        "111": (fcc111, (2, 2, 3), 1),
        "100": (fcc100, (2, 2, 3), 1),
        "110": (fcc110, (2, 2, 4), 2),
        "211": (fcc211, (3, 2, 2), 1),
    }
    facet = str(rng.choice(list(builders)))
    builder, size, fixed_layers = builders[facet]
    shares = rng.dirichlet(np.full(len(metals), 3.0))
    lattice = sum(
        share * reference_states[atomic_numbers[metal]]["a"]
        for share, metal in zip(shares, metals, strict=True)
    )
    slab = builder(str(metals[0]), size=size, a=lattice, vacuum=_VACUUM)
    slab.pbc = True
    symbols = rng.choice(metals, size=len(slab), p=shares)
    slab.set_chemical_symbols(symbols.tolist())

    height = slab.positions[:, 2]
    atoms_fixed = len(slab) * fixed_layers // size[2]
    fixed = np.zeros(len(slab), dtype=bool)
    fixed[np.argsort(height, kind="stable")[:atoms_fixed]] = True
    slab.set_tags(np.where(fixed, 0, 1))
    slab.set_constraint(FixAtoms(mask=fixed))
    # Off the cell's edges, so that small displacements do not carry an atom to the other side of the picture.
    slab.positions += 0.5 * (slab.cell[0] / size[0] + slab.cell[1] / size[1])
    slab.wrap()
    return slab, f"{slab.get_chemical_formula()}-{facet}"


def add_adsorbate(slab: Atoms, name: str, rng: np.random.Generator) -> Atoms:
    """Return ``slab`` with an adsorbate, tag 2, turned at random, at a random place on its surface."""
    adsorbate = Atoms(name, positions=[(0, 0, 0)]) if len(name) == 1 else _small_molecule(name)
    axis = rng.standard_normal(3)
    adsorbate.rotate(rng.uniform(0, 360), axis / np.linalg.norm(axis), center="COM")
    system = slab.copy()
    place = rng.uniform(size=2) @ slab.cell[:2]
    adsorbate.positions -= adsorbate.get_center_of_mass()
    adsorbate.positions[:, :2] += place[:2]
    # Down until the first contact, then up a little: neither inside the metal nor out of reach.
    clearance = rng.uniform(0.9, 1.2)
    adsorbate.positions[:, 2] += _contact_height(slab, adsorbate, clearance)
    adsorbate.set_tags([2] * len(adsorbate))
    system += adsorbate
    return system


def _small_molecule(name: str) -> Atoms:
    known = {"CH2": "CH2_s1A1d"}
    return molecule(known.get(name, name))


def _contact_height(slab: Atoms, adsorbate: Atoms, clearance: float) -> float:
    """Lowest shift along z, in Å, that keeps atoms ``clearance`` times the sum of their radii apart."""
    lowest = -np.inf
    for atom in adsorbate:
        for repeat_x in (-1, 0, 1):
            for repeat_y in (-1, 0, 1):
                image = slab.positions + repeat_x * slab.cell[0] + repeat_y * slab.cell[1]
                contact = clearance * (covalent_radii[slab.numbers] + covalent_radii[atom.number])
                flat = ((image[:, :2] - atom.position[:2]) ** 2).sum(axis=1)
                above = np.sqrt(np.clip(contact**2 - flat, 0, None))
                touching = flat < contact**2
                if touching.any():
                    lowest = max(
                        lowest, float((image[touching, 2] + above[touching]).max() - atom.position[2])
                    )
    return lowest if np.isfinite(lowest) else float(slab.positions[:, 2].max()) + 1.0


def simulate_system(sid: int, settings: EmtSettings) -> Frames:
    """Build a system, relax it, run molecular dynamics and take frames of both.

    A pure function of its arguments. Frames are chosen evenly over the molecular dynamics and, along the
    relaxation, more densely at its start, where forces are large.
    """
    rng = generator(settings.seed, sid)
    slab, slab_name = build_slab(rng)
    adsorbate = str(rng.choice(ADSORBATES))
    frames = Frames(sid=sid, name=f"{slab_name} + {adsorbate}")

    system = add_adsorbate(slab, adsorbate, rng)
    free = system.get_tags() > 0
    system.positions[free] += rng.normal(scale=rng.uniform(0.05, 0.2), size=(int(free.sum()), 3))

    slab.calc = EMT()
    BFGS(slab, logfile=None).run(fmax=0.03, steps=settings.relaxation_steps)
    reference = slab.get_potential_energy() + sum(
        gas_phase_energy(symbol) for symbol in system.symbols[system.get_tags() == 2]
    )

    system.calc = EMT()
    relaxation: list[tuple[Atoms, float, np.ndarray]] = []
    relaxer = BFGS(system, logfile=None)
    relaxer.attach(lambda: relaxation.append(_snapshot(system, reference)))
    relaxer.run(fmax=0.03, steps=settings.relaxation_steps)

    dynamics: list[tuple[Atoms, float, np.ndarray]] = []
    temperature = rng.uniform(300.0, 1500.0)
    thermal = np.sqrt(units.kB * temperature * system.get_masses())[:, None]
    system.set_momenta(thermal * rng.standard_normal((len(system), 3)))
    # A hydrogen vibrates with a period of about 10 fs.
    timestep = 1.0 if "H" in system.symbols else 2.0
    thermostat = Langevin(
        system,
        timestep=timestep * units.fs,
        temperature_K=temperature,
        friction=0.02 / units.fs,
        fixcm=False,
        rng=rng,
    )
    thermostat.attach(lambda: dynamics.append(_snapshot(system, reference)))
    thermostat.run(settings.md_steps)

    frames.computed = len(relaxation) + len(dynamics)
    relaxation = _keep(relaxation, settings, frames.dropped)
    dynamics = _keep(dynamics, settings, frames.dropped)
    from_relaxation = round(settings.frames_per_system * _CHOSEN_ALONG_RELAXATION)
    from_dynamics = settings.frames_per_system - min(from_relaxation, len(relaxation) // 2)
    # An adsorbate may leave during the dynamics: then the relaxation has to give more.
    from_dynamics = min(from_dynamics, len(dynamics))
    chosen = _choose(relaxation, settings.frames_per_system - from_dynamics, dense_start=True)
    chosen += _choose(dynamics, from_dynamics, dense_start=False)
    for atoms, energy, forces in chosen:
        frames.atoms.append(atoms)
        frames.energies.append(energy)
        frames.forces.append(forces)
    return frames


def _snapshot(system: Atoms, reference: float) -> tuple[Atoms, float, np.ndarray]:
    structure = system.copy()
    structure.set_velocities(np.zeros((len(system), 3)))
    energy = float(system.get_potential_energy(apply_constraint=False)) - reference
    return structure, energy, system.get_forces(apply_constraint=False).copy()


def _keep(
    frames: list[tuple[Atoms, float, np.ndarray]], settings: EmtSettings, dropped: Counter[str]
) -> list[tuple[Atoms, float, np.ndarray]]:
    """Leave out what no model should learn, and count it."""
    kept = []
    for frame in frames:
        atoms, energy, forces = frame
        metal = atoms.get_tags() < 2
        height = atoms.positions[~metal, 2].max() - atoms.positions[metal, 2].max()
        if not np.isfinite(energy) or not np.isfinite(forces).all():
            dropped["energy or forces not finite"] += 1
        elif np.linalg.norm(forces, axis=1).max() > settings.max_force:
            dropped[f"a force above {settings.max_force:g} eV/Å"] += 1
        elif height > _MAX_HEIGHT:
            dropped[f"an adsorbate more than {_MAX_HEIGHT:g} Å above the surface"] += 1
        else:
            kept.append(frame)
    return kept


def _choose(frames: list[Any], count: int, *, dense_start: bool) -> list[Any]:
    """Take ``count`` different frames in order, spread evenly or, with ``dense_start``, with growing gaps."""
    count = min(count, len(frames))
    if count <= 0:
        return []
    spread = np.linspace(0.0, 1.0, count + 1)[1:] if not dense_start else np.linspace(0.0, 1.0, count) ** 2
    indices = np.round(spread * (len(frames) - 1)).astype(int)
    for position in range(1, count):  # growing gaps start below one frame: no frame twice
        indices[position] = max(indices[position], indices[position - 1] + 1)
    for position in range(count - 1, -1, -1):
        indices[position] = min(indices[position], len(frames) - count + position)
    return [frames[index] for index in indices]


def generate(
    folder: str | Path,
    settings: EmtSettings,
    *,
    processes: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Make the data set: one LMDB folder for each split, and a summary that is written last.

    A complete set made with the same settings is left as it is.

    Args:
        folder: gets ``train/``, ``val/``, ``test/`` and ``summary.json``.
        settings: what to generate.
        processes: processes that compute; None takes one for each of up to four cores.
        progress: show progress bars.

    Returns:
        The summary: ``settings``, ``seconds`` and, in ``splits``, for each split the counts of systems,
            frames and atoms, what was left
        out, and the statistics of energies (eV) and of the forces on free atoms (eV/Å).

    Raises:
        ValueError: the folder holds a set made with other settings.
    """
    folder = Path(folder)
    summary = read_summary(folder)
    if summary is not None:
        if summary["settings"] != asdict(settings):
            different = [
                name for name, value in asdict(settings).items() if summary["settings"].get(name) != value
            ]
            raise ValueError(
                f"'{folder}' holds a data set made with other settings (different: {', '.join(different)}). "
                "Remove it, or choose another folder."
            )
        return summary

    started = time.monotonic()
    splits = {}
    with worker_pool(processes) as pool:
        for split in SPLITS:
            sids = settings.sids(split)
            systems = pool.map(simulate_system, sids, [settings] * len(sids))
            bar = progress_bar(systems, shown=progress, total=len(sids), desc=f"  {split:5}", unit="system")
            splits[split] = _write_split(folder / split, bar)
    summary = {
        "settings": asdict(settings),
        "seconds": round(time.monotonic() - started, 1),
        "splits": splits,
    }
    write_text(folder / SUMMARY_FILE, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def read_summary(folder: str | Path) -> dict[str, Any] | None:
    """Return the summary of a complete generated set, or None."""
    file = Path(folder) / SUMMARY_FILE
    return json.loads(file.read_text()) if file.is_file() else None


def _write_split(folder: Path, systems: Iterator[Frames]) -> dict[str, Any]:
    # Imported here: the processes that compute need neither torch nor its start-up time.
    from fairchem_dens.data.lmdb import LmdbWriter, data_from_atoms

    count, computed, energies, sizes = 0, 0, [], []
    free_forces: list[np.ndarray] = []
    dropped: Counter[str] = Counter()
    with LmdbWriter(folder, overwrite=True) as writer:
        for frames in systems:
            count += 1
            computed += frames.computed
            dropped.update(frames.dropped)
            for fid, (atoms, energy, forces) in enumerate(
                zip(frames.atoms, frames.energies, frames.forces, strict=True)
            ):
                writer.add(data_from_atoms(atoms, sid=frames.sid, fid=fid, energy=energy, forces=forces))
                energies.append(energy)
                sizes.append(len(atoms))
                free_forces.append(forces[atoms.get_tags() > 0])
    forces = np.concatenate(free_forces)
    return {
        "systems": count,
        "frames": len(energies),
        "atoms": [min(sizes), max(sizes)],
        "free_atoms": len(forces),
        "frames_computed": computed,
        "frames_left_out": dict(sorted(dropped.items())),
        "energy_mean": float(np.mean(energies)),
        "energy_std": float(np.std(energies)),
        "force_rms": float(np.sqrt(np.mean(forces**2))),
        "force_mean_norm": float(np.linalg.norm(forces, axis=1).mean()),
    }
