"""Reading a data set as training does, and finding what training would stumble over."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from fairchem_dens.data.examine import examine
from fairchem_dens.data.findings import Locate, findings
from fairchem_dens.data.inspection import Finding, Inspection, Record
from fairchem_dens.data.processes import worker_pool
from fairchem_dens.data.source import Source, file_lengths, forget_opened, open_part
from fairchem_dens.data.statistics import Statistics
from fairchem_dens.progress import progress_bar

_STRUCTURES_PER_TASK = 250
_PLACE = re.compile(r"^Record \d+ of '.*?' \(.*?\) ")
"""How the readers of LMDB files begin what they say about a record."""


@dataclass(frozen=True)
class _Part:
    """What is opened as one data set: all of a source or, if some files are damaged, each file by itself.

    Attributes:
        file: the file, or None for all.
        offset: number of structures before it.
        count: number of structures in it.
    """

    file: Path | None
    offset: int
    count: int


def inspect(
    source: Source, *, sample: int | None = 10_000, workers: int = 0, progress: bool = True
) -> Inspection:
    """Read a source and say what is in it.

    Args:
        source: what to read.
        sample: how many structures, evenly spread over all; None reads all.
        workers: processes that read; 0 is this one.
        progress: show a progress bar.

    Raises:
        ValueError: it cannot be opened at all.
    """
    forget_opened()
    lengths = file_lengths(source)
    inspection = Inspection(source, len(source.files), 0, Statistics())
    for file, length in zip(source.files, lengths, strict=True):
        if isinstance(length, str):
            inspection.records.append(Record(str(file), None, length))
    parts = _parts(source, lengths, inspection.findings)
    inspection.total = sum(part.count for part in parts)
    tasks = list(_tasks(source, parts, _spread(inspection.total, sample)))
    statistics = inspection.statistics
    total = sum(len(task[-1]) for task in tasks)
    with progress_bar(total=total, shown=progress, desc="  reading", unit="structure") as bar:
        for tally in _tallies(tasks, workers):
            statistics.merge(tally)
            bar.update(tally.read)
    place_of = _places(source, lengths, inspection.total)
    inspection.records += [Record(*place_of(place), text) for place, text in sorted(statistics.problems)]
    inspection.findings += findings(inspection, place_of)
    forget_opened()
    return inspection


def _parts(source: Source, lengths: Sequence[int | str], said: list[Finding]) -> list[_Part]:
    if not any(isinstance(length, str) for length in lengths):
        try:
            dataset = open_part(source.settings, None)
            getattr(dataset, "layout", None)  # reads the first structure of each file
            return [_Part(None, 0, len(dataset))]
        except Exception as error:  # whatever a damaged file makes of unpickling
            if len(source.files) < 2:
                raise ValueError(f"'{source.name}' cannot be opened: {_one_line(error)}") from error
            said.append(Finding(True, f"the files cannot be opened as one data set: {_one_line(error)}"))
    parts = []
    offset = 0
    for file, length in zip(source.files, lengths, strict=True):
        if isinstance(length, int) and length:
            parts.append(_Part(file, offset, length))
            offset += length
    return parts


def _spread(total: int, sample: int | None) -> np.ndarray:
    if sample is None or sample >= total:
        return np.arange(total)
    return np.round(np.linspace(0, total - 1, sample)).astype(np.int64)


_Task = tuple[dict[str, Any], Path | None, int, list[int]]


def _tasks(source: Source, parts: Sequence[_Part], places: np.ndarray) -> Iterator[_Task]:
    """Yield settings, file, offset of the file and indices within it, of some structures at a time."""
    for part in parts:
        start, end = np.searchsorted(places, [part.offset, part.offset + part.count])
        indices = (places[start:end] - part.offset).tolist()
        for first in range(0, len(indices), _STRUCTURES_PER_TASK):
            chosen = indices[first : first + _STRUCTURES_PER_TASK]
            yield source.settings, part.file, part.offset, chosen


def _tallies(tasks: Sequence[_Task], workers: int) -> Iterator[Statistics]:
    if workers:
        with worker_pool(workers) as pool:
            yield from pool.map(tally, *zip(*tasks, strict=True)) if tasks else ()
    else:
        for task in tasks:
            yield tally(*task)


def tally(settings: dict[str, Any], file: Path | None, offset: int, indices: Sequence[int]) -> Statistics:
    """Read some structures of a file and count what they hold."""
    dataset = open_part(settings, file)
    statistics = Statistics()
    rows = []
    for index in indices:
        try:
            facts = examine(dataset[index])
        except Exception as error:  # whatever a damaged record makes of unpickling
            statistics.read += 1
            statistics.problems.append((offset + index, _one_line(error)))
            continue
        row = statistics.add(offset + index, facts)
        if row is not None:
            rows.append(row)
    if rows:
        compositions, energies = zip(*rows, strict=True)
        statistics.fit.add(np.array(compositions), np.array(energies))
    return statistics


def _one_line(error: Exception) -> str:
    said = _PLACE.sub("", " ".join(str(error).split()))
    return said if isinstance(error, ValueError) and said else f"{type(error).__name__}: {said}"


def _places(source: Source, lengths: Sequence[int | str], total: int) -> Locate:
    """Return a function from the index of a structure to its file and the record in it."""
    readable = [
        (str(file), length)
        for file, length in zip(source.files, lengths, strict=True)
        if isinstance(length, int) and length
    ]
    ends = list(accumulate(length for _, length in readable))
    if not ends or ends[-1] != total:  # settings choose some of the records, or there are no files
        return lambda place: (source.name, place)

    def place_of(place: int) -> tuple[str, int]:
        number = bisect_right(ends, place)
        file, length = readable[number]
        return file, place - ends[number] + length

    return place_of
