"""Checking a submission before anyone uploads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fairchem_dens import keys
from fairchem_dens.data.inspection import Finding
from fairchem_dens.data.report import describe_findings
from fairchem_dens.submission.arrays import is_compressed, names_of, read_array
from fairchem_dens.submission.faults import (
    Arrays,
    counted,
    differences,
    examples,
    wrong_contents,
    wrong_forms,
)
from fairchem_dens.submission.splits import IDS, Leaderboard, Task
from fairchem_dens.submission.wanted import read_wanted

_ROWS_AT_A_TIME = 2**20


@dataclass(frozen=True)
class Split:
    """What a submission holds of one split.

    Attributes:
        name: of the split.
        structures: how many.
        rows: of forces or positions; None for other tasks.
        energies: least and largest finite one, eV; None where there are none.
        largest_force: largest finite norm, eV/Å; None where there are none.
    """

    name: str
    structures: int
    rows: int | None
    energies: tuple[float, float] | None
    largest_force: float | None


@dataclass
class Report:
    """What is known about a submission.

    Attributes:
        file: that was read.
        board: it is for.
        task: it is of.
        size: bytes on disk.
        splits: whose arrays have the right types and shapes.
        findings: what is to be said.
    """

    file: Path
    board: Leaderboard
    task: Task
    size: int
    splits: list[Split] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.problem for finding in self.findings)


def check_submission(
    file: Path,
    board: Leaderboard,
    task: Task,
    *,
    lmdbs: Mapping[str, Path] | None = None,
    workers: int = 0,
    progress: bool = True,
) -> Report:
    """Read a submission and say what is wrong with it.

    Args:
        file: an ``.npz`` of any origin; nothing in it is ever unpickled.
        board: the leaderboard it is for.
        task: its task.
        lmdbs: the test LMDBs of each split; of a split without, structures and counts are not compared.
        workers: processes that read LMDBs; 0 is this one.
        progress: show progress bars.

    Raises:
        FileNotFoundError: there is no such file, or no LMDB.
        ValueError: the file cannot be read, or an LMDB cannot.
    """
    lmdbs = lmdbs or {}
    names = names_of(file)
    report = Report(file, board, task, file.stat().st_size)
    uncompared: dict[str, np.ndarray] = {}
    problems: list[str] = []
    for split in board.splits:
        lacking = [name for name in task.arrays if f"{split}_{name}" not in names]
        if len(lacking) == len(task.arrays):
            problems.append(f"the split '{split}' is missing: there is no array '{split}_{IDS}'")
            continue
        if lacking:
            problems += [f"the array '{split}_{name}' is missing" for name in lacking]
            continue
        arrays = {name: read_array(file, f"{split}_{name}") for name in task.arrays}
        forms = list(wrong_forms(split, arrays, board, task))
        if forms:
            problems += forms
            continue
        report.splits.append(_summary(split, arrays))
        contents = list(wrong_contents(split, arrays, task))
        problems += contents
        if split not in lmdbs:
            uncompared[split] = arrays[IDS]
        elif not contents:
            said = f"  reading LMDBs of {split}" if progress else ""
            wanted = read_wanted(lmdbs[split], board, task, workers=workers, progress=said)
            problems += differences(split, arrays, task, wanted)
    problems += _same_structures(uncompared)
    report.findings += [Finding(True, problem) for problem in problems]
    report.findings += [Finding(False, note) for note in _notes(report, names, list(uncompared))]
    return report


def _same_structures(ids: Mapping[str, np.ndarray]) -> Iterator[str]:
    splits = list(ids)
    for place, one in enumerate(splits):
        for other in splits[place + 1 :]:
            shared = np.intersect1d(ids[one], ids[other])
            if len(shared):
                yield (
                    f"the splits '{one}' and '{other}' share {counted(len(shared), 'id')} "
                    f"({examples(shared)}), and no structure is in two splits"
                )


def _notes(report: Report, names: Sequence[str], uncompared: Sequence[str]) -> Iterator[str]:
    known = {f"{split}_{name}" for split in report.board.splits for name in report.task.arrays}
    surplus = sorted(set(names) - known)
    if surplus:
        said = ", ".join(f"'{name}'" for name in surplus[:6]) + (", ..." if len(surplus) > 6 else "")
        yield f"{report.board.name} {report.task.name} has no use for {said}"
    if uncompared:
        yield (
            f"nothing says whether {', '.join(uncompared)} hold the right structures with the right numbers "
            "of rows: name the test LMDBs (--test-lmdbs)"
        )
    if not is_compressed(report.file):
        yield "the file is not compressed: numpy.savez_compressed makes it smaller"


# ------------------------------------------------------------------ what it holds


def _summary(split: str, arrays: Arrays) -> Split:
    energy, forces = arrays.get(keys.ENERGY), arrays.get(keys.FORCES)
    rows = forces if forces is not None else arrays.get(keys.POS)
    return Split(
        split,
        structures=len(arrays[IDS]),
        rows=None if rows is None else len(rows),
        energies=None if energy is None else _range(energy),
        largest_force=None if forces is None else _largest(forces),
    )


def _range(energy: np.ndarray) -> tuple[float, float] | None:
    finite = energy[np.isfinite(energy)]
    return (float(finite.min()), float(finite.max())) if len(finite) else None


def _largest(forces: np.ndarray) -> float:
    largest = 0.0
    for start in range(0, len(forces), _ROWS_AT_A_TIME):
        norms = np.linalg.norm(forces[start : start + _ROWS_AT_A_TIME].astype(np.float64), axis=1)
        largest = max(largest, float(norms[np.isfinite(norms)].max(initial=0.0)))
    return largest


def describe(report: Report) -> str:
    """Return a report as text."""
    title = f"{report.file}: {report.board.name} {report.task.name}, {_size(report.size)}"
    lines = [title]
    if report.splits:
        lines.append(f"  {'split':10}{'structures':>12}{'rows':>12}{'energy (eV)':>24}{'largest force':>16}")
    for split in report.splits:
        rows = "" if split.rows is None else str(split.rows)
        energies = "" if split.energies is None else f"{split.energies[0]:.3f} to {split.energies[1]:.3f}"
        force = "" if split.largest_force is None else f"{split.largest_force:.3f} eV/Å"
        lines.append(f"  {split.name:10}{split.structures:>12}{rows:>12}{energies:>24}{force:>16}".rstrip())
    if report.findings:
        lines += ["", describe_findings(report.findings)]
    return "\n".join(lines)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
