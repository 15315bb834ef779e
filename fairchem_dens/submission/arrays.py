"""Reading ``.npz`` files of any origin, and writing large ones."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib.npyio import NpzFile


def names_of(file: Path) -> list[str]:
    """Return the names of the arrays of an ``.npz``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds a name twice.
    """
    with _opened(file) as arrays:
        names: list[str] = arrays.files
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"'{file}' holds the array '{twice[0]}' {names.count(twice[0])} times: write it anew."
        )
    return names


def read_array(file: Path, name: str) -> np.ndarray:
    """Return one array of an ``.npz``.

    Nothing is ever unpickled: an array of Python objects, which may run code, is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file or the array cannot be read.
    """
    with _opened(file) as arrays:
        try:
            array = arrays[name]
        except Exception as error:  # whatever damaged bytes make of unpacking
            objects = "allow_pickle" in str(error)
            said = "it holds Python objects, which could run code" if objects else str(error)
            raise ValueError(
                f"The array '{name}' in '{file}' cannot be read: {said}. Write the file anew."
            ) from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"'{name}' in '{file}' is not an array of numpy: write the file anew.")
    return array


def is_compressed(file: Path) -> bool:
    """Tell whether the arrays of an ``.npz`` are compressed."""
    with zipfile.ZipFile(file) as archive:
        return all(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist())


@contextmanager
def _opened(file: Path) -> Iterator[NpzFile]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no file '{file}'.")
    try:
        loaded = np.load(file, allow_pickle=False)
    except Exception as error:  # whatever a damaged file makes of unpacking
        said = "it is no archive of arrays" if "pickle" in str(error) else str(error)
        raise ValueError(f"'{file}' cannot be read as an .npz: {said}.") from error
    if not isinstance(loaded, NpzFile):
        raise ValueError(f"'{file}' is a single array (.npy) where an .npz is needed.")
    with loaded:
        yield loaded


def write_arrays(file: Path, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write a compressed ``.npz``, replacing one that is there; only one array is in memory at a time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
