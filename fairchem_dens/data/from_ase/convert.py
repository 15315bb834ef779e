"""Files to train, val and test LMDBs, with all that a YAML needs to train on them."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fairchem_dens.data.fit import REFERENCES_FILE
from fairchem_dens.data.folder import refuse_existing, write_text, written_aside
from fairchem_dens.data.from_ase import parts, systems
from fairchem_dens.data.from_ase.filters import Reason
from fairchem_dens.data.from_ase.parts import Part, Task
from fairchem_dens.data.from_ase.plan import Plan, make_plan
from fairchem_dens.data.from_ase.report import summarise
from fairchem_dens.data.from_ase.settings import Settings
from fairchem_dens.data.from_ase.sources import find_sources
from fairchem_dens.data.from_ase.systems import SPLITS
from fairchem_dens.data.from_ase.training import TRAINING_FILE, write_training
from fairchem_dens.data.labels import SUMMARY_FILE
from fairchem_dens.data.lmdb import LmdbWriter, data_from_atoms
from fairchem_dens.data.processes import worker_pool
from fairchem_dens.data.references import write_references
from fairchem_dens.data.settings_file import (
    SETTINGS_FILE,
    dataset_settings,
    write_normalizers,
    write_settings,
)
from fairchem_dens.progress import progress_bar

SYSTEMS_FILE = "systems.json"
_TRAINING_HEADER = """\
EquiformerV2 with DeNS on {folder}.
The settings are the paper's for OC20, where the learning rate 0.0002 belongs to 64 structures a step on all
GPUs together. Set depth, batch, learning rate and epochs to your data.

    fairchem --mode train --config-yml {folder}/train.yml --run-dir runs
"""
_PARTS = "parts"


def from_ase(
    patterns: Sequence[str],
    out: str | Path | None,
    settings: Settings,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Make a data set from files that ASE reads.

    What is written depends on the files and the settings alone. A call that was killed leaves a hidden folder
    beside ``out``; the same call goes on from there, and reads anew what has changed since.

    Args:
        patterns: files, folders and globs.
        out: gets ``train``, ``val`` and ``test`` as LMDB folders, ``data.yml`` to include, ``train.yml`` to
            train with, the normalisers and references as files, ``systems.json`` and ``summary.json``. None
            reads everything and writes nothing.
        settings: what to read, to keep and to write.
        workers: processes that read; None takes one for each of up to four cores.
        overwrite: replace ``out`` if it exists.
        progress: show progress bars.

    Returns:
        The summary that `report.describe` puts into words.

    Raises:
        FileNotFoundError: a pattern names nothing.
        FileExistsError: ``out`` exists.
        ValueError: a file cannot be read, nothing is left to train on, or what was asked for is impossible;
            names file, system or option.
    """
    if out is not None and not overwrite:
        refuse_existing(Path(out))
    sources = find_sources(patterns, any_name=settings.format is not None)
    if out is None:
        tasks = [Task(source.path, settings.read, None, settings.skip_unreadable) for source in sources]
        return summarise(make_plan(sources, _read(tasks, workers, progress), settings), settings)
    out = Path(out).absolute()
    with written_aside(out, overwrite=overwrite, keep=True) as partial:
        folder = partial / _PARTS
        folder.mkdir(exist_ok=True)
        tasks = [
            Task(
                source.path,
                settings.read,
                folder / parts.key_of(source.path, settings.read),
                settings.skip_unreadable,
            )
            for source in sources
        ]
        _remove_all_but({task.file.name for task in tasks if task.file is not None}, folder)
        plan = make_plan(sources, _read(tasks, workers, progress), settings)
        _remove_all_but({_PARTS}, partial)
        for split in SPLITS:
            if plan.members(split).any():
                _write_split(partial, split, plan, tasks, settings.frames_per_file, progress)
        summary = summarise(plan, settings)
        _write_surroundings(partial, out, plan, summary)
        shutil.rmtree(folder)
    return summary


def _remove_all_but(names: set[str], folder: Path) -> None:
    for leftover in folder.iterdir():
        if leftover.stem not in names:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _read(tasks: Sequence[Task], workers: int | None, progress: bool) -> list[Part]:
    """Read the files that have no part yet."""
    found = [parts.load(task) for task in tasks]
    missing = [place for place, part in enumerate(found) if part is None]
    known = len(tasks) - len(missing)
    if known and progress:
        print(f"{known} of {len(tasks)} files were read before.", file=sys.stderr)
    with _in_processes(workers, len(missing)) as make_all:
        made = zip(missing, make_all([tasks[place] for place in missing]), strict=True)
        for place, part in progress_bar(
            made, shown=progress, desc="  reading", unit="file", total=len(tasks), initial=known
        ):
            found[place] = part
    return [part for part in found if part is not None]


@contextmanager
def _in_processes(workers: int | None, tasks: int) -> Iterator[Callable[[Iterable[Task]], Iterable[Part]]]:
    """Give a function that makes parts in order; it needs no process of its own for one worker."""
    workers = min(workers or min(4, os.cpu_count() or 1), tasks)
    if workers <= 1:
        yield lambda given: map(parts.make, given)
    else:
        with worker_pool(workers) as pool:
            yield lambda given: pool.map(parts.make, given)


def _write_split(
    folder: Path,
    split: str,
    plan: Plan,
    tasks: Sequence[Task],
    frames_per_file: int | None,
    progress: bool,
) -> None:
    members = np.flatnonzero(plan.members(split))
    sids = systems.stored_ids(plan.systems.names)
    structures = _structures(members, plan, tasks)
    with LmdbWriter(folder / split, structures_per_file=frames_per_file) as writer:
        for frame, atoms, forces in progress_bar(
            structures, shown=progress, desc=f"  {split:7}", unit="frame", total=len(members)
        ):
            writer.add(
                data_from_atoms(
                    atoms,
                    sid=sids[plan.systems.of_frame[frame]],
                    fid=int(plan.fids[frame]),
                    energy=float(plan.energies[frame]),
                    forces=forces,
                )
            )


def _structures(
    members: np.ndarray, plan: Plan, tasks: Sequence[Task]
) -> Iterator[tuple[int, Any, np.ndarray]]:
    """Yield place, structure and forces of frames, file by file."""
    source = plan.source[members]
    for here in np.split(members, np.flatnonzero(np.diff(source)) + 1):
        file = tasks[plan.source[here[0]]].file
        assert file is not None
        for place, (atoms, forces) in zip(
            here.tolist(), parts.structures(file, plan.frames[here]), strict=True
        ):
            yield place, atoms, forces


def _write_surroundings(folder: Path, out: Path, plan: Plan, summary: dict[str, Any]) -> None:
    """Write everything but the LMDBs; ``out`` is where the folder will be."""
    write_normalizers(folder, energy=plan.energy, forces=plan.forces)
    if plan.fit is not None:
        write_references(folder / REFERENCES_FILE, plan.fit.coefficients)
    settings = dataset_settings(
        energy=plan.energy,
        forces=plan.forces,
        sources={split: out / split for split in SPLITS if (folder / split).is_dir()},
        element_references=out / REFERENCES_FILE if plan.fit is not None else None,
    )
    # Half precision, fairchem's default, does not hold energies of hundreds of eV.
    settings["task"] = {"prediction_dtype": "float32"}
    write_settings(folder / SETTINGS_FILE, settings, _header(out, summary))
    write_training(folder / TRAINING_FILE, out / SETTINGS_FILE, _TRAINING_HEADER.format(folder=out))
    write_text(folder / SYSTEMS_FILE, _json(_systems(plan)))
    write_text(folder / SUMMARY_FILE, _json(summary))


def _header(out: Path, summary: dict[str, Any]) -> str:
    frames = ", ".join(f"{split} {found['frames']}" for split, found in summary["splits"].items())
    return (
        f"{out.name}: frames {frames}. Made by `fairchem-dens data from-ase`; see {SUMMARY_FILE}.\n"
        f"Energies (eV): {summary['energy']['says']}.\n"
        "Normalisers are those of train: of the energies, less the references if there are any, mean and\n"
        "root mean square deviation; of the forces (eV/Å), root mean square component on free atoms.\n"
        "Where test is named, fairchem predicts all of it in training each time the validation error falls."
    )


def _systems(plan: Plan) -> dict[str, Any]:
    """Return for each system its sid, split, files, frames and reference energy."""
    sids = systems.stored_ids(plan.systems.names)
    kept = plan.reasons == Reason.KEPT
    read = np.bincount(plan.systems.of_frame, minlength=len(sids)).tolist()
    written = np.bincount(plan.systems.of_frame[kept], minlength=len(sids)).tolist()
    files: list[list[str]] = [[] for _ in sids]
    for system, source in np.unique(np.stack([plan.systems.of_frame, plan.source]), axis=1).T.tolist():
        files[system].append(str(plan.sources[source].path))
    return {
        name: {
            "sid": sids[place],
            "split": plan.splits.get(name),
            "frames": written[place],
            "frames_read": read[place],
            "reference_energy": _number(plan.references[place]),
            "files": files[place],
        }
        for place, name in enumerate(plan.systems.names)
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
