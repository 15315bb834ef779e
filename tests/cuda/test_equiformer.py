"""Equiformer on a GPU: agreement with the CPU, and steps recorded as CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from fairchem_dens import keys
from fairchem_dens.models import EquiformerDeNS
from fairchem_dens.models.equiformer.plain import PlainEquiformer
from model_cases import EQUIFORMER, disturbed
from structures import molecule, partly_corrupted

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = 1e-9
"""In double precision, where only the order of sums differs."""


def make(device: str = "cuda") -> tuple[EquiformerDeNS, Batch]:
    torch.manual_seed(0)
    model = disturbed(EquiformerDeNS(**EQUIFORMER)).double().train()
    batch = partly_corrupted(Batch.from_data_list([molecule(seed, natoms=7) for seed in range(3)]), std=0.05)
    for name in (keys.POS, keys.CONDITION_FORCES, keys.FORCES):
        batch[name] = batch[name].double()
    return model.to(device), batch.to(device)


def learned(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    """Predictions, and gradients of a loss on all of them."""
    outputs = model(batch)
    sum(value.square().sum() for value in outputs.values()).backward()
    gradients = {
        name.removeprefix("model."): one.grad
        for name, one in model.named_parameters()
        if one.grad is not None
    }
    return {name: value.detach().cpu() for name, value in (outputs | gradients).items()}


@pytest.mark.parametrize("reference", ["CPU", "plain"])
def test_predictions_and_second_derivatives(reference):
    model, batch = make()
    found = learned(model, batch)
    there, same = make("cpu" if reference == "CPU" else "cuda")
    expected = learned(PlainEquiformer(there).train() if reference == "plain" else there, same)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


def test_the_same_twice_to_the_last_bit():
    """No sum is left to atomics but that of the energy, over the atoms of a molecule."""
    model, batch = make()
    model.requires_grad_(False)
    first, second = (model.eval()(batch)["forces"] for _ in range(2))
    assert torch.equal(first, second)


def test_a_step_does_not_wait_for_the_device():
    model, batch = make()
    batch[keys.LARGEST] = 7
    learned(model, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = model(batch)
        sum(value.square().sum() for value in outputs.values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def settings(run_settings: dict[str, Any], tmp_path: Any, write_lmdb: Any) -> dict[str, Any]:
    """Molecules of one size, in batches of four and a last one of two, as on MD17."""
    settings = run_settings
    settings["model"] = {"name": "equiformer_dens", **copy.deepcopy(EQUIFORMER)}
    for split, seeds in {"train": range(14), "val": range(100, 105), "test": range(200, 205)}.items():
        structures = [molecule(seed, natoms=7) for seed in seeds]
        settings["dataset"][split]["src"] = str(write_lmdb(tmp_path / split, structures))
    settings["dataset"]["train"]["transforms"] = {
        "normalizer": {"energy": {"mean": 20.0, "rmsd": 10.0}, "forces": {"mean": 0.0, "rmsd": 10.0}},
        "dens": {"prob": 0.5, "std": 0.05, "corrupt_ratio": 0.5, "switch": "structure"},
    }
    settings["loss_functions"] = [
        {"energy": {"fn": "mae", "coefficient": 1}},
        {"forces": {"fn": "l2mae", "coefficient": 10}},
        {"noise": {"fn": "l2mae", "coefficient": 1, "reduction": "separate", "decay": "linear"}},
    ]
    settings["optim"].update(batch_size=4, lr_initial=1e-3, max_epochs=6, clip_grad_norm=5)
    return settings


def test_a_run_of_recorded_steps_is_the_ordinary_run(settings, make_trainer):
    runs = []
    for recorded in (False, True):
        settings["optim"]["cuda_graph"] = recorded
        trainer, losses = make_trainer(settings, cpu=False), []
        backward = trainer._backward

        def watched(loss, losses=losses, backward=backward):
            losses.append(float(loss))
            backward(loss)

        trainer._backward = watched
        trainer.train(disable_eval_tqdm=True)
        metrics = trainer.validate(split="val", disable_tqdm=True)
        runs.append((torch.tensor(losses), metrics["forces_mae"]["metric"], trainer))
    (losses, mae, _), (found, found_mae, trainer) = runs
    assert trainer._graphed._recorded.num_records == 2
    torch.testing.assert_close(found, losses, rtol=1e-3, atol=1e-3)
    assert found_mae == pytest.approx(mae, rel=1e-2)

    resumed = make_trainer(settings, cpu=False)
    resumed.load_checkpoint(f"{trainer.config['cmd']['checkpoint_dir']}/checkpoint.pt")
    assert resumed.step == trainer.step == 24
    resumed.config["optim"]["max_epochs"] = 8
    resumed.train(disable_eval_tqdm=True)
    assert resumed.step == 32
