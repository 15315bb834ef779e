"""Decides what to answer when somebody asks for a missing torch_scatter, torch_sparse or torch_cluster."""

from __future__ import annotations

import importlib
import sys
from contextlib import suppress
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

PYG = "torch_geometric"


def find_stand_in(name: str) -> ModuleSpec | None:
    """Returns the spec of the stand-in for the missing top-level module `name`.

    torch_geometric takes an importable torch_scatter or torch_sparse for the complete compiled package and
    would call functions that a stand-in lacks, while its own pure-torch code needs neither. It is therefore
    told the truth about these two: not installed. Of torch_cluster it needs `radius_graph` alone, which there
    is a stand-in for.

    Args:
        name: One of `fairchem_dens.compat.STAND_INS`.

    Returns:
        The spec, or None where the caller does better without the module.
    """
    if _asked_by_pyg():
        return None if name != "torch_cluster" or _serve_recent_pyg() else _spec(name)
    # torch_geometric looks for the compiled packages once, when it is imported, and looks into `sys.modules`
    # first. Let it look before the stand-in is there to be found.
    with suppress(ImportError):
        importlib.import_module(f"{PYG}.typing")
    return _spec(name)


def _spec(name: str) -> ModuleSpec | None:
    # The module is loaded under the real one's name, not as `fairchem_dens.compat...`: what is pickled by
    # reference to it then loads where the real package is installed, and the other way round.
    here = Path(__file__).parent
    if (package := here / name).is_dir():
        return spec_from_file_location(
            name, package / "__init__.py", submodule_search_locations=[str(package)]
        )
    return spec_from_file_location(name, here / f"{name}.py")


def _asked_by_pyg() -> bool:
    """Whether torch_geometric is looking which compiled packages there are."""
    # It does so while its module of decisions is imported, and nobody else's code runs in that time. Walking
    # up the call stack for the name of the asker instead would be misled by anything that wraps `__import__`.
    decisions = sys.modules.get(f"{PYG}.typing")
    return bool(getattr(getattr(decisions, "__spec__", None), "_initializing", False))


def _serve_recent_pyg() -> bool:
    """Gives torch_geometric 2.8 or later a radius search; False if it is an earlier one.

    From 2.8 on, `torch_geometric.nn.radius_graph` no longer calls torch_cluster but the operator
    `pyg::radius` of pyg_lib, which has no wheels on the package index either. It does so when its flag
    `WITH_RADIUS` is set, which has been decided by the time torch_geometric asks for torch_cluster (only to
    warn that it is no longer used). Where pyg_lib has that operator, nothing is touched.
    """
    decisions: Any = sys.modules[f"{PYG}.typing"]
    if not hasattr(decisions, "WITH_RADIUS"):
        return False
    if not decisions.WITH_RADIUS:
        from fairchem_dens.compat.torch_cluster import register_pyg_radius

        register_pyg_radius()
        decisions.WITH_RADIUS = True
    return True
