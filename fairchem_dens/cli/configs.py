"""`fairchem-dens configs`: list and copy the training configurations that ship with the package."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import yaml

from fairchem_dens.shipped import config_names, configs_folder, run_names

MAP = "README.md"
"""The file beside the configurations that explains them; copied with all of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the actions `list` and `copy`."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)
    actions.add_parser(
        "list",
        help="print the name and the first line of each",
        description=("Print the name of each shipped configuration and what it is for."),
    )
    copy = actions.add_parser(
        "copy",
        help="copy them to a folder of your own",
        description=(
            "Copy configurations, and the files that they include, to a folder, keeping their place below "
            "it. Files that are already there and differ are an error unless --force is given."
        ),
    )
    copy.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help=("a name or folder that `configs list` prints, e.g. oc20; default: all"),
    )
    copy.add_argument("destination", type=Path, metavar="FOLDER", help="where to; made if missing")
    copy.add_argument("--force", action="store_true", help="overwrite files that differ")


def run(args: argparse.Namespace) -> int:
    """Runs the chosen action and returns its exit status."""
    if args.action == "list":
        runs = run_names()
        width = max(map(len, runs), default=0)
        for name in runs:
            print(f"{name:{width}}  {summary(configs_folder() / name)}".rstrip())
    else:
        for path in copy_configs(args.names, args.destination, force=args.force):
            print(path)
    return 0


def summary(path: Path) -> str:
    """Returns the first comment line of a configuration, or nothing if it does not start with one."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def copy_configs(names: Iterable[str], destination: Path, *, force: bool = False) -> list[Path]:
    """Copies configurations and everything they include.

    Args:
        names: Configurations, with or without `.yml`, or folders of them; none means all, with `MAP`.
        destination: Folder to copy to.
        force: Whether files that are there and differ are overwritten.

    Returns:
        The copies.

    Raises:
        ValueError: If a name is unknown or a file is there and differs; nothing is copied then.
    """
    source = configs_folder()
    asked = [name for given in names for name in _resolve(given)]
    wanted = _with_includes(source, asked) if asked else [*config_names(), MAP]
    copies = {source / name: destination / name for name in wanted}
    if not force:
        for original, copy in copies.items():
            if copy.exists() and copy.read_bytes() != original.read_bytes():
                raise ValueError(
                    f"{copy} exists and differs from the shipped file: choose another folder, or --force."
                )
    for original, copy in copies.items():
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(original, copy)
    return list(copies.values())


def _resolve(given: str) -> list[str]:
    available = config_names()
    wanted = given.strip("/")
    exact = (wanted, f"{wanted}.yml")
    matches = [name for name in available if name in exact or name.startswith(f"{wanted}/")]
    if matches:
        return matches
    folders = {parent.as_posix() for name in available for parent in Path(name).parents} - {"."}
    short = [name.removesuffix(".yml") for name in available]
    close = get_close_matches(wanted, [*available, *short, *folders], n=1)
    hint = f"did you mean {close[0]!r}?" if close else "`fairchem-dens configs list` shows what there is."
    raise ValueError(f"no shipped configuration or folder is called {given!r}: {hint}")


def _with_includes(source: Path, names: Iterable[str]) -> list[str]:
    """Adds what the configurations include, resolved as fairchem does: relative to the file that includes."""
    complete: dict[str, None] = {}
    queue = list(names)
    while queue:
        name = queue.pop(0)
        if name in complete:
            continue
        complete[name] = None
        loaded = yaml.safe_load((source / name).read_text(encoding="utf-8")) or {}
        folder = (source / name).parent
        queue += [
            (folder / include).resolve().relative_to(source.resolve()).as_posix()
            for include in loaded.get("includes", [])
        ]
    return list(complete)
