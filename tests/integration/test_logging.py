"""What lands in tensorboard's and wandb's files, from runs that are stopped and resumed."""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Trainer = Callable[..., Any]
OURS = (
    "train/loss",
    "train/forces_mae",
    "train/denoising_pos_mae",
    "train/grad_norm",
    "train/lr",
    "train/noise_std_A",
    "train/noise_prob",
    "train/noise_coefficient",
    "train/throughput_structures_per_s",
    "train/throughput_atoms_per_s",
    "train/memory_host_peak_GiB",
    "train/skipped_steps",
    "val/forces_mae",
)


@pytest.fixture
def settings(run_settings: dict[str, Any]) -> dict[str, Any]:
    run_settings["model"] = {"name": "toy_model.ToyDeNS"}
    run_settings["optim"]["eval_every"] = 6
    return run_settings


def test_tensorboard(settings: dict[str, Any], make_trainer: Trainer) -> None:
    settings["logger"] = "tensorboard"
    trainer = make_trainer(settings, print_every=3)
    trainer.train(disable_eval_tqdm=True)
    # Nothing is closed here: what a run has logged is on disk when it ends.
    events = EventAccumulator(trainer.config["cmd"]["logs_dir"])
    events.Reload()
    for name in OURS:
        expected = [3, 6, 9, 12] if name.startswith("train") else [6, 12]
        assert [event.step for event in events.Scalars(name)] == expected, name
    assert [event.value for event in events.Scalars("train/noise_prob")] == [0.5] * 4


def records(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB, of pieces with a header of 7 bytes."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if left < 7 or kind == 0:
            at += left
            continue
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a piece that is all of a record, or its last
            yield whole
            whole = b""


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows that wandb has written into the files of an offline run."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in folder.glob("*.wandb"):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append(
                    {
                        item.key or "/".join(item.nested_key): json.loads(item.value_json)
                        for item in record.history.item
                    }
                    | {"_step": record.history.step.num}
                )
    return rows


@pytest.mark.slow
def test_wandb_offline_goes_on_under_the_same_id(
    settings: dict[str, Any], make_trainer: Trainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run that is preempted and resumed is two folders of one id, for `wandb sync`."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    settings["logger"] = "wandb"
    first = make_trainer(settings, print_every=1)
    first.model.register_forward_hook(
        lambda *_: os.kill(os.getpid(), signal.SIGUSR2) if first.step == 8 else None
    )
    with pytest.raises(SystemExit):
        first.train(disable_eval_tqdm=True)
    wandb.finish()
    second = make_trainer(settings, print_every=1)
    second.load_checkpoint(second.config["cmd"]["checkpoint_dir"] + "/checkpoint.pt")
    second.train(disable_eval_tqdm=True)
    wandb.finish()
    runs = sorted((Path(second.config["cmd"]["logs_dir"]) / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith("-test") for run in runs)
    logged = [{row["_step"]: row for row in history(run)} for run in runs]
    assert sorted(logged[0]) == list(range(1, 8)) and sorted(logged[1]) == list(range(8, 13))
    for name in OURS:
        assert name in logged[1][12], name
    assert logged[0][7]["train/step"] == 7
