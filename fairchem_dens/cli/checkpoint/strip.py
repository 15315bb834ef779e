"""`fairchem-dens checkpoint strip`: a plain model of fairchem that predicts exactly the same."""

from __future__ import annotations

import argparse
from functools import partial

from fairchem_dens.cli.checkpoint.arguments import add_files, convert


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files and the options."""
    parser.description = (
        "Leave force embedding and noise head out. What the embedding adds to every atom also without "
        "forces, its bias, becomes part of the embedding of the elements, so that the result, fairchem's "
        "'equiformer_v2' or 'escn', predicts exactly the same for structures that are not corrupted."
    )
    add_files(parser, "a checkpoint of this package, or one that `checkpoint import` takes")


def run(args: argparse.Namespace) -> int:
    """Strip the file."""
    from fairchem_dens.checkpoints.convert import strip_checkpoint

    conversion = partial(strip_checkpoint, average=args.ema)
    return convert(args, conversion, "OCPCalculator(checkpoint_path='OUT.pt'), in any fairchem-core 1.10.0")
