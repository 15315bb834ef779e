"""`fairchem-dens checkpoint import`: turn a foreign checkpoint into one of this package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairchem_dens.cli.checkpoint.arguments import add_files, convert

if TYPE_CHECKING:
    from fairchem_dens.checkpoints.convert import Converted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the files and the options."""
    parser.description = (
        "Turn a checkpoint into one of this package: of the authors' code (flat EquiformerV2, eSCN or "
        "Equiformer), or of fairchem (backbone and heads, fine-tuned ones too). Normalisers and element "
        "references are carried along; 'energy_lin_ref' of the model becomes element references; heads for "
        "stress, optimizer and schedule are left out. No code in the file is run."
    )
    add_files(parser, "the checkpoint of elsewhere; one of this package is brought to the current version")
    parser.add_argument(
        "--config-yml",
        type=Path,
        metavar="RUN.yml",
        help="take the settings of the model from this YAML (its 'model'), for files that lack them",
    )
    parser.add_argument(
        "--new-dens",
        action="store_true",
        help="add an untrained force embedding and noise head to a plain model, to go on with DeNS from it; "
        "its predictions stay the same",
    )


def run(args: argparse.Namespace) -> int:
    """Import the file."""
    from fairchem_dens.checkpoints.convert import import_checkpoint

    model = None if args.config_yml is None else _model(args.config_yml)

    def conversion(checkpoint: dict[str, Any]) -> Converted:
        return import_checkpoint(checkpoint, model=model, average=args.ema, new_dens=args.new_dens)

    return convert(
        args,
        conversion,
        "fairchem --mode validate --checkpoint OUT.pt with the YAML of the run, or "
        "'model.finetune_config.starting_checkpoint: OUT.pt' in a YAML to fine-tune from it",
    )


def _model(file: Path) -> dict[str, Any]:
    """Read the settings of the model from the YAML of a run."""
    from fairchem.core.common.utils import load_config

    if not file.is_file():
        raise FileNotFoundError(f"'--config-yml {file}': there is no such file.")
    model = load_config(file)[0].get("model")
    if not isinstance(model, dict):
        raise ValueError(f"'--config-yml {file}' has no 'model' with settings.")
    return model
