"""What the result of a benchmark says of its machine, and how it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fairchem_dens import machine


def describe(device: str) -> dict[str, Any]:
    """Machine and versions."""
    return {"device": machine.device(on_gpu=device.startswith("cuda")), "versions": machine.versions()}


def write(out: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
