"""Run fairchem commands: two at a time where there are two cores, visibly, leaving nothing running."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from tqdm import tqdm

from fairchem_dens.demo.plan import TITLES, Folder, Stage, fairchem_executable

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""One thread for each command: two of them keep two cores busy better than one with two threads, and sums are
always taken in the same order."""

_POLL = 0.25  # s
_SECONDS_TO_STOP = 60.0
_SECONDS_BETWEEN_LINES = 20.0
_TAIL = 25
_PR_SET_PDEATHSIG = 1

_STEP = re.compile(r"\bstep: ([\d.]+e[+-]\d+)")
_FORCE_ERROR = re.compile(r"\bforces_mae: ([\d.]+(?:e[+-]\d+)?)")


class StageError(RuntimeError):
    """A fairchem command failed; the message has the end of its log and says where the rest is."""


@contextlib.contextmanager
def locked(folder: Folder, patience: float = _SECONDS_TO_STOP) -> Iterator[int]:
    """Hold the folder for this process and the commands that it starts; yields the lock's file descriptor.

    The commands inherit the lock. If the demo is killed, the next one therefore waits until they have written
    their checkpoints and ended.

    Args:
        folder: the demo's folder.
        patience: seconds to wait for an earlier demo to end.

    Raises:
        ValueError: another demo is still running in it.
    """
    folder.lock.parent.mkdir(parents=True, exist_ok=True)
    with folder.lock.open("w") as file:
        deadline = time.monotonic() + patience
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"Another demo is running in '{folder.root}': wait for it, or choose another "
                        "folder with --out."
                    ) from None
                if not waiting:
                    print("waiting for an earlier demo in this folder to end ...", flush=True)
                    waiting = True
                time.sleep(_POLL)
        yield file.fileno()


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the demo the way Ctrl-C does."""

    def interrupt(_signal: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_group(
    group: Sequence[Stage],
    folder: Folder,
    *,
    lock: int,
    total_steps: int | None = None,
    at_once: int | None = None,
) -> None:
    """Run the commands of a group that are not done yet, and record each that ends well.

    Args:
        group: commands that do not depend on each other.
        folder: the demo's folder, in which they run.
        lock: descriptor that they inherit, see `locked`.
        total_steps: optimizer steps of a training; shows a progress bar.
        at_once: how many run at the same time; None takes one for each core.

    Raises:
        StageError: a command failed. The others have been stopped.
    """
    waiting = [stage for stage in group if folder.read_state(stage.name) is None]
    if not waiting:
        return
    at_once = at_once or _cores()
    display = _Display([TITLES[stage.run] for stage in waiting], total_steps)
    queue = list(enumerate(waiting))
    running: dict[int, _Command] = {}
    try:
        while queue or running:
            while queue and len(running) < at_once:
                index, stage = queue.pop(0)
                running[index] = _Command(stage, folder, lock)
            time.sleep(_POLL)
            for index, command in list(running.items()):
                # Asked for before the log is read: nothing is written after the process has ended.
                status = command.process.poll()
                display.show(index, command.read_progress())
                if status is None:
                    continue
                del running[index]
                if status != 0:
                    raise StageError(command.failure(status))
                folder.write_state(command.stage.name, {"command": command.stage.command})
                display.done(index)
    except BaseException:
        _stop(running.values())
        raise
    finally:
        display.close()


class _Command:
    """A running fairchem command and what its log says about its progress."""

    def __init__(self, stage: Stage, folder: Folder, lock: int) -> None:
        self.stage = stage
        self.log = folder.logs / f"{stage.name}.log"
        self.step = 0
        self.force_error: float | None = None
        self._unread = ""
        with self.log.open("ab") as log:
            log.write(f"$ {stage.command}\n".encode())
            log.flush()
            self._reader: IO[str] = self.log.open(encoding="utf-8", errors="replace")
            self._reader.seek(0, os.SEEK_END)
            self.process = subprocess.Popen(
                [*fairchem_executable(), *stage.arguments],
                cwd=folder.root,
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                # Ctrl-C goes to the demo alone, which then stops its commands in good order.
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )

    def read_progress(self) -> tuple[int, float | None]:
        """Return the last step and validation force error (eV/Å) that the log tells of."""
        self._unread += self._reader.read()
        *lines, self._unread = self._unread.split("\n")
        for line in lines:
            step = _STEP.search(line)
            if step:
                self.step = round(float(step[1]))
                continue
            error = _FORCE_ERROR.search(line)
            if error:
                self.force_error = float(error[1])
        return self.step, self.force_error

    def failure(self, status: int) -> str:
        """Say what failed, with the end of the log."""
        end = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return "\n".join(
            [
                f"{self.stage.command}\n{how}. The end of its log:",
                "",
                *(f"  | {line}" for line in end),
                "",
                f"All of it: {self.log}",
            ]
        )


def _stop(commands: Any) -> None:
    """End commands: first asking, so that they write a checkpoint."""
    commands = [command for command in commands if command.process.poll() is None]
    for command in commands:
        _signal_group(command.process, signal.SIGTERM)
    deadline = time.monotonic() + _SECONDS_TO_STOP
    for command in commands:
        try:
            command.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(command.process, signal.SIGKILL)
            command.process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _end_with_parent() -> Callable[[], None] | None:
    """What a child does first so that Linux sends it SIGTERM when the demo dies without stopping it."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Display:
    """Progress of the commands of a group: bars on a terminal, now and then a line elsewhere."""

    def __init__(self, titles: Sequence[str], total_steps: int | None) -> None:
        self._titles = titles
        self._total = total_steps
        self._started = time.monotonic()
        self._said = self._started
        self._progress: list[tuple[int, float | None]] = [(0, None)] * len(titles)
        self._bars: list[Any] = []
        if total_steps is not None and sys.stderr.isatty():
            tqdm.monitor_interval = 0  # no thread besides this one, which forks
            self._bars = [
                tqdm(total=total_steps, desc=f"  {title:13}", unit="step", position=position, leave=True)
                for position, title in enumerate(titles)
            ]

    def show(self, index: int, progress: tuple[int, float | None]) -> None:
        """Take note of where command ``index`` is."""
        self._progress[index] = progress
        if self._bars:
            step, error = progress
            self._bars[index].update(step - self._bars[index].n)
            if error is not None:
                self._bars[index].set_postfix_str(f"val force MAE {1000 * error:.0f} meV/Å", refresh=False)
        elif self._total is not None and time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            parts = []
            for title, (step, error) in zip(self._titles, self._progress, strict=True):
                said = "" if error is None else f", val force MAE {1000 * error:.0f} meV/Å"
                parts.append(f"{title} {step}/{self._total}{said}")
            print(f"  {self._said - self._started:4.0f} s  steps: " + "; ".join(parts), flush=True)

    def done(self, index: int) -> None:
        """Show command ``index`` as finished."""
        if self._bars:
            # The log rounds the number of steps to three digits.
            self._bars[index].update(self._total - self._bars[index].n)
        else:
            seconds = time.monotonic() - self._started
            print(f"  {self._titles[index]}: done after {seconds:.0f} s", flush=True)

    def close(self) -> None:
        """Leave the terminal in order."""
        for bar in self._bars:
            bar.close()
