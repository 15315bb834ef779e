"""What people get wrong: each mistake ends in one sentence that names the thing and says what to do."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption

Settings = dict[str, Any]
Make = Callable[..., Any]
DENS = r"'dataset\.train\.transforms\.dens"


def write(folder: Path, structures: Iterable[Data]) -> str:
    """Without any check, unlike our own writer."""
    folder.mkdir()
    env = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, map_size=2**24, lock=False)
    with env.begin(write=True) as transaction:
        for index, data in enumerate(structures):
            transaction.put(str(index).encode(), pickle.dumps(data, protocol=-1))
    env.close()
    return str(folder)


def run(settings: Settings, make_trainer: Make) -> None:
    make_trainer(settings).train(disable_eval_tqdm=True)


@pytest.fixture
def dens(run_settings: Settings) -> Settings:
    """The transform's settings within those of the run."""
    return run_settings["dataset"]["train"]["transforms"]["dens"]


def test_the_settings_that_are_spoilt_below_are_good(run_settings: Settings, make_trainer: Make) -> None:
    run_settings["optim"]["max_epochs"] = 1
    run(run_settings, make_trainer)


# ------------------------------------------------------------------ structures


def without(key: str) -> Callable[[Data], None]:
    def spoil(data: Data) -> None:
        del data[key]

    return spoil


def not_finite(value: float) -> Callable[[Data], None]:
    def spoil(data: Data) -> None:
        data.forces[3, 1] = value

    return spoil


def emptied(data: Data) -> None:
    for key in (keys.POS, keys.ATOMIC_NUMBERS, keys.FIXED, keys.TAGS, keys.FORCES):
        data[key] = data[key][:0]
    data.natoms = 0


BAD_STRUCTURES = {
    "no forces": (
        without(keys.FORCES),
        r"sid 1007, fid 0, id 0_7\) has no field 'forces'.*Train on data with forces",
    ),
    "nan": (
        not_finite(math.nan),
        r"sid 1007, fid 0, id 0_7\) has forces that are not finite.*Remove the structure",
    ),
    "inf": (
        not_finite(math.inf),
        r"sid 1007, fid 0, id 0_7\) has forces that are not finite.*Remove the structure",
    ),
    "no fixed": (
        without(keys.FIXED),
        r"sid 1007, fid 0, id 0_7\) has no field 'fixed'.*zeros if all atoms are free",
    ),
    "empty": (emptied, r"sid 1007, fid 0, id 0_7\) has no atoms: remove it from the data set"),
}


@pytest.mark.parametrize("switch", ["structure", "batch"])
@pytest.mark.parametrize("bad", BAD_STRUCTURES)
def test_one_bad_structure(
    run_settings: Settings,
    dens: Settings,
    make_trainer: Make,
    structure: Any,
    tmp_path: Path,
    bad: str,
    switch: str,
) -> None:
    spoil, message = BAD_STRUCTURES[bad]
    structures = [structure(1000 + seed) for seed in range(12)]
    spoil(structures[7])
    run_settings["dataset"]["train"]["src"] = write(tmp_path / "train", structures)
    dens["switch"] = switch
    with pytest.raises(ValueError, match=message):
        run(run_settings, make_trainer)


@pytest.mark.parametrize("bad", ["nan", "empty"])
def test_one_bad_structure_that_a_worker_meets(
    run_settings: Settings,
    make_trainer: Make,
    structure: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad: str,
) -> None:
    """Data sets are larger than the sample that is looked at before training."""
    monkeypatch.setattr("fairchem_dens.trainer._NUM_SAMPLED", 1)
    spoil, message = BAD_STRUCTURES[bad]
    structures = [structure(1000 + seed) for seed in range(12)]
    spoil(structures[7])
    run_settings["dataset"]["train"] |= {
        "src": write(tmp_path / "train", structures), "format": "dens_lmdb", "md_logs": "ignore",
        "no_shuffle": True,
    }  # fmt: skip
    run_settings["optim"]["num_workers"] = 1
    trainer = make_trainer(run_settings)
    with pytest.raises(ValueError, match=message):
        trainer.train(disable_eval_tqdm=True)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("number", [90, 118])
def test_atomic_number_beyond_the_embedding(
    run_settings: Settings, make_trainer: Make, structure: Any, tmp_path: Path, split: str, number: int
) -> None:
    structures = [structure(1000 + seed) for seed in range(4)]
    structures[2].atomic_numbers[5] = number
    run_settings["dataset"][split]["src"] = write(tmp_path / split, structures)
    run_settings["optim"]["max_epochs"] = 1
    message = rf"Atomic number {number} .*sid 1002.*ends at 89: raise 'model\.max_num_elements' \(now 90"
    trainer = make_trainer(run_settings)
    use = trainer.train if split == "train" else trainer.validate
    with pytest.raises(ValueError, match=message):
        use()


# ------------------------------------------------------------------ settings of DeNS


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"std": 0}, rf"{DENS}\.std' must be above 0, found 0"),
        ({"std": -0.1}, rf"{DENS}\.std' must be above 0, found -0\.1"),
        ({"std": None}, rf"{DENS}' needs a noise level"),
        ({"std_low": 0.1}, rf"{DENS}\.std' is one fixed noise level"),
        ({"corrupt_ratio": 0}, rf"{DENS}\.corrupt_ratio' must be above 0 and at most 1, found 0"),
        ({"corrupt_ratio": 1.5}, rf"{DENS}\.corrupt_ratio' must be above 0 and at most 1, found 1\.5"),
        ({"prob": 1.1}, rf"{DENS}\.prob' must be from 0 and at most 1, found 1\.1"),
        ({"prob": -1}, rf"{DENS}\.prob' must be from 0 and at most 1, found -1"),
        ({"switch": "epoch"}, rf"{DENS}\.switch' must be 'structure'"),
        ({"corupt_ratio": 0.5}, rf"Unknown setting {DENS}\.corupt_ratio' \(did you mean 'corrupt_ratio'\?\)"),
        ({"sigma": 0.5}, rf"Unknown setting {DENS}\.sigma'"),
    ],
)
def test_settings_of_the_corruption(
    run_settings: Settings, dens: Settings, make_trainer: Make, changes: Settings, message: str
) -> None:
    dens |= changes
    with pytest.raises(ValueError, match=message):
        make_trainer(run_settings)


def test_the_other_name_of_the_transform_is_named(run_settings: Settings, make_trainer: Make) -> None:
    transforms = run_settings["dataset"]["train"]["transforms"]
    transforms["fairchem_dens.transforms.dens"] = transforms.pop("dens") | {"std": 0}
    with pytest.raises(
        ValueError,
        match=r"'dataset\.train\.transforms\.fairchem_dens\.transforms\.dens\.std' must be above 0",
    ):
        make_trainer(run_settings)


def test_both_styles_of_keys(run_settings: Settings, make_trainer: Make) -> None:
    run_settings["optim"] |= {
        "use_denoising_pos": True,
        "denoising_pos_coefficient": 10,
        "denoising_pos_params": {},
    }
    with pytest.raises(
        ValueError,
        match=r"configured twice, by 'optim\.use_denoising_pos'.*'dataset\.train\.transforms\.dens'",
    ):
        make_trainer(run_settings)


def test_dens_without_a_loss_on_noise(run_settings: Settings, make_trainer: Make) -> None:
    run_settings["loss_functions"].pop()
    with pytest.raises(
        ValueError, match=rf"{DENS}' corrupts.*'loss_functions' has no 'noise' entry.*Add '- noise:"
    ):
        make_trainer(run_settings)


def test_a_loss_on_noise_without_dens(run_settings: Settings, make_trainer: Make) -> None:
    del run_settings["dataset"]["train"]["transforms"]["dens"]
    with pytest.raises(
        ValueError, match=r"'loss_functions\[2\]\.noise' is a loss on noise.*has no 'dens'\. Add it"
    ):
        make_trainer(run_settings)


def test_dens_without_a_loss_on_forces(run_settings: Settings, make_trainer: Make) -> None:
    del run_settings["loss_functions"][1]
    with pytest.raises(ValueError, match=r"DeNS needs a loss on forces: add '- forces:"):
        make_trainer(run_settings)


def test_a_model_that_predicts_no_noise(run_settings: Settings, make_trainer: Make) -> None:
    run_settings["model"] = {
        "name": "schnet", "otf_graph": True, "cutoff": 5.0, "hidden_channels": 8, "num_filters": 8,
        "num_interactions": 1, "num_gaussians": 8,
    }  # fmt: skip
    message = r"SchNetWrap does not predict noise.*Choose.*'model\.name: .*EquiformerV2DeNS'.*remove 'dens'"
    with pytest.raises(ValueError, match=message):
        run(run_settings, make_trainer)


def test_noise_under_outputs(run_settings: Settings, make_trainer: Make) -> None:
    run_settings["outputs"]["noise"] = {"level": "atom"}
    with pytest.raises(ValueError, match=r"'outputs\.noise' is not an output of its own: remove it"):
        make_trainer(run_settings)


# ------------------------------------------------------------------ folders


@pytest.mark.parametrize("format_", ["lmdb", "dens_lmdb"])
@pytest.mark.parametrize("split", ["train", "val", "test", "relax"])
def test_missing_and_empty_folders(
    run_settings: Settings, make_trainer: Make, tmp_path: Path, split: str, format_: str
) -> None:
    run_settings["dataset"]["train"]["format"] = format_
    if format_ == "dens_lmdb":
        run_settings["dataset"]["train"]["md_logs"] = "ignore"
    absent = str(tmp_path / "absent")
    run_settings["dataset"][split] = run_settings["dataset"].get(split, {}) | {"src": absent}
    with pytest.raises(
        FileNotFoundError, match=rf"'dataset\.{split}\.src' names '{re.escape(absent)}', which does not exist"
    ):
        make_trainer(run_settings)
    empty = tmp_path / "empty"
    empty.mkdir()
    run_settings["dataset"][split]["src"] = str(empty)
    with pytest.raises(
        FileNotFoundError,
        match=rf"'dataset\.{split}\.src' names the folder '{re.escape(str(empty))}', which holds no \*\.lmdb",
    ):
        make_trainer(run_settings)


# ------------------------------------------------------------------ typos


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_typo_in_a_transform(run_settings: Settings, make_trainer: Make, split: str) -> None:
    run_settings["dataset"][split].setdefault("transforms", {})["denss"] = {"prob": 0.5, "std": 0.1}
    with pytest.raises(
        ValueError,
        match=rf"'dataset\.{split}\.transforms\.denss' is not a transform \(did you mean 'dens'\?\)",
    ):
        make_trainer(run_settings)


def test_a_typo_in_a_target(run_settings: Settings, make_trainer: Make) -> None:
    for typo, meant in (("force", "forces"), ("noize", "noise"), ("enery", "energy")):
        spoilt = run_settings | {
            "loss_functions": [*run_settings["loss_functions"], {typo: {"fn": "mae", "coefficient": 1}}]
        }
        with pytest.raises(
            ValueError, match=rf"'loss_functions' names '{typo}'.*\(did you mean '{meant}'\?\)"
        ):
            make_trainer(spoilt)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"coefficent": 10},
            r"Unknown setting 'loss_functions\[2\]\.noise\.coefficent' \(did you mean 'coefficient'\?\)",
        ),
        ({"reduction": "jiont"}, r"'loss_functions\[2\]\.noise\.reduction' must be 'joint'"),
        ({"fn": "l2maee"}, r"'loss_functions\[2\]\.noise\.fn'.*l2maee.*l2mae"),
    ],
)
def test_a_typo_in_the_loss_on_noise(
    run_settings: Settings, make_trainer: Make, changes: Settings, message: str
) -> None:
    run_settings["loss_functions"][2]["noise"] |= changes
    with pytest.raises(ValueError, match=message):
        make_trainer(run_settings)


@pytest.mark.parametrize(
    ("typo", "meant"), [("num_layer", "num_layers"), ("sphere_chanels", "sphere_channels")]
)
def test_a_typo_in_a_key_of_the_model(
    run_settings: Settings, make_trainer: Make, typo: str, meant: str
) -> None:
    run_settings["model"][typo] = 1
    with pytest.raises(ValueError, match=rf"Unknown setting 'model\.{typo}' \(did you mean '{meant}'\?\)"):
        make_trainer(run_settings)


# ------------------------------------------------------------------ the authors' keys


def in_authors_style(settings: Settings, **params: Any) -> Settings:
    del settings["dataset"]["train"]["transforms"]["dens"]
    settings["loss_functions"].pop()
    settings["trainer"] = "denoising_forces"
    settings["optim"] |= {
        "use_denoising_pos": True,
        "denoising_pos_coefficient": 15,
        "denoising_pos_params": {
            "prob": 0.125, "fixed_noise_std": True, "std": 0.15, "num_steps": 50, "std_low": 0.01,
            "std_high": 0.4,
            "corrupt_ratio": 0.25, "all_atoms": False, **params,
        },
    }  # fmt: skip
    return settings


@pytest.mark.parametrize("fixed", [True, False])
def test_authors_keys_mean_the_same_as_ours(run_settings: Settings, make_trainer: Make, fixed: bool) -> None:
    """A whole run: the same settings, the same steps, the same weights."""
    run_settings["optim"]["max_epochs"] = 1
    theirs = make_trainer(in_authors_style(copy.deepcopy(run_settings), fixed_noise_std=fixed, prob=0.5))
    level = {"std": 0.15} if fixed else {"std_low": 0.01, "std_high": 0.4, "num_steps": 50}
    run_settings["dataset"]["train"]["transforms"]["dens"] = {
        "prob": 0.5, **level, "corrupt_ratio": 0.25, "switch": "batch",
    }  # fmt: skip
    run_settings["loss_functions"][2]["noise"]["coefficient"] = 15
    ours = make_trainer(run_settings)
    where = "dataset.train.transforms.dens"
    written = Corruption(prob=0.5, **level, corrupt_ratio=0.25, all_atoms=False, switch="batch", where=where)
    assert theirs.corruption == ours.corruption == written
    assert theirs.noise_loss == ours.noise_loss
    for trainer in (theirs, ours):
        trainer.train(disable_eval_tqdm=True)
    for one, other in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_authors_linear_references_are_used(
    run_settings: Settings, make_trainer: Make, structure: Any, tmp_path: Path
) -> None:
    """`lin_ref` alone is ignored by fairchem-core 1.10.0: energies would be trained as totals."""
    coefficients = np.zeros(100)
    elements = [1, 8, 29, 46]
    coefficients[elements] = [-3.0, -430.0, -1500.0, -2200.0]
    np.savez(tmp_path / "references.npz", coeff=coefficients)
    structures = [structure(seed) for seed in range(8)]
    differences = [data.energy for data in structures]
    for data in structures:
        data.energy += coefficients[data.atomic_numbers.numpy()].sum()
    settings = in_authors_style(run_settings)
    settings["dataset"]["train"] |= {
        "src": write(tmp_path / "train", structures),
        "lin_ref": str(tmp_path / "references.npz"),
    }
    trainer = make_trainer(settings)
    assert "lin_ref" not in trainer.config["dataset"]
    references = trainer.elementrefs["energy"]
    used = references.element_references[elements].double().numpy()
    assert used == pytest.approx(coefficients[elements])
    batch = next(iter(trainer.train_loader))
    left = references.dereference(batch.energy.double().reshape(-1, 1), batch).reshape(-1)
    assert left.tolist() == pytest.approx([differences[sid] for sid in batch.sid.tolist()], abs=1e-2)


def test_references_of_the_model_and_of_the_data(
    run_settings: Settings, make_trainer: Make, tmp_path: Path
) -> None:
    np.savez(tmp_path / "references.npz", coeff=np.full(100, -1.0))
    run_settings["dataset"]["train"]["transforms"]["element_references"] = {
        "energy": {"file": str(tmp_path / "references.npz")}
    }
    run_settings["model"] |= {"use_energy_lin_ref": True, "load_energy_lin_ref": True}
    with pytest.raises(ValueError, match=r"'model\.use_energy_lin_ref: True' and .*element_references'"):
        make_trainer(run_settings)


def test_normalizers_that_are_no_mapping(run_settings: Settings, make_trainer: Make) -> None:
    run_settings["dataset"]["train"]["transforms"]["normalizer"] = "energy.npz"
    with pytest.raises(ValueError, match=r"dataset\.train\.transforms\.normalizer"):
        make_trainer(run_settings)
