"""A long run of a very small model, watched from outside: nothing grows.

    python -m tests.faults.soak --steps 3000 --out benchmarks/results/soak_cpu.json

The real `fairchem` command trains with DeNS, loader workers, evaluations and checkpoints. Every 25 steps the
operating system is asked for the memory of the process (resident, without what is shared), its open files,
its threads and the processes that it has started. The exit status is 1 if memory grows by more than --limit,
if files, threads or processes become more, or if a process outlives the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fairchem_dens.progress import progress_bar

from .commands import Spawned, all_gone, children
from .machine import environment

EVERY = 25
WARM_UP = 0.2
"""Share of the run before memory has to be flat: caches fill, code is compiled."""
STRUCTURES = 200


@dataclass
class Sample:
    """What the operating system says of a process: memory in MiB, numbers of all else."""

    step: int
    memory: float
    files: int
    threads: int
    children: int


def look_at(pid: int, step: int) -> Sample | None:
    """Return a sample, or None if the process has just ended."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        memory = int(status["RssAnon"].split()[0]) / 1024
        return Sample(step, round(memory, 2), files, int(status["Threads"]), len(children(pid)))
    except (FileNotFoundError, ProcessLookupError, KeyError):
        return None


def settings_of(run: dict[str, Any], *, steps: int, workers: int) -> dict[str, Any]:
    """Make a run of this many steps of one: one structure a step, evaluations and checkpoints between."""
    run["model"] |= {"lmax_list": [1], "mmax_list": [1], "sphere_channels": 4, "max_neighbors": 6}
    run["optim"] |= {
        "batch_size": 1, "eval_batch_size": 2, "num_workers": workers, "max_epochs": -(-steps // STRUCTURES),
        "eval_every": 150, "checkpoint_every": 40, "lr_initial": 1e-4,
    }  # fmt: skip
    return run


def watch(
    folder: Path, settings: dict[str, Any], steps: int, timeout: float
) -> tuple[list[Sample], list[int]]:
    """Run to the end; returns the samples, and the processes that are left.

    Raises:
        RuntimeError: the run failed.
    """
    yml = folder / "soak.yml"
    yml.write_text(yaml.safe_dump(settings))
    arguments = [
        *("--mode", "train", "--config-yml", str(yml), "--cpu", "--run-dir", str(folder)),
        *("--timestamp-id", "soak", "--print-every", str(EVERY)),
    ]
    samples: list[Sample] = []
    with Spawned() as command, progress_bar(total=steps, desc="steps", unit="step") as bar:
        run = command.start(arguments, folder, folder / "soak.log")
        for watched in command.follow(run, timeout):
            if watched.phase.name != "step" or watched.phase.step % EVERY:
                continue
            sample = look_at(run.pid, watched.phase.step)
            if sample is not None:
                samples.append(sample)
            bar.update(watched.phase.step - bar.n)
        status = command.wait(run, timeout)
        if status:
            raise RuntimeError(f"The run ended with status {status}:\n{run.said()[-4000:]}")
        return samples, all_gone([run.pid], patience=30.0)


def judge(samples: list[Sample], left: list[int], limit: float) -> dict[str, Any]:
    """Return what the samples say, with all that must not be under ``problems``.

    Args:
        samples: in the order of their steps.
        left: processes that outlived the run.
        limit: MiB that memory may grow by in 1000 steps.
    """
    warm = samples[int(len(samples) * WARM_UP) :]
    half = len(warm) // 2
    slope, _ = np.polyfit([sample.step for sample in warm], [sample.memory for sample in warm], 1)
    growth = float(1000 * slope)

    def typical(name: str) -> tuple[float, float]:
        values = [getattr(sample, name) for sample in warm]
        return statistics.median(values[:half]), statistics.median(values[half:])

    problems = [f"memory grows by {growth:.2f} MiB in 1000 steps"] if growth > limit else []
    for name in ("files", "threads", "children"):
        before, after = typical(name)
        if after > before:
            problems.append(f"{name}: {before:g} in the first half, {after:g} in the second")
    if left:
        problems.append(f"{len(left)} processes outlived the run")
    before, after = typical("memory")
    return {
        "memory_mib": {"first_half": before, "second_half": after, "growth_in_1000_steps": round(growth, 3)},
        **{name: dict(zip(("first_half", "second_half"), typical(name), strict=True))
           for name in ("files", "threads", "children")},
        "processes_left": len(left),
        "problems": problems,
    }  # fmt: skip


def main() -> int:
    """Run, print what was found, write the JSON."""
    from tests.conftest import small_data, small_model, small_run

    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=3000, help="at least so many (default: 3000)")
    parser.add_argument("--workers", type=int, default=2, help="loader workers (default: 2)")
    parser.add_argument(
        "--limit", type=float, default=2.0, help="MiB that memory may grow by in 1000 steps (default: 2)"
    )
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = small_run(small_data(folder / "lmdb", train=STRUCTURES), small_model())
        settings = settings_of(run, steps=args.steps, workers=args.workers)
        samples, left = watch(folder, settings, args.steps, timeout=4 * 3600)
    report = {
        "campaign": "soak", **environment(), "workers": args.workers, "steps": samples[-1].step,
        "minutes": round((time.monotonic() - begun) / 60, 1), **judge(samples, left, args.limit),
        "samples": [asdict(sample) for sample in samples],
    }  # fmt: skip
    for key, value in report.items():
        if key not in ("samples", "versions"):
            print(f"{key}: {value}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report) + "\n")
    return 1 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
