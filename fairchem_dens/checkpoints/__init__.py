"""Checkpoints: reading and writing them, their versions, and ways between the layouts that there are."""

from __future__ import annotations

from fairchem_dens.checkpoints.files import (
    aside,
    plain,
    put_in_place,
    read,
    read_as_written,
    remove_unfinished,
    write,
)
from fairchem_dens.checkpoints.fit import load, require_fit
from fairchem_dens.checkpoints.versions import CHECKPOINT_VERSION, mark, upgraded, version_of
from fairchem_dens.checkpoints.weights import average_of, predicting_weights, trained_names, weights_of

__all__ = [
    "CHECKPOINT_VERSION",
    "aside",
    "average_of",
    "load",
    "mark",
    "plain",
    "predicting_weights",
    "put_in_place",
    "read",
    "read_as_written",
    "remove_unfinished",
    "require_fit",
    "trained_names",
    "upgraded",
    "version_of",
    "weights_of",
    "write",
]
