"""Where numbers come from: versions, device, and the state of this package."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("torch", "numpy", "fairchem-core", "torch-geometric", "ase", "e3nn")


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

    import fairchem_dens

    versions = {"python": platform.python_version(), "fairchem_dens": fairchem_dens.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    if cpu or not torch.cuda.is_available():
        device = f"{_processor()}, {torch.get_num_threads()} thread of {os.cpu_count()}"
    else:
        device = torch.cuda.get_device_name()
    return {"commit": commit(), "device": device, "versions": versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
