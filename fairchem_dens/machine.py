"""What numbers depend on beside the code: the machine and the versions of what is installed."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fairchem_dens

_PACKAGES = ("torch", "numpy", "torch_geometric", "e3nn", "ase", "lmdb", "fairchem-core")


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of those that results depend on."""
    found = {"python": platform.python_version(), "fairchem_dens": fairchem_dens.__version__}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found


def device(*, on_gpu: bool) -> str:
    """Return the name of the GPU, or that of the processor and the threads that torch takes of it."""
    import torch

    if on_gpu:
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'' if threads == 1 else 's'} of {os.cpu_count()}"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
