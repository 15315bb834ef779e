"""What the result of a benchmark says of its machine, and how it is written."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch


def describe(device: str) -> dict[str, Any]:
    """Machine and versions."""
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    return {"device": name, "versions": {"python": platform.python_version(), "torch": torch.__version__}}


def write(out: Path, result: dict[str, Any]) -> None:
    """Write a result as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
