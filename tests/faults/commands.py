"""The `fairchem` command as a process that can be watched, killed and waited for."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ENVIRONMENT = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


class Hangs(Exception):  # noqa: N818  # what it is, not where it was raised
    """A process did not end in its time. It has been killed."""


@dataclass
class Phase:
    """What a run was doing.

    Attributes:
        name: see `probe`.
        step: the step that it was at.
        completed: the last step whose update was complete, 0 if there was none in this process.
    """

    name: str = "start"
    step: int = 0
    completed: int = 0


@dataclass
class Watched:
    """What has been seen of a process.

    Attributes:
        pid: its id.
        log: the file with all that it says.
        phase: the latest.
        phases: number of changes of phase.
        first_step: the first step that it made, None if it made none.
        calls: calls of functions by phase, for each occurrence, if they were counted.
    """

    pid: int
    log: Path
    phase: Phase = field(default_factory=Phase)
    phases: int = 0
    first_step: int | None = None
    calls: dict[str, list[int]] = field(default_factory=dict)

    def take(self, line: str) -> None:
        """Take an event of `probe`."""
        kind, name, *numbers = line.split()
        if kind == "calls":
            self.calls.setdefault(name, []).append(int(numbers[1]))
            return
        self.phase = Phase(name, *map(int, numbers))
        self.phases += 1
        if name == "step" and self.first_step is None:
            self.first_step = self.phase.step

    def send(self, signum: int) -> None:
        """Send a signal."""
        os.kill(self.pid, signum)

    def said(self) -> str:
        """All that it said."""
        return self.log.read_text(errors="replace")


class Forked:
    """`fairchem` in processes forked from one that has made its imports; see `server`. A context manager."""

    def __init__(self) -> None:
        self._events, theirs = os.pipe()
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), str(theirs)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[theirs],
            env=os.environ | ENVIRONMENT,
        )  # fmt: skip
        os.close(theirs)
        assert self._answer(timeout=300) == {"ready": 1}
        self._rest = b""

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.kill()
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()
        os.close(self._events)

    def _answer(self, timeout: float) -> dict[str, int]:
        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], timeout)[0]:
            raise Hangs
        return json.loads(self._server.stdout.readline())  # type: ignore[no-any-return]

    def start(
        self, arguments: list[str], folder: Path, log: Path, watch: dict[str, Any] | None = None
    ) -> Watched:
        """Start a run; the one before must have ended."""
        assert self._server.stdin is not None
        list(self._lines(0))  # of a run before
        request = {"arguments": arguments, "folder": str(folder), "log": str(log), "watch": watch}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return Watched(self._answer(timeout=60)["pid"], log)

    def follow(self, run: Watched, timeout: float) -> Iterator[Watched]:
        """Yield at each change of phase, until the run has ended or somebody stops listening."""
        deadline = time.monotonic() + timeout
        assert self._server.stdout is not None
        while True:
            ready, _, _ = select.select(
                [self._events, self._server.stdout], [], [], deadline - time.monotonic()
            )
            if not ready:
                kill(run.pid, group=True)
                self._answer(timeout=60)
                raise Hangs
            if self._events not in ready:
                return
            for line in self._lines(0):
                run.take(line)
                yield run

    def wait(self, run: Watched, timeout: float) -> int:
        """Wait for the end; returns the exit status, that of a signal being negative."""
        for _ in self.follow(run, timeout):
            pass
        status = self._answer(timeout)["status"]
        for line in self._lines(0):
            run.take(line)
        return status

    def _lines(self, timeout: float) -> Iterator[str]:
        while select.select([self._events], [], [], timeout)[0]:
            *lines, self._rest = (self._rest + os.read(self._events, 1 << 16)).split(b"\n")
            yield from (line.decode() for line in lines)


class Spawned:
    """The installed `fairchem` command, started anew for each run and watched by what it says."""

    def __enter__(self) -> Spawned:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def start(
        self, arguments: list[str], folder: Path, log: Path, watch: dict[str, Any] | None = None
    ) -> Watched:
        """Start a run."""
        beside = shutil.which("fairchem", path=str(Path(sys.executable).parent))
        command = [beside] if beside else [sys.executable, "-m", "fairchem.core._cli"]
        self._seen = log.stat().st_size if log.exists() else 0
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                [*command, *arguments], cwd=folder, env=os.environ | ENVIRONMENT, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return Watched(self._process.pid, log)

    def follow(self, run: Watched, timeout: float) -> Iterator[Watched]:
        """Yield at each line that tells a phase, until the run has ended or somebody stops listening."""
        deadline = time.monotonic() + timeout
        with run.log.open("rb") as log:
            log.seek(self._seen)
            ended, rest = False, b""
            while not ended:
                ended = self._process.poll() is not None
                *lines, rest = (rest + log.read()).split(b"\n")
                self._seen = log.tell() - len(rest)
                for line in lines:
                    if self._took(run, line.decode(errors="replace")):
                        yield run
                if time.monotonic() > deadline:
                    kill(run.pid, group=True)
                    raise Hangs
                time.sleep(0.002)

    def _took(self, run: Watched, line: str) -> bool:
        done = run.phase.completed
        if "Evaluating on" in line:
            run.take(f"phase validation {done} {done}")
        elif "step: " in line and "lr: " in line:
            step = round(float(line.rsplit("step: ", 1)[1].split(",")[0]))
            run.take(f"phase step {step} {step}")
        else:
            return False
        return True

    def wait(self, run: Watched, timeout: float) -> int:
        """Wait for the end; returns the exit status, that of a signal being negative."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            kill(run.pid, group=True)
            raise Hangs from None
        return status


def kill(pid: int, *, group: bool = False) -> None:
    """SIGKILL a process, with all those that it started if ``group``: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started and that are there."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def of_session(pid: int) -> list[int]:
    """Return the processes of the session that a process leads or led."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # After the name, which may hold anything: state, parent, group, session.
            state, _, _, session, *_ = entry.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == pid and state != "Z":
            found.append(int(entry.parent.name))
    return found


def all_gone(pids: list[int], patience: float) -> list[int]:
    """Wait for the sessions of some processes to be empty; returns the processes that remain."""
    deadline = time.monotonic() + patience
    while True:
        left = [process for pid in pids for process in of_session(pid)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.2)
