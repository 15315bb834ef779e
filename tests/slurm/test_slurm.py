"""`fairchem --submit` on a real SLURM: two tasks, two GPUs that are none, ``--cpu``.

All jobs are submitted together, and two run at a time. Those that a test disturbs are held until it begins.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytestmark = pytest.mark.slow

STEPS = 108  # 24 structures, 2 ranks of 2, 18 epochs
SLOW_STEPS = '''
"""Our trainer, with steps that take as long as those of a real model, and use no processor for it."""
import time

from fairchem_dens.trainer import DeNSTrainer


class SlowTrainer(DeNSTrainer):
    def _forward(self, batch):
        time.sleep(0.3 if self.model.training else 2)
        return super()._forward(batch)
'''
SUBMIT = '''
"""Submits each job as its command would, the first by ours, which also shows it."""
import contextlib
import json
import sys

from fairchem.core import _cli
from fairchem_dens.cli.main import main

jobs = json.load(open("jobs.json"))
for name, arguments in jobs.items():
    if name == "whole":
        assert main(["submit", *arguments]) == 0
    else:
        sys.argv = ["fairchem", "--mode", "train", "--submit", *arguments]
        _cli.main()
with open("dry_run.txt", "w") as file, contextlib.redirect_stdout(file):
    assert main(["submit", "--dry-run", *jobs["whole"]]) == 0
'''


@dataclass(frozen=True)
class Job:
    """A submitted job and where it writes."""

    number: str
    folder: Path

    def said(self, task: int = 0, stream: str = "out") -> str:
        """What a task has written so far, in all lives of the job."""
        file = self.folder / "logs" / self.number / f"{self.number}_{task}_log.{stream}"
        return file.read_text() if file.exists() else ""

    def everything(self) -> str:
        return "\n".join(self.said(task, stream)[-5000:] for task in (0, 1) for stream in ("out", "err"))

    def field(self, name: str) -> str:
        """A field of ``scontrol show job``."""
        shown = subprocess.run(
            ["scontrol", "show", "job", self.number], capture_output=True, text=True, check=True
        ).stdout
        found = re.search(rf"\b{name}=(\S*)", shown)
        assert found is not None, shown
        return found[1]

    def wait_for(self, what: Callable[[], Any], seconds: float = 400) -> Any:
        """Wait until something is true, and return it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := what():
                return value
            state = self.field("JobState")
            assert state not in ("FAILED", "CANCELLED", "TIMEOUT"), f"{state}\n{self.everything()}"
            time.sleep(0.1)
        pytest.fail(f"waited in vain\n{self.everything()}")

    def wait(self) -> None:
        """Wait for its end."""
        self.wait_for(lambda: self.field("JobState") == "COMPLETED")

    def release(self) -> None:
        """Let it start, if it was submitted to be held."""
        subprocess.run(["scontrol", "release", self.number], check=True)

    def signal(self) -> None:
        """Send what SLURM sends before it preempts or ends a job, to all of its tasks."""
        subprocess.run(["scancel", "--signal=USR2", self.number], check=True)

    def limit(self, minutes: int) -> None:
        """Change how long it may run, counted from its start."""
        subprocess.run(["scontrol", "update", f"jobid={self.number}", f"timelimit={minutes}"], check=True)

    def minutes(self) -> int:
        """For how many full minutes it has been running."""
        days, hours, minutes = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):\d+", self.field("RunTime")).groups()
        return int(days or 0) * 1440 + int(hours) * 60 + int(minutes)

    def last_step(self) -> int:
        """The last step that it has logged."""
        steps = re.findall(r"step: (\S+)", self.said())
        return int(float(steps[-1])) if steps else 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture
def jobs(slurm: None, run_settings: dict[str, Any], folder: Path) -> dict[str, Job]:
    """All jobs of this file by name, submitted once."""
    if (folder / "jobs.json").exists() and not (folder / "numbers.json").exists():
        pytest.fail("the jobs could not be submitted, see the first test of this file")
    if not (folder / "jobs.json").exists():
        _submit(run_settings, folder)
    numbers = json.loads((folder / "numbers.json").read_text())
    return {name: Job(number, folder) for name, number in numbers.items()}


def _submit(run_settings: dict[str, Any], folder: Path) -> None:
    (folder / "slow_steps.py").write_text(SLOW_STEPS)
    settings = copy.deepcopy(run_settings)
    settings["trainer"] = "slow_steps.SlowTrainer"
    del settings["dataset"]["test"]
    settings["optim"] |= {"batch_size": 2, "max_epochs": 18, "eval_every": 24, "checkpoint_every": 50}
    (folder / "run.yml").write_text("#   batch       2 per GPU × 2 GPUs = 4\n" + yaml.safe_dump(settings))
    (folder / "sweep.yml").write_text(yaml.safe_dump({"optim": {"lr_initial": [0.001, 0.003]}}))
    common = ["--config-yml", "run.yml", "--cpu", "--run-dir", "runs", "--slurm-mem", "2"]
    common += ["--print-every", "1"]
    two, hour, held = ["--num-gpus", "2"], ["--slurm-timeout", "1"], ["--slurm.hold=True"]
    short = ["--optim.max_epochs=1", "--optim.eval_every=12"]
    given: Mapping[str, list[str]] = {
        "whole": [*two, *hour, "--slurm-partition", "main"],
        "preempted": [*two, *hour],
        # No limit for submitit, which so takes every signal for the end of the job's time; an hour for SLURM.
        "limited": [*two, *held, "--slurm-timeout", "0", "--slurm.time=60"],
        "failing": [*two, *hour, "--dataset.train.transforms.dens.prob=2"],
        "starting": [*hour, *held, *short, "--slurm.gpus_per_node=0"],
        "sweep": [*hour, *short, "--sweep-yml", "sweep.yml"],
    }
    arguments = {name: [*common, "--identifier", name, *options] for name, options in given.items()}
    (folder / "jobs.json").write_text(json.dumps(arguments))
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT], cwd=folder, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    (folder / "submission.txt").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    submitted = re.findall(r"Submitted jobs: (.*)", done.stdout + done.stderr)
    # Each call of fairchem's main adds a log handler, so later lines come more than once.
    numbers = list(dict.fromkeys(number for line in submitted for number in line.strip().split(", ")))
    names = [*list(given)[:-1], "sweep 0", "sweep 1"]
    (folder / "numbers.json").write_text(json.dumps(dict(zip(names, numbers, strict=True))))


def run_folder(folder: Path, name: str) -> Path:
    """Where the checkpoints of a run are: a folder called by its start and its identifier."""
    (found,) = (folder / "runs" / "checkpoints").glob(f"20*-{name}")
    return found


def assert_same_run(folder: Path, name: str) -> None:
    """The run ended with everything that the undisturbed one ended with, bit for bit."""
    for file in ("checkpoint.pt", "best_checkpoint.pt"):
        whole, other = (
            torch.load(run_folder(folder, run) / file, weights_only=True) for run in ("whole", name)
        )
        for key, value in whole["state_dict"].items():
            assert torch.equal(value, other["state_dict"][key]), (file, key)
    whole, other = (
        torch.load(run_folder(folder, run) / "checkpoint.pt", weights_only=True) for run in ("whole", name)
    )
    assert whole["step"] == other["step"] == STEPS
    assert whole["best_val_metric"] == other["best_val_metric"]
    for ours, theirs in zip(whole["ema"]["shadow_params"], other["ema"]["shadow_params"], strict=True):
        assert torch.equal(ours, theirs)
    assert not list(run_folder(folder, name).glob(".*")), "something was left half written"


def test_preemption_between_steps(jobs: dict[str, Job], folder: Path) -> None:
    job = jobs["preempted"]
    before = job.wait_for(lambda: (step := job.last_step()) >= 7 and step)
    job.signal()
    job.wait_for(lambda: job.field("Restarts") == "1")
    resumed = job.wait_for(lambda: re.search(r"Resuming '(.*)' after step (\d+)", job.said()))
    assert before <= int(resumed[2]) < STEPS  # not one step was lost, and none but the current one made twice
    assert folder / resumed[1] == run_folder(folder, "preempted") / "checkpoint.pt"
    assert "this job is preempted" in job.said() + job.said(stream="err")
    assert "Not checkpointing nor requeuing since I am a slave" in job.said(1)


def test_preemption_in_an_evaluation(jobs: dict[str, Job]) -> None:
    job = jobs["preempted"]
    job.wait_for(lambda: "Evaluating on val." in job.said())
    evaluated = job.last_step()
    job.signal()
    resumed = job.wait_for(lambda: re.search(rf"Resuming '.*' after step {evaluated}\D", job.said()))
    assert evaluated % 24 == 0
    before = job.said()[: resumed.start()]
    assert before.rindex("Evaluating on val.") > before.rindex("step: ")
    job.wait_for(lambda: "Evaluating on val." in job.said()[resumed.end() :])


def test_time_limit(jobs: dict[str, Job]) -> None:
    job = jobs["limited"]
    job.release()
    job.wait_for(lambda: job.last_step() >= 3)
    job.limit(job.minutes() + 2)  # the signal comes 90 s before the end: in the next minute
    job.wait_for(lambda: job.field("Restarts") == "1")
    job.limit(60)
    said = job.said() + job.said(stream="err")
    assert "this job is timed-out" in said and "2 remaining timeouts" in said
    job.wait_for(lambda: "Resuming" in job.said())


def test_preemption_before_training(jobs: dict[str, Job], folder: Path) -> None:
    """The job of fairchem alone would die, as there is no trainer to save yet."""
    job = jobs["starting"]
    job.release()
    job.wait_for(lambda: "CPU job: rank 0 of 1" in job.said())
    if "step: " not in job.said():
        job.signal()
        job.wait_for(lambda: job.field("Restarts") == "1")
        assert "Nothing has been trained yet" in job.said()
    job.wait()
    checkpoint = run_folder(folder, "starting") / "checkpoint.pt"
    assert torch.load(checkpoint, weights_only=True)["step"] == 12


def test_failing_job_reports_its_error(jobs: dict[str, Job], folder: Path) -> None:
    job = jobs["failing"]
    end = time.monotonic() + 300
    while job.field("JobState") != "FAILED" and time.monotonic() < end:
        time.sleep(0.5)
    assert job.field("JobState") == "FAILED"
    error = "ValueError: 'dataset.train.transforms.dens.prob' must be"
    assert error in job.said(stream="err")
    with (folder / "logs" / job.number / f"{job.number}_0_result.pkl").open("rb") as file:
        outcome, trace = pickle.load(file)
    assert outcome == "error" and error in trace


def test_sweep(jobs: dict[str, Job], folder: Path) -> None:
    for index, rate in enumerate((0.001, 0.003)):
        job = jobs[f"sweep {index}"]
        assert job.number.endswith(f"_{index}")
        job.wait()
        checkpoint = torch.load(run_folder(folder, f"sweep_run{index}") / "checkpoint.pt", weights_only=True)
        assert checkpoint["config"]["optim"]["lr_initial"] == rate
        assert checkpoint["step"] == 12


def test_undisturbed_job_and_where_it_writes(jobs: dict[str, Job], folder: Path) -> None:
    job = jobs["whole"]
    job.wait()
    assert job.field("Restarts") == "0"
    logs = folder / "logs" / job.number
    names = {path.name.removeprefix(f"{job.number}_") for path in logs.iterdir()}
    assert names >= {"submission.sh", "submitted.pkl", "0_log.out", "0_log.err", "1_log.out", "0_result.pkl"}
    assert "effective batch: 2 structures × 2 ranks = 4" in job.said()
    run = run_folder(folder, "whole")
    assert {path.name for path in run.iterdir()} >= {"checkpoint.pt", "best_checkpoint.pt"}
    assert list((folder / "runs" / "logs" / "tensorboard" / run.name).iterdir())
    assert list((folder / "logs" / "exp").glob("*.log"))

    shown = (folder / "dry_run.txt").read_text()
    assert "1 node × 2 processes × 2 structures = 4" in shown
    script = (logs / f"{job.number}_submission.sh").read_text()
    assert script in shown and "#SBATCH --gpus-per-node=2" in script and "#SBATCH --time=60" in script


@pytest.mark.parametrize(("name", "restarts"), [("preempted", "2"), ("limited", "1")])
def test_disturbed_jobs_end_as_the_undisturbed_one(
    jobs: dict[str, Job], folder: Path, name: str, restarts: str
) -> None:
    jobs["whole"].wait()
    jobs[name].wait()
    assert jobs[name].field("Restarts") == restarts
    assert_same_run(folder, name)
