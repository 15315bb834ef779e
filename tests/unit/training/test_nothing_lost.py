"""Whatever ends a run, its last complete step is in a file; where there is no room, the old file stays."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fairchem_dens import checkpoints
from fairchem_dens.errors import CheckpointNotWritten

Trainer = Callable[..., Any]


def saved(trainer: Any) -> dict[str, Any]:
    return torch.load(Path(trainer.config["cmd"]["checkpoint_dir"]) / "checkpoint.pt", weights_only=True)


def assert_goes_on(settings: dict[str, Any], make_trainer: Trainer, stopped: Any) -> None:
    """A run from the file of the stopped one ends as one that was never stopped, bit for bit."""
    whole, resumed = (make_trainer(settings, timestamp_id=name) for name in ("whole", "resumed"))
    resumed.load_checkpoint(stopped.config["cmd"]["checkpoint_dir"] + "/checkpoint.pt")
    for trainer in (whole, resumed):
        trainer.train(disable_eval_tqdm=True)
    one, other = saved(whole), saved(resumed)
    assert one["step"] == other["step"] == 12
    assert all(map(torch.equal, one["state_dict"].values(), other["state_dict"].values()))
    assert all(map(torch.equal, one["ema"]["shadow_params"], other["ema"]["shadow_params"]))
    assert one["best_val_metric"] == other["best_val_metric"]


class Crash(Exception):  # noqa: N818
    """Something that nobody expects."""


def crash(*_args: Any, **_kwargs: Any) -> None:
    raise Crash


def crash_in_the_model(trainer: Any) -> None:
    trainer.model.register_forward_hook(lambda *_: crash() if trainer.step == 6 else None)


def crash_in_an_evaluation(trainer: Any) -> None:
    trainer.model.register_forward_hook(lambda *_: None if trainer.model.training else crash())


def crash_at_the_schedule(trainer: Any) -> None:
    step = trainer.scheduler.step
    trainer.scheduler.step = lambda *args: crash() if trainer.step == 5 else step(*args)


def interrupt_from_the_keyboard(trainer: Any) -> None:
    def interrupt(*_: Any) -> None:
        if trainer.step == 6:
            raise KeyboardInterrupt

    trainer.model.register_forward_hook(interrupt)


@pytest.mark.parametrize(
    ("what", "error", "step"),
    [
        (crash_in_the_model, Crash, 5),
        (crash_in_an_evaluation, Crash, 5),
        (crash_at_the_schedule, Crash, 5),
        (interrupt_from_the_keyboard, KeyboardInterrupt, 5),
    ],
)
def test_an_error_costs_no_complete_step(
    settings: dict[str, Any], make_trainer: Trainer, what: Any, error: type[BaseException], step: int
) -> None:
    """The regular checkpoints are of steps 3, 6, ...; an evaluation is after step 5."""
    settings["optim"] |= {"checkpoint_every": 3, "eval_every": 5}
    trainer = make_trainer(settings, timestamp_id="stopped")
    what(trainer)
    with pytest.raises(error):
        trainer.train(disable_eval_tqdm=True)
    assert saved(trainer)["step"] == step and not trainer.in_training
    assert_goes_on(settings, make_trainer, trainer)


def test_an_error_in_an_update_leaves_the_file_before(
    settings: dict[str, Any], make_trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings["optim"] |= {"checkpoint_every": 3}
    trainer = make_trainer(settings, timestamp_id="stopped")
    update = trainer.ema.update
    monkeypatch.setattr(trainer.ema, "update", lambda: crash() if trainer.step == 5 else update())
    with pytest.raises(Crash):
        trainer.train(disable_eval_tqdm=True)
    assert saved(trainer)["step"] == 3
    assert_goes_on(settings, make_trainer, trainer)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("place", ["forward", "update"])
def test_signals_without_slurm(
    settings: dict[str, Any], make_trainer: Trainer, number: int, place: str
) -> None:
    trainer = make_trainer(settings, timestamp_id="stopped")

    def send(*_: Any) -> None:
        if trainer.step == 5:
            os.kill(os.getpid(), number)

    if place == "forward":
        trainer.model.register_forward_hook(send)
    else:
        trainer.optimizer.register_step_post_hook(send)  # the moving average is still to be updated
    with pytest.raises(SystemExit) as stopped:
        trainer.train(disable_eval_tqdm=True)
    assert stopped.value.code == 128 + number
    assert saved(trainer)["step"] == (4 if place == "forward" else 5)
    assert_goes_on(settings, make_trainer, trainer)


def test_a_handler_of_a_scheduler_waits_for_the_end_of_an_update(
    settings: dict[str, Any], make_trainer: Trainer
) -> None:
    """As submitit's, which saves through the trainer: in an update there would be nothing to save."""
    trainer = make_trainer(settings)
    steps: list[int] = []

    def preempted(*_: Any) -> None:
        assert trainer.save() is not None
        steps.append(saved(trainer)["step"])

    before = signal.signal(signal.SIGUSR2, preempted)
    try:
        trainer.optimizer.register_step_pre_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGUSR2) if trainer.step in (2, 7) else None
        )
        trainer.train(disable_eval_tqdm=True)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert steps == [2, 7] and trainer.step == 12


# ------------------------------------------------------------------ no room


def write(file: Path, size: int) -> None:
    with checkpoints.replacing(file) as beside:
        torch.save({"state_dict": {"w": torch.ones(size)}, "config": {}}, beside)


def test_a_file_that_may_not_grow_keeps_the_old_one(tmp_path: Path) -> None:
    """A limit on the size of files, as a quota sets one."""
    file = tmp_path / "checkpoint.pt"
    write(file, 10)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointNotWritten, match="could not be written") as failed:
            write(file, 1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert f"'{file}'" in str(failed.value)
    assert "The file that was there before is as it was" in str(failed.value)
    assert checkpoints.read(file)["state_dict"]["w"].shape == (10,)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


FILL = """
import pathlib, sys, torch
from fairchem_dens import checkpoints

file = pathlib.Path(sys.argv[1])
def write(size):
    with checkpoints.replacing(file) as beside:
        torch.save({"state_dict": {"w": torch.ones(size)}, "config": {}}, beside)

write(10)
try:
    write(1_000_000)
except checkpoints.CheckpointNotWritten as error:
    print(error)
assert checkpoints.read(file)["state_dict"]["w"].shape == (10,)
assert [path.name for path in file.parent.iterdir()] == ["checkpoint.pt"]
"""


@pytest.mark.slow
def test_a_full_disk_says_so_and_keeps_the_old_file(tmp_path: Path) -> None:
    """A file system of 1 MiB; needs the right to mount one in a name space of its own."""
    unshare = shutil.which("unshare")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=1m none {disk}"
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount], check=False).returncode:
        pytest.skip("needs unshare and the right to mount a file system")
    file = disk / "checkpoint.pt"
    command = f'{mount} && exec "$@"'
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", command, "sh", sys.executable, "-c", FILL, str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"'{file}' could not be written: the disk is full" in done.stdout


def test_a_run_that_cannot_save_ends_with_the_reason(settings: dict[str, Any], make_trainer: Trainer) -> None:
    """Its folder is gone: as a disk that went away."""
    settings["optim"]["checkpoint_every"] = 3
    trainer = make_trainer(settings)
    folder = Path(trainer.config["cmd"]["checkpoint_dir"])
    trainer.model.register_forward_hook(
        lambda *_: shutil.rmtree(folder) if trainer.step == 3 and folder.is_dir() else None
    )
    with pytest.raises(CheckpointNotWritten, match=r"checkpoint\.pt' could not be written.*none before"):
        trainer.train(disable_eval_tqdm=True)


def test_a_block_that_writes_nothing_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    file.write_text("old")
    with checkpoints.replacing(file):
        pass
    assert file.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(RuntimeError, match="something else"), checkpoints.replacing(file):
        raise RuntimeError("something else")
    assert file.read_text() == "old"
