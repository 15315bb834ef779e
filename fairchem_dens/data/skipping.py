"""Records that could not be read and were passed over: which ones, over all processes of a run."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.utils.data import get_worker_info

from fairchem_dens.errors import UnreadableRecord

FOLDER = "skipped_records"
"""Where the lists of a run lie, beside its results."""


class SkippedRecords:
    """Notes each record once. With a folder, all processes of all ranks, and a resumed run, share the list.

    Each process writes a file of its own, as several cannot safely append to one on every file system.

    Args:
        folder: where the lists are; None keeps one in this process.
        rank: of this process, or of the one whose loader worker it is.
    """

    def __init__(self, folder: Path | None = None, rank: int = 0) -> None:
        self._folder, self._rank = folder, rank
        self._known: dict[str, str] | None = None

    def note(self, record: UnreadableRecord) -> None:
        """Say that a record is passed over, unless this process has said so."""
        file = self._file()
        if self._known is None:
            self._known = _read(file) if file is not None else {}
        if record.place in self._known:
            return
        self._known[record.place] = record.problem
        logging.warning(f"{record} It is skipped ('dataset.train.skip_bad_records').")
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as lines:
                lines.write(f"{record.place}\t{' '.join(record.problem.split())}\n")

    def all(self) -> dict[str, str]:
        """Return what is wrong with each record that was passed over, by place."""
        if self._folder is None:
            return dict(self._known or {})
        found: dict[str, str] = {}
        for file in sorted(self._folder.glob("*.txt")):
            found |= _read(file)
        return found

    def summary(self) -> str | None:
        """Return a sentence with their number, None if there are none."""
        count = len(self.all())
        if not count:
            return None
        where = "" if self._folder is None else f" They are listed in '{self._folder}'."
        return (
            f"{count} records of 'dataset.train.src' could not be read; each time, the next record that can "
            f"be read took their place.{where}"
        )

    def _file(self) -> Path | None:
        if self._folder is None:
            return None
        worker = get_worker_info()
        of_worker = "" if worker is None else f".worker{worker.id}"
        return self._folder / f"rank{self._rank}{of_worker}.txt"


def _read(file: Path) -> dict[str, str]:
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8").splitlines()
    return {place: problem for place, _, problem in (line.partition("\t") for line in lines) if place}
