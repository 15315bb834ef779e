"""The shipped configurations load, say what the paper says, and build models of the paper's size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from fairchem.core.common.flags import flags
from fairchem.core.common.utils import build_config, load_config
from fairchem.core.modules.normalization.element_references import load_references_from_config
from fairchem.core.modules.normalization.normalizer import create_normalizer

from fairchem_dens import config as dens_config
from fairchem_dens.corruption import Corruption
from fairchem_dens.models import EquiformerV2DeNS

CONFIGS = Path(__file__).parents[2] / "configs"
INCLUDES = CONFIGS / "includes"
RUNS = sorted(path for folder in ("oc20", "oc22") for path in (CONFIGS / folder).glob("*.yml"))
DENS_RUNS = [path for path in RUNS if "dens" in path.name]
BASELINE = CONFIGS / "oc20" / "equiformer_v2_2M_12ep.yml"


class Row(NamedTuple):
    """A run in the paper's tables of hyper-parameters."""

    layers: int
    mmax: int
    weights: tuple[int, int, int]
    prob: float
    std: float
    ratio: float
    lr: float
    gpus: int
    epochs: int
    warmup: float
    drop_path: float
    clip: int
    params: int


ROWS = {
    "oc20/equiformer_v2_dens_2M_12ep.yml": Row(
        12, 2, (2, 100, 10), 0.5, 0.1, 0.5, 2e-4, 16, 12, 0.1, 0.05, 100, 89_148_163
    ),
    "oc20/equiformer_v2_dens_2M_30ep.yml": Row(
        12, 2, (2, 100, 10), 0.5, 0.1, 0.5, 4e-4, 32, 30, 0.1, 0.05, 100, 89_148_163
    ),
    "oc20/equiformer_v2_dens_all_md.yml": Row(
        20, 3, (4, 100, 15), 0.125, 0.1, 0.25, 4e-4, 128, 2, 0.01, 0.1, 100, 160_504_579
    ),
    "oc22/equiformer_v2_dens.yml": Row(
        18, 2, (4, 100, 25), 0.5, 0.15, 0.5, 2e-4, 32, 6, 0.1, 0.1, 50, 127_509_763
    ),
}
EXPECTED_MAE = {
    "oc20/equiformer_v2_dens_2M_12ep.yml": ["19.09", "269", "20.46", "285"],
    "oc20/equiformer_v2_dens_2M_30ep.yml": ["18.02", "251", "19.4", "278"],
    "oc20/equiformer_v2_dens_all_md.yml": ["14.0", "222", "15.0", "227", "13.3", "214", "14.2", "219"],
    "oc20/equiformer_v2_2M_12ep.yml": ["20.46", "285", "19.09", "269"],
    "oc22/equiformer_v2_dens.yml": ["20.66", "27.11", "391.6", "533.0", "22.88", "30.70", "433", "629"],
}
OC20_STD = 2.887317180633545


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def load(path: Path) -> dict[str, Any]:
    """As the ``fairchem`` command loads it."""
    loaded, overwritten, conflicts = load_config(str(path))
    assert conflicts == []
    assert overwritten == [], "says the same thing in two files"
    return loaded


def losses(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {target: settings for entry in config["loss_functions"] for target, settings in entry.items()}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{index}]")
    else:
        yield path, value


each_run = pytest.mark.parametrize("path", RUNS, ids=name_of)
each_dens_run = pytest.mark.parametrize("path", DENS_RUNS, ids=name_of)


def test_every_run_is_in_the_table() -> None:
    assert {name_of(path) for path in DENS_RUNS} == set(ROWS)
    assert {name_of(path) for path in RUNS} == set(EXPECTED_MAE)


@each_run
def test_loads_from_any_working_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fairchem looks for included files in the working directory first."""
    expected = load(path)
    for directory in (tmp_path, CONFIGS, CONFIGS.parent, path.parent, INCLUDES):
        monkeypatch.chdir(directory)
        assert load(path) == expected


@each_run
def test_command_line_overrides(path: Path) -> None:
    """What the header promises: paths and the batch size may come from the command line."""
    command = ["--mode", "train", "--config-yml", str(path), "--amp", "--optim.batch_size=8"]
    command += ["--dataset.train.src=/my/train", "--dataset.val.src=/my/val"]
    config = build_config(*flags.get_parser().parse_known_args(command))
    assert config["amp"] is True
    assert config["dataset"]["train"]["src"] == "/my/train"
    assert config["dataset"]["val"] == {"src": "/my/val"}
    assert config["optim"]["batch_size"] == 8
    assert config["dataset"]["train"]["transforms"] == load(path)["dataset"]["train"]["transforms"]


@each_run
def test_no_number_is_text(path: Path) -> None:
    """YAML reads 2e-4 as text, silently."""
    for where, value in leaves(load(path)):
        if isinstance(value, str):
            assert not re.fullmatch(r"[-+\d.eE]+", value), f"{where}: {value!r} is text"


@each_run
def test_names_are_dotted_paths_that_exist(path: Path) -> None:
    from fairchem.core.common.registry import registry

    config = load(path)
    assert config["trainer"] == "fairchem_dens.trainer.DeNSTrainer"
    assert config["model"]["name"] == "fairchem_dens.models.EquiformerV2DeNS"
    assert registry.get_model_class(config["model"]["name"]) is EquiformerV2DeNS
    assert registry.get_trainer_class(config["trainer"]).__name__ == "DeNSTrainer"
    assert config["logger"] == {"name": "wandb", "project": "fairchem_dens"}


@each_run
def test_settings_of_all_runs(path: Path) -> None:
    config = load(path)
    model, optim, train = config["model"], config["optim"], config["dataset"]["train"]
    shared = {
        "sphere_channels": 128,
        "attn_hidden_channels": 64,
        "num_heads": 8,
        "attn_alpha_channels": 64,
        "attn_value_channels": 16,
        "ffn_hidden_channels": 128,
        "norm_type": "layer_norm_sh",
        "lmax_list": [6],
        "grid_resolution": 18,
        "edge_channels": 128,
        "max_radius": 12.0,
        "max_neighbors": 20,
        "attn_activation": "silu",
        "ffn_activation": "silu",
        "use_grid_mlp": True,
        "use_sep_s2_act": True,
        "alpha_drop": 0.1,
        "weight_init": "uniform",
        "otf_graph": True,
        "use_pbc": True,
        "regress_forces": True,
    }
    assert {key: model[key] for key in shared} == shared
    assert model["enforce_max_neighbors_strictly"] is (path.parent.name == "oc20")
    assert (optim["optimizer"], optim["optimizer_params"]) == ("AdamW", {"weight_decay": 1e-3})
    assert optim["ema_decay"] == 0.999
    assert optim["scheduler"] == "LambdaLR"
    assert {**optim["scheduler_params"], "warmup_epochs": None} == {
        "lambda_type": "cosine",
        "warmup_factor": 0.2,
        "lr_min_factor": 0.01,
        "warmup_epochs": None,
    }
    assert (optim["load_balancing"], optim["load_balancing_on_error"]) == ("atoms", "warn_and_no_balance")
    assert train["key_mapping"] == {"y": "energy", "force": "forces"}
    assert config["outputs"]["forces"] == {
        "level": "atom",
        "train_on_free_atoms": True,
        "eval_on_free_atoms": True,
    }
    assert set(config["outputs"]) == {"energy", "forces"}
    assert set(config["dataset"]["val"]) == {"src"}, "the validation split inherits all else"


@each_dens_run
def test_row_of_the_paper(path: Path) -> None:
    config, row = load(path), ROWS[name_of(path)]
    model, optim, weights = config["model"], config["optim"], losses(config)
    (mmax,) = model["mmax_list"]
    dens = config["dataset"]["train"]["transforms"]["dens"]
    found = Row(
        layers=model["num_layers"],
        mmax=mmax,
        weights=tuple(weights[target]["coefficient"] for target in ("energy", "forces", "noise")),
        prob=dens.pop("prob"),
        std=dens.pop("std"),
        ratio=dens.pop("corrupt_ratio"),
        lr=optim["lr_initial"],
        gpus=row.gpus,  # in the header alone
        epochs=optim["max_epochs"],
        warmup=optim["scheduler_params"]["warmup_epochs"],
        drop_path=model["drop_path_rate"],
        clip=optim["clip_grad_norm"],
        params=row.params,  # see below
    )
    assert found == row
    assert dens == {"switch": "batch"}
    assert optim["batch_size"] == 4
    assert {target: settings["fn"] for target, settings in weights.items()} == {
        "energy": "mae",
        "forces": "l2mae",
        "noise": "l2mae",
    }


@each_dens_run
def test_our_settings_are_accepted(path: Path) -> None:
    config = load(path)
    transforms = config["dataset"]["train"]["transforms"]
    corruption = Corruption.from_config(transforms["dens"], where="dataset.train.transforms.dens")
    assert corruption.noise_scale == ROWS[name_of(path)].std
    noise, others = dens_config.take_noise_loss(config["loss_functions"])
    assert noise is not None and (noise.reduction, noise.decay) == ("joint", None)
    dens_config.check_targets(others, config["outputs"])
    misspelt = {**transforms["dens"], "corrupt_ration": 0.5}
    with pytest.raises(ValueError, match="corrupt_ratio"):
        Corruption.from_config(misspelt, where="dens")


@each_run
def test_normalisers(path: Path) -> None:
    transforms = load(path)["dataset"]["train"]["transforms"]
    expected = {"energy": (-0.7554450631141663, OC20_STD), "forces": (0.0, OC20_STD)}
    if path.parent.name == "oc22":
        expected = {"energy": (0.0, 25.119809935106424), "forces": (0.0, 0.14759646356105804)}
    assert set(transforms["normalizer"]) == set(expected)
    for target, (mean, std) in expected.items():
        normalizer = create_normalizer(**transforms["normalizer"][target])
        assert normalizer.mean.item() == pytest.approx(mean, rel=1e-6)
        assert normalizer.rmsd.item() == pytest.approx(std, rel=1e-6)


def test_oc22_linear_reference(tmp_path: Path) -> None:
    config = load(CONFIGS / "oc22" / "equiformer_v2_dens.yml")
    assert config["task"]["prediction_dtype"] == "float32"
    assert config["evaluation_metrics"]["primary_metric"] == "energy_mae"
    references = config["dataset"]["train"]["transforms"]["element_references"]
    file = tmp_path / Path(references["energy"]["file"]).name
    np.savez(file, coeff=np.arange(100.0))
    references["energy"]["file"] = str(file)
    loaded = load_references_from_config(references, dataset=None)
    assert loaded["energy"].element_references[8].item() == 8.0


def test_formats() -> None:
    formats = {name_of(path): load(path)["dataset"]["train"]["format"] for path in RUNS}
    assert formats.pop("oc20/equiformer_v2_dens_all_md.yml") == "dens_lmdb"
    assert formats.pop("oc22/equiformer_v2_dens.yml") == "oc22_lmdb"
    assert set(formats.values()) == {"lmdb"}


def test_the_baseline_differs_in_dens_alone() -> None:
    baseline, dens = load(BASELINE), load(CONFIGS / "oc20" / "equiformer_v2_dens_2M_12ep.yml")
    del dens["dataset"]["train"]["transforms"]["dens"]
    dens["loss_functions"] = [entry for entry in dens["loss_functions"] if "noise" not in entry]
    assert baseline == dens


def test_paths_stand_in_one_file_per_data_set() -> None:
    for path in [*RUNS, *INCLUDES.glob("*.yml")]:
        written = dict(leaves(yaml.safe_load(path.read_text())))
        paths = {key for key in written if key.endswith((".src", ".file"))}
        assert bool(paths) is path.name.startswith("paths_"), path
        for key in paths:
            assert not Path(written[key]).is_absolute()
    for path in RUNS:
        header = path.read_text().partition("includes:")[0]
        included = re.findall(r"\.\./includes/(paths_\w+\.yml)", header)
        assert len(set(included)) == 1 and (INCLUDES / included[0]).is_file()
        sources = yaml.safe_load((INCLUDES / included[0]).read_text())["dataset"]
        assert load(path)["dataset"]["train"]["src"] == sources["train"]["src"]


@each_run
def test_header(path: Path) -> None:
    """Row, batch, learning rate, epochs, expected errors with units, commands and paths, all true."""
    text, config = path.read_text(), load(path)
    header = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    first = header.partition("\n")[0].strip()
    assert first.startswith("EquiformerV2") and first.endswith("."), "`configs list` prints this line"
    per_gpu, gpus, total = map(int, re.search(r"(\d+) per GPU × (\d+) GPUs = (\d+)", header).groups())
    assert per_gpu == config["optim"]["batch_size"] and per_gpu * gpus == total
    lr, epochs = re.search(r"lr, epochs\s+(\S+), (\d+)", header).groups()
    assert (float(lr), int(epochs)) == (config["optim"]["lr_initial"], config["optim"]["max_epochs"])
    assert f"{epochs} epochs" in first
    if path in DENS_RUNS:
        assert gpus == ROWS[name_of(path)].gpus
        assert f"{ROWS[name_of(path)].params:,} parameters" in first
    for number in EXPECTED_MAE[name_of(path)]:
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", header), number
    assert "meV/Å" in header and "meV on" in header and " val" in header

    commands = re.findall(
        r"fairchem --mode train.*?(?=\n\s*\n|\nOne node| One node|\Z)", header, flags=re.DOTALL
    )
    assert len(commands) == 2
    for command in commands:
        assert f"--config-yml configs/{name_of(path)} " in command and " --amp " in command
    nodes, per_node = map(int, re.search(r"--num-nodes (\d+) --num-gpus (\d+)", commands[0]).groups())
    assert "--submit" in commands[0] and nodes * per_node == gpus
    local = re.search(r"--num-gpus 8 --optim.batch_size=(\d+)", commands[1])
    assert "--submit" not in commands[1]
    assert (8 * int(local[1]) == total) if local else "global batch of 32" in header


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in DENS_RUNS if "30ep" not in path.name], ids=name_of)
def test_number_of_parameters(path: Path) -> None:
    settings = load(path)["model"]
    settings.pop("name")
    model = EquiformerV2DeNS(**settings)
    assert sum(parameter.numel() for parameter in model.parameters()) == ROWS[name_of(path)].params
