"""What the numbers of a report depend on."""

from __future__ import annotations

import os
from typing import Any

from fairchem_dens.machine import versions


def environment() -> dict[str, Any]:
    """Return the number of cores and versions."""
    return {"cores": os.cpu_count(), "versions": versions()}
