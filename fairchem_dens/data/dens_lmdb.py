"""OC20 All+MD: fairchem's LMDB data set that knows which frames are from molecular dynamics.

Training on All+MD never corrupts frames of the MD split, and the records do not say which they are. The logs
beside the LMDBs do: ``data_log.0000.txt`` has one line for each frame of ``data.0000.lmdb``, in the same
order, such as ``/somewhere/relaxations/7/random1.traj,5,12``. MD frames have ``md`` in their path instead.
"""

from __future__ import annotations

import gzip
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from fairchem_dens import keys
from fairchem_dens.data.reader import LazyLmdbDataset
from fairchem_dens.data.records import Fields

MdLogs = Literal["require", "ignore"]

_SHOWN_PROBLEMS = 3
# Two letters that many names contain: they count only where they stand alone, as in `oc20_md` or `md-3`.
_MD = re.compile(r"(?<![A-Za-z])md(?![A-Za-z])")


class DeNSLmdbDataset(LazyLmdbDataset):
    """`LazyLmdbDataset` whose structures carry ``md``, (1,) bool, before any transform sees them.

    Splits inherit the settings of the train split, and logs are there for train only. A log that is missing
    or does not fit is therefore no error here: the frames then keep the ``md`` they were stored with, if any,
    and `check_md_logs` says what is wrong. A trainer that is about to corrupt the data set calls it.

    Args:
        config: settings of `LazyLmdbDataset`, and ``md_logs``: ``require`` (default), or ``ignore`` to treat
            every frame as one of a relaxation.

    Raises:
        FileNotFoundError: as `LazyLmdbDataset`.
        ValueError: as `LazyLmdbDataset`, or ``md_logs`` has an unknown value.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        md_logs = config.get("md_logs", "require")
        if md_logs not in get_args(MdLogs):
            raise ValueError(
                "'dataset.*.md_logs' must be 'require' (tell MD frames by the logs beside the LMDBs) or "
                f"'ignore' (treat all frames as relaxations), found {md_logs!r}."
            )
        super().__init__(config)

    def check_md_logs(self) -> None:
        """Make sure that it is known which frames are from MD.

        Raises:
            ValueError: a log is missing, has not one line for each frame, or has a line that names neither
                kind; never with ``md_logs: ignore``.
        """
        _, problem = self._md_logs
        if problem is not None:
            raise ValueError(problem)

    def _fields(self, file: int, record: int) -> Fields:
        fields = super()._fields(file, record)
        flags, _ = self._md_logs
        if flags is not None:
            fields[keys.MD] = torch.tensor([flags[file][record]])
        return fields

    @cached_property
    def _md_logs(self) -> tuple[Sequence[_Flags] | None, str | None]:
        """For each file and record, whether it is an MD frame; or None, and what is wrong with the logs."""
        counts = self.files.counts
        if self.config.get("md_logs") == "ignore":
            return [_Flags(np.zeros(count, dtype=bool)) for count in counts], None
        return _read_logs([env.path for env in self.files.envs], counts)


class _Flags:
    """One bit for each frame: All+MD has 172 million, in each process."""

    def __init__(self, values: np.ndarray) -> None:
        self._bits = np.packbits(values)

    def __getitem__(self, index: int) -> bool:
        return bool(self._bits[index >> 3] >> (7 - (index & 7)) & 1)


def _log_of(file: Path) -> Path:
    """``data.0000.lmdb`` → ``data_log.0000.txt``, beside it, or the same compressed with gzip."""
    name, *rest = file.stem.split(".")
    log = file.with_name(".".join([f"{name}_log", *rest, "txt"]))
    compressed = log.with_name(f"{log.name}.gz")
    return compressed if compressed.is_file() and not log.is_file() else log


def _read_logs(files: Sequence[Path], counts: Sequence[int]) -> tuple[list[_Flags] | None, str | None]:
    """Return the flags of all files, or None and what is wrong with the logs."""
    problems = [f"'{_log_of(file)}' is missing" for file in files if not _log_of(file).is_file()]
    flags = []
    if not problems:
        for file, count in zip(files, counts, strict=True):
            try:
                flags.append(_Flags(_read_log(_log_of(file), count)))
            except (ValueError, OSError, EOFError) as error:
                problems.append(str(error))
    if not problems:
        return flags, None
    more = len(problems) - _SHOWN_PROBLEMS
    said = "; ".join(problems[:_SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    return None, (
        f"It is not known which frames are from MD and must not be corrupted: {said}. Each data.NNNN.lmdb "
        "needs beside it a data_log.NNNN.txt with one line a frame, whose path has a folder with "
        "'relaxations' in its name or one with the word 'md'. If there are no MD frames, set "
        "'dataset.train.md_logs: ignore'."
    )


def _read_log(log: Path, count: int) -> np.ndarray:
    """Return (count,) bool, True for MD frames.

    Raises:
        ValueError: the number of lines is not ``count``, or a line names neither kind or both.
    """
    flags = np.empty(count, dtype=bool)
    number = found = 0
    opened = gzip.open if log.suffix == ".gz" else open
    with opened(log, "rt", encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            path = line.split(",", 1)[0].strip()
            if not path:
                continue
            is_md = _is_md(path)
            if is_md is None:
                raise ValueError(
                    f"line {number} of '{log}' names neither 'relaxations' nor 'md', or both in one place: "
                    f"{line.strip()!r}"
                )
            if found < count:
                flags[found] = is_md
            found += 1
    if found != count:
        raise ValueError(f"'{log}' has {found} lines for {count} frames")
    return flags


def _is_md(path: str) -> bool | None:
    """Tell by the last part of a path that names one of the kinds; None if none does, or one names both.

    Source: the authors' README describes the logs; their code looks for the two words anywhere in a line.
    """
    relaxation = "relaxations" in path
    if "md" not in path or _MD.search(path) is None:
        return False if relaxation else None
    if not relaxation:
        return True
    for part in reversed(Path(path).parts):
        relaxation, md = "relaxations" in part, _MD.search(part) is not None
        if relaxation or md:
            return None if relaxation and md else md
    return None
