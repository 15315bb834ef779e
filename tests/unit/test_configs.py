"""The shipped configurations load, say what the paper says, and build models of the paper's size."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from fairchem.core.common.flags import flags
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import build_config, load_config, setup_imports
from fairchem.core.modules.normalization.element_references import load_references_from_config
from fairchem.core.modules.normalization.normalizer import create_normalizer

import fairchem_dens.register  # noqa: F401  so that short names are known too
from fairchem_dens import config as dens_config
from fairchem_dens.cli.configs import MAP
from fairchem_dens.corruption import Corruption
from fairchem_dens.shipped import config_names, configs_folder, run_names

CONFIGS = configs_folder()
INCLUDES = CONFIGS / "includes"
RUNS = [CONFIGS / name for name in run_names()]
DEMO = [path for path in RUNS if path.parent.name == "demo"]
PAPER = [path for path in RUNS if path not in DEMO]
"""What has a header; not all of them are in the paper."""
ABLATIONS = [path for path in RUNS if path.parent.name == "ablations"]
V2 = [path for path in RUNS if path.parent.name in ("oc20", "oc22") and path.name.startswith("equiformer_v2")]


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
    "oc20/equiformer_v2_2M_12ep.yml": ["20.46", "285", "19.09", "269"],
    "oc20/equiformer_v2_dens_2M_30ep.yml": ["18.02", "251", "19.4", "278"],
    "oc20/equiformer_v2_2M_30ep.yml": ["19.4", "278", "18.02", "251"],
    "oc20/equiformer_v2_dens_all_md.yml": ["14.0", "222", "15.0", "227", "13.3", "214", "14.2", "219"],
    "oc20/equiformer_v2_all_md.yml": ["15.0", "227", "14.0", "222", "14.2", "219", "13.3", "214"],
    "oc22/equiformer_v2_dens.yml": ["20.66", "27.11", "391.6", "533.0", "22.88", "30.70", "433", "629"],
    "oc22/equiformer_v2.yml": ["22.88", "30.70", "433", "629", "20.66", "27.11", "391.6", "533.0"],
    "oc20/ablations/no_force_encoding.yml": ["21.32", "19.09", "20.46"],
}
# force and energy; L = 2 without and with DeNS, L = 3 without and with
MD17_MAE = {
    "aspirin": (7.2, 5.3, 5.7, 5.1, 6.6, 5.3, 5.2, 5.0),
    "benzene": (6.6, 2.2, 6.1, 2.3, 8.1, 2.5, 6.1, 2.3),
    "ethanol": (3.1, 2.2, 2.6, 2.2, 2.9, 2.2, 2.4, 2.2),
    "malonaldehyde": (5.8, 3.3, 4.4, 3.2, 5.4, 3.2, 4.1, 3.2),
    "naphthalene": (2.1, 3.7, 1.7, 3.7, 2.0, 4.4, 1.6, 3.7),
    "salicylic": (4.1, 4.5, 3.7, 4.4, 3.9, 4.3, 3.2, 4.2),
    "toluene": (2.1, 3.8, 1.9, 3.5, 2.1, 3.7, 1.8, 3.4),
    "uracil": (3.3, 4.3, 3.3, 4.2, 3.4, 4.3, 2.9, 4.1),
}
MD17_PARAMS = {"_baseline": 3.50e6, "": 4.00e6, "_l3_baseline": 5.50e6, "_l3": 6.35e6}
OC20_STD = 2.887317180633545


def name_of(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def load(path: Path) -> dict[str, Any]:
    """As the ``fairchem`` command loads it."""
    loaded, overwritten, conflicts = load_config(str(path))
    assert conflicts == []
    assert overwritten == [], "says the same thing in two files"
    return loaded


def header_of(path: Path) -> str:
    comment = path.read_text(encoding="utf-8").partition("includes:")[0].splitlines()
    assert all(line.startswith("#") for line in comment)
    return "\n".join(line[1:] for line in comment)


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


def with_dens(path: Path) -> bool:
    """As its name says."""
    return "baseline" not in path.stem and ("dens" in path.stem or path.parent.name in ("ablations", "md17"))


DENS_RUNS = [path for path in RUNS if with_dens(path)]
each_run = pytest.mark.parametrize("path", RUNS, ids=name_of)
each_paper_run = pytest.mark.parametrize("path", PAPER, ids=name_of)
each_dens_run = pytest.mark.parametrize("path", DENS_RUNS, ids=name_of)
each_v2_run = pytest.mark.parametrize("path", V2, ids=name_of)
each_row = pytest.mark.parametrize("path", [CONFIGS / name for name in ROWS], ids=name_of)


def test_every_run_is_found() -> None:
    names = set(config_names())
    assert set(EXPECTED_MAE) | set(ROWS) <= names
    assert {f"md17/{molecule}{kind}.yml" for molecule in MD17_MAE for kind in MD17_PARAMS} <= names
    assert {name_of(path) for path in V2} == set(EXPECTED_MAE) - {"oc20/ablations/no_force_encoding.yml"}
    included = {
        (CONFIGS / name).parent.joinpath(include).resolve().relative_to(CONFIGS.resolve()).as_posix()
        for name in names
        for include in yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8")).get("includes", [])
    }
    parts = names - {name_of(path) for path in RUNS}
    assert parts <= included, "parts that nothing includes"


def test_the_map_lists_what_there_is() -> None:
    text = (CONFIGS / MAP).read_text(encoding="utf-8")
    runs, parts = text.partition("## How a file is put together")[::2]
    listed = re.findall(r"`([\w/]+\.yml)`", runs.partition("## The runs")[2])
    assert sorted(listed) == sorted(name_of(path) for path in RUNS)
    table = re.findall(r"^\| (`.*?) \|", parts, flags=re.MULTILINE)
    files = {name for row in table for name in re.findall(r"`(\w+\.yml)`", row)}
    known = {path.name for path in INCLUDES.glob("*.yml") if not path.name.startswith("paths_md17_")}
    assert files == known | {"paths_md17_MOLECULE.yml"}


@each_paper_run
def test_the_map_says_what_the_header_says(path: Path) -> None:
    text = (CONFIGS / MAP).read_text(encoding="utf-8")
    said = re.search(rf"`{re.escape(name_of(path))}`([^`]*)", text)[1]
    header = header_of(path)
    for number in re.findall(r"\d+\.?\d*(?= /)|(?<=/ )\d+\.?\d*", said):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", header), number


@each_run
def test_loads_from_any_working_directory(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fairchem looks for included files in the working directory first."""
    expected = load(path)
    for directory in (tmp_path, CONFIGS, CONFIGS.parent, path.parent, INCLUDES):
        monkeypatch.chdir(directory)
        assert load(path) == expected


@each_paper_run
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
    setup_imports()
    config = load(path)
    assert config["trainer"] == "fairchem_dens.trainer.DeNSTrainer"
    assert registry.get_trainer_class(config["trainer"]).__name__ == "DeNSTrainer"
    module, _, name = config["model"]["name"].rpartition(".")
    assert module == "fairchem_dens.models"
    assert registry.get_model_class(config["model"]["name"]).__name__ == name
    assert registry.get_dataset_class(config["dataset"]["train"]["format"]) is not None
    if path not in DEMO:
        assert config["logger"] == {"name": "wandb", "project": "fairchem_dens"}


@each_run
def test_dens_is_on_or_off_as_the_name_says(path: Path) -> None:
    config = load(path)
    transforms = config["dataset"]["train"].get("transforms", {})
    noise, others = dens_config.take_noise_loss(config["loss_functions"])
    assert ("dens" in transforms) is (noise is not None) is with_dens(path)
    dens_config.check_targets(others, config["outputs"])
    dens_config.check_transforms(transforms, [], "dataset.train.transforms")
    assert dens_config.unread_settings(config["optim"]) == []
    assert set(config["outputs"]) == {"energy", "forces"}
    if not with_dens(path):
        return
    corruption = Corruption.from_config(transforms["dens"], where="dataset.train.transforms.dens")
    expected = "structure" if path.parent.name in ("md17", "demo") else "batch"
    assert corruption.switch == expected
    if path.parent.name == "md17":
        assert (noise.reduction, noise.decay, noise.fn) == ("separate", "linear", "l2mae")
    else:
        assert (noise.reduction, noise.decay, noise.fn) == ("joint", None, "l2mae")
    misspelt = {**transforms["dens"], "corrupt_ration": 0.5}
    with pytest.raises(ValueError, match="corrupt_ratio"):
        Corruption.from_config(misspelt, where="dens")


@each_v2_run
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
    assert set(config["dataset"]["val"]) == {"src"}, "the validation split inherits all else"


@each_row
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


@each_v2_run
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


@pytest.mark.parametrize("name", ["equiformer_v2_dens", "equiformer_v2"])
def test_oc22_linear_reference(name: str, tmp_path: Path) -> None:
    config = load(CONFIGS / "oc22" / f"{name}.yml")
    assert config["task"]["prediction_dtype"] == "float32"
    assert config["evaluation_metrics"]["primary_metric"] == "energy_mae"
    references = config["dataset"]["train"]["transforms"]["element_references"]
    file = tmp_path / Path(references["energy"]["file"]).name
    np.savez(file, coeff=np.arange(100.0))
    references["energy"]["file"] = str(file)
    loaded = load_references_from_config(references, dataset=None)
    assert loaded["energy"].element_references[8].item() == 8.0


def test_formats() -> None:
    special = {"all_md": "dens_lmdb", "oc22": "oc22_lmdb", "mptrj": "ase_db"}
    for path in RUNS:
        expected = [special[part] for part in special if part in name_of(path)] or ["lmdb"]
        assert [load(path)["dataset"]["train"]["format"]] == expected, path


@pytest.mark.parametrize(
    ("dens", "baseline"),
    [
        ("oc20/equiformer_v2_dens_2M_12ep.yml", "oc20/equiformer_v2_2M_12ep.yml"),
        ("oc20/equiformer_v2_dens_2M_30ep.yml", "oc20/equiformer_v2_2M_30ep.yml"),
        ("oc20/equiformer_v2_dens_all_md.yml", "oc20/equiformer_v2_all_md.yml"),
        ("oc20/escn_dens_2M_20ep.yml", "oc20/escn_2M_20ep.yml"),
        ("oc22/equiformer_v2_dens.yml", "oc22/equiformer_v2.yml"),
        ("mptrj/equiformer_v2_dens.yml", "mptrj/equiformer_v2.yml"),
        ("demo/dens.yml", "demo/baseline.yml"),
    ],
)
def test_the_baseline_differs_in_dens_alone(dens: str, baseline: str) -> None:
    with_noise = load(CONFIGS / dens)
    transforms = with_noise["dataset"]["train"]["transforms"]
    del transforms["dens"]
    if not transforms:
        del with_noise["dataset"]["train"]["transforms"]
    with_noise["loss_functions"] = [entry for entry in with_noise["loss_functions"] if "noise" not in entry]
    assert load(CONFIGS / baseline) == with_noise


def test_ablations_differ_in_one_thing_each() -> None:
    expected = {
        "no_force_encoding": {"model.use_force_encoding": False},
        "no_denoising_energy": {"model.use_denoising_energy": False},
        "full_corruption": {"dataset.train.transforms.dens.corrupt_ratio": None},
        "multi_scale": {
            "dataset.train.transforms.dens.std": ...,
            "dataset.train.transforms.dens.std_low": 0.01,
            "dataset.train.transforms.dens.std_high": 0.5,
            "dataset.train.transforms.dens.num_steps": 50,
            "model.use_noise_schedule_sigma_encoding": True,
        },
    }
    full = dict(leaves(load(CONFIGS / "oc20" / "equiformer_v2_dens_2M_12ep.yml")))
    assert {path.stem for path in ABLATIONS} == set(expected)
    for path in ABLATIONS:
        written = dict(leaves(load(path)))
        changed = {
            key: written.get(key, ...)
            for key in full | written
            if written.get(key, ...) != full.get(key, ...)
        }
        assert changed == expected[path.stem]


def test_paths_stand_in_one_file_per_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below one folder, which a variable names and our trainer puts in."""
    for path in [*RUNS, *INCLUDES.glob("*.yml")]:
        written = dict(leaves(yaml.safe_load(path.read_text(encoding="utf-8"))))
        paths = {key: value for key, value in written.items() if ".src" in key or key.endswith(".file")}
        assert bool(paths) is path.name.startswith("paths_"), path
        for value in paths.values():
            assert value.startswith("${FAIRCHEM_DENS_DATA:-data}/")
    for path in PAPER:
        dataset = load(path)["dataset"]
        for folder in ("data", "/my/own"):
            if folder == "data":
                monkeypatch.delenv("FAIRCHEM_DENS_DATA", raising=False)
            else:
                monkeypatch.setenv("FAIRCHEM_DENS_DATA", folder)
            for key, value in leaves(dens_config.tidied(dataset)):
                assert "$" not in str(value), key
                if ".src" in key or key.endswith(".file"):
                    assert value.startswith(f"{folder}/")


@each_paper_run
def test_header(path: Path) -> None:
    """Batch, learning rate, epochs, errors with units, paths and commands: there, and those of the file."""
    header, config = header_of(path), load(path)
    first = header.partition("\n")[0].strip()
    assert first.endswith("."), "`configs list` prints this line"
    per_gpu, gpus, total = map(int, re.search(r"(\d+) per GPU × (\d+) GPUs? = (\d+)", header).groups())
    assert per_gpu == config["optim"]["batch_size"] and per_gpu * gpus == total
    lr, epochs = re.search(r"lr, epochs\s+(\S+), (\d+)", header).groups()
    assert (float(lr), int(epochs)) == (config["optim"]["lr_initial"], config["optim"]["max_epochs"])
    assert f"{epochs} epochs" in first
    assert re.search(r"\n\s+expected\s+\S", header) and re.search(r"\n\s+data\s+\S", header)
    assert "MAE" in header and "meV" in header and "meV/Å" in header and " val" in header + " validation"
    if name_of(path) in ROWS:
        assert gpus == ROWS[name_of(path)].gpus
        assert f"{ROWS[name_of(path)].params:,} parameters" in first
    for number in EXPECTED_MAE.get(name_of(path), []):
        assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", header), number
    for included in re.findall(r"[./]+includes/paths_\w+\.yml", header):
        sources = yaml.safe_load((path.parent / included).read_text(encoding="utf-8"))["dataset"]
        assert config["dataset"]["train"]["src"] == sources["train"]["src"]

    commands = re.findall(r"fairchem --mode train.*?(?=\n\s*\n|\n One node|\n Errors|\Z)", header, flags=re.S)
    assert commands or path in ABLATIONS
    for command in commands:
        assert f"--config-yml configs/{name_of(path)} " in command
        mixed_precision = config["model"]["name"] == "fairchem_dens.models.EquiformerV2DeNS"
        assert (" --amp " in command) is mixed_precision
        nodes = re.search(r"--num-nodes (\d+) --num-gpus (\d+)", command)
        if nodes:
            assert "--submit" in command and int(nodes[1]) * int(nodes[2]) == gpus
        local = re.search(r"--num-gpus 8 --optim.batch_size=(\d+)", command)
        assert local is None or 8 * int(local[1]) == total
    if path in ABLATIONS:
        assert f"configs/{name_of(path)}" in header


@pytest.mark.parametrize("molecule", MD17_MAE)
def test_expected_errors_on_md17(molecule: str) -> None:
    numbers = iter(MD17_MAE[molecule])
    pairs = {kind: (next(numbers), next(numbers)) for kind in MD17_PARAMS}
    other = {"": "_baseline", "_baseline": "", "_l3": "_l3_baseline", "_l3_baseline": "_l3"}
    for kind, (force, energy) in pairs.items():
        header = header_of(CONFIGS / "md17" / f"{molecule}{kind}.yml")
        assert f"energy MAE {energy} meV, force MAE {force} meV/Å" in header
        assert f"DeNS: {pairs[other[kind]][1]} and {pairs[other[kind]][0]}" in header


@functools.cache
def num_parameters(model: str) -> int:
    settings = json.loads(model)
    built = registry.get_model_class(settings.pop("name"))(**settings)
    return sum(parameter.numel() for parameter in built.parameters())


@pytest.mark.slow
@each_paper_run
def test_number_of_parameters(path: Path) -> None:
    """Whatever the header says, and what the paper says."""
    found = num_parameters(json.dumps(load(path)["model"], sort_keys=True))
    said = re.search(r"\(([\d,.]+)(M?) parameters\)", header_of(path).partition("\n")[0])
    if path.parent.name == "md17":
        molecule, _, kind = path.stem.partition("_")
        assert found == pytest.approx(MD17_PARAMS[f"_{kind}" if kind else ""], abs=5e3), molecule
    elif name_of(path) in ROWS:
        assert found == ROWS[name_of(path)].params
    if said is not None:
        value = float(said[1].replace(",", ""))
        assert found == (pytest.approx(1e6 * value, abs=5e3) if said[2] else value)
