"""Where the configurations that ship with the package are, and what they are called."""

from __future__ import annotations

from pathlib import Path

import fairchem_dens

_PARTS = ("includes/", "demo/base.yml")
"""Configurations that are no runs: others include them."""


def configs_folder() -> Path:
    """Return the folder of the configurations: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: there is none.
    """
    package = Path(fairchem_dens.__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"There is no configs folder in {package} nor beside it: reinstall fairchem_dens."
    )


def config_names() -> list[str]:
    """Return the shipped configurations, as paths below `configs_folder()`, sorted."""
    folder = configs_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yml"))


def run_names() -> list[str]:
    """Return those of `config_names()` that are runs, not parts of others."""
    return [name for name in config_names() if not name.startswith(_PARTS)]
