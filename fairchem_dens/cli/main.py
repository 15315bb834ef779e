"""Entry point of the `fairchem-dens` command.

Each subcommand is a module of its own, see `fairchem_dens.cli.subcommands`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fairchem_dens import __version__
from fairchem_dens.cli.subcommands import add_commands

COMMANDS = {
    "checkpoint": (
        "fairchem_dens.cli.checkpoint",
        "look into checkpoints, import official ones, export them to fairchem, strip them of DeNS",
    ),
    "configs": (
        "fairchem_dens.cli.configs",
        "list the training configurations that ship with the package, or copy them",
    ),
    "data": (
        "fairchem_dens.cli.data",
        "make data sets from MD17 or files that ASE reads, look at them, fit their normalisers",
    ),
    "demo": (
        "fairchem_dens.cli.demo",
        "generate a small data set, train with and without DeNS on it, and compare",
    ),
    "evaluate": (
        "fairchem_dens.cli.evaluate",
        "score a checkpoint on data sets, by the metrics of the leaderboards and the paper",
    ),
    "submission": (
        "fairchem_dens.cli.submission",
        "build and check files for the OC20 and OC22 leaderboards",
    ),
    "submit": (
        "fairchem_dens.cli.submit",
        "submit a training job to SLURM, or show its global batch and its job script",
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
    parser = build_parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    args.rest = rest
    if rest and not getattr(args, "takes_the_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return int(args.run(args))
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        print(f"{parser.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader has seen enough (`... | head`). Python flushes stdout once more at exit: into nothing,
        # then.
        sys.stdout = None  # type: ignore[assignment]  # the documented value of a missing stream
        return 0


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Builds the parser, with the arguments of the subcommand that is about to run.

    Args:
        arguments: The command line.

    Returns:
        The parser; parsing sets `run` to the subcommand's function.
    """
    parser = argparse.ArgumentParser(
        prog="fairchem-dens", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"fairchem_dens {__version__}")
    add_commands(parser, COMMANDS, arguments, title="commands", metavar="COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main())
