"""Score the energies of relaxed structures: what ``fairchem --mode run-relaxations`` left, against labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from fairchem_dens import keys
from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.data.trajectories import last_frames
from fairchem_dens.evaluation import metrics
from fairchem_dens.evaluation.scorecard import Score
from fairchem_dens.evaluation.splits import Split
from fairchem_dens.inference import predictions
from fairchem_dens.trainer import DeNSTrainer

LABELS = ("y_relaxed", "energy_relaxed")
"""Names of the energy of the relaxed structure; fairchem's relaxations call it by the second."""
_SHOWN = 5


def score(split: Split, energies: Mapping[str, float], *, where: str) -> Score:
    """Compare the energies of relaxed structures with the labels of a split.

    Args:
        split: LMDBs of initial structures with `LABELS`.
        energies: by sid, in eV; more than the split has are no error.
        where: what they were read from, for messages.

    Raises:
        FileNotFoundError: there is no such data.
        ValueError: a structure has no label or no energy.
    """
    labels = dict(_labels(split))
    missing = [sid for sid in labels if sid not in energies]
    if missing:
        raise ValueError(
            f"'{where}' has no relaxation of {len(missing)} of the {len(labels)} structures of the split "
            f"'{split.name}' ('{split.path}'), such as those with sid {', '.join(missing[:_SHOWN])}: let the "
            "relaxations finish."
        )
    true = split.in_ev * np.array(list(labels.values()))
    found = split.in_ev * np.array([energies[sid] for sid in labels])
    if not np.isfinite(found).all():
        sid = list(labels)[int(np.flatnonzero(~np.isfinite(found))[0])]
        raise ValueError(f"The energy of the structure with sid {sid} in '{where}' is not finite.")
    return Score(
        split=split,
        metrics=metrics.is2re(found, true),
        structures=len(labels),
        energies=np.stack([true, found], axis=1),
    )


def relaxed_energies(
    results: str | Path, split: Split, trainer: DeNSTrainer | None = None, *, progress: str = ""
) -> dict[str, float]:
    """Return the energy of each relaxed structure by sid, in the unit of the data.

    Args:
        results: the folder of trajectories, of which the last frame counts; or an npz with ``ids`` and
            ``energy``; or ``relaxed_positions.npz``, whose energies the model predicts.
        split: the structures that were relaxed.
        trainer: the model, for positions without energies.
        progress: what the progress bar says; empty shows none.

    Raises:
        FileNotFoundError: there is nothing of that name, or a folder without trajectories.
        ValueError: a file cannot be read, or has no energies and ``trainer`` is None.
    """
    path = Path(results)
    if path.is_dir():
        return {
            sid: float(atoms.get_potential_energy()) for sid, atoms in last_frames(path, progress=progress)
        }
    if not path.is_file():
        raise FileNotFoundError(f"There are no results of relaxations '{path}' (looked in {Path.cwd()}).")
    arrays = _arrays(path)
    ids = [str(sid) for sid in arrays["ids"].tolist()]
    if len(set(ids)) < len(ids):
        raise ValueError(f"'{path}' has several results for one sid: remove the repetitions.")
    if keys.ENERGY in arrays:
        return dict(zip(ids, arrays[keys.ENERGY].reshape(-1).tolist(), strict=True))
    if trainer is None:
        raise ValueError(
            f"'{path}' holds relaxed positions and no energies: give --checkpoint, which predicts them, or "
            "the folder of trajectories (task.relax_opt.traj_dir)."
        )
    positions = dict(zip(ids, np.split(arrays["pos"], arrays["chunk_idx"]), strict=True))
    predicted = predictions(trainer, split.source, progress=progress, positions=positions)
    return {str(prediction.sid): prediction.energy for prediction in predicted}


def _labels(split: Split) -> Iterator[tuple[str, float]]:
    for data in read_lmdb(split.path):
        name = next((name for name in LABELS if name in data), None)
        if name is None or keys.SID not in data:
            raise ValueError(
                f"The split '{split.name}' ('{split.path}') has no labels '{LABELS[0]}' with a "
                f"'{keys.SID}', so there is nothing to compare with (its structures have: "
                f"{', '.join(sorted(data.keys()))})."
            )
        yield str(data[keys.SID]), float(torch.as_tensor(data[name]).reshape(-1)[0])


def _arrays(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as stored:
            arrays = dict(stored)
    except Exception as error:
        raise ValueError(f"'{file}' is not an npz file of arrays ({error}).") from error
    wanted = {"ids"} | ({"energy"} if "energy" in arrays else {"pos", "chunk_idx"})
    if not wanted <= arrays.keys():
        raise ValueError(
            f"'{file}' has the arrays {', '.join(sorted(arrays)) or 'none'}: results of relaxations have "
            "'ids' and 'energy', or 'ids', 'pos' and 'chunk_idx'."
        )
    return arrays
