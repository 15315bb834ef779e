"""What the result of a benchmark says of its machine, and how it is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from fairchem_dens.machine import processor, versions


def describe(device: str) -> dict[str, Any]:
    """Machine and versions."""
    name = f"{processor()}, {torch.get_num_threads()} threads of {os.cpu_count()}"
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name()
    return {"device": name, "versions": versions()}


def write(out: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
