"""Double precision, in which a tolerance speaks of the model and not of rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from fairchem_dens.models import graph


@contextmanager
def default_precision(dtype: torch.dtype) -> Iterator[None]:
    """Make tensors of this type where none is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def double_precision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run models in double precision.

    fairchem's grids and Wigner matrices have the default precision; its search for neighbours knows only
    single.
    """
    search = default_precision(torch.float32)(graph.radius_graph_pbc)
    monkeypatch.setattr(graph, "radius_graph_pbc", search)
    with default_precision(torch.float64):
        yield
