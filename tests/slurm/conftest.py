"""A real SLURM of one node, for the tests in this folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def _script() -> Path:
    """The script that starts it: FAIRCHEM_DENS_SLURM names it, else it is in ``shared`` by the checkout."""
    checkout = Path(__file__).resolve().parents[2]
    beside = checkout.parent / "shared" / "slurm" / "slurm_single_node.sh"
    script = Path(os.environ.get("FAIRCHEM_DENS_SLURM", beside))
    if not script.is_file():
        pytest.skip("needs slurm_single_node.sh, which starts a SLURM (set FAIRCHEM_DENS_SLURM to its path)")
    if os.geteuid() != 0:
        pytest.skip("needs root, to start the daemons of SLURM")
    if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is None and not shutil.which(
        "apt-get"
    ):
        pytest.skip("needs SLURM, or apt-get to install it")
    return script


def _free_ports() -> int:
    """The first of four neighbouring ports that nobody uses."""
    for first in range(17000, 30000, 4):
        try:
            for port in range(first, first + 4):
                with socket.socket() as tried:
                    tried.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    pytest.fail("there are no four free ports")


@pytest.fixture(scope="session")
def slurm() -> Iterator[None]:
    """Starts it, lets all commands find it, and stops it."""
    script = _script()
    had_it = shutil.which("sbatch") is not None
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/var/tmp"))
    folder.chmod(0o755)  # the daemons want every parent to be searchable
    # Room for two jobs of two tasks at a time, whatever the machine has.
    claims = {"CPUS": 4, "GPUS": 4, "MEM": 16000, "PORT": _free_ports(), "DIR": folder}
    environment = os.environ | {f"SLURM_SN_{name}": str(value) for name, value in claims.items()}
    before = os.environ.get("SLURM_CONF")
    try:
        up = subprocess.run(
            ["bash", str(script), "up"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if up.returncode != 0:
            reason = f"no SLURM could be started: {(up.stdout + up.stderr)[-1500:]}"
            pytest.fail(reason) if had_it else pytest.skip(reason)
        os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
        yield
    finally:
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
        subprocess.run(["bash", str(script), "down"], env=environment, timeout=120, check=False)
        shutil.rmtree(folder, ignore_errors=True)
