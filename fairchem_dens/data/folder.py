"""Folders and files that appear under their name only once they are complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_existing(folder: Path) -> None:
    """Raise if the folder, or a file of that name, is there.

    Raises:
        FileExistsError: it is.
    """
    if folder.exists():
        raise FileExistsError(f"'{folder}' exists already. Remove it, or choose another folder.")


@contextmanager
def written_aside(folder: str | Path, *, overwrite: bool = False, keep: bool = False) -> Iterator[Path]:
    """Give a hidden folder beside ``folder`` to write into, and rename it at the end.

    After an exception, or if the process is killed, ``folder`` is as it was before.

    Args:
        folder: the folder to make.
        overwrite: replace it if it exists.
        keep: leave what was written in the hidden folder after an exception, and find it there the next time:
            for work that goes on where it stopped. Otherwise what a killed process left behind is removed.

    Yields:
        The hidden folder.

    Raises:
        FileExistsError: ``folder`` exists and ``overwrite`` is False.
    """
    folder = Path(folder).absolute()
    if not overwrite:
        refuse_existing(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    if not keep:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        if not overwrite:
            refuse_existing(folder)
    except BaseException:
        if not keep:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        replaced = folder.with_name(f".{folder.name}.replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced)
    else:
        partial.rename(folder)


@contextmanager
def file_aside(file: str | Path) -> Iterator[Path]:
    """Give a hidden name beside ``file`` to write into, and rename it at the end, over a file that is there.

    After an exception ``file`` is as it was before, and nothing is left beside it.
    """
    file = Path(file)
    aside = file.with_name(f".{file.name}.partial")
    try:
        yield aside
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def write_text(file: str | Path, content: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    with file_aside(file) as aside:
        aside.write_text(content, encoding="utf-8")
