"""LMDB files that may be shared by processes: opened on first use, and refused with a reason."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb

LENGTH_KEY = b"length"
"""Where the number of records stands, in files that say it."""


class LazyEnvironment:
    """A read-only LMDB file, opened on first use and anew in each process. Pickles carry only its path.

    Handles on the same file share one environment, because LMDB refuses to open a file twice in a process
    (train and val may well be the same file).

    Args:
        path: the file.

    Raises:
        ValueError: on first use, the file is missing, empty, truncated or not an LMDB; names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._env: lmdb.Environment | None = None
        self._pid = -1

    def begin(self) -> lmdb.Transaction:
        """Start a read transaction."""
        return self._opened().begin()

    def get(self, key: bytes) -> bytes | None:
        """Return what is stored under ``key``, or None."""
        try:
            return self.begin().get(key)
        except lmdb.Error as error:
            raise _unusable(self.path, str(error)) from error

    def stat(self) -> Any:
        """Return LMDB's statistics, a dict; ``entries`` is the number of keys."""
        return self._opened().stat()

    def count(self, *, trust_length: bool = True) -> int:
        """Return the number of records, which have the keys ``0``, ``1``, ...

        Args:
            trust_length: take the number under ``length`` where there is one; else count all other keys.

        Raises:
            ValueError: ``length`` is not a number, or larger than the number of records that are there.
        """
        stored = self.get(LENGTH_KEY)
        entries: int = self.stat()["entries"]
        if stored is None:
            return entries
        if not trust_length:
            return entries - 1
        try:
            length = int(pickle.loads(stored))
        except Exception as error:
            raise _unusable(self.path, "its 'length' is not a number") from error
        if not 0 <= length < entries:
            raise _unusable(self.path, f"it says that it holds {length} structures and holds {entries - 1}")
        return length

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
        env = lmdb.open(str(path), subdir=False, readonly=True, lock=False, meminit=False)
    except lmdb.Error as error:
        found = "it is empty" if path.is_file() and path.stat().st_size == 0 else str(error)
        raise _unusable(path, found) from error
    # Reading behind the end of a mapped file kills the process, without a word.
    expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
    size = path.stat().st_size
    if size < expected:
        env.close()
        raise _unusable(path, f"it is cut off, with {size} of at least {expected} bytes")
    return env


def _unusable(path: Path, found: str) -> ValueError:
    return ValueError(
        f"'{path}' cannot be opened as an LMDB file of structures: {found}. Copy or preprocess it again, or "
        "remove it."
    )
