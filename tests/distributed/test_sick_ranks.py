"""A step that is sick on one rank is skipped by both, and what they print is that of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from two_ranks import run_two_ranks

RANK = '''
"""One rank: trains as the settings say, sick in some steps on rank 1, and writes what it had printed."""
import json
import logging
import sys

import torch
from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports

settings_file, folder = sys.argv[1:]
logging.basicConfig(level=logging.WARNING, stream=sys.stdout)
distutils.setup({"submit": False, "summit": False, "world_size": 2, "distributed_backend": "gloo"})
rank = distutils.get_rank()
setup_imports()
settings = json.load(open(settings_file))
trainer = registry.get_trainer_class(settings.pop("trainer"))(
    optimizer=settings.pop("optim"), identifier="sick", timestamp_id="sick", run_dir=folder, local_rank=rank,
    seed=0, cpu=True, print_every=2, **settings,
)
printed = []
end_step = trainer._end_step

def look():
    end_step()
    printed.append({name: value["metric"] for name, value in trainer.metrics.items()})

def spoil(module, inputs, outputs):
    if rank == 1 and trainer.model.training and trainer.step in (3, 5):
        for name in ("forces", "noise"):
            outputs[name] = outputs[name].index_fill(0, torch.tensor([8]), float("nan"))

trainer._end_step = look
trainer.model.register_forward_hook(spoil)
trainer.train(disable_eval_tqdm=True)
metrics = trainer.validate("val", disable_tqdm=True)
torch.save(
    {
        "printed": printed,
        "weights": [parameter.detach() for parameter in trainer.model.parameters()],
        "bad": trainer.bad_steps.total,
        "updates": [int(state["step"]) for state in trainer.optimizer.state.values()],
        "val": {name: value["metric"] for name, value in metrics.items()},
    },
    f"{folder}/{rank}.pt",
)
distutils.cleanup()
'''


def settings_of(run_settings: dict[str, Any]) -> dict[str, Any]:
    run_settings["model"] = {"name": "toy_model.ToyDeNS"}
    run_settings["logger"] = "none"
    run_settings["evaluation_metrics"]["metrics"]["misc"] = ["energy_forces_within_threshold"]
    run_settings["optim"]["batch_size"] = 2
    return run_settings


@pytest.fixture
def two_ranks(run_settings: dict[str, Any], tmp_path: Path) -> tuple[list[dict[str, Any]], str]:
    """What both ranks had in the end, and what rank 0 said."""
    said = run_two_ranks(tmp_path, RANK, settings_of(run_settings), timeout=600)
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)], said[0]


@pytest.mark.slow
def test_two_ranks(
    two_ranks: tuple[list[dict[str, Any]], str],
    run_settings: dict[str, Any],
    make_trainer: Callable[..., Any],
) -> None:
    (one, other), said = two_ranks
    assert one["bad"] == other["bad"] == 2
    assert set(one["updates"]) == set(other["updates"]) == {10}
    assert all(map(torch.equal, one["weights"], other["weights"]))
    assert all(torch.isfinite(weight).all() for weight in one["weights"])
    for step in (3, 5):
        assert f"Step {step} skipped" in said
    # The structures of both ranks, two each, and which of them it was.
    (line_0, line_1) = [line for line in said.splitlines() if line.lstrip().startswith("rank ")][:2]
    assert line_0.count("sid") == 2 and "not finite" not in line_0
    assert line_1.split("all: ")[1].count("sid") == 2 and "predictions not finite: sid" in line_1

    # Printed every other step, on both the same, although rank 0 has fewer elements of some kind.
    assert [bool(numbers) for numbers in one["printed"]] == [False, True] * 6
    for ours, theirs in zip(one["printed"], other["printed"], strict=True):
        assert ours.keys() == theirs.keys()
        for name in set(ours) - {"memory_host_peak_GiB"}:
            if not name.startswith("throughput"):
                assert ours[name] == theirs[name], name

    # One rank with these weights evaluates the same.
    trainer = make_trainer(settings_of(run_settings))
    with torch.no_grad():
        for parameter, weight in zip(trainer.model.parameters(), one["weights"], strict=True):
            parameter.copy_(weight)
    trainer.ema = None
    alone = trainer.validate("val", disable_tqdm=True)
    assert set(alone) == set(one["val"]) == set(other["val"])
    assert one["val"] == other["val"]
