"""The five YAMLs of the paper's code: with their `src` filled in they start, train, and mean what they meant.

They are put together here from the paper's settings under the keys of that code, all of them, those that have
no effect included. What is not theirs is overridden: sizes, the number of epochs, batches and loader workers.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import yaml
from fairchem.core.common.utils import load_config
from torch_geometric.data import Data

import fairchem_dens.register  # noqa: F401  so that a checkout that is not installed knows the names too
from fairchem_dens.corruption import Corruption
from fairchem_dens.objective import NoiseLoss
from fairchem_dens.shipped import configs_folder

Settings = dict[str, Any]
COEFFICIENTS = {1: -16.1, 8: -439.8, 29: -1503.2, 46: -2212.7}
"""eV by atomic number, of all elements that the structures have."""


def dataset(format_: str, energy: tuple[float, float], forces: tuple[float, float]) -> Settings:
    normalizer = {
        target: {"mean": mean, "stdev": std}
        for target, (mean, std) in {"energy": energy, "forces": forces}.items()
    }
    train = {
        "format": format_,
        "src": None,
        "key_mapping": {"y": "energy", "force": "forces"},
        "transforms": {"normalizer": normalizer},
    }
    return {"train": train, "val": {"src": None}}


def equiformer_v2(layers: int, mmax: int, drop_path: float, strict: bool) -> Settings:
    return {
        "name": "equiformer_v2_dens",
        "use_pbc": True, "regress_forces": True, "otf_graph": True,
        "max_neighbors": 20, "max_radius": 12.0, "max_num_elements": 90,
        "num_layers": layers, "sphere_channels": 128, "attn_hidden_channels": 64, "num_heads": 8,
        "attn_alpha_channels": 64, "attn_value_channels": 16, "ffn_hidden_channels": 128,
        "norm_type": "layer_norm_sh", "lmax_list": [6], "mmax_list": [mmax], "grid_resolution": 18,
        "num_sphere_samples": 128, "edge_channels": 128, "use_atom_edge_embedding": True,
        "share_atom_edge_embedding": False, "use_m_share_rad": False, "distance_function": "gaussian",
        "num_distance_basis": 512, "attn_activation": "silu", "use_tp_reparam": False,
        "use_s2_act_attn": False, "use_attn_renorm": True, "ffn_activation": "silu", "use_gate_act": False,
        "use_grid_mlp": True, "use_sep_s2_act": True, "alpha_drop": 0.1, "drop_path_rate": drop_path,
        "proj_drop": 0.0, "weight_init": "uniform", "enforce_max_neighbors_strictly": strict,
        "use_force_encoding": True, "use_noise_schedule_sigma_encoding": False,
        "use_energy_lin_ref": False, "load_energy_lin_ref": False,
    }  # fmt: skip


ESCN = {
    "name": "escn_dens", "num_layers": 12, "max_neighbors": 20, "cutoff": 12.0, "sphere_channels": 128,
    "hidden_channels": 256, "lmax_list": [6], "mmax_list": [2], "num_sphere_samples": 128,
    "distance_function": "gaussian", "regress_forces": True, "use_pbc": True, "basis_width_scalar": 2.0,
    "otf_graph": True, "use_force_encoding": True, "show_timing_info": False,
}  # fmt: skip
COSINE = {"lambda_type": "cosine", "warmup_factor": 0.2, "warmup_epochs": 0.1, "lr_min_factor": 0.01}
MULTISTEP = {
    "lambda_type": "multistep", "warmup_factor": 0.2, "warmup_epochs": 0.01,
    "decay_epochs": [11.7, 15, 18.3], "decay_rate": 0.3,
}  # fmt: skip


def authors_yaml(
    data: Settings,
    model: Settings,
    *,
    losses: tuple[int, int],
    noise: tuple[float, float, float, int],
    lr: float,
    epochs: int,
    batch: int = 4,
    clip: int = 100,
    scheduler: Settings = COSINE,
    optimizer: Settings | None = None,
    eval_every: int = 5000,
    std_high: float = 0.5,
    **others: Any,
) -> Settings:
    """One of the five; ``noise`` is probability, σ, ratio and coefficient."""
    energy, forces = losses
    prob, std, ratio, coefficient = noise
    return {
        "trainer": "denoising_forces",
        "dataset": data,
        "logger": {"name": "wandb", "project": "equiformer_v2"},
        "task": {"strict_load": True},
        "loss_functions": [
            {"energy": {"fn": "mae", "coefficient": energy}},
            {"forces": {"fn": "l2mae", "coefficient": forces}},
        ],
        "evaluation_metrics": {
            "primary_metric": "forces_mae",
            "metrics": {
                "energy": ["mae"],
                "forces": [
                    *("forcesx_mae", "forcesy_mae", "forcesz_mae"),
                    *("mae", "cosine_similarity", "magnitude_error"),
                ],
            },
        },
        "outputs": {
            "energy": {"level": "system"},
            "forces": {"level": "atom", "train_on_free_atoms": True, "eval_on_free_atoms": True},
        },
        "slurm": {"constraint": "volta32gb"},
        "model": model,
        "optim": {
            "batch_size": batch, "eval_batch_size": batch, "load_balancing": "atoms", "num_workers": 8,
            "lr_initial": lr, "optimizer": "AdamW", "optimizer_params": optimizer or {"weight_decay": 0.001},
            "scheduler": "LambdaLR", "scheduler_params": scheduler, "max_epochs": epochs,
            "clip_grad_norm": clip, "ema_decay": 0.999, "loss_energy": "mae", "loss_force": "l2mae",
            "eval_every": eval_every,
            "use_denoising_pos": True,
            "denoising_pos_params": {
                "prob": prob, "fixed_noise_std": True, "std": std, "num_steps": 50, "std_low": 0.01,
                "std_high": std_high, "corrupt_ratio": ratio,
            },
            "denoising_pos_coefficient": coefficient,
        },
        **others,
    }  # fmt: skip


OC20 = ((-0.7554450631141663, 2.887317180633545), (0.0, 2.887317180633545))
OC22 = ((0.0, 25.119809935106424), (0.0, 0.14759646356105804))


def oc22_dataset() -> Settings:
    splits = dataset("oc22_lmdb", *OC22)
    for split in splits.values():
        split |= {"lin_ref": None, "oc20_ref": None}
    return splits


YAMLS: dict[str, Callable[[], Settings]] = {
    "2M, 12 epochs": lambda: authors_yaml(
        dataset("lmdb", *OC20), equiformer_v2(12, 2, 0.05, True),
        losses=(2, 100), noise=(0.5, 0.1, 0.5, 10), lr=2e-4, epochs=12,
    ),
    "2M, 30 epochs": lambda: authors_yaml(
        dataset("lmdb", *OC20), equiformer_v2(12, 2, 0.05, True),
        losses=(2, 100), noise=(0.5, 0.1, 0.5, 10), lr=4e-4, epochs=30,
    ),
    "2M, eSCN": lambda: authors_yaml(
        dataset("lmdb", *OC20), dict(ESCN),
        losses=(2, 100), noise=(0.5, 0.15, 0.5, 10), lr=8e-4, epochs=20, batch=6, scheduler=MULTISTEP,
        optimizer={"amsgrad": True, "weight_decay": 0.01},
    ),
    "All+MD": lambda: authors_yaml(
        dataset("dens_lmdb", *OC20), equiformer_v2(20, 3, 0.1, True),
        losses=(4, 100), noise=(0.125, 0.1, 0.25, 15), lr=4e-4, epochs=2, eval_every=25000,
        scheduler=COSINE | {"warmup_epochs": 0.01},
    ),
    "OC22": lambda: authors_yaml(
        oc22_dataset(), equiformer_v2(18, 2, 0.1, False),
        losses=(4, 100), noise=(0.5, 0.15, 0.5, 25), lr=2e-4, epochs=6, clip=50, std_high=0.2,
        task={"prediction_dtype": "float32"}, compute_stats=False, hide_eval_progressbar=False,
    ),
}  # fmt: skip
SMALLER = {
    "equiformer_v2_dens": {
        "max_radius": 6.0, "max_neighbors": 8, "num_layers": 1, "sphere_channels": 8,
        "attn_hidden_channels": 8, "num_heads": 2, "attn_alpha_channels": 4, "attn_value_channels": 4,
        "ffn_hidden_channels": 8, "lmax_list": [2], "mmax_list": [1], "grid_resolution": 6,
        "edge_channels": 8,
    },
    "escn_dens": {
        "cutoff": 6.0, "max_neighbors": 8, "num_layers": 1, "sphere_channels": 8, "hidden_channels": 8,
        "lmax_list": [2], "mmax_list": [1], "num_sphere_samples": 16,
    },
}  # fmt: skip
each_yaml = pytest.mark.parametrize("name", YAMLS)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, structure: Callable[..., Data]
) -> dict[str, dict[str, str]]:
    """Folders of train and val by format, as the published LMDBs are."""
    root = tmp_path_factory.mktemp("published")
    result: dict[str, dict[str, str]] = {}
    for format_ in ("lmdb", "dens_lmdb", "oc22_lmdb"):
        for split, seeds in (("train", range(8)), ("val", range(100, 104))):
            folder = root / format_ / split
            folder.mkdir(parents=True)
            env = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, map_size=2**24, lock=False)
            logged = []
            with env.begin(write=True) as transaction:
                for index, seed in enumerate(seeds):
                    data = structure(seed)
                    data.y, data.force = data.energy, data.forces
                    del data.energy, data.forces
                    if format_ == "oc22_lmdb":
                        data.oc22 = 1
                        data.y += sum(COEFFICIENTS[number] for number in data.atomic_numbers.tolist())
                    transaction.put(str(index).encode(), pickle.dumps(data, protocol=-1))
                    kind = "md" if index % 4 == 3 else "relaxations"
                    logged.append(f"/somewhere/{kind}/random{seed}.traj,0,9\n")
            env.close()
            if (format_, split) == ("dens_lmdb", "train"):
                (folder / "data_log.0000.txt").write_text("".join(logged))
            result.setdefault(format_, {})[split] = str(folder)
    return result


@pytest.fixture
def references(tmp_path: Path) -> str:
    coefficients = np.zeros(100)
    coefficients[list(COEFFICIENTS)] = list(COEFFICIENTS.values())
    np.savez(tmp_path / "linref.npz", coeff=coefficients)
    return str(tmp_path / "linref.npz")


def filled_in(name: str, folders: dict[str, dict[str, str]]) -> Settings:
    settings = YAMLS[name]()
    for split in ("train", "val"):
        settings["dataset"][split]["src"] = folders[settings["dataset"]["train"]["format"]][split]
    return settings


def smaller(settings: Settings) -> Settings:
    sizes = SMALLER[settings["model"]["name"]]
    assert set(sizes) <= set(settings["model"])
    settings["model"] |= sizes
    settings["optim"] |= {"batch_size": 2, "eval_batch_size": 2, "num_workers": 0, "max_epochs": 1}
    return settings


@each_yaml
def test_means_what_it_meant(
    name: str,
    folders: dict[str, dict[str, str]],
    make_trainer: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    written = filled_in(name, folders)
    settings = smaller(copy.deepcopy(written))
    settings["logger"] = "none"
    trainer = make_trainer(settings)
    params = written["optim"]["denoising_pos_params"]
    assert trainer.corruption == Corruption(
        prob=params["prob"], std=params["std"], corrupt_ratio=params["corrupt_ratio"], all_atoms=False,
        switch="batch", where="dataset.train.transforms.dens",
    )  # fmt: skip
    assert trainer.noise_loss == NoiseLoss(
        coefficient=written["optim"]["denoising_pos_coefficient"], fn="l2mae", reduction="joint", decay=None,
        where="loss_functions[2].noise",
    )  # fmt: skip
    for target, normalizer in written["dataset"]["train"]["transforms"]["normalizer"].items():
        assert trainer.normalizers[target].rmsd.item() == pytest.approx(normalizer["stdev"])
        assert trainer.normalizers[target].mean.item() == pytest.approx(normalizer["mean"])
    coefficients = [
        settings["coefficient"] for entry in written["loss_functions"] for settings in entry.values()
    ]
    assert [settings["coefficient"] for _, settings in trainer.loss_functions] == coefficients
    assert trainer._max_norm == written["optim"]["clip_grad_norm"]
    group = trainer.optimizer.param_groups[0]
    assert group["amsgrad"] is ("eSCN" in name)
    assert "Nobody reads" not in caplog.text
    total_energies = "total energies where referenced ones are expected" in caplog.text
    assert total_energies is (name == "OC22"), "its `lin_ref` is empty here, and it is said what that does"

    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 4
    md = [bool(data.md) for data in trainer.train_dataset]
    assert sum(md) == (2 if name == "All+MD" else 0)


def test_model_of_the_right_size(folders: dict[str, dict[str, str]]) -> None:
    """Nothing of theirs is taken for something else: the model block builds the model of our YAML."""
    for name, ours in (
        ("2M, 12 epochs", "oc20/equiformer_v2_dens_2M_12ep.yml"),
        ("2M, 30 epochs", "oc20/equiformer_v2_dens_2M_30ep.yml"),
        ("All+MD", "oc20/equiformer_v2_dens_all_md.yml"),
        ("OC22", "oc22/equiformer_v2_dens.yml"),
        ("2M, eSCN", "oc20/escn_dens_2M_20ep.yml"),
    ):
        theirs = filled_in(name, folders)
        settings = load_config(str(configs_folder() / ours))[0]
        shared = set(theirs["model"]) & set(settings["model"]) - {"name"}
        assert len(shared) >= 12
        assert {key: theirs["model"][key] for key in shared} == {
            key: settings["model"][key] for key in shared
        }
        both = set(theirs["optim"]) & set(settings["optim"])
        assert {key: theirs["optim"][key] for key in both} == {key: settings["optim"][key] for key in both}


def test_linear_references_of_oc22(
    folders: dict[str, dict[str, str]],
    make_trainer: Callable[..., Any],
    references: str,
    structure: Callable[..., Data],
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = smaller(filled_in("OC22", folders)) | {"logger": "none"}
    for split in ("train", "val"):
        settings["dataset"][split]["lin_ref"] = references
    trainer = make_trainer(settings)
    assert "total energies" not in caplog.text
    assert trainer.elementrefs["energy"].element_references[29].item() == pytest.approx(COEFFICIENTS[29])
    trainer.train(disable_eval_tqdm=True)
    # A model that has learned next to nothing is as far off as the labels spread, not as the total energies.
    metrics = trainer.validate(split="val", disable_tqdm=True)
    spread = np.mean([abs(structure(seed).energy) for seed in range(100, 104)])
    assert metrics["energy_mae"]["metric"] < spread + 25.0 < 1000.0


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
@each_yaml
def test_trains_by_the_command(
    name: str, folders: dict[str, dict[str, str]], references: str, tmp_path: Path, fairchem: Any
) -> None:
    """`src` is the only thing that the file itself has more than theirs; the rest is on the command line."""
    settings = filled_in(name, folders)
    if name == "OC22":
        for split in ("train", "val"):
            settings["dataset"][split]["lin_ref"] = references
    (tmp_path / "theirs.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
    small = smaller(copy.deepcopy(settings))
    overrides = [f"--model.{key}={small['model'][key]}" for key in SMALLER[settings["model"]["name"]]]
    overrides += [
        f"--optim.{key}={small['optim'][key]}"
        for key in ("batch_size", "eval_batch_size", "num_workers", "max_epochs")
    ]
    output = fairchem("train", tmp_path / "theirs.yml", *overrides)
    losses = [float(loss) for loss in re.findall(r" loss: (\S+?),", output)]
    assert len(losses) >= 4 and np.isfinite(losses).all()
    assert f"probability p = {settings['optim']['denoising_pos_params']['prob']:g}" in output
    assert fairchem.file().is_file()
