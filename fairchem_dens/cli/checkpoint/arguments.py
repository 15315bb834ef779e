"""What the actions that write a checkpoint have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fairchem_dens.checkpoints.convert import Converted


def add_files(parser: argparse.ArgumentParser, source: str) -> None:
    """Add the checkpoint to read, the one to write, and what happens to the moving average."""
    parser.add_argument("source", type=Path, metavar="FILE.pt", help=source)
    parser.add_argument("out", type=Path, metavar="OUT.pt", help="the checkpoint to write, a new file")
    parser.add_argument(
        "--ema",
        choices=("keep", "use", "drop"),
        default="keep",
        help="the moving average of the weights: keep it beside them (default; the calculator of stock "
        "fairchem then uses the weights, all else the average), use it as the weights, or drop it",
    )


def convert(
    args: argparse.Namespace, conversion: Callable[[dict[str, Any]], Converted], next_step: str
) -> int:
    """Read, convert and write; say what was done and what to do next."""
    from fairchem_dens import checkpoints
    from fairchem_dens.data.folder import refuse_existing

    refuse_existing(args.out)
    checkpoint = checkpoints.read_as_written(args.source)
    try:
        converted = conversion(checkpoint)
    except ValueError as error:
        raise ValueError(f"'{args.source}': {error}") from error
    checkpoints.write(converted.checkpoint, args.out)
    for line in converted.said:
        print(line)
    print(f"wrote {args.out}")
    print(f"next: {next_step.replace('OUT.pt', str(args.out))}")
    return 0
