"""What all tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution

# Before torch is imported. The tests' tensors are small: more threads cost more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, so that a failure is one for everybody; no deadline, because the first example
# pays for imports.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _same_random_numbers() -> Iterator[None]:
    """Each test starts from the same state of torch's generator and leaves the caller's alone."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def installed() -> None:
    """Skips where the package is imported from a checkout instead of being installed."""
    try:
        distribution("fairchem_dens")
    except PackageNotFoundError:
        pytest.skip("fairchem_dens is not installed in this environment: run the tests with `make test`")


@pytest.fixture
def python(tmp_path) -> Callable[..., str]:
    """Runs code in a fresh interpreter of this environment, away from any checkout; returns what it printed."""

    def run(code: str, *options: str, path: str | None = None) -> str:
        # Not the pytest process's own PYTHONPATH first: a folder given here shadows what is installed.
        environment = dict(os.environ)
        if path is not None:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [path, os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, *options, "-c", code],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
