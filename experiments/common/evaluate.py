"""What is measured on a trained model besides the errors that training itself reports."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.demo.results import force_mae, load_trained


def train_force_mae(checkpoint: Path, _settings: dict[str, Any], given: dict[str, Any]) -> dict[str, float]:
    """Return the force error on the structures that a model was trained on, as they are: memorised or learnt?

    Args:
        checkpoint: of the end of the run.
        _settings: of the run.
        given: ``train``, the LMDB, and ``structures``, how many of it.
    """
    trained = load_trained(checkpoint)
    structures = list(islice(read_lmdb(given["train"]), given["structures"]))
    return {
        "train_forces_mae": force_mae(trained, structures),
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
    }
