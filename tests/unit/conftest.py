"""Batches that tests of models share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch_geometric.data import Batch, Data

from structures import partly_corrupted


@pytest.fixture
def batch(structure: Callable[..., Data]) -> Batch:
    """Two ordinary structures, of 12 and 7 atoms."""
    return Batch.from_data_list([structure(0), structure(1, natoms=7)])


@pytest.fixture
def corrupted(batch: Batch) -> Batch:
    """The first structure corrupted in every other atom, the second an ordinary one; both with all fields."""
    return partly_corrupted(batch)
