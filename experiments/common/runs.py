"""Running fairchem on many settings: several at a time, each in a folder of its own, none twice."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from experiments.common.environment import environment
from experiments.common.trainer import HISTORY_FILE, read_history
from fairchem_dens.data.folder import write_text
from fairchem_dens.data.processes import worker_pool
from fairchem_dens.progress import progress_bar

_RECORD_FILE = "record.json"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        variant: what is varied, by its name in the experiment's ``variants.yml``.
        seed: of weights, batches and noise.
        settings: the whole YAML.
        labels: what else tells this run from others, such as ``{"frames": 120}``.
        after: measures the trained model; called with the checkpoint, the settings, and ``after_with``. Must
            be importable, because it runs in another process.
        after_with: see above; JSON.
    """

    variant: str
    seed: int
    settings: dict[str, Any]
    labels: dict[str, Any] = field(default_factory=dict)
    after: Callable[[Path, dict[str, Any], Any], Any] | None = None
    after_with: Any = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        return "-".join([*map(str, self.labels.values()), self.variant, f"seed{self.seed}"])


def run_all(runs: Sequence[Run], folder: Path, *, jobs: int, cpu: bool) -> list[dict[str, Any]]:
    """Train what has not been trained with the same settings, and return the record of each run, in order.

    A run that was cut off goes on from its last checkpoint.

    Args:
        runs: the trainings; their names differ.
        folder: everything ends up below it.
        jobs: trainings at the same time, of one thread each.
        cpu: whether to leave a GPU alone.

    Raises:
        RuntimeError: a training failed; has the end of its log.
    """
    assert len({run.name for run in runs}) == len(runs)
    records = {run.name: finished(run, folder) for run in runs}
    missing = [run for run in runs if records[run.name] is None]
    bar = progress_bar(total=len(runs), initial=len(runs) - len(missing), desc="  trainings", unit="run")
    with worker_pool(jobs) as pool, bar:
        futures = [pool.submit(execute, run, folder, cpu) for run in missing]
        for future in as_completed(futures):
            record = future.result()
            records[record["name"]] = record
            bar.update()
    return [records[run.name] for run in runs]  # type: ignore[misc]  # none is missing any more


def execute(run: Run, folder: Path, cpu: bool = True) -> dict[str, Any]:
    """Train one model with the function behind the ``fairchem`` command, in this process.

    What it prints goes to ``train.log`` in the folder of the run.

    Raises:
        RuntimeError: it failed; has the end of the log.
    """
    home = folder / "runs" / run.name
    home.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(run.settings, sort_keys=False)
    yml = home / "run.yml"
    if yml.is_file() and yml.read_text(encoding="utf-8") != text:
        for stale in home.rglob("*.*"):
            if stale.name in (HISTORY_FILE, "checkpoint.pt", "best_checkpoint.pt"):
                stale.unlink()
    write_text(yml, text)
    arguments = ["--mode", "train", "--config-yml", str(yml), "--run-dir", str(home)]
    # A fixed name: fairchem finds the checkpoint of a run that was cut off, and resumes it.
    arguments += ["--identifier", run.name, "--timestamp-id", "run", "--seed", str(run.seed)]
    arguments += ["--print-every", "100", *(["--cpu"] if cpu else [])]
    with (home / "train.log").open("ab") as log:
        saved = [os.dup(stream) for stream in (1, 2)]
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            _fairchem(arguments)
        except Exception as error:
            sys.stderr.flush()
            end = (home / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise RuntimeError(f"{run.name} failed: {error}\n" + "\n".join(end)) from error
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, stream)
                os.close(descriptor)
    checkpoints = home / "checkpoints" / "run"
    record = {
        "name": run.name,
        "variant": run.variant,
        **run.labels,
        "seed": run.seed,
        "fingerprint": fingerprint(run),
        "command": shlex.join(["fairchem", *arguments[:2], "--config-yml", "run.yml", *arguments[6:]]),
        "history": [_rounded(line) for line in read_history(checkpoints / HISTORY_FILE)],
        "environment": environment(cpu=cpu),
    }
    if run.after is not None:
        record["after"] = _rounded(run.after(checkpoints / "checkpoint.pt", run.settings, run.after_with))
    write_text(home / _RECORD_FILE, json.dumps(record, indent=1) + "\n")
    return record


def _fairchem(arguments: list[str]) -> None:
    from fairchem.core._cli import main
    from fairchem.core.common.flags import flags

    main(*flags.get_parser().parse_known_args(arguments))


def finished(run: Run, folder: Path) -> dict[str, Any] | None:
    """Return the record of a run that ended with the same settings, else None."""
    file = folder / "runs" / run.name / _RECORD_FILE
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return record if record is not None and record["fingerprint"] == fingerprint(run) else None


def fingerprint(run: Run) -> str:
    """Return what changes if anything changes that decides about the numbers of a run."""
    after = run.after and f"{run.after.__module__}.{run.after.__qualname__}"
    content = json.dumps([run.settings, run.seed, after, run.after_with], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _rounded(value: Any) -> Any:
    """Five digits: results are committed, and no more of them mean anything."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
