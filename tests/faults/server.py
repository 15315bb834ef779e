"""Starts `fairchem` over and over without paying for its imports: imports once, forks for each run.

A program of its own, started by `commands.Forked`. It reads one request a line on standard input, a JSON with
the command line of `fairchem`, the folder to run it in, the file for what it says and, if the run is to be
watched, what `probe.install` takes. For each it answers with the process id and then with the exit status. In
the forked process it is fairchem's own `main` that runs, to a regular end of the interpreter.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def import_everything() -> Any:
    """Return fairchem's `main`, after importing what a run of ours would import."""
    from fairchem.core._cli import main
    from fairchem.core.common.utils import setup_imports
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import fairchem_dens.models
    import fairchem_dens.trainer  # noqa: F401

    setup_imports()
    return main


def become(request: dict[str, Any], events: int, keep: int) -> None:
    """Make a forked process look as if it had been started with this command line."""
    os.setsid()
    os.close(keep)
    os.chdir(request["folder"])
    said = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (said, 1), (said, 2)):
        os.dup2(source, target)
    os.close(said)
    os.close(nothing)
    if request["watch"] is not None:
        import probe

        probe.install(events, **request["watch"])
    sys.argv = ["fairchem", *request["arguments"]]


def serve(events: int) -> None:
    """Answer requests until there are no more; return in each forked process after its run."""
    main = import_everything()
    # fairchem's imports may print; the answers go where nobody else writes.
    answers = os.dup(1)
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "r", buffering=1)

    def answer(**what: int) -> None:
        os.write(answers, (json.dumps(what) + "\n").encode())

    answer(ready=1)
    for line in iter(requests.readline, ""):
        pid = os.fork()
        if pid == 0:
            become(json.loads(line), events, keep=answers)
            main()
            return
        answer(pid=pid)
        _, status = os.waitpid(pid, 0)
        answer(status=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    serve(int(sys.argv[1]))
