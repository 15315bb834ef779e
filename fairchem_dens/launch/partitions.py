"""Which partitions there are, asked before a job waits in a queue that does not exist."""

from __future__ import annotations

import shutil
import subprocess

from fairchem_dens.validation import nearest


def check_partition(name: str | None) -> None:
    """Refuse a partition that SLURM does not have, or none where it has no default.

    Says nothing where there is no SLURM to ask, or it does not answer.

    Args:
        name: what ``--slurm-partition`` says.

    Raises:
        ValueError: names the partitions that there are.
    """
    listed = _partitions()
    if not listed:
        return
    names = [partition.rstrip("*") for partition in listed]
    if name is None:
        if names == listed:
            raise ValueError(
                f"--slurm-partition is missing, and there is no default: choose from {', '.join(names)}."
            )
        return
    # SLURM takes several, and uses the first that has room.
    for one in name.split(","):
        if one not in names:
            raise ValueError(
                f"--slurm-partition: there is no partition '{one}'{nearest(one, names)}. There are: "
                f"{', '.join(names)}."
            )


def _partitions() -> list[str]:
    """Names of all partitions, that of the default one with a star."""
    if shutil.which("sinfo") is None:
        return []
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%P"], capture_output=True, text=True, timeout=20, check=False
        )
    except subprocess.TimeoutExpired:
        return []
    return list(dict.fromkeys(done.stdout.split())) if done.returncode == 0 else []
