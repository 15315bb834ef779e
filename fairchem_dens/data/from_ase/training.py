"""A complete YAML that trains EquiformerV2 with DeNS on a new data set, with the paper's settings."""

from __future__ import annotations

from pathlib import Path

from fairchem.core.common.utils import load_config

from fairchem_dens.data.settings_file import write_settings
from fairchem_dens.shipped import configs_folder

TRAINING_FILE = "train.yml"


def write_training(file: Path, settings_file: Path, header: str) -> None:
    """Write the YAML.

    Args:
        file: where to.
        settings_file: the `data.yml` that it includes, by its final path.
        header: what to say at the top.
    """
    includes = configs_folder() / "includes"
    s2ef, network = (load_config(str(includes / name))[0] for name in ("s2ef.yml", "equiformer_v2.yml"))
    model, optim = network["model"], network["optim"]
    depth = {"num_layers": 12, "lmax_list": [6], "mmax_list": [2], "drop_path_rate": 0.05}
    settings = {
        # Not relative: fairchem would take a file of that name in the working directory first.
        "includes": [str(settings_file.absolute())],
        **{key: value for key, value in s2ef.items() if key != "evaluation_metrics"},
        "logger": "tensorboard",
        "dataset": {"train": {"transforms": {"dens": {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5}}}},
        "loss_functions": [
            {"energy": {"fn": "mae", "coefficient": 2}},
            {"forces": {"fn": "l2mae", "coefficient": 100}},
            {"noise": {"fn": "l2mae", "coefficient": 10}},
        ],
        "evaluation_metrics": {**s2ef["evaluation_metrics"], "primary_metric": "forces_mae"},
        "model": {"name": model["name"], **depth, **model},
        "optim": {
            "lr_initial": 0.0002,
            "max_epochs": 30,
            "clip_grad_norm": 100,
            **optim,
            "scheduler_params": {**optim["scheduler_params"], "warmup_epochs": 0.1},
        },
    }
    write_settings(file, settings, header)
