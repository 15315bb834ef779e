"""The predictions of one split, from what fairchem writes: an ``.npz``, or a folder of trajectories."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fairchem_dens import keys
from fairchem_dens.data.trajectories import last_frames
from fairchem_dens.submission.arrays import names_of, read_array
from fairchem_dens.submission.splits import CHUNK_IDX, IDS, IS2RE, IS2RS, S2EF, Leaderboard, Task

_WRITTEN_BY = {
    S2EF: "'fairchem --mode predict' writes such a file (s2ef_predictions.npz)",
    IS2RE: "'fairchem --mode predict' writes such a file, or give the folder of trajectories of a relaxation",
    IS2RS: "'fairchem --mode run-relaxations' writes it with 'task.write_pos: True' (relaxed_positions.npz)",
}


def check_source(source: Path, task: Task) -> None:
    """Look at a source without reading its arrays.

    Raises:
        FileNotFoundError: it does not exist, or is a folder without trajectories.
        ValueError: it is not a result of this task, or relaxations are unfinished.
    """
    if not source.is_dir():
        present = names_of(source)
        missing = [name for name in task.arrays if name not in present]
        if missing:
            raise ValueError(
                f"'{source}' has no array '{missing[0]}' (it has: {', '.join(present) or 'none'}), so it "
                f"holds no results of {task.name}: {_WRITTEN_BY[task]}."
            )
        return
    if task is S2EF:
        raise ValueError(
            f"'{source}' is a folder where a file of predictions is needed: {_WRITTEN_BY[task]}."
        )
    # Some are left by a killed run though another has finished them.
    unfinished = sorted(
        file for file in source.rglob("*.traj_tmp") if not (source / f"{file.stem}.traj").exists()
    )
    if unfinished:
        raise ValueError(
            f"'{source}' holds {len(unfinished)} unfinished relaxations, as '{unfinished[0].name}': give the "
            "same 'fairchem --mode run-relaxations' command again, which goes on with those."
        )
    if not any(source.glob("*.traj")):
        raise FileNotFoundError(f"'{source}' holds no trajectories (*.traj): {_WRITTEN_BY[task]}.")


def load_predictions(
    source: Path, board: Leaderboard, task: Task, *, cast: bool = False, progress: str = ""
) -> dict[str, np.ndarray]:
    """Return the arrays of a split, as fairchem's ``make_submission_file`` takes them.

    Of predictions of frames, for IS2RE, ids are cut to their system: these are relaxed structures whose
    energies another model predicted. From trajectories the last frame is taken, sorted by id.

    Args:
        source: a file of predictions, or a folder of trajectories named by their system.
        board: the leaderboard.
        task: the task; of a file, arrays that it does not want are left out.
        cast: turn forces of a more precise type into that of the leaderboard.
        progress: what the progress bar says while trajectories are read; empty shows none.

    Raises:
        FileNotFoundError: as `check_source`.
        ValueError: as `check_source`, or an array or a trajectory cannot be read.
    """
    check_source(source, task)
    if source.is_dir():
        return _from_trajectories(source, task, progress)
    arrays = {name: read_array(source, name) for name in task.arrays}
    if task is IS2RE and arrays[IDS].dtype.kind == "U" and all("_" in sid for sid in arrays[IDS].flat):
        arrays[IDS] = np.array([sid.split("_")[0] for sid in arrays[IDS].tolist()])
    if cast and task is S2EF:
        arrays[keys.FORCES] = _cast(arrays[keys.FORCES], board, source)
    return arrays


def _cast(forces: np.ndarray, board: Leaderboard, source: Path) -> np.ndarray:
    wanted = np.dtype(board.prediction_dtype)
    if forces.dtype.kind == "f" and forces.dtype.itemsize < wanted.itemsize:
        raise ValueError(
            f"'{source}' has forces of type {forces.dtype}, which cannot be made as precise as {wanted}: "
            "predict again with 'task.prediction_dtype: float32'."
        )
    with np.errstate(over="ignore"):  # what overflows is found by the check
        return forces.astype(wanted)


def _from_trajectories(folder: Path, task: Task, progress: str) -> dict[str, np.ndarray]:
    ids, energies, positions = [], [], []
    for sid, atoms in last_frames(folder, progress=progress):
        ids.append(sid)
        energies.append(float(atoms.get_potential_energy()))
        positions.append(atoms.positions)
    if task is IS2RE:
        return {IDS: np.array(ids), keys.ENERGY: np.array(energies)}
    return {
        IDS: np.array(ids),
        keys.POS: np.concatenate(positions),
        CHUNK_IDX: np.cumsum([len(one) for one in positions])[:-1],
    }
