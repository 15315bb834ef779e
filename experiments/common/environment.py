"""Where numbers come from: versions, device, and the state of this package."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from fairchem_dens import machine

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

    on_gpu = not cpu and torch.cuda.is_available()
    return {"commit": commit(), "device": machine.device(on_gpu=on_gpu), "versions": machine.versions()}
