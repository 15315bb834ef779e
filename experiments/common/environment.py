"""Where numbers come from: versions, device, and the state of this package."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from fairchem_dens.machine import processor, versions

_ROOT = Path(__file__).resolve().parents[2]


@cache
def commit() -> str | None:
    """Return the commit that last changed what is trained and how, None outside of a repository.

    Not the newest one: that may be of a page of the documentation.
    """
    command = ["git", "log", "-1", "--format=%H", "--", "fairchem_dens", "configs"]
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip() or None


def environment(*, cpu: bool) -> dict[str, Any]:
    """Return versions, device and commit.

    Args:
        cpu: whether the training runs on the CPU although there may be a GPU.
    """
    import torch

    if cpu or not torch.cuda.is_available():
        device = f"{processor()}, {torch.get_num_threads()} thread of {os.cpu_count()}"
    else:
        device = torch.cuda.get_device_name()
    return {"commit": commit(), "device": device, "versions": versions()}
