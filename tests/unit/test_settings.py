"""Settings of a run that are refused at once, by their key."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from fairchem.core.common.utils import setup_imports
from torch_geometric.data import Data

from fairchem_dens.models import EquiformerV2DeNS
from fairchem_dens.models.inputs import check_cells
from fairchem_dens.objective import NoiseLoss
from fairchem_dens.settings import as_fairchem_reads, check_model_arguments, check_run
from fairchem_dens.training.settings import StepSettings


@pytest.fixture(scope="module", autouse=True)
def _known_names() -> None:
    """Loggers, losses and formats are known by what fairchem imports at its start."""
    setup_imports()


@pytest.fixture
def given(run_settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a trainer, as fairchem hands them over."""
    return {"optimizer" if key == "optim" else key: value for key, value in run_settings.items()}


def put(given: dict[str, Any], path: str, value: Any) -> None:
    *way, last = path.split(".")
    for part in way:
        given = given[int(part)] if part.isdigit() else given[part]
    given[int(last) if last.isdigit() else last] = value


def test_good_settings_pass(given: dict[str, Any]) -> None:
    before = copy.deepcopy(given)
    check_run(given)
    assert given == before
    for path, value in {
        "optimizer.checkpoint_every": -1,
        "optimizer.clip_grad_norm": None,
        "optimizer.lr_initial": 1,
        "optimizer.load_balancing": "atoms",
        "optimizer.scheduler": "Null",
        "optimizer.optimizer_params": {"betas": [0.9, 0.95], "amsgrad": True},
        "optimizer.somebody_elses": object(),
        "loss_functions": {},
        "evaluation_metrics": {},
        "logger": {"name": "wandb", "project": "mine"},
        "dataset.train.somebody_elses": 3,
        "dataset.train.transforms.normalizer": {"fit": {"targets": {}}, "energy": {"file": "a.npz"}},
        "dataset.val": {},
        "task": None,
    }.items():
        other = copy.deepcopy(given)
        put(other, path, value)
        check_run(other)
    check_run(given | {"dataset": [given["dataset"]["train"], given["dataset"]["val"]]})
    check_run(given | {"dataset": given["dataset"]["train"]})


BAD = [
    ("optimizer.batch_size", 0, "'optim.batch_size' must be a whole number from 1 to 100000, found 0"),
    ("optimizer.batch_size", 10**12, "must be a whole number from 1 to 100000, found 1000000000000"),
    ("optimizer.batch_size", 2.5, "'optim.batch_size' must be a whole number from 1 to 100000, found 2.5"),
    ("optimizer.num_workers", -1, "'optim.num_workers' must be a whole number from 0 to 1000, found -1"),
    ("optimizer.lr_initial", "1e-3", "'optim.lr_initial' must be a number, found '1e-3'. YAML reads '1e-1'"),
    ("optimizer.lr_initial", math.nan, "'optim.lr_initial' must be a number from 0, found nan"),
    ("optimizer.eval_every", 0, "'optim.eval_every' must be a whole number from 1, found 0"),
    ("optimizer.checkpoint_every", 0, "'optim.checkpoint_every' must be a whole number from 1, found 0"),
    ("optimizer.ema_decay", 1.5, "'optim.ema_decay' must be a number from 0 to 1, found 1.5"),
    (
        "optimizer.optimizer",
        "Adamm",
        "'optim.optimizer' names 'Adamm', which is not a class of torch.optim (did",
    ),
    ("optimizer.optimizer_params", {"beta": 1}, "'optim.optimizer_params.beta' (did you mean 'betas'?)"),
    (
        "optimizer.optimizer_params",
        {"betas": 3},
        "'optim.optimizer_params' are not those of torch.optim.AdamW",
    ),
    ("optimizer.scheduler", "LambdaRL", "'optim.scheduler' names 'LambdaRL'"),
    (
        "optimizer.scheduler_params.lambda_type",
        "cosin",
        "must be one of 'cosine', 'multistep', found 'cosin' (did",
    ),
    (
        "optimizer.scheduler_params",
        {"lambda_type": "cosine"},
        "'optim.scheduler_params.warmup_epochs' is missing",
    ),
    ("optimizer", {}, "'optim.num_workers' is missing"),
    ("optimizer", [], "'optim' must be a mapping of settings, found []"),
    ("outputs.energy", {}, "'outputs.energy.level' is missing: system or atom"),
    (
        "outputs.energy.level",
        "atoms",
        "'outputs.energy.level' must be one of 'system', 'atom', found 'atoms' (did",
    ),
    (
        "outputs.forces.train_on_free_atoms",
        1,
        "'outputs.forces.train_on_free_atoms' must be one of True, False",
    ),
    ("loss_functions", {"energy": {"fn": "mae"}}, "'loss_functions' must be a list"),
    ("loss_functions.0.energy", {"fn": "mae"}, "'loss_functions[0].energy.coefficient' is missing"),
    (
        "loss_functions.0.energy.fn",
        "maee",
        "'loss_functions[0].energy.fn' names 'maee', which is not a loss (did",
    ),
    (
        "loss_functions.1.forces.coefficient",
        -1,
        "'loss_functions[1].forces.coefficient' must be a number from 0",
    ),
    (
        "loss_functions.1.forces.reduction",
        "max",
        "'loss_functions[1].forces.reduction' must be one of 'mean'",
    ),
    (
        "evaluation_metrics.primary_metric",
        "force_mae",
        "which 'evaluation_metrics.metrics' does not measure (did",
    ),
    ("loss_functions.1", None, "'loss_functions[1]' is empty"),
    ("dataset", [], "'dataset' is empty"),
    ("model", None, "'model' is empty"),
    (
        "evaluation_metrics.primary_metric",
        None,
        "'evaluation_metrics.primary_metric' is 'energy_forces_within_threshold', which",
    ),
    ("evaluation_metrics.metrics", {"force": ["mae"]}, "'evaluation_metrics.metrics.force' names 'force'"),
    ("evaluation_metrics.metrics", {"forces": ["mea"]}, "'evaluation_metrics.metrics.forces[0]' names 'mea'"),
    ("evaluation_metrics.metric", {}, "'evaluation_metrics.metric' (did you mean 'metrics'?)"),
    ("dataset", "folder", "'dataset' must be a mapping of settings, found 'folder'"),
    ("dataset.train", ["folder"], "'dataset.train' must be a mapping of settings"),
    ("dataset.train.src", 3, "'dataset.train.src' must be a text, found 3"),
    (
        "dataset.train.format",
        "lmbd",
        "'dataset.train.format' names 'lmbd', which is not a format of data (did",
    ),
    ("dataset.train.first_n", 0, "'dataset.train.first_n' must be a whole number from 1"),
    ("dataset.train.key_mapping", {"y": 3}, "'dataset.train.key_mapping.y' must be a text, found 3"),
    ("dataset.train.subset_to", [{"op": "in"}], "'dataset.train.subset_to[0].metadata_key' is missing"),
    (
        "dataset.train.transforms.normalizer.energy.rmsd",
        0,
        "normalizer.energy.rmsd' must be a number above 0",
    ),
    ("dataset.train.transforms.normalizer.energy", {"mean": 0}, "normalizer.energy' needs 'mean' and 'rmsd'"),
    (
        "logger",
        "tensorbord",
        "'logger' names 'tensorbord', which is not a logger (did you mean 'tensorboard'",
    ),
    ("model", {}, "'model.name' is missing"),
    ("task", "s2ef", "'task' must be a mapping"),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD, ids=[f"{path}={value}" for path, value, _ in BAD])
def test_bad_settings(given: dict[str, Any], path: str, value: Any, message: str) -> None:
    put(given, path, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_run(given)


SCHEDULES = [
    ({}, "'optim.scheduler' is missing"),
    ({"scheduler_params": {}}, "'optim.scheduler' is missing"),
    ({"scheduler": "LambdaLR"}, "'optim.scheduler_params.lambda_type' is missing"),
    ({"scheduler": "StepLR", "scheduler_params": {}}, "are not those of torch.optim.lr_scheduler.StepLR"),
    ({"scheduler": "StepLR", "step_size": 3}, None),
    ({"warmup_steps": 1, "warmup_factor": 0.1, "lr_milestones": [2], "lr_gamma": 0.1}, None),
    ({"scheduler": "Null"}, None),
]


@pytest.mark.parametrize(("written", "message"), SCHEDULES)
def test_schedules(given: dict[str, Any], written: dict[str, Any], message: str | None) -> None:
    optim = {key: value for key, value in given["optimizer"].items() if "scheduler" not in key} | written
    if message is None:
        check_run(given | {"optimizer": optim})
        return
    with pytest.raises(ValueError, match=re.escape(message)):
        check_run(given | {"optimizer": optim})


def test_whole_numbers_where_fairchem_wants_floats() -> None:
    optim = {
        "lr_initial": 1,
        "scheduler_params": {"warmup_factor": 0, "warmup_epochs": 2, "lambda_type": "cosine"},
    }
    changed = as_fairchem_reads(optim)
    assert type(changed["lr_initial"]) is type(changed["scheduler_params"]["warmup_factor"]) is float
    assert changed == optim and type(changed["scheduler_params"]["warmup_epochs"]) is int


def test_what_a_checkpoint_says_of_its_training_does_not_matter_for_inference(given: dict[str, Any]) -> None:
    put(given, "optimizer.lr_initial", "unknown")
    check_run(given | {"inference_only": True})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": "two"}, "'model.num_layers' must be a whole number, found 'two'"),
        ({"num_layers": 0}, "'model.num_layers' must be a whole number from 1 to 1000, found 0"),
        (
            {"num_layers": 10**12},
            "'model.num_layers' must be a whole number from 1 to 1000, found 1000000000000",
        ),
        ({"use_pbc": 1}, "'model.use_pbc' must be True or False, found 1"),
        ({"lmax_list": 4}, "'model.lmax_list' must be a list of numbers or null, found 4"),
        ({"lmax_list": [2.5]}, "'model.lmax_list' must be a list of numbers or null, found [2.5]"),
        ({"max_radius": -1.0}, "'model.max_radius' must be a number above 0 to 1000, found -1.0"),
        ({"alpha_drop": 2}, "'model.alpha_drop' must be a number from 0 to 1, found 2"),
        ({"norm_type": None}, "'model.norm_type' must be a text, found None"),
    ],
)
def test_arguments_of_models(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_model_arguments(EquiformerV2DeNS, settings)


def test_arguments_of_models_that_pass() -> None:
    check_model_arguments(
        EquiformerV2DeNS, {"lmax_list": None, "max_radius": 6, "avg_degree": None, "who": 1}
    )


# ------------------------------------------------------------------ cells


def cells(*each: tuple[list[list[float]], list[bool]]) -> Data:
    return Data(
        cell=torch.tensor([cell for cell, _ in each]),
        pbc=torch.tensor([pbc for _, pbc in each]),
        sid=[100 + index for index in range(len(each))],
    )


CUBE = ([[5.0, 0, 0], [0, 5, 0], [0, 0, 5]], [True] * 3)


@pytest.mark.parametrize(
    "cell",
    [
        CUBE,
        ([[0.0, 5, 0], [5, 0, 0], [0, 0, 5]], [True] * 3),  # left-handed
        ([[0.0] * 3] * 3, [False] * 3),
        ([[5.0, 0, 0], [0, 5, 0], [0, 0, 0.01]], [True, True, False]),
        ([[1e8, 0, 0], [0, 1, 0], [0, 0, 1]], [True] * 3),
    ],
)
def test_cells_that_repeat(cell: Any) -> None:
    check_cells(cells(CUBE, cell))


@pytest.mark.parametrize(
    "cell",
    [
        ([[0.0] * 3] * 3, [True, False, False]),
        ([[1.0] * 3] * 3, [True] * 3),
        ([[5.0, 0, 0], [0, 5, 0], [0, 0, 0]], [True, True, False]),
        ([[5.0, 0, 0], [0, 5, 0], [0, 0, 0.01]], [True] * 3),
        ([[math.nan, 0, 0], [0, 5, 0], [0, 0, 5]], [False] * 3),
        ([[math.inf, 0, 0], [0, 5, 0], [0, 0, 5]], [True] * 3),
    ],
)
def test_cells_that_do_not(cell: Any) -> None:
    with pytest.raises(
        ValueError, match=r"Structure 1 in the batch \(sid 101\) has a 'cell' that does not repeat"
    ):
        check_cells(cells(CUBE, cell))


def test_empty_sections_are_left_out(given: dict[str, Any]) -> None:
    changed = as_fairchem_reads(given["optimizer"] | {"optimizer_params": None})
    assert "optimizer_params" not in changed and changed["clip_grad_norm"] == 100


def test_a_metric_that_decides_is_not_asked_for_where_nothing_is_evaluated(given: dict[str, Any]) -> None:
    del given["evaluation_metrics"]["primary_metric"], given["dataset"]["val"]
    check_run(given)


def test_a_noise_loss_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'loss_functions.noise.fn' must name a loss.*found None"):
        NoiseLoss.from_config({"fn": None, "coefficient": 10})


@pytest.mark.parametrize("wrong", [[], {}, "float8"])
def test_precisions_that_do_not_exist(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"'optim.amp_dtype' must be"):
        StepSettings.from_config({"amp_dtype": wrong})
