"""Checkpoints: reading and writing them, their versions, and ways between the layouts that there are."""

from __future__ import annotations

from fairchem_dens.checkpoints.files import (
    plain,
    read,
    read_as_written,
    remove_unfinished,
    replacing,
    write,
)
from fairchem_dens.checkpoints.fit import load, require_fit
from fairchem_dens.checkpoints.versions import CHECKPOINT_VERSION, mark, upgraded, version_of
from fairchem_dens.checkpoints.weights import average_of, predicting_weights, trained_names, weights_of
from fairchem_dens.errors import CheckpointNotWritten

__all__ = [
    "CHECKPOINT_VERSION",
    "CheckpointNotWritten",
    "average_of",
    "load",
    "mark",
    "plain",
    "predicting_weights",
    "read",
    "read_as_written",
    "remove_unfinished",
    "replacing",
    "require_fit",
    "trained_names",
    "upgraded",
    "version_of",
    "weights_of",
    "write",
]
