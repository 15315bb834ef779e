"""What the numbers of a report depend on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import fairchem_dens

_PACKAGES = ("torch", "numpy", "torch_geometric", "lmdb", "fairchem-core")


def environment() -> dict[str, Any]:
    """Return the number of cores and versions."""
    versions = {"python": platform.python_version(), "fairchem_dens": fairchem_dens.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return {"cores": os.cpu_count(), "versions": versions}
