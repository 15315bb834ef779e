"""From patterns to files, from files to frames."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ase.db
import ase.io
from ase import Atoms
from ase.io.formats import filetype, ioformats

DATABASES = ("db", "json", "aselmdb")
_PACKED = re.compile(r"\.(gz|bz2|xz)$")
_TRAJECTORY = re.compile(r"\.(traj|xyz|extxyz|db|aselmdb)$")
_VASP = re.compile(r"^(OUTCAR|vasprun)")
"""Also `OUTCAR.1` or `vasprun.relax.xml`."""


class UnreadableError(ValueError):
    """A file, or a frame of it, cannot be read."""


class MissingPackageError(ValueError):
    """A file's format needs a package that is not installed."""


@dataclass(frozen=True)
class Source:
    """A file.

    Attributes:
        path: absolute.
        name: the shortest end of its path that no other file has, without suffix; parts joined by ``:``.
            Of VASP's OUTCAR and vasprun.xml, the name of their folder.
    """

    path: Path
    name: str


# ------------------------------------------------------------------ files


def find_sources(patterns: Sequence[str], *, any_name: bool = False) -> list[Source]:
    """Return the files that the patterns name, each once, sorted by path.

    Args:
        patterns: files, folders (searched to any depth for files known by their name: traj, xyz, extxyz, db,
            aselmdb, OUTCAR, vasprun.xml, also packed), or globs, where ``**`` is any depth.
        any_name: take every file of a folder.

    Raises:
        FileNotFoundError: a pattern names nothing.
        ValueError: two files seem to hold the same frames.
    """
    found: set[Path] = set()
    for pattern in patterns:
        files = list(_matches(pattern, any_name))
        if not files:
            what = "a folder without any file of a known name" if Path(pattern).is_dir() else "nothing"
            raise FileNotFoundError(
                f"'{pattern}' names {what} (looked in {Path.cwd()}). Give files, folders, or patterns in "
                "quotes such as 'runs/**/*.traj'; name files of a folder by a pattern if they are called "
                "otherwise."
            )
        found.update(files)
    paths = sorted(found)
    names = shortest_names(_identity(path) for path in paths)
    sources = [Source(path, names[_identity(path)]) for path in paths]
    _refuse_twice(sources)
    return sources


def _matches(pattern: str, any_name: bool) -> Iterator[Path]:
    pattern = str(Path(pattern).expanduser())  # the shell leaves ~ alone in quotes
    # Not Path.glob: it takes no absolute pattern.
    matches = [pattern] if Path(pattern).exists() else glob.glob(pattern, recursive=True)  # noqa: PTH207
    for match in map(Path, matches):
        if match.is_file():
            yield match.absolute()
        elif match.is_dir():
            for file in match.rglob("*"):
                if file.is_file() and not _hidden(file, match) and (any_name or _is_known(file.name)):
                    yield file.absolute()


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _is_known(name: str) -> bool:
    name = _PACKED.sub("", name)
    return bool(_TRAJECTORY.search(name) or _VASP.match(name))


def _identity(path: Path) -> tuple[str, ...]:
    """The parts of a path that name what is in the file."""
    name = _PACKED.sub("", path.name)
    return path.parts[:-1] if _VASP.match(name) else (*path.parts[:-1], Path(name).stem)


def _kind(path: Path) -> str:
    vasp = _VASP.match(path.name)
    return vasp.group() if vasp else "".join(path.suffixes[-2:])


def shortest_names(identities: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return for each tuple its shortest end that no other has, joined by ``:``."""
    names: dict[tuple[str, ...], str] = {}
    pending = all_identities = set(identities)
    length = 1
    while pending:
        ends = Counter(identity[-length:] for identity in all_identities)
        done = {it for it in pending if ends[it[-length:]] == 1 or length >= len(it)}
        names.update((identity, ":".join(identity[-length:])) for identity in done)
        pending = pending - done
        length += 1
    return names


def _refuse_twice(sources: Iterable[Source]) -> None:
    first: dict[tuple[str, ...], Path] = {}
    for source in sources:
        other = first.setdefault(_identity(source.path), source.path)
        if _kind(other) != _kind(source.path):
            raise ValueError(
                f"'{other}' and '{source.path}' seem to be the same run, written twice: its frames would "
                "count twice. Give one kind of file, such as 'runs/**/vasprun.xml'."
            )


# ------------------------------------------------------------------ frames


def format_of(path: Path, forced: str | None = None) -> str:
    """Return ASE's name of a file's format.

    Raises:
        UnreadableError: ASE does not know it, or the file cannot be opened.
        ValueError: ``forced`` is not a format.
    """
    if forced is not None:
        if forced not in DATABASES and forced not in ioformats:
            raise ValueError(
                f"'--format {forced}' is not a format of ASE; `ase info --formats` lists them (and aselmdb)."
            )
        return forced
    if path.suffix == ".aselmdb":
        return "aselmdb"
    try:
        name = str(filetype(str(path)))
    except Exception as error:
        raise UnreadableError(f"'{path}' cannot be read ({_said(error)}).") from error
    # Of a file that it does not know, ASE returns the suffix.
    if name not in DATABASES and name not in ioformats:
        raise UnreadableError(
            f"'{path}' is of a format that ASE does not recognise: name it with --format, or leave the file "
            "out."
        )
    return name


def read_frames(path: Path, format_name: str) -> Iterator[tuple[int, Atoms]]:
    """Yield the frames of a file with their numbers: from 0, in a database the ids of its rows.

    What a database keeps beside a structure, key-value pairs and data, is in ``info``.

    Raises:
        UnreadableError: a frame cannot be read.
        MissingPackageError: the format needs a package that is not there.
    """
    number = None
    try:
        frames = _rows(path, format_name) if format_name in DATABASES else _images(path, format_name)
        for number, atoms in frames:
            yield number, atoms
    except MissingPackageError:
        raise
    except Exception as error:
        after = "" if number is None else f" after frame {number}"
        raise UnreadableError(
            f"'{path}' cannot be read{after} as {format_name} ({_said(error)}). Repair it, name its "
            "format with --format, leave it out, or give --skip-unreadable to leave out all such files."
        ) from error


def _images(path: Path, format_name: str) -> Iterator[tuple[int, Atoms]]:
    # A path may hold an @, which ASE would take for a choice of frames.
    frames = ase.io.iread(str(path), index=":", format=format_name, do_not_split_by_at_sign=True)
    yield from enumerate(frames)


def _rows(path: Path, format_name: str) -> Iterator[tuple[int, Atoms]]:
    if format_name == "aselmdb":
        try:
            database = ase.db.connect(str(path), type=format_name, readonly=True, use_lock_file=False)
        except ImportError as error:
            raise MissingPackageError(
                f"'{path}' is an LMDB database of ASE, which needs a package: pip install ase-db-backends"
            ) from error
    else:
        database = ase.db.connect(str(path), type=format_name, use_lock_file=False)
    for row in database.select():
        atoms = row.toatoms()
        atoms.info.update(row.data)
        atoms.info.update(row.key_value_pairs)
        yield row.id, atoms


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
