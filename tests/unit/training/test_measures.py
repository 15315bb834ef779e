"""Metrics as masked sums against fairchem's own functions on the structures that count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch_geometric.data import Batch

from fairchem_dens import keys
from fairchem_dens.training import measures
from fairchem_dens.training.running import on_host

FUNCTIONS = [
    ("energy", "mae"),
    ("energy", "mse"),
    ("energy", "rmse"),
    ("energy", "per_atom_mae"),
    ("energy", "per_atom_mse"),
    ("energy", "energy_within_threshold"),
    ("forces", "mae"),
    ("forces", "mse"),
    ("forces", "rmse"),
    ("forces", "cosine_similarity"),
    ("forces", "magnitude_error"),
    ("forces", "forcesx_mae"),
    ("forces", "forcesy_mse"),
    ("forces", "forcesz_mae"),
    ("misc", "energy_forces_within_threshold"),
]


@pytest.fixture
def trainer(run_settings: dict[str, Any], make_trainer: Callable[..., Any]) -> Any:
    run_settings["evaluation_metrics"]["metrics"] = {}
    for target, function in FUNCTIONS:
        run_settings["evaluation_metrics"]["metrics"].setdefault(target, []).append(function)
    run_settings["logger"] = "none"
    return make_trainer(run_settings)


def predicted(batch: Batch, trainer: Any, scale: float) -> dict[str, torch.Tensor]:
    """Predictions near the labels, as the model gives them: normalised, and two of them nearly right."""
    generator = torch.Generator().manual_seed(3)
    norm = trainer.normalizers
    noise = {
        name: torch.randn(batch[name].shape, generator=generator) * scale for name in ("energy", "forces")
    }
    for structure in (0, 2):
        noise["energy"][structure] = 0.01
        noise["forces"][batch.batch == structure] = 0.02
    return {
        "energy": norm["energy"].norm(batch.energy + noise["energy"]).view(-1, 1),
        "forces": norm["forces"].norm(batch.forces + noise["forces"]),
    }


@pytest.mark.parametrize("free_only", [True, False])
@pytest.mark.parametrize("corrupted", [(), (1, 3), (0, 2, 4), (0, 1, 2, 3, 4)])
def test_equal_fairchems(trainer: Any, structure: Any, corrupted: tuple[int, ...], free_only: bool) -> None:
    """Structure 4 has no free atom."""
    trainer.output_targets["forces"]["eval_on_free_atoms"] = free_only
    num_fixed = [4, 0, 3, 7, 9]
    batch = Batch.from_data_list(
        [structure(seed, natoms=9 + seed % 2, num_fixed=num_fixed[seed]) for seed in range(4)]
        + [structure(4, natoms=9, num_fixed=9)]
    )
    batch[keys.CORRUPTED] = torch.tensor([index in corrupted for index in range(5)])
    out = predicted(batch, trainer, 0.3)
    evaluated = trainer._evaluated(out, batch)
    counted = 0
    for target, function in FUNCTIONS:
        if not free_only and (function == "energy_forces_within_threshold" or "per_atom" in function):
            continue  # fairchem asserts that there are free atoms only, or divides by their number, 0
        assert measures.is_known(target, function, trainer.output_targets)
        ours = measures.measure(target, function, evaluated)
        theirs = trainer._measure_by_fairchem(target, function, out, batch, evaluated.structures)
        (total, numel), (expected, count) = on_host({"ours": ours, "theirs": theirs}).values()
        assert numel == count, function
        assert total == pytest.approx(expected, rel=1e-6), function
        counted += count > 0
    assert (counted > 0) == (len(corrupted) < 5)
    if not corrupted and free_only:
        within = on_host({"": measures.measure("misc", "energy_forces_within_threshold", evaluated)})[""]
        assert within == (2.0, 4.0)


def test_names_are_fairchems(trainer: Any, structure: Any) -> None:
    batch = Batch.from_data_list([structure(seed) for seed in range(5)])
    out = predicted(batch, trainer, 0.3)
    metrics = trainer._compute_metrics(out, batch, trainer.evaluator, {})
    theirs = super(type(trainer).__mro__[1], trainer)._compute_metrics(out, batch, trainer.evaluator, {})
    assert list(metrics) == list(theirs)
    for name, value in theirs.items():
        assert metrics[name]["metric"] == pytest.approx(value["metric"], rel=1e-6), name


def test_a_metric_that_only_fairchem_knows(run_settings, make_trainer, structure, monkeypatch) -> None:
    """A function that somebody added to fairchem's module, by the way of before."""
    from fairchem.core.modules import evaluator as module

    @module.metrics_dict
    def largest_error(prediction: Any, target: Any, key: Any = None) -> torch.Tensor:
        return (prediction[key] - target[key]).abs().max().reshape(1)

    monkeypatch.setattr(module, "largest_error", largest_error, raising=False)
    run_settings["evaluation_metrics"]["metrics"] = {"forces": ["mae", "largest_error"]}
    trainer = make_trainer(run_settings)
    assert not measures.is_known("forces", "largest_error", trainer.output_targets)
    batch = Batch.from_data_list([structure(seed) for seed in range(5)])
    out = predicted(batch, trainer, 0.3)
    batch[keys.CORRUPTED] = torch.tensor([False, True, False, True, True])
    free = (batch.fixed == 0) & ~batch[keys.CORRUPTED][batch.batch]
    expected = (trainer.normalizers["forces"](out["forces"]) - batch.forces).abs()[free].max().item()
    trainer.corruption = None  # nothing about noise in these predictions
    metrics = trainer._compute_metrics(out, batch, trainer.evaluator, {})
    assert metrics["forces_largest_error"]["metric"] == pytest.approx(expected, rel=1e-6)
    batch[keys.CORRUPTED][:] = True
    assert trainer._compute_metrics(out, batch, trainer.evaluator, {}) == {}
