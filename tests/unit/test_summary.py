"""What a run says when it starts, and when it warns."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from fairchem_dens.corruption import Corruption
from fairchem_dens.objective import NoiseLoss
from fairchem_dens.summary import Target, describe_run, sample_targets, target_warnings

OC20_ENERGY = {"mean": -0.7554450631141663, "rmsd": 2.887317180633545}
OC20_FORCES = {"mean": 0.0, "rmsd": 2.887317180633545}
OC22_ENERGY = {"mean": 0.0, "rmsd": 25.119809935106424}
OC22_FORCES = {"mean": 0.0, "rmsd": 0.14759646356105804}


def frame(
    energy: float | None, forces: np.ndarray, fixed: list[int] | None = None, numbers: list[int] | None = None
) -> Data:
    count = len(forces)
    data = Data(
        pos=torch.zeros(count, 3),
        atomic_numbers=torch.tensor(numbers or [29] * count),
        fixed=torch.tensor(fixed or [0] * count),
        forces=torch.as_tensor(forces, dtype=torch.float32),
        natoms=count,
    )
    if energy is not None:
        data.energy = energy
    return data


def oc20_like(count: int = 64, *, energy_shift: float = 0.0, unit: float = 1.0, seed: int = 0) -> list[Data]:
    """Energies as OC20's; forces far smaller than their normaliser, with the long tail of early frames."""
    rng = np.random.default_rng(seed)
    return [
        frame(
            unit * (energy_shift + rng.normal(-0.755, 2.887)),
            unit * 0.15 * rng.standard_t(3, size=(40, 3)),
            fixed=[1] * 10 + [0] * 30,
        )
        for _ in range(count)
    ]


def warnings_about(structures: list[Data], energy: dict[str, float], forces: dict[str, float]) -> list[str]:
    seen = sample_targets(structures)
    return target_warnings("energy", seen["energy"], **energy) + target_warnings(
        "forces", seen["forces"], **forces
    )


# ------------------------------------------------------------------ five lines


def test_five_lines_say_what_dens_will_do() -> None:
    corruption = Corruption(prob=0.125, std=0.15, corrupt_ratio=0.25)
    lines = describe_run(corruption, NoiseLoss(coefficient=15), batch_size=4, num_ranks=128)
    assert len(lines) == 5 and all("\n" not in line for line in lines)
    probability, noise, atoms, loss, batch = lines
    assert "p = 0.125" in probability and "each structure" in probability
    assert "σ = 0.15 Å" in noise
    assert "0.25" in atoms and "free ones only" in atoms
    assert "coefficient 15" in loss and "one mean" in loss and "decay" not in loss
    assert "4" in batch and "128" in batch and "512" in batch


def test_five_lines_for_all_that_is_different() -> None:
    corruption = Corruption(prob=0.5, std_low=0.01, std_high=0.3, num_steps=7, all_atoms=True, switch="batch")
    noise_loss = NoiseLoss(coefficient=5, decay="linear", decay_floor=0.2, reduction="separate")
    lines = describe_run(corruption, noise_loss, batch_size=8, num_ranks=1)
    assert len(lines) == 5
    probability, noise, atoms, loss, batch = lines
    assert "p = 0.5" in probability and "each batch" in probability
    assert all(said in noise for said in ("0.01", "0.3", "7 steps"))
    assert "all" in atoms and "fixed ones too" in atoms
    assert "coefficient 5" in loss and "linearly" in loss and "0.2" in loss and "separate" in loss
    assert batch.endswith("= 8")


def test_one_line_where_dens_is_off() -> None:
    (line,) = describe_run(None, None, batch_size=4, num_ranks=2)
    assert "DeNS is off" in line and "= 8" in line


# ------------------------------------------------------------------ the targets


def test_what_is_seen_of_the_targets() -> None:
    first = frame(1.0, np.array([[3.0, 0.0, 0.0], [50.0, 50.0, 50.0]]), fixed=[0, 1])
    second = frame(3.0, np.array([[0.0, -3.0, 0.0]]))
    seen = sample_targets([first, second])
    assert seen["energy"] == Target(count=2, mean=2.0, rmsd=1.0)
    # Fixed atoms do not count; the mean square of (3, 0, 0, 0, -3, 0) is 3.
    assert seen["forces"].count == 2
    assert seen["forces"].mean == pytest.approx(0.0)
    assert seen["forces"].rmsd == pytest.approx(3**0.5)
    assert sample_targets([first, second], force_mean=1.0)["forces"].rmsd == pytest.approx(2.0)


def test_energies_are_measured_from_element_references() -> None:
    references = torch.zeros(90)
    references[29], references[8] = -100.0, -1.0
    frames = [
        frame(-298.0, np.zeros((4, 3)), numbers=[29, 29, 29, 8]),
        frame(-104.0, np.zeros((2, 3)), numbers=[29, 8]),
    ]
    seen = sample_targets(frames, references)
    assert seen["energy"].mean == pytest.approx(0.0) and seen["energy"].rmsd == pytest.approx(3.0)


@pytest.mark.parametrize(
    "energy", [1.5, torch.tensor(1.5), torch.tensor([1.5]), torch.tensor([[1.5]]), np.float64(1.5)]
)
def test_every_way_to_write_an_energy(energy: Any) -> None:
    data = frame(None, np.ones((1, 3)))
    data.energy = energy
    assert sample_targets([data])["energy"] == Target(count=1, mean=1.5, rmsd=0.0)


def test_targets_that_are_not_there() -> None:
    data = frame(None, np.ones((2, 3)))
    assert set(sample_targets([data])) == {"forces"}
    del data["forces"]
    data.energy = 1.0
    assert set(sample_targets([data])) == {"energy"}
    assert sample_targets([]) == {}
    # Nothing free, nothing to measure.
    assert set(sample_targets([frame(1.0, np.ones((2, 3)), fixed=[1, 1])])) == {"energy"}


@pytest.mark.parametrize("seed", range(5))
def test_silent_on_oc20(seed: int) -> None:
    assert warnings_about(oc20_like(seed=seed), OC20_ENERGY, OC20_FORCES) == []


def test_silent_on_oc22() -> None:
    rng = np.random.default_rng(0)
    frames = [frame(rng.normal(0, 25), rng.normal(scale=0.3, size=(30, 3))) for _ in range(64)]
    assert warnings_about(frames, OC22_ENERGY, OC22_FORCES) == []


def test_total_energies_instead_of_adsorption_energies() -> None:
    (warning,) = warnings_about(oc20_like(energy_shift=-400.0), OC20_ENERGY, OC20_FORCES)
    assert "dataset.train.transforms.normalizer.energy" in warning and "64" in warning
    assert "-40" in warning and "-0.7554" in warning and "total energies" in warning


def test_other_units() -> None:
    """kcal/mol where eV is expected: 23 times the numbers."""
    warnings = warnings_about(oc20_like(unit=23.06), OC20_ENERGY, {"mean": 0.0, "rmsd": 0.05})
    assert len(warnings) == 2
    assert "normalizer.energy" in warnings[0] and "59.4" in warnings[0] and "2.887" in warnings[0]
    assert "normalizer.forces" in warnings[1] and "0.05" in warnings[1]


def test_the_normaliser_of_another_data_set() -> None:
    assert any("normalizer.energy" in said for said in warnings_about(oc20_like(), OC22_ENERGY, OC20_FORCES))
    small = [frame(float(i % 2) * 1e-3, np.full((4, 3), 1e-4)) for i in range(16)]
    said = warnings_about(small, {"mean": 0.0, "rmsd": 1.0}, {"mean": 0.0, "rmsd": 1.0})
    assert len(said) == 2 and "normalizer.energy" in said[0] and "normalizer.forces" in said[1]


def test_a_handful_of_frames_says_little_about_a_spread() -> None:
    assert target_warnings("energy", Target(count=3, mean=0.0, rmsd=1e-3), mean=0.0, rmsd=2.9) == []
    assert target_warnings("forces", Target(count=3, mean=0.0, rmsd=1e-3), mean=0.0, rmsd=2.9) == []
    assert target_warnings("forces", Target(count=64, mean=0.0, rmsd=0.0), mean=0.0, rmsd=2.9) == []


# ------------------------------------------------------------------ in a run


def test_a_run_begins_with_the_five_lines(
    run_settings: dict[str, Any], make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        make_trainer(run_settings)
    expected = describe_run(
        Corruption(prob=0.5, std=0.1, corrupt_ratio=0.5), NoiseLoss(coefficient=10), batch_size=4, num_ranks=1
    )
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    at = said.index(expected[0])
    assert said[at : at + 5] == expected
    assert not [
        record
        for record in caplog.records
        if "normalizer" in record.getMessage() and record.levelno > logging.INFO
    ]


def test_a_run_warns_of_a_normaliser_that_is_far_off(
    run_settings: dict[str, Any], make_trainer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    run_settings["dataset"]["train"]["transforms"]["normalizer"] = {
        "energy": {"mean": -400.0, "rmsd": 1.0},
        "forces": {"mean": 0.0, "rmsd": 1e-3},
    }
    with caplog.at_level(logging.WARNING):
        make_trainer(run_settings)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("'dataset.train.transforms.normalizer.energy' says -400" in message for message in said) == 1
    assert sum("'dataset.train.transforms.normalizer.forces' says 0.001" in message for message in said) == 1


def test_a_run_is_silent_where_references_explain_the_energies(
    run_settings: dict[str, Any],
    make_trainer: Callable[..., Any],
    structure: Callable[..., Data],
    write_lmdb: Callable[..., Any],
    tmp_path: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Total energies are far from any normaliser until the linear reference is taken off."""
    references = np.zeros(100)
    references[[1, 8, 29, 46]] = [-3.0, -430.0, -1500.0, -2200.0]
    np.savez(tmp_path / "references.npz", coeff=references)
    structures = [structure(seed) for seed in range(16)]
    for data in structures:
        data.energy += references[data.atomic_numbers.numpy()].sum()
    train = run_settings["dataset"]["train"]
    train["src"] = str(write_lmdb(tmp_path / "train", structures))
    with caplog.at_level(logging.WARNING):
        make_trainer(run_settings)
    assert any("total energies" in record.getMessage() for record in caplog.records)
    caplog.clear()
    train["transforms"]["element_references"] = {"energy": {"file": str(tmp_path / "references.npz")}}
    with caplog.at_level(logging.WARNING):
        make_trainer(run_settings)
    assert not any("normalizer.energy" in record.getMessage() for record in caplog.records)
