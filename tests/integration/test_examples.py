"""The notebooks in `examples`, run as scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from checkout import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("name", ["corruption", "denoise"])
def test_notebook_runs_and_draws(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py")],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{name}.svg").stat().st_size > 5000 and done.stdout
    if name == "denoise":
        shown, hidden = (float(line.split("noise ")[1].split()[0]) for line in done.stdout.splitlines())
        assert shown < hidden
