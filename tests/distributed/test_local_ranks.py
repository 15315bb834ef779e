"""`fairchem --num-gpus 2` on this machine: loader workers, balanced batches, and what is refused."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.slow


def test_balanced_batches_with_workers_resume_within_an_epoch(fairchem: Any, run_settings: Any) -> None:
    run_settings["optim"] |= {"batch_size": 2, "load_balancing": "atoms", "max_epochs": 3}
    run_settings["dataset"].pop("test")
    ranks = ("--num-gpus", "2")
    with_workers = ("--optim.local_num_workers=2", *ranks)
    said = fairchem("train", run_settings, *with_workers, name="whole")
    assert "Loaders of each local rank: 2 workers" in said
    whole = fairchem.checkpoint("whole")
    assert whole["step"] == 18

    # Without workers, stopped in the second epoch.
    process = fairchem.start("train", run_settings, *ranks, name="stopped")
    for line in process.stdout:
        if "step: 8.00e+00" in line:
            process.send_signal(signal.SIGTERM)
            break
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert 8 <= fairchem.checkpoint("stopped")["step"] < 12

    fairchem("train", run_settings, *with_workers, name="stopped")
    resumed = fairchem.checkpoint("stopped")
    assert resumed["step"] == 18
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
    for ours, theirs in zip(whole["ema"]["shadow_params"], resumed["ema"]["shadow_params"], strict=True):
        assert torch.equal(ours, theirs)


def test_graph_parallelism_is_refused_before_anything_is_built(fairchem: Any, run_settings: Any) -> None:
    process = fairchem.start("train", run_settings, "--num-gpus", "2", "--gp-gpus", "2")
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "ValueError: --gp-gpus 2: graph parallelism is not supported by DeNSTrainer" in output
    assert "Loading model" not in output and "step:" not in output
