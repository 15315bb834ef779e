"""Commands as modules, imported when they are called, so that `--help` does not wait for torch.

Such a module has `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from importlib import import_module

Commands = Mapping[str, tuple[str, str]]
"""Name of each command: its module and one line of help."""


def add_commands(
    parser: argparse.ArgumentParser, commands: Commands, arguments: Sequence[str], *, title: str, metavar: str
) -> None:
    """Adds the named commands: the one that is about to run with its arguments, the others by name only.

    Parsing sets `run` to the function of the chosen one.

    Args:
        parser: Gets the commands.
        commands: Which there are.
        arguments: The command line; the first word that names a command is the one about to run.
        title: Heading of the list in the help.
        metavar: What a command is called there.
    """
    chosen = next((argument for argument in arguments if argument in commands), None)
    subparsers = parser.add_subparsers(title=title, metavar=metavar, required=True)
    for name, (module_name, help_line) in commands.items():
        subparser = subparsers.add_parser(
            name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}."
        )
        if name == chosen:
            module = import_module(module_name)
            rest = arguments[list(arguments).index(name) + 1 :]
            nested: Commands | None = getattr(module, "COMMANDS", None)
            if nested is not None:
                add_commands(subparser, nested, rest, title="actions", metavar="ACTION")
            else:
                module.add_arguments(subparser)
                subparser.set_defaults(run=module.run)
