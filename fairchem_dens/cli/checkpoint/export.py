"""`fairchem-dens checkpoint export`: turn a checkpoint into the layout of stock fairchem."""

from __future__ import annotations

import argparse
from functools import partial

from fairchem_dens.cli.checkpoint.arguments import add_files, convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files and the options."""
    parser.description = (
        "Turn a checkpoint into a hydra model, backbone and heads, which fairchem-core 1.10.0 loads "
        "without this package. EquiformerV2 becomes fairchem's own backbone and heads with DeNS: the same "
        "network, so nothing is lost and `checkpoint import` of the result gives it back. Do not train it "
        "with fairchem's own DeNS trainer, which adds a wrong term to the loss."
    )
    add_files(parser, "a checkpoint of this package, or one that `checkpoint import` takes")
    parser.add_argument(
        "--plain",
        action="store_true",
        help="leave DeNS out, as `checkpoint strip` does: fairchem's plain backbone and heads, for "
        "EquiformerV2 and eSCN",
    )


def run(args: argparse.Namespace) -> int:
    """Export the file."""
    from fairchem_dens.checkpoints.convert import export_checkpoint

    conversion = partial(export_checkpoint, with_dens=not args.plain, average=args.ema)
    return convert(args, conversion, "OCPCalculator(checkpoint_path='OUT.pt'), in any fairchem-core 1.10.0")
