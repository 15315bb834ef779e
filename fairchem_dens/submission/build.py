"""Building a submission from the predictions of its splits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fairchem_dens.progress import progress_bar
from fairchem_dens.submission.arrays import write_arrays
from fairchem_dens.submission.check import Report, check_submission
from fairchem_dens.submission.sources import check_source, load_predictions
from fairchem_dens.submission.splits import Leaderboard, Task


def check_output(file: Path, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written.

    Raises:
        FileExistsError: it exists, and ``overwrite`` is False.
        FileNotFoundError: its folder does not exist.
        ValueError: its name does not end in ``.npz``.
    """
    if file.suffix != ".npz":
        raise ValueError(f"'--out {file}' must end in .npz.")
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"'--out {file}': there is no folder '{file.parent}'.")
    if file.exists() and not overwrite:
        raise FileExistsError(f"'{file}' exists already. Choose another name, or give --overwrite.")


def check_sources(sources: Mapping[str, Path], board: Leaderboard, task: Task) -> None:
    """Refuse predictions that do not make a submission, without reading their arrays.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a split is missing or not one of the leaderboard's, two splits have the same source, or a
            source does not hold results of the task.
    """
    for split in sources:
        if split not in board.splits:
            raise ValueError(
                f"{board.name} has no test split '{split}' (it has: {', '.join(board.splits)}): leave out "
                f"{option(split)}, or give another --dataset."
            )
    missing = [split for split in board.splits if split not in sources]
    if missing:
        raise ValueError(
            f"A submission for {board.name} holds {', '.join(board.splits)}, and the predictions of "
            f"{', '.join(missing)} are missing: give {' '.join(option(split) for split in missing)}."
        )
    seen: dict[str, str] = {}
    for split, source in sources.items():
        same = seen.setdefault(os.path.realpath(source), split)
        if same != split:
            raise ValueError(f"{option(same)} and {option(split)} both name '{source}'.")
        check_source(source, task)


def option(split: str) -> str:
    """Return the option of the command line that names the predictions of a split."""
    return f"--{split.replace('_', '-')}"


def build_submission(
    file: Path,
    board: Leaderboard,
    task: Task,
    sources: Mapping[str, Path],
    *,
    lmdbs: Mapping[str, Path] | None = None,
    cast: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> Report:
    """Join the predictions of all splits in one file, and check it.

    The file appears under its name only if nothing is wrong with it.

    Args:
        file: to write.
        board: the leaderboard.
        task: the task.
        sources: for each split a file of predictions or a folder of trajectories, see `load_predictions`.
        lmdbs: see `check_submission`.
        cast: see `load_predictions`.
        overwrite: replace the file if it exists.
        workers: processes that read LMDBs; 0 is this one.
        progress: show progress bars.

    Returns:
        What the check says.

    Raises:
        FileExistsError: the file exists and ``overwrite`` is False.
        FileNotFoundError: a source or its LMDBs do not exist, or the folder of ``file``.
        ValueError: a source cannot be read, or see `check_sources`.
    """
    check_output(file, overwrite=overwrite)
    check_sources(sources, board, task)
    aside = file.with_name(f".{file.name}.partial")
    try:
        splits = progress_bar(board.splits, shown=progress, desc="  joining", unit="split")
        write_arrays(
            aside,
            (
                (f"{split}_{name}", array)
                for split in splits
                for name, array in load_predictions(
                    sources[split], board, task, cast=cast, progress=f"  reading {split}" if progress else ""
                ).items()
            ),
        )
        report = check_submission(aside, board, task, lmdbs=lmdbs, workers=workers, progress=progress)
        if report.healthy:
            check_output(file, overwrite=overwrite)
            aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    return replace(report, file=file)
