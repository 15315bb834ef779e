"""MD17 and revised MD17: molecular dynamics of small molecules, as LMDBs split the way the paper splits them.

The split is that of TorchMD-NET (``train_val_test_split`` in its ``torchmdnet/utils.py``), which the authors
repeat in ``datasets/pyg/md17.py`` of their Equiformer code: the frames of the file are permuted with
``numpy.random.default_rng(1)``; the first 950 are for training, the next 50 for validation, the rest for the
test. It is a split of the frames of the given file: a revised file holds a part of the original frames, so
its splits are others than those of the original file, with either set of labels.

Energies near -4e5 kcal/mol have steps of 0.03 kcal/mol in single precision, a quarter of the error of the
paper's models. They are therefore stored less a constant, the train mean rounded to whole kcal/mol, which
``summary.json`` states as ``energy_offset``. Training, metrics and predictions are in energies so counted.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final, get_args

import numpy as np
import torch
from ase import Atoms
from torch_geometric.data import Data

from fairchem_dens import keys
from fairchem_dens.data.folder import refuse_existing, write_text, written_aside
from fairchem_dens.data.labels import SUMMARY_FILE
from fairchem_dens.data.lmdb import LmdbWriter, data_from_atoms
from fairchem_dens.data.md17_file import MOLECULES, Labels, Trajectory, download, read_npz
from fairchem_dens.data.settings_file import (
    SETTINGS_FILE,
    Scale,
    dataset_settings,
    write_normalizers,
    write_settings,
)
from fairchem_dens.progress import progress_bar
from fairchem_dens.validation import nearest

MOST_TRAIN_FRAMES: Final = 1000
"""The publishers of MD17 advise against training on more: frames of one trajectory are alike."""


def make_md17(
    molecule: str,
    labels: Labels,
    out: str | Path,
    *,
    npz: str | Path | None = None,
    train_size: int = 950,
    val_size: int = 50,
    test_size: int | None = None,
    seed: int = 1,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Make the LMDBs of a molecule, with normalisers and a YAML to include.

    Everything is written aside and renamed at the end.

    Args:
        molecule: a name of `MOLECULES`.
        labels: which energies and forces.
        out: gets ``train/``, ``val/``, ``test/``, ``data.yml``, ``energy_normalizer.npz``,
            ``forces_normalizer.npz`` and ``summary.json``.
        npz: the published file; None downloads it into ``downloads/`` beside ``out``.
        train_size: number of frames for training.
        val_size: number of frames for validation.
        test_size: number of frames for the test, None for all others.
        seed: seed of the permutation.
        overwrite: replace ``out`` if it exists.
        progress: show progress bars.

    Returns:
        What ``summary.json`` holds.

    Raises:
        FileExistsError: ``out`` exists and ``overwrite`` is False.
        FileNotFoundError: ``npz`` does not exist, or could not be downloaded.
        ValueError: an argument is impossible, or the file is not what it should be; see `read_npz`.
    """
    if molecule not in MOLECULES:
        raise ValueError(
            f"'{molecule}' is not a molecule of MD17{nearest(molecule, MOLECULES)}. "
            f"Known: {', '.join(MOLECULES)}."
        )
    if labels not in get_args(Labels):
        raise ValueError(f"The labels must be 'original' or 'revised', found {labels!r}.")
    out = Path(out)
    if not overwrite:
        refuse_existing(out)
    file = download(molecule, labels, out.absolute().parent / "downloads") if npz is None else Path(npz)
    trajectory = read_npz(file, molecule, labels)
    splits = split_frames(
        len(trajectory), train_size=train_size, val_size=val_size, test_size=test_size, seed=seed
    )

    train_energies = trajectory.energies[splits["train"]]
    offset = float(np.round(train_energies.mean()))
    energy = Scale(
        mean=float((train_energies - offset).mean()), rmsd=float((train_energies - offset).std(ddof=1))
    )
    forces = Scale(mean=0.0, rmsd=energy.rmsd)
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    summary = {
        "molecule": molecule,
        "formula": MOLECULES[molecule],
        "labels": labels,
        "units": {"positions": "Å", "energy": "kcal/mol", "forces": "kcal/mol/Å"},
        "energy_offset": offset,
        "total_energy": "energy + energy_offset",
        "energy_mean": energy.mean,
        "energy_std": energy.rmsd,
        "source": {
            "file": file.name,
            "sha256": sha256,
            "published_as": trajectory.published_as,
            "frames": len(trajectory),
        },
        "split": {"of": "the frames of the source file", "seed": seed}
        | {name: len(frames) for name, frames in splits.items()},
    }
    with written_aside(out, overwrite=overwrite) as folder:
        for name, frames in splits.items():
            bar = progress_bar(frames.tolist(), shown=progress, desc=f"  {name:5}", unit="frame")
            with LmdbWriter(folder / name) as writer:
                for frame in bar:
                    writer.add(_structure(molecule, trajectory, frame, offset))
        write_normalizers(folder, energy=energy, forces=forces)
        write_settings(
            folder / SETTINGS_FILE,
            dataset_settings(
                energy=energy, forces=forces, sources={name: out / name for name in ("train", "val")}
            ),
            f"{molecule} of MD17 with {labels} labels, for inclusion in a YAML.\n"
            f"Energies in kcal/mol, counted from {offset:.0f}; forces in kcal/mol/Å.\n"
            "Molecules have no cell: the model needs 'use_pbc: False'.\n"
            "The test split is not named: fairchem would predict all of it in training, each time the\n"
            "validation error falls. Give it as dataset.val.src when you evaluate.",
        )
        write_text(folder / SUMMARY_FILE, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def split_frames(
    num_frames: int, *, train_size: int = 950, val_size: int = 50, test_size: int | None = None, seed: int = 1
) -> dict[str, np.ndarray]:
    """Return the frames of ``train``, ``val`` and ``test``, as TorchMD-NET and the paper split them.

    Raises:
        ValueError: a size or the seed is impossible.
    """
    sizes = {"train": train_size, "val": val_size}
    if test_size is not None:
        sizes["test"] = test_size
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"The {name} split must have at least 1 frame, found {size}.")
    least = sum(sizes.values()) + (test_size is None)
    if least > num_frames:
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"The file has {num_frames} frames, the splits need at least {least} ({said}"
            f"{', test 1' if test_size is None else ''}): make them smaller."
        )
    if seed < 0:
        raise ValueError(f"The seed must not be negative, found {seed}.")
    order = np.random.default_rng(seed).permutation(num_frames)
    end_of_train, end_of_val = train_size, train_size + val_size
    end_of_test = num_frames if test_size is None else end_of_val + test_size
    return {
        "train": order[:end_of_train],
        "val": order[end_of_train:end_of_val],
        "test": order[end_of_val:end_of_test],
    }


def _structure(molecule: str, trajectory: Trajectory, frame: int, energy_offset: float) -> Data:
    data = data_from_atoms(
        Atoms(numbers=trajectory.numbers, positions=trajectory.positions[frame]),
        # fairchem names relaxations by sid alone: it has to tell frames apart.
        sid=f"{molecule}-{frame}",
        fid=frame,
        energy=trajectory.energies[frame] - energy_offset,
        forces=trajectory.forces[frame],
    )
    data[keys.CELL] = torch.zeros(1, 3, 3)
    return data
