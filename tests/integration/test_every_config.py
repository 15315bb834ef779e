"""Every shipped run trains two steps as it is written, but smaller, on data of its kind below one folder."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase
import ase.db
import lmdb
import numpy as np
import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from fairchem.core.common.utils import load_config
from torch_geometric.data import Data

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption, batch_is_corrupted, corrupt
from fairchem_dens.shipped import configs_folder, run_names

Structure = Callable[..., Data]
COEFFICIENTS = {1: -3.4, 8: -7.2, 29: -4.1, 46: -5.6}
"""eV by atomic number, of all elements that the structures have."""
NUM_TRAIN, NUM_VAL, BATCH = 4, 2, 2

SMALLER: dict[str, dict[str, Any]] = {
    "EquiformerV2DeNS": {
        "max_radius": 6.0,
        "max_neighbors": 8,
        "num_layers": 1,
        "lmax_list": [2],
        "mmax_list": [1],
        "grid_resolution": 6,
        "sphere_channels": 8,
        "edge_channels": 8,
        "num_heads": 2,
        "attn_hidden_channels": 8,
        "attn_alpha_channels": 4,
        "attn_value_channels": 4,
        "ffn_hidden_channels": 8,
    },
    "ESCNDeNS": {
        "cutoff": 6.0,
        "max_neighbors": 8,
        "num_layers": 1,
        "lmax_list": [2],
        "mmax_list": [1],
        "sphere_channels": 8,
        "hidden_channels": 8,
        "edge_channels": 8,
        "num_sphere_samples": 16,
        "distance_resolution": 0.5,
    },
    "EquiformerDeNS": {"num_layers": 1, "num_heads": 2, "number_of_basis": 4, "fc_neurons": [8, 8]},
}


def smaller(model: dict[str, Any]) -> dict[str, Any]:
    """The same model with fewer of everything; irreps keep their degrees."""
    sizes = SMALLER[model["name"].rpartition(".")[2]]
    assert set(sizes) <= set(model), "sizes that the YAML does not set"
    irreps = {
        key: re.sub(r"\d+(?=x)", lambda count: str(max(1, int(count[0]) // 16)), value)
        for key, value in model.items()
        if key.startswith("irreps_") and key != "irreps_in" and value is not None  # that is one per element
    }
    return {**model, **irreps, **sizes}


def write_lmdb(folder: Path, structures: list[Data]) -> None:
    folder.mkdir(parents=True)
    env = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, map_size=2**24, lock=False)
    with env.begin(write=True) as transaction:
        for index, data in enumerate(structures):
            transaction.put(str(index).encode(), pickle.dumps(data, protocol=-1))
    env.close()
    np.savez(folder / "metadata.npz", natoms=np.array([int(data.natoms) for data in structures]))


def with_old_names(data: Data) -> Data:
    data = data.clone()
    data.y, data.force = data.energy, data.forces
    del data.energy, data.forces
    return data


def with_total_energy(data: Data) -> Data:
    data = with_old_names(data)
    data.y += sum(COEFFICIENTS[number] for number in data.atomic_numbers.tolist())
    data.oc22 = 1
    return data


def molecule(data: Data) -> Data:
    """As `fairchem-dens data md17` writes them: no cell, no constraints; kcal/mol, kcal/mol/Å."""
    fields = {key: data[key] for key in ("pos", "atomic_numbers", "natoms", "sid", "fid", "forces", "energy")}
    zeros = torch.zeros(data.num_nodes, dtype=torch.long)
    return Data(**fields, fixed=zeros, tags=zeros.clone(), pbc=torch.zeros(1, 3, dtype=torch.bool))


def write_ase(folder: Path, structures: list[Data], suffix: str = "db") -> None:
    folder.mkdir(parents=True)
    with ase.db.connect(str(folder / f"data.{suffix}")) as database:
        for data in structures:
            atoms = ase.Atoms(
                data.atomic_numbers.numpy(), data.pos.numpy(), cell=data.cell[0].numpy(), pbc=True
            )
            energy = data.energy + sum(COEFFICIENTS[number] for number in data.atomic_numbers.tolist())
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=data.forces.numpy())
            database.write(atoms)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory: pytest.TempPathFactory, structure: Structure) -> Path:
    """What FAIRCHEM_DENS_DATA names: each data set where the shipped paths have it."""
    root = tmp_path_factory.mktemp("data")
    train = [structure(seed, natoms=10 + seed % 3) for seed in range(NUM_TRAIN)]
    val = [structure(100 + seed, natoms=10) for seed in range(NUM_VAL)]
    for structures, folder, old in (
        (train, "oc20/s2ef/train/2M", with_old_names),
        (train, "oc20/s2ef/train/all_md", with_old_names),
        (val, "oc20/s2ef/val/id_30k", with_old_names),
        (train, "oc22/s2ef/train", with_total_energy),
        (val, "oc22/s2ef/val_id_ood_30k", with_total_energy),
        (train, "md17/aspirin/train", molecule),
        (val, "md17/aspirin/val", molecule),
        (val, "md17/aspirin/test", molecule),
        (train, "demo/train", Data.clone),
        (val, "demo/val", Data.clone),
    ):
        write_lmdb(root / folder, [old(data) for data in structures])
    logs = [
        f"/somewhere/{kind}/random{data.sid}.traj,0,9\n"
        for kind, data in zip(["md", *["relaxations"] * 9], train, strict=False)
    ]
    (root / "oc20/s2ef/train/all_md/data_log.0000.txt").write_text("".join(logs))
    coefficients = np.zeros(100)
    coefficients[list(COEFFICIENTS)] = list(COEFFICIENTS.values())
    np.savez(root / "oc22/oc22_linfit_coeffs.npz", coeff=coefficients)
    for name in ("energy", "forces"):
        np.savez(root / f"md17/aspirin/{name}_normalizer.npz", mean=0.0, rmsd=1.0)
    for molecule_name in {
        name.split("/")[1].split(".")[0].split("_")[0] for name in run_names() if "md17/" in name
    }:
        if molecule_name != "aspirin":
            (root / "md17" / molecule_name).symlink_to(root / "md17/aspirin")
    write_ase(root / "mptrj/train", train)
    write_ase(root / "mptrj/val", val)
    return root


def load(name: str, data_folder: Path) -> dict[str, Any]:
    settings = load_config(str(configs_folder() / name))[0]
    settings["logger"] = "none"
    settings["model"] = smaller(settings["model"])
    settings["optim"] |= {
        "batch_size": BATCH, "eval_batch_size": BATCH, "num_workers": 0, "max_epochs": 1, "eval_every": 100,
    }  # fmt: skip
    if name.startswith("demo/"):  # the demo adds its paths itself
        settings["dataset"]["train"]["src"] = str(data_folder / "demo/train")
        settings["dataset"]["val"] = {"src": str(data_folder / "demo/val")}
    return settings


def seed_for(corruption: Corruption | None, structures: list[Data]) -> int:
    """A seed for which some of the steps, or of the structures, are corrupted and others are not."""
    if corruption is None:
        return 0
    for seed in range(1000):
        if corruption.switch == "batch":
            on = [batch_is_corrupted(corruption, seed=seed, step=step) for step in (1, 2)]
        else:
            on = [bool(corrupt(data, corruption, seed=seed, epoch=0).corrupted) for data in structures]
        if any(on) and not all(on):
            return seed
    raise AssertionError("no such seed")


@pytest.mark.parametrize("name", run_names())
def test_two_steps(
    name: str,
    data_folder: Path,
    structure: Structure,
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FAIRCHEM_DENS_DATA", str(data_folder))
    settings = load(name, data_folder)
    written = settings["dataset"]["train"].get("transforms", {}).get("dens")
    corruption = (
        None if written is None else Corruption.from_config(written, where="dataset.train.transforms.dens")
    )
    structures = [structure(seed, natoms=10 + seed % 3) for seed in range(NUM_TRAIN)]
    if name.startswith("md17/"):
        structures = [molecule(data) for data in structures]
    trainer = make_trainer(settings, seed=seed_for(corruption, structures))
    assert trainer.corruption == corruption
    assert (trainer.noise_loss is not None) is (corruption is not None)

    losses, corrupted = [], []
    compute_loss = trainer._compute_loss

    def watch(out: Any, batch: Any) -> torch.Tensor:
        loss = compute_loss(out, batch)
        if not trainer.model.training:
            assert keys.CORRUPTED not in batch
            return loss
        losses.append(loss.item())
        assert (keys.CORRUPTED in batch) is (corruption is not None)
        if corruption is not None:
            corrupted.extend(batch.corrupted.tolist())
            assert (keys.NOISE in out) and torch.isfinite(out[keys.NOISE]).all()
            assert not (batch.md & batch.corrupted).any()
            assert not (batch.noise_mask & (batch.fixed != 0)).any()
            if "all_md" in name:
                assert batch.md.tolist() == [sid == 0 for sid in batch.sid.tolist()]
        return loss

    trainer._compute_loss = watch
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == NUM_TRAIN // BATCH == len(losses) == 2
    assert np.isfinite(losses).all()
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    if corruption is not None:
        assert any(corrupted) and not all(corrupted)
    metrics = trainer.validate(split="val", disable_tqdm=True)
    assert np.isfinite([metrics[metric]["metric"] for metric in ("energy_mae", "forces_mae")]).all()


def test_mptrj_as_it_is_published(
    structure: Structure, make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In ``aselmdb`` files, which ASE reads with a package of its own; nothing is fixed in such data."""
    pytest.importorskip("ase_db_backends", reason="needs ase-db-backends, which *.aselmdb is read with")
    for split, count in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        write_ase(tmp_path / "mptrj" / split, [structure(seed) for seed in range(count)], "aselmdb")
    monkeypatch.setenv("FAIRCHEM_DENS_DATA", str(tmp_path))
    settings = load("mptrj/equiformer_v2_dens.yml", tmp_path)
    settings["dataset"]["train"]["transforms"]["dens"]["prob"] = 1.0
    trainer = make_trainer(settings)
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2
    for batch in trainer.train_loader:
        assert (batch.fixed == 0).all()
    # Most energies are the elements', which the fitted references have taken away.
    assert trainer.elementrefs["energy"].element_references[list(COEFFICIENTS)].abs().min() > 0.1


def test_ase_data_that_does_not_say_what_is_fixed(
    data_folder: Path, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIRCHEM_DENS_DATA", str(data_folder))
    settings = load("mptrj/equiformer_v2_dens.yml", data_folder)
    settings["dataset"]["train"]["a2g_args"]["r_fixed"] = False
    with pytest.raises(
        ValueError, match=r"Structure \(sid \d.*\) has no field 'fixed'.*zeros if all atoms are free"
    ):
        make_trainer(settings)


def test_paths_of_every_split(
    data_folder: Path, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the command: validate opens val, predict test, run-relaxations relax."""
    monkeypatch.setenv("FAIRCHEM_DENS_DATA", str(data_folder))
    monkeypatch.setenv("HOME", str(data_folder))
    settings = load("oc20/equiformer_v2_dens_2M_12ep.yml", data_folder)
    settings["dataset"]["test"] = {"src": "~/oc20/s2ef/val/id_30k"}
    settings["task"]["relax_dataset"] = {"src": "${FAIRCHEM_DENS_DATA}/oc20/s2ef/val/id_30k/data.0000.lmdb"}
    trainer = make_trainer(settings)
    sizes = {split: len(getattr(trainer, f"{split}_dataset")) for split in ("train", "val", "test", "relax")}
    assert sizes == {"train": NUM_TRAIN, "val": NUM_VAL, "test": NUM_VAL, "relax": NUM_VAL}
    monkeypatch.delenv("FAIRCHEM_DENS_DATA")
    with pytest.raises(
        ValueError, match=r"'dataset\.relax\.src' is .*environment variable FAIRCHEM_DENS_DATA is not"
    ):
        make_trainer(settings)
