"""Predictions and relaxations by a checkpoint, kept so that what was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_dens import keys
from fairchem_dens.data.folder import write_text, written_aside
from fairchem_dens.inference import loader_of, trainer_of
from fairchem_dens.submission.splits import IS2RE, IS2RS, S2EF, Leaderboard, Task

if TYPE_CHECKING:
    from fairchem_dens.trainer import DeNSTrainer

_PREDICTIONS = "s2ef_predictions.npz"
_TRAJECTORIES = "trajectories"
_POSITIONS = "relaxed_positions.npz"
_MADE_FROM = "made_from.json"


@dataclass(frozen=True)
class Running:
    """How to run a checkpoint, see `trainer_of`."""

    batch_size: int | None = None
    num_workers: int = 0
    cpu: bool | None = None
    amp: bool = False


@dataclass(frozen=True)
class Relaxation:
    """fairchem's L-BFGS, by default with the settings of its configurations for OC20.

    Attributes:
        steps: at most so many.
        fmax: eV/Å; a structure is relaxed where no force on a free atom is larger.
        maxstep: Å; the farthest that an atom moves in a step.
        memory: number of steps that the Hessian is estimated from.
        damping: factor of each step.
        alpha: eV/Å²; first guess of the curvature.
    """

    steps: int = 300
    fmax: float = 0.02
    maxstep: float = 0.04
    memory: int = 50
    damping: float = 1.0
    alpha: float = 70.0

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.fmax > 0:
            raise ValueError(
                f"A relaxation needs at least 1 step and an fmax above 0, found {self.steps} and {self.fmax}."
            )


_Run = Callable[["DeNSTrainer", Path, Path], None]
"""Given a trainer, LMDBs and the folder for the results."""


def predict_splits(
    checkpoint: Path, board: Leaderboard, lmdbs: Mapping[str, Path], folder: Path, running: Running
) -> dict[str, Path]:
    """Predict energies and forces of the test splits, with fairchem's own `predict`.

    Each split becomes a folder, which appears once it is complete; those that are there are left as they are.

    Args:
        checkpoint: to predict with.
        board: whose splits, and the type of its forces.
        lmdbs: the test LMDBs of each split.
        folder: for the results.
        running: how.

    Returns:
        fairchem's file of each split.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no LMDB.
        ValueError: the checkpoint cannot be used, or ``folder`` holds results of something else.
    """
    origin = {"task": S2EF.name, "dtype": board.prediction_dtype, "amp": running.amp}

    def predict(trainer: DeNSTrainer, path: Path, results: Path) -> None:
        _set_precision(trainer.config, board.prediction_dtype)
        trainer.config["cmd"]["results_dir"] = str(results)
        trainer.predict(loader_of(trainer, path), results_file="predictions")

    done = _run_splits(predict, checkpoint, origin, board, lmdbs, folder, running)
    return {split: results / _PREDICTIONS for split, results in done.items()}


def relax_splits(
    checkpoint: Path,
    board: Leaderboard,
    task: Task,
    lmdbs: Mapping[str, Path],
    folder: Path,
    running: Running,
    relaxation: Relaxation,
) -> dict[str, Path]:
    """Relax the structures of the test splits, with fairchem's own `run_relaxations`.

    As `predict_splits`; a split that was interrupted goes on with the batches that are not relaxed.

    Args:
        checkpoint: to relax with.
        board: whose splits.
        task: what is wanted of the relaxations; both can be built from the same folder.
        lmdbs: the test LMDBs (of initial structures) of each split.
        folder: for the results.
        running: how.
        relaxation: to what end.

    Returns:
        For relaxed energies the trajectories of each split, for relaxed positions fairchem's file of them.

    Raises:
        FileNotFoundError: as `predict_splits`.
        ValueError: as `predict_splits`.
    """
    origin = {"task": IS2RE.name, **asdict(relaxation), "amp": running.amp}

    def relax(trainer: DeNSTrainer, path: Path, results: Path) -> None:
        trainer.config["cmd"]["results_dir"] = str(results)
        trainer.config["task"] |= {
            "relaxation_steps": relaxation.steps,
            "relaxation_fmax": relaxation.fmax,
            "save_full_traj": False,
            "write_pos": True,
            "relax_opt": {
                "maxstep": relaxation.maxstep,
                "memory": relaxation.memory,
                "damping": relaxation.damping,
                "alpha": relaxation.alpha,
                "traj_dir": str(results / _TRAJECTORIES),
            },
        }
        trainer.relax_loader = loader_of(trainer, path)
        trainer.relax_dataset = trainer.test_dataset
        trainer.run_relaxations()

    done = _run_splits(relax, checkpoint, origin, board, lmdbs, folder, running)
    wanted = _POSITIONS if task is IS2RS else _TRAJECTORIES
    return {split: results / wanted for split, results in done.items()}


def _run_splits(
    run: _Run,
    checkpoint: Path,
    origin: Mapping[str, Any],
    board: Leaderboard,
    lmdbs: Mapping[str, Path],
    folder: Path,
    running: Running,
) -> dict[str, Path]:
    if not checkpoint.is_file():
        raise FileNotFoundError(f"There is no checkpoint '{checkpoint}'.")
    folders = {split: folder / split for split in board.splits}
    same = {"checkpoint_sha256": _sha256(checkpoint), **origin}
    origins = {split: {**same, "lmdbs": str(lmdbs[split].resolve())} for split in board.splits}
    left = [split for split in board.splits if not folders[split].exists()]
    for split in board.splits:
        if split not in left:
            _check_origin(folders[split], origins[split])
    if left:
        trainer = trainer_of(checkpoint, **asdict(running))
        _require_outputs(trainer.config["outputs"], checkpoint)
        for split in left:
            with written_aside(folders[split], keep=True) as aside:
                if any(aside.iterdir()):
                    _check_origin(aside, origins[split])
                write_text(aside / _MADE_FROM, json.dumps(origins[split], indent=2) + "\n")
                run(trainer, lmdbs[split], aside)
    return folders


def _require_outputs(outputs: Mapping[str, Any], checkpoint: Path) -> None:
    missing = [name for name in (keys.ENERGY, keys.FORCES) if name not in outputs]
    if missing:
        raise ValueError(
            f"'{checkpoint}' predicts {', '.join(outputs)} and no '{missing[0]}': both energy and forces are "
            "needed."
        )


def _set_precision(config: dict[str, Any], dtype: str) -> None:
    """Make fairchem write this type, whatever the run of the checkpoint asked for."""
    # fairchem reads three settings, of which any can ask for single precision.
    config["task"].pop("dataset", None)
    config["task"]["prediction_dtype"] = dtype
    for output in config["outputs"].values():
        output["prediction_dtype"] = dtype


def _check_origin(folder: Path, made_from: Mapping[str, Any]) -> None:
    try:
        found = json.loads((folder / _MADE_FROM).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"'{folder}' does not say what its results were made from: remove it, or choose another folder "
            "(--results)."
        ) from error
    for name, value in made_from.items():
        if found.get(name) != value:
            raise ValueError(
                f"'{folder}' holds results made with another {name} ({found.get(name)}, and now {value}): "
                "remove it, or choose another folder (--results)."
            )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
