"""Loss, gradient and metrics against the authors' code; against the formula where their code cannot go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.data import Batch, Data

from fairchem_dens import keys, objective
from fairchem_dens.corruption import Corruption

CASES = ("partial", "full", "partial_all_atoms", "partial_not_free", "s2ef")


@pytest.fixture
def trainer_of_case(run_settings, make_trainer):
    """A real trainer with the coefficients, normalisers and free-atom rule of a golden case."""

    def make(params: dict[str, Any]) -> Any:
        run_settings["loss_functions"] = [
            {"energy": {"fn": "mae", "coefficient": params["energy_coefficient"]}},
            {"forces": {"fn": "l2mae", "coefficient": params["force_coefficient"]}},
            {"noise": {"fn": "l2mae", "coefficient": params["denoising_pos_coefficient"]}},
        ]
        run_settings["outputs"]["forces"] |= {
            "train_on_free_atoms": params["free_atoms"],
            "eval_on_free_atoms": params["free_atoms"],
        }
        train = run_settings["dataset"]["train"]
        train["transforms"]["normalizer"] = {
            name: {"mean": mean, "rmsd": rmsd} for name, (mean, rmsd) in params["norm"].items()
        }
        train["transforms"]["dens"] = {
            "prob": 0.5,
            "std": params["std"],
            "all_atoms": params["all_atoms"],
        }
        trainer = make_trainer(run_settings)
        trainer.step = 1
        return trainer

    return make


def batch_of_case(case: dict[str, Any]) -> Data:
    batch = Batch(**{name: value.clone() for name, value in case["batch"].items()})
    if keys.NOISE_VEC in batch:
        if keys.NOISE_MASK not in batch:
            batch[keys.NOISE_MASK] = torch.ones(len(batch[keys.POS]), dtype=torch.bool)
        batch[keys.CORRUPTED] = torch.ones(len(batch[keys.NATOMS]), dtype=torch.bool)
    return batch


@pytest.mark.parametrize("name", CASES)
def test_golden_case(golden, trainer_of_case, name: str) -> None:
    case = next(case for case in golden("losses.pt") if case["case"] == name)
    trainer = trainer_of_case(case["params"])
    batch = batch_of_case(case)
    energy = case["pred"]["energy"].clone().requires_grad_()
    # Theirs is one output, the noise where an atom is corrupted and the force elsewhere; given to both heads,
    # each takes its part.
    vectors = case["pred"]["forces"].clone().requires_grad_()
    out = {keys.ENERGY: energy, keys.FORCES: vectors}
    if name != "s2ef":
        out[keys.NOISE] = vectors

    loss = trainer._compute_loss(out, batch)
    loss.backward()
    torch.testing.assert_close(loss.item(), case["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(energy.grad, case["grad"]["energy"], rtol=0, atol=1e-5)
    torch.testing.assert_close(vectors.grad, case["grad"]["forces"], rtol=0, atol=1e-5)

    metrics = trainer._compute_metrics({k: v.detach() for k, v in out.items()}, batch, trainer.evaluator)
    theirs = case["metrics"]
    if name != "s2ef":
        assert set(metrics) == set(theirs)
    for metric, value in theirs.items():
        assert metrics[metric]["metric"] == pytest.approx(value, rel=2e-6), metric


def test_full_corruption_of_all_atoms_follows_the_formula(golden, trainer_of_case) -> None:
    """The authors' code crashes here (a mask of the wrong shape); every atom's target is its noise."""
    case = next(case for case in golden("losses.pt") if case["case"] == "full")
    params = case["params"] | {"all_atoms": True}
    trainer, batch = trainer_of_case(params), batch_of_case(case)
    out = {keys.ENERGY: case["pred"]["energy"], keys.FORCES: case["pred"]["forces"]}
    out[keys.NOISE] = out[keys.FORCES]
    mean, rmsd = params["norm"]["energy"]
    energy_error = (out[keys.ENERGY].view(-1) - (batch[keys.ENERGY] - mean) / rmsd).abs().mean()
    noise_error = (out[keys.NOISE] - batch[keys.NOISE_VEC] / params["std"]).norm(dim=-1).mean()
    expected = params["energy_coefficient"] * energy_error + params["denoising_pos_coefficient"] * noise_error
    torch.testing.assert_close(trainer._compute_loss(out, batch), expected, rtol=1e-6, atol=0)


def test_separate_means_with_decay(run_settings, make_trainer) -> None:
    """The MD17 form: λ_F · mean over uncorrupted + λ_N (1 − epoch/epochs) · mean over corrupted atoms."""
    run_settings["loss_functions"][2]["noise"] |= {"reduction": "separate", "decay": "linear"}
    run_settings["optim"]["max_epochs"] = 4
    trainer = make_trainer(run_settings)
    generator = torch.Generator().manual_seed(0)
    num_atoms = 9
    mask = torch.arange(num_atoms) % 3 == 0
    batch = Batch(
        natoms=torch.tensor([4, 5]),
        batch=torch.tensor([0] * 4 + [1] * 5),
        fixed=torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 0]),
        energy=torch.randn(2, generator=generator),
        forces=torch.randn(num_atoms, 3, generator=generator),
        noise_vec=torch.randn(num_atoms, 3, generator=generator) * 0.1 * mask[:, None],
        noise_mask=mask,
        corrupted=torch.tensor([True, True]),
    )
    out = {
        "energy": torch.randn(2, 1, generator=generator),
        "forces": torch.randn(num_atoms, 3, generator=generator),
        "noise": torch.randn(num_atoms, 3, generator=generator),
    }
    free = batch.fixed == 0
    energy = (out["energy"].view(-1) - (batch.energy - 0.1) / 1.2).abs().mean()
    forces = (out["forces"] - batch.forces / 0.7).norm(dim=-1)[free & ~mask].mean()
    noise = (out["noise"] - batch.noise_vec / 0.1).norm(dim=-1)[free & mask].mean()
    steps = len(trainer.train_loader)
    for step, factor in ((1, 1.0), (steps, 1.0), (steps + 1, 0.75), (3 * steps + 1, 0.25)):
        trainer.step = step
        expected = 2 * energy + 100 * forces + 10 * factor * noise
        torch.testing.assert_close(trainer._compute_loss(out, batch), expected)


@pytest.mark.parametrize("reduction", ["joint", "separate"])
@pytest.mark.parametrize("kind", ["none corrupted", "all corrupted", "all fixed", "no atoms supervised"])
def test_an_empty_subset_is_zero_with_a_zero_gradient(reduction: str, kind: str) -> None:
    corrupted = torch.full((5,), kind == "all corrupted")
    fixed = torch.full((5,), kind in ("all fixed", "no atoms supervised")).long()
    atoms = objective.supervised_atoms(corrupted, fixed, free_atoms_only=True, all_atoms=False)
    forces = torch.rand(5, requires_grad=True)
    noise = torch.rand(5, requires_grad=True)
    loss = objective.force_and_noise_loss(
        forces, noise, atoms, force_coefficient=3.0, noise_coefficient=2.0, reduction=reduction
    )
    loss.backward()
    expected = {"none corrupted": 3 * forces.mean(), "all corrupted": 2 * noise.mean()}
    torch.testing.assert_close(loss.detach(), expected.get(kind, torch.zeros(())).detach())
    for values, mask in ((forces, atoms.forces), (noise, atoms.noise)):
        assert values.grad is not None
        assert torch.isfinite(values.grad).all()
        assert bool((values.grad[~mask] == 0).all())


def test_real_batches_without_a_kind_of_atom(run_settings, make_trainer, structure) -> None:
    """Only corrupted, only ordinary, only fixed atoms: all is finite, metrics are left out and never nan."""
    trainer = make_trainer(run_settings)
    for prob, num_fixed in ((1.0, 4), (0.0, 4), (1.0, 12), (0.0, 12)):
        from fairchem_dens.corruption import corrupt

        dens = Corruption(prob=prob, std=0.1)
        batch = Batch.from_data_list(
            [corrupt(structure(seed, num_fixed=num_fixed), dens, seed=0, epoch=0) for seed in range(3)]
        )
        trainer.step = 1
        trainer.model.train()
        out = trainer._forward(batch)
        loss = trainer._compute_loss(out, batch)
        loss.backward()
        assert torch.isfinite(loss)
        assert all(
            parameter.grad is not None and torch.isfinite(parameter.grad).all()
            for parameter in trainer.model.parameters()
        )
        trainer.model.zero_grad()
        metrics = trainer._compute_metrics(out, batch, trainer.evaluator, {})
        assert all(torch.isfinite(torch.tensor(float(value["metric"]))) for value in metrics.values())
        corrupted = prob == 1.0 and num_fixed < 12
        assert ("denoising_pos_mae" in metrics) == corrupted
        assert ("forces_mae" in metrics) == (not corrupted and num_fixed < 12)
