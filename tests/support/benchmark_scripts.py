"""The scripts of `benchmarks/`, which are only in a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

only_in_a_checkout = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="benchmarks are only in a checkout")


def run_benchmark(script: str, *arguments: str, cwd: Path) -> str:
    """Run a script, and return what it printed."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *arguments],
        cwd=cwd, env=dict(os.environ), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
