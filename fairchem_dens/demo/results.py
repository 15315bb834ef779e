"""Collect what the demo's runs brought: learning curves, errors on val and test, and errors of the noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from fairchem.core.common.registry import registry
from torch_geometric.data import Batch, Data

from fairchem_dens import checkpoints, keys
from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.demo.plan import Folder

Curve = dict[int, float]
"""A logged quantity by optimizer step."""

METRICS = ("energy_mae", "forces_mae", "forces_cosine_similarity")
"""eV, eV/Å, and the mean cosine between predicted and true force, named and defined as in fairchem."""

PREDICTIONS_FILE = "s2ef_predictions.npz"
_BATCH_SIZE = 32


def read_curves(folder: str | Path) -> dict[str, Curve]:
    """Read all scalars that fairchem logged for TensorBoard.

    A resumed run has several files; where they overlap, the steps of the latest count.

    Args:
        folder: the folder with the event files.

    Raises:
        FileNotFoundError: it has none.
    """
    curves: dict[str, Curve] = {}
    for _, scalars in _event_files(folder):
        for tag, events in scalars.items():
            curves.setdefault(tag, {}).update({event.step: event.value for event in events})
    return {tag: dict(sorted(curve.items())) for tag, curve in curves.items()}


def training_seconds(folder: str | Path) -> float:
    """Wall time of a training in seconds, its evaluations included and the start-up of the process not.

    Each step counts once, however often the run was cut off and resumed. NaN where no process has printed
    two steps.
    """
    durations: dict[int, float] = {}
    for _, scalars in _event_files(folder):
        events = scalars.get("train/loss", [])
        for before, after in itertools.pairwise(events):
            # The logger hears of the steps that are printed; those between share the time.
            steps = range(before.step + 1, after.step + 1)
            durations |= dict.fromkeys(steps, (after.wall_time - before.wall_time) / max(len(steps), 1))
    if not durations:
        return math.nan
    # The first steps of a process have nothing before them to be counted from.
    missing = max(durations) - len(durations)
    return sum(durations.values()) + missing * median(durations.values())


def _event_files(folder: str | Path) -> list[tuple[Path, dict[str, list[Any]]]]:
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
        SCALARS,
        EventAccumulator,
    )

    # The time is in the name, with a fixed number of digits.
    files = sorted(Path(folder).glob("events.out.tfevents.*"))
    if not files:
        raise FileNotFoundError(
            f"There is no TensorBoard file in '{folder}': the command that writes it has not run."
        )
    read = []
    for file in files:
        accumulator = EventAccumulator(str(file), size_guidance={SCALARS: 0})
        accumulator.Reload()
        read.append((file, {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()[SCALARS]}))
    return read


def validation_metrics(folder: Folder, run: str) -> dict[str, float]:
    """Return `METRICS` on the validation split, as ``fairchem --mode validate`` found them."""
    curves = read_curves(folder.events(f"{run}-validate"))
    return {name: list(curves[f"val/{name}"].values())[-1] for name in METRICS}


def prediction_metrics(predictions: str | Path, labels: str | Path) -> dict[str, float]:
    """Compare predictions of fairchem with the labels of an LMDB.

    Args:
        predictions: the npz that ``fairchem --mode predict`` wrote: ``ids``, ``energy`` and the forces on
            free atoms, one structure after the other, with the places to split at in ``chunk_idx``.
        labels: the LMDB folder.

    Returns:
        `METRICS`, as fairchem defines them: the force error is a mean over components, the cosine one over
        atoms.

    Raises:
        ValueError: a structure has no prediction.
    """
    with np.load(predictions) as file:
        energies = dict(zip(file["ids"].tolist(), file["energy"].reshape(-1).tolist(), strict=True))
        forces = dict(zip(file["ids"].tolist(), np.split(file["forces"], file["chunk_idx"]), strict=True))
    energy_errors, force_errors, cosines = [], [], []
    for data in read_lmdb(labels):
        name = f"{data[keys.SID]}_{data[keys.FID]}"
        if name not in energies:
            raise ValueError(f"'{predictions}' has no prediction for the structure {name} of '{labels}'.")
        true = data[keys.FORCES][data[keys.FIXED] == 0]
        predicted = torch.from_numpy(forces[name]).to(true)
        energy_errors.append(abs(energies[name] - data[keys.ENERGY]))
        force_errors.append((predicted - true).abs().flatten())
        cosines.append(torch.cosine_similarity(predicted, true, dim=-1))
    values = (np.mean(energy_errors), torch.cat(force_errors).mean(), torch.cat(cosines).mean())
    return dict(zip(METRICS, map(float, values), strict=True))


@dataclass(frozen=True)
class Trained:
    """The end of a run, on the CPU.

    Attributes:
        model: with the moving average of its weights, in evaluation mode.
        force_rmsd: what its forces are to be multiplied by, eV/Å.
    """

    model: torch.nn.Module
    force_rmsd: float


def load_trained(checkpoint_file: str | Path) -> Trained:
    """Load a checkpoint of the demo."""
    checkpoint = checkpoints.read(checkpoint_file)
    settings = dict(checkpoint["config"]["model"])
    model = registry.get_model_class(settings.pop("name"))(**settings)
    model.load_state_dict(checkpoints.predicting_weights(checkpoint, checkpoints.trained_names(model)))
    return Trained(model.eval(), float(checkpoint["normalizers"]["forces"]["rmsd"]))


def force_mae(trained: Trained, structures: Sequence[Data]) -> float:
    """Return the mean absolute error, in eV/Å, over the components of the forces on free atoms."""
    errors = []
    for start in range(0, len(structures), _BATCH_SIZE):
        batch = Batch.from_data_list(list(structures[start : start + _BATCH_SIZE]))
        predicted = trained.force_rmsd * _predict(trained, batch)[keys.FORCES]
        errors.append((predicted - batch[keys.FORCES])[batch[keys.FIXED] == 0].abs().flatten())
    return float(torch.cat(errors).mean())


def _predict(trained: Trained, batch: Batch) -> dict[str, torch.Tensor]:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trained.model(batch)


@dataclass(frozen=True)
class Denoised:
    """One structure: as it was, corrupted, and with the model's guess of the noise taken away again.

    Attributes:
        clean: the structure.
        corrupted_pos: (N, 3), Å.
        denoised_pos: (N, 3), Å; atoms that were not corrupted stay where they are.
        noise_mask: (N,), which atoms were corrupted.
    """

    clean: Data
    corrupted_pos: np.ndarray
    denoised_pos: np.ndarray
    noise_mask: np.ndarray

    def rmsd(self, pos: np.ndarray) -> float:
        """Root mean square distance, in Å, of the corrupted atoms from where they were."""
        moved = (pos - self.clean[keys.POS].numpy())[self.noise_mask]
        return float(np.sqrt((moved**2).sum(axis=1).mean()))

    @property
    def gain(self) -> float:
        """How much of the displacement is left, as a factor."""
        return self.rmsd(self.denoised_pos) / self.rmsd(self.corrupted_pos)


def denoise(
    trained: Trained, structures: Sequence[Data], corruption: Corruption, seed: int = 0
) -> list[Denoised]:
    """Corrupt structures that the model has not been trained on, and let it guess the noise from the forces.

    Structures in which no atom happens to be chosen are left out.

    Args:
        trained: a model with a noise head.
        structures: clean structures with forces.
        corruption: noise level and ratio; all structures are corrupted, whatever its probability.
        seed: of the noise.
    """
    denoised = []
    for start in range(0, len(structures), _BATCH_SIZE):
        chunk = list(structures[start : start + _BATCH_SIZE])
        noisy = [corrupt(data, corruption, seed=seed, epoch=0, selected=True) for data in chunk]
        batch = Batch.from_data_list(noisy)
        guess = _predict(trained, batch)[keys.NOISE] * corruption.noise_scale
        guess = torch.where(batch[keys.NOISE_MASK][:, None], guess, torch.zeros_like(guess))
        sizes = [data[keys.POS].shape[0] for data in chunk]
        for clean, corrupted, displacement in zip(chunk, noisy, torch.split(guess, sizes), strict=True):
            if bool(corrupted[keys.CORRUPTED].any()):
                denoised.append(
                    Denoised(
                        clean=clean,
                        corrupted_pos=corrupted[keys.POS].numpy(),
                        denoised_pos=(corrupted[keys.POS] - displacement).numpy(),
                        noise_mask=corrupted[keys.NOISE_MASK].numpy(),
                    )
                )
    return denoised


def denoising_mae(denoised: Sequence[Denoised]) -> tuple[float, float]:
    """Return the mean absolute error of the noise, in Å, of the model and of guessing none.

    The means are over the components of the corrupted atoms.
    """
    left, before = [], []
    for item in denoised:
        clean = item.clean[keys.POS].numpy()
        left.append(np.abs(item.denoised_pos - clean)[item.noise_mask])
        before.append(np.abs(item.corrupted_pos - clean)[item.noise_mask])
    return float(np.concatenate(left).mean()), float(np.concatenate(before).mean())


def typical(denoised: Sequence[Denoised]) -> Denoised:
    """Return the structure with the median share of displacement left: denoised neither well nor badly.

    Only structures with at least three corrupted atoms compete, as far as there are any.
    """
    candidates = [item for item in denoised if item.noise_mask.sum() >= 3] or list(denoised)
    return sorted(candidates, key=lambda item: item.gain)[len(candidates) // 2]
