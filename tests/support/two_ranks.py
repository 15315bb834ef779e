"""Two processes on this machine that train together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_two_ranks(folder: Path, script: str, settings: Any, *, timeout: float) -> list[str]:
    """Run a script on two ranks with gloo, until both have ended well.

    Args:
        folder: where they run; ``rank.py`` and ``settings.json`` are written there.
        script: its text; it is given the file of settings and the folder, and finds modules of this folder.
        settings: anything JSON can hold.
        timeout: seconds for each.

    Returns:
        What the ranks said.
    """
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "rank.py").write_text(script)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).parent)]))
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [sys.executable, "rank.py", "settings.json", str(folder)],
            cwd=folder, env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, said, strict=True):
        assert process.returncode == 0, output[-5000:]
    return said
