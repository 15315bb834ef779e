"""The fault of fairchem-core 1.10.0's own DeNS trainer: the same batch and predictions, its loss and ours.

In a denoising step it adds the right term and then falls through to a second one: the force coefficient times
the distance to a target that is normalised twice, over fixed atoms too (unless the structure is fully
corrupted).
"""

from __future__ import annotations

import pytest
import torch
from torch_geometric.data import Batch

from fairchem_dens.corruption import Corruption, corrupt
from fairchem_loss import STD, fairchem_loss


@pytest.mark.parametrize("ratio", [None, 0.25, 0.5])
def test_fairchem_adds_a_second_term(run_settings, make_trainer, structure, ratio: float | None) -> None:
    run_settings["dataset"]["train"]["transforms"] = {
        "normalizer": {
            "energy": {"mean": -0.7554450631141663, "rmsd": 2.887317180633545},
            "forces": {"mean": 0.0, "rmsd": 2.887317180633545},
        },
        "dens": {"prob": 1.0, "std": STD, "corrupt_ratio": ratio},
    }
    trainer = make_trainer(run_settings)
    trainer.step = 1
    dens = Corruption(prob=1.0, std=STD, corrupt_ratio=ratio)
    batch = Batch.from_data_list([corrupt(structure(seed), dens, seed=0, epoch=0) for seed in range(4)])
    batch.energy = batch.energy.float()
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(batch.num_nodes, 3, generator=generator, requires_grad=True)
    out = {"energy": torch.randn(4, 1, generator=generator, requires_grad=True), "forces": vectors}
    ours = trainer._compute_loss({**out, "noise": vectors}, batch)

    batch.denoising_pos_forward = True
    if ratio is None:
        # Theirs knows full corruption by the absence of a mask; fixed atoms are then left out of the first
        # term.
        del batch.noise_mask
    theirs = fairchem_loss(trainer, out, batch)

    scale = trainer.normalizers["forces"].rmsd
    mask = batch.corrupted[batch.batch] if ratio is None else batch.noise_mask
    target = torch.where(mask[:, None], batch.noise_vec / STD, batch.forces / scale)
    atoms = batch.fixed == 0 if ratio is None else torch.ones_like(mask)
    second_term = 100 * (vectors - target / scale).norm(dim=-1)[atoms].mean()
    print(
        f"corrupt_ratio {ratio}: fairchem-core 1.10.0 {theirs.item():.1f}, right {ours.item():.1f}, "
        f"ratio {theirs.item() / ours.item():.2f}"
    )
    torch.testing.assert_close(theirs, ours + second_term, rtol=1e-5, atol=0)
    assert theirs > 1.5 * ours
