"""What a GPU changes: devices, reduced precision, the order of sums. `benchmarks/gpu.sh` runs these."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.models import EquiformerV2DeNS

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Sums over edges run in another order, in float32; the largest of some thousand components.
TOLERANCE = 1e-4


@pytest.fixture
def batch(structure: Any) -> Batch:
    return Batch.from_data_list([structure(seed, natoms=12 + seed) for seed in range(3)])


def corrupted(batch: Batch) -> Batch:
    settings = Corruption(prob=1.0, std=0.1, corrupt_ratio=0.5)
    return corrupt(batch, settings, seed=1, epoch=0, selected=True)


def test_noise_is_the_same_on_both_devices(batch: Batch) -> None:
    """A coin per batch falls on the device, where the batch already is."""
    here, there = corrupted(batch), corrupted(batch.clone().to("cuda"))
    for name in keys.DENS_FIELDS:
        assert there[name].is_cuda, name
        assert torch.equal(here[name], there[name].cpu()), name
    # The sum of position and noise may be rounded once more.
    assert torch.allclose(here.pos, there.pos.cpu(), rtol=0, atol=1e-6)


def test_outputs_and_gradients_agree_with_the_cpu(batch: Batch, model_settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = EquiformerV2DeNS(**model_settings).eval()
    noisy = corrupted(batch)
    here = model(noisy)
    sum(value.square().sum() for value in here.values()).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    there = model(noisy.clone().to("cuda"))
    sum(value.square().sum() for value in there.values()).backward()
    for name, value in here.items():
        assert torch.allclose(value, there[name].cpu(), rtol=TOLERANCE, atol=TOLERANCE), name
    for name, parameter in model.named_parameters():
        scale = gradients[name].abs().max().clamp(min=1e-3)
        assert (parameter.grad.cpu() - gradients[name]).abs().max() <= 10 * TOLERANCE * scale, name


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "amp"])
@pytest.mark.parametrize("switch", ["structure", "batch"])
def test_a_run_trains_evaluates_and_goes_on(
    run_settings: dict[str, Any], make_trainer: Any, switch: str, amp: bool
) -> None:
    run_settings["dataset"]["train"]["transforms"]["dens"]["switch"] = switch
    trainer = make_trainer(run_settings, cpu=False, amp=amp)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train(disable_eval_tqdm=True)
    after = list(trainer.model.parameters())
    assert all(parameter.is_cuda and bool(parameter.isfinite().all()) for parameter in after)
    assert any(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    metrics = trainer.validate(split="val", disable_tqdm=True)
    assert math.isfinite(metrics["forces_mae"]["metric"])

    resumed = make_trainer(run_settings, cpu=False, amp=amp)
    resumed.load_checkpoint(f"{trainer.config['cmd']['checkpoint_dir']}/checkpoint.pt")
    assert resumed.step == trainer.step
    for old, new in zip(after, resumed.model.parameters(), strict=True):
        assert torch.equal(old, new)


def test_prediction_agrees_with_the_cpu(
    run_settings: dict[str, Any], make_trainer: Any, batch: Batch
) -> None:
    on_gpu = make_trainer(run_settings, cpu=False)
    on_cpu = make_trainer(run_settings)
    on_cpu.model.load_state_dict(on_gpu.model.state_dict())
    on_gpu.ema = on_cpu.ema = None
    there = on_gpu.predict(batch.clone().to("cuda"), per_image=False, disable_tqdm=True)
    here = on_cpu.predict(batch, per_image=False, disable_tqdm=True)
    for name in ("energy", "forces"):
        assert torch.allclose(here[name], there[name].cpu(), rtol=TOLERANCE, atol=TOLERANCE), name
