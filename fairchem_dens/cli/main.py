"""Entry point of the `fairchem-dens` command.

A subcommand is a module with `add_arguments(parser)` and `run(args) -> int`. It is imported when it is
called, so that `--help` and the light subcommands do not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from fairchem_dens import __version__

COMMANDS = {
    "configs": (
        "fairchem_dens.cli.configs",
        "list the training configurations that ship with the package, or copy them",
    ),
    "demo": (
        "fairchem_dens.cli.demo",
        "generate a small data set, train with and without DeNS on it, and compare",
    ),
}
"""Name of each subcommand: its module and one line of help."""

DESCRIPTION = """\
Companion of the fairchem command for training with DeNS (denoising non-equilibrium structures).

Training, validation, prediction and relaxation run through fairchem itself:

  fairchem --mode train --config-yml CONFIG.yml

This command supplies what surrounds that.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; by default the process's own.

    Returns:
        The exit status: 0, or what the subcommand returns, or 2 after an error in the input, which is printed
        as one line.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = build_parser(next((argument for argument in arguments if argument in COMMANDS), None))
    args = parser.parse_args(arguments)
    try:
        return int(args.run(args))
    except (ValueError, FileNotFoundError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has seen enough (`... | head`). Python flushes stdout once more at exit: into nothing,
        # then.
        sys.stdout = None  # type: ignore[assignment]  # the documented value of a missing stream
        return 0


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Builds the parser, with the arguments of `command` and only the names of the others.

    Args:
        command: The subcommand that is about to run, a key of `COMMANDS`, or None.

    Returns:
        The parser; parsing sets `run` to the subcommand's function.
    """
    parser = argparse.ArgumentParser(
        prog="fairchem-dens", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fairchem_dens {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module_name, help_line) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=help_line, description=f"{help_line[0].upper()}{help_line[1:]}."
        )
        if name == command:
            module = import_module(module_name)
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
