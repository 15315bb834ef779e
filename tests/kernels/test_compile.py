"""All kernels compile for a GPU, which need not be there, and fit into what it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "compile_kernels.py"
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block can have, by compute capability."""

A_FEW_REGISTERS = 64
"""Bytes of stack: what does not fit into registers."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "precision"), [(80, "float16"), (90, "bfloat16"), (90, "float32"), (90, "tf32")]
)
def test_kernels_compile(capability: int, precision: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), str(capability), precision],
        cwd=tmp_path, env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) >= 25
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[capability], kernel
        assert kernel["stack"] <= A_FEW_REGISTERS, kernel
