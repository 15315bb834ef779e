"""Structures that tests of models share, in double precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch_geometric.data import Batch, Data

from structures import conditioned


@pytest.fixture(scope="session")
def make(structure: Callable[..., Data]) -> Callable[..., Data]:
    """Makes a structure as the corruption leaves it."""
    return lambda seed, **keywords: conditioned(structure(seed, dtype=torch.float64, **keywords))


@pytest.fixture
def batch(make: Callable[..., Data]) -> Batch:
    """Two conditioned structures, of 12 and 9 atoms."""
    return Batch.from_data_list([make(0), make(1, natoms=9)])
