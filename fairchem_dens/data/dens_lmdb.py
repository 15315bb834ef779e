"""OC20 All+MD: fairchem's LMDB data set that knows which frames are from molecular dynamics.

Training on All+MD never corrupts frames of the MD split, and the records do not say which they are. The logs
beside the LMDBs do: ``data_log.0000.txt`` has one line for each frame of ``data.0000.lmdb``, in the same
order, such as ``/somewhere/relaxations/7/random1.traj,5,12``. MD frames have ``md`` in their path instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args
from weakref import WeakValueDictionary

import lmdb
import numpy as np
import torch
from fairchem.core.datasets.lmdb_dataset import LmdbDataset
from fairchem.core.modules.transforms import DataTransforms
from torch_geometric.data import Data

from fairchem_dens import keys

MdLogs = Literal["require", "ignore"]

_SHOWN_PROBLEMS = 3


class DeNSLmdbDataset(LmdbDataset):
    """fairchem's ``lmdb`` data set whose structures carry ``md``, (1,) bool, before any transform sees them.

    Splits inherit the settings of the train split, and logs are there for train only. A log that is missing
    or does not fit is therefore no error here: the frames then keep the ``md`` they were stored with, if any,
    and `check_md_logs` says what is wrong. A trainer that is about to corrupt the data set calls it.

    LMDB files are opened on first use, once per process and file, so that the data set can be pickled into
    spawned workers and is safe in forked ones.

    Args:
        config: fairchem's ``lmdb`` settings (``src`` is a folder of LMDBs or one file), and ``md_logs``:
            ``require`` (default), or ``ignore`` to treat every frame as one of a relaxation.

    Raises:
        FileNotFoundError: ``src`` does not exist, or is a folder without LMDBs.
        ValueError: ``src`` is missing or not one path, ``md_logs`` has an unknown value, or a file is not an
            LMDB.
    """

    path: Path
    envs: list[LazyEnvironment]
    transforms: DataTransforms
    _keys: list[Any]

    def __init__(self, config: dict[str, Any]) -> None:
        _check_src(config)
        md_logs = config.get("md_logs", "require")
        if md_logs not in get_args(MdLogs):
            raise ValueError(
                "'dataset.*.md_logs' must be 'require' (tell MD frames by the logs beside the LMDBs) or "
                f"'ignore' (treat all frames as relaxations), found {md_logs!r}."
            )
        super().__init__(config)
        if self.path.is_file():
            # One file is read as a folder of one: then every structure is told its file and record (`id`)
            # before the transforms run.
            self.path = self.path.parent
            self.envs, self._keys = [self.env], [self._keys]
            self._keylen_cumulative = [len(self._keys[0])]
            del self.env
        # fairchem lists each record number, which for the 172 million frames of All+MD is gigabytes.
        self._keys = [range(len(numbers)) for numbers in self._keys]
        for env in self.envs:
            env.close()

        files = [env.path for env in self.envs]
        counts = [len(numbers) for numbers in self._keys]
        self._md_problem: str | None = None
        flags: list[_Flags] | None
        if md_logs == "ignore":
            flags = [_Flags(np.zeros(count, dtype=bool)) for count in counts]
        else:
            flags, self._md_problem = _read_logs(files, counts)
        self.transforms = _MarkMD(self.transforms.config, flags)

    def connect_db(self, lmdb_path: Path | None = None) -> LazyEnvironment:
        """Return a handle that opens the file when it is first read."""
        assert lmdb_path is not None  # fairchem's signature allows None, its calls do not use it
        return LazyEnvironment(lmdb_path)

    def check_md_logs(self) -> None:
        """Make sure that it is known which frames are from MD.

        Raises:
            ValueError: a log is missing, has not one line for each frame, or has a line that names neither
                kind; never with ``md_logs: ignore``.
        """
        if self._md_problem is not None:
            raise ValueError(self._md_problem)

    def __del__(self) -> None:
        """Do nothing: handles close by themselves, and fairchem's version fails where construction failed."""


class LazyEnvironment:
    """A read-only LMDB file, opened on first use and anew in each process. Pickles carry only its path.

    Handles on the same file share one environment, because LMDB refuses to open a file twice in a process
    (train and val may well be the same file).

    Args:
        path: the file.

    Raises:
        ValueError: on first use, the file cannot be opened; names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._env: lmdb.Environment | None = None
        self._pid = -1

    def begin(self) -> lmdb.Transaction:
        """Start a read transaction."""
        return self._opened().begin()

    def stat(self) -> Any:
        """Return LMDB's statistics, a dict; ``entries`` is the number of records."""
        return self._opened().stat()

    def close(self) -> None:
        """Let go of the file. The next use opens it again."""
        self._env = None

    def _opened(self) -> lmdb.Environment:
        pid = os.getpid()
        if self._env is None or self._pid != pid:
            file = os.path.realpath(self.path)
            env = _open_environments.get(file)
            if env is None:
                env = _open_environments[file] = _open(self.path)
            self._env, self._pid = env, pid
        return self._env

    def __reduce__(self) -> tuple[type[LazyEnvironment], tuple[Path]]:
        return LazyEnvironment, (self.path,)


_open_environments: WeakValueDictionary[str, lmdb.Environment] = WeakValueDictionary()
"""What this process has open, by real path. An environment closes when the last handle lets go of it."""


def _close_inherited() -> None:
    """Close in a forked child what its parent had open.

    LMDB forbids its use there, yet refuses to open the file again until it is closed. The parent's stays.
    """
    for env in list(_open_environments.values()):
        env.close()
    _open_environments.clear()


os.register_at_fork(after_in_child=_close_inherited)


def _open(path: Path) -> lmdb.Environment:
    try:
        return lmdb.open(str(path), subdir=False, readonly=True, lock=False, meminit=False)
    except lmdb.Error as error:
        raise ValueError(
            f"'{path}' cannot be opened as an LMDB file: {error}. Copy or preprocess it again, or remove it."
        ) from error


class _Flags:
    """One bit for each frame: All+MD has 172 million, in each process."""

    def __init__(self, values: np.ndarray) -> None:
        self._bits = np.packbits(values)

    def __getitem__(self, index: int) -> bool:
        return bool(self._bits[index >> 3] >> (7 - (index & 7)) & 1)


class _MarkMD(DataTransforms):
    """fairchem's transforms, after a first step that writes ``md``.

    Args:
        config: the settings under ``transforms``.
        flags: for each file and record, whether it is an MD frame; None leaves structures as they are.
    """

    def __init__(self, config: Mapping[str, Any] | None, flags: Sequence[_Flags] | None) -> None:
        super().__init__(config)
        self._flags = flags

    def __call__(self, data_object: Data) -> Data:
        if self._flags is not None:
            file, record = data_object.id.split("_")
            data_object[keys.MD] = torch.tensor([self._flags[int(file)][int(record)]])
        return super().__call__(data_object)


def _check_src(config: Mapping[str, Any]) -> None:
    where = "'dataset.*.src' (format 'dens_lmdb')"
    src = config.get("src")
    if not isinstance(src, str | os.PathLike) or not str(src):
        raise ValueError(f"{where} must be the path of a folder of LMDBs or of one LMDB file, found {src!r}.")
    path = Path(src)
    if not path.exists():
        raise FileNotFoundError(
            f"{where} is '{src}', which does not exist. Set it to your folder of *.lmdb files."
        )
    if path.is_dir() and not any(path.glob("*.lmdb")):
        raise FileNotFoundError(
            f"{where} is '{src}', a folder without any *.lmdb file. Set it to the folder that holds them."
        )


def _log_of(file: Path) -> Path:
    """``data.0000.lmdb`` → ``data_log.0000.txt``, beside it."""
    name, *rest = file.stem.split(".")
    return file.with_name(".".join([f"{name}_log", *rest, "txt"]))


def _read_logs(files: Sequence[Path], counts: Sequence[int]) -> tuple[list[_Flags] | None, str | None]:
    """Return the flags of all files, or None and what is wrong with the logs."""
    problems = [f"'{_log_of(file)}' is missing" for file in files if not _log_of(file).is_file()]
    flags = []
    if not problems:
        for file, count in zip(files, counts, strict=True):
            try:
                flags.append(_Flags(_read_log(_log_of(file), count)))
            except ValueError as error:
                problems.append(str(error))
    if not problems:
        return flags, None
    more = len(problems) - _SHOWN_PROBLEMS
    said = "; ".join(problems[:_SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")
    return None, (
        f"It is not known which frames are from MD and must not be corrupted: {said}. Each data.NNNN.lmdb "
        "needs beside it a data_log.NNNN.txt with one line a frame, whose path contains 'relaxations' or "
        "'md'. If there are no MD frames, set 'dataset.train.md_logs: ignore'."
    )


def _read_log(log: Path, count: int) -> np.ndarray:
    """Return (count,) bool, True for MD frames.

    Raises:
        ValueError: the number of lines is not ``count``, or a line names neither kind.
    """
    flags = []
    with log.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            path = line.split(",", 1)[0]
            if "relaxations" in path:  # first: 'md' is two letters that any user name may contain
                flags.append(False)
            elif "md" in path:
                flags.append(True)
            elif path.strip():
                raise ValueError(
                    f"line {number} of '{log}' names neither 'relaxations' nor 'md': {line.strip()!r}"
                )
    if len(flags) != count:
        raise ValueError(f"'{log}' has {len(flags)} lines for {count} frames")
    return np.array(flags, dtype=bool)
