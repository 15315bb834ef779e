"""eSCN: settings, precision, training, configurations, and what it has in common with fairchem's."""

from __future__ import annotations

import copy
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import load_config
from fairchem.core.models.escn.escn import eSCN
from torch_geometric.data import Batch, Data

from fairchem_dens.models import ESCNDeNS
from fairchem_dens.models.graph import edge_frames
from model_cases import ESCN, rescaled
from outputs import assert_close, assert_equal, assert_learns, predict
from printed import metrics_printed_by

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = ("oc20/escn_dens_2M_20ep.yml", "oc20/escn_2M_20ep.yml")

OWN = ("force_embedding.", "denoising_pos_block.")
"""Parameters that fairchem's eSCN has no counterpart of."""


def build(**changes: Any) -> ESCNDeNS:
    torch.manual_seed(0)
    return ESCNDeNS(**ESCN | changes).eval()


@pytest.fixture(scope="module")
def model() -> ESCNDeNS:
    """In evaluation mode; a test that changes anything about it makes its own."""
    return rescaled(build())


def test_is_found_by_its_registered_and_its_dotted_name() -> None:
    importlib.import_module("fairchem_dens.register")
    for name in ("escn_dens", "fairchem_dens.models.ESCNDeNS"):
        assert registry.get_model_class(name) is ESCNDeNS


def test_force_embedding_starts_small():
    """As the paper's code, which follows eSCN's embeddings of the atoms of an edge."""
    embedding = build(lmax_list=[6], sphere_channels=64).force_embedding
    assert 0.0009 < embedding.weight.abs().max() <= 0.001
    assert (embedding.bias == 0).all()


class TestSettings:
    @pytest.mark.parametrize(
        ("name", "value"),
        [("distance_function", "bessel"), ("use_grid", False), ("resolution", 4), ("resolution", 7)],
    )
    def test_unsupported_value_is_refused_by_name(self, name, value):
        with pytest.raises(ValueError, match=rf"'model\.{name}'.*{value}"):
            build(**{name: value})

    @pytest.mark.parametrize(
        "changes",
        [
            {"lmax_list": [2, 1], "mmax_list": [2, 1]},
            {"lmax_list": [2], "mmax_list": [3]},
            {"lmax_list": 2},
            {"lmax_list": [12]},
        ],
    )
    def test_unsupported_degrees_are_refused(self, changes):
        with pytest.raises(ValueError, match=r"lmax_list|mmax_list"):
            build(**changes)

    @pytest.mark.parametrize(
        "changes",
        [
            {"distance_function": "sigmoid"},
            {"distance_function": "linearsigmoid"},
            {"distance_function": "silu"},
            {"mmax_list": [0]},
            {"lmax_list": [3], "mmax_list": [3]},
            {"resolution": 10},
            {"enforce_max_neighbors_strictly": False},
            {"use_grid": True, "show_timing_info": True},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("kind", ["ordinary", "corrupted"])
    def test_supported_variants_predict_and_learn(self, batch, corrupted, kind, changes):
        """Distributed training waits for the gradient of each parameter."""
        assert_learns(build(**changes).train(), batch if kind == "ordinary" else corrupted)

    def test_takes_the_arguments_of_the_stock_model_with_their_defaults(self):
        ours, stock = (inspect.signature(one).parameters for one in (ESCNDeNS, eSCN))
        assert set(stock) - set(ours) == {"use_pbc_single", "activation_checkpoint"}
        different = {name for name in set(ours) & set(stock) if ours[name].default != stock[name].default}
        assert different == {"otf_graph"}, "corrupted positions need a search"

    def test_the_callers_lists_are_left_alone(self):
        lists = {"lmax_list": [2], "mmax_list": [1]}
        model = build(**lists)
        model.lmax_list[0] = 5
        assert lists == {"lmax_list": [2], "mmax_list": [1]}


@pytest.fixture(scope="module")
def stock() -> eSCN:
    """fairchem's own model, without DeNS, of the same arguments."""
    torch.manual_seed(3)
    return rescaled(eSCN(**ESCN).eval())


class TestStockModel:
    @pytest.fixture
    def ours(self, stock) -> ESCNDeNS:
        ours = build()
        result = ours.load_state_dict(stock.state_dict(), strict=False)
        assert not result.unexpected_keys
        assert result.missing_keys and all(name.startswith(OWN) for name in result.missing_keys)
        return ours

    def test_same_energy_and_forces_in_the_same_frames(self, ours, stock, batch, monkeypatch):
        """The bias of the force embedding starts at zero. To rounding, which the heads' sums amplify."""
        monkeypatch.setattr(
            stock, "_init_edge_rot_mat", lambda data, edges, vectors: edge_frames(vectors, random_roll=False)
        )
        expected = predict(stock, batch.clone())
        assert_close(predict(ours, batch), expected, tolerance=2e-4)
        with torch.no_grad():
            ours.force_embedding.bias.fill_(0.5)
        difference = predict(ours, batch)["forces"] - expected["forces"]
        assert difference.abs().max() > 1e-2 * expected["forces"].abs().max()

    def test_decays_the_same_parameters(self, model, stock):
        own_ones = {name for name in model.no_weight_decay() if name.startswith(OWN)}
        assert model.no_weight_decay() - own_ones == set(stock.no_weight_decay())
        assert own_ones == {
            "force_embedding.weight",
            "force_embedding.bias",
            "denoising_pos_block.fc1.bias",
            "denoising_pos_block.fc2.bias",
        }
        assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}


def test_tables_move_with_the_model(model, batch):
    """Tensors that are no buffers stay on the device of the first pass, but for those made anew in each."""
    predict(model, batch)
    kept = {
        name for module in model.modules() for name, value in vars(module).items() if torch.is_tensor(value)
    }
    # The last is a list of indices, which may be on another device than what it picks from.
    assert kept == {"wigner", "wigner_inv", "mask_indices_cache"}


def test_neighbours_as_far_as_the_last_one_are_kept_unless_strictly_limited():
    """An atom of a simple cubic lattice has six nearest ones; of four allowed, which would be left?"""
    lattice = Data(
        pos=torch.zeros(1, 3), cell=3 * torch.eye(3)[None], atomic_numbers=torch.tensor([29]), natoms=1
    )
    changes: dict[str, Any] = {"cutoff": 3.5, "distance_resolution": 0.1}
    energies = {}
    for limit, strict in ((4, True), (4, False), (6, True)):
        limited = rescaled(build(max_neighbors=limit, enforce_max_neighbors_strictly=strict, **changes))
        energies[limit, strict] = predict(limited, Batch.from_data_list([lattice]))["energy"].item()
    assert energies[4, False] == energies[6, True] != energies[4, True]


class TestMixedPrecision:
    def test_does_not_round_the_tables(self, model, corrupted):
        """fairchem makes the tables in the first pass, at whatever precision that has."""
        fresh = build()
        fresh.load_state_dict(model.state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = predict(fresh, corrupted)
        assert_equal(predict(fresh, corrupted), predict(model, corrupted))
        # Seven bits of mantissa are some 1 %.
        assert_close(rough, predict(model, corrupted), tolerance=0.05)
        assert {value.dtype for value in rough.values()} == {torch.float32}

    def test_rotations_stay_exact(self, model, batch):
        fresh = copy.deepcopy(model)
        predict(fresh, batch)
        expected = fresh.SO3_edge_rot[0].wigner
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predict(fresh, batch)
        assert torch.equal(fresh.SO3_edge_rot[0].wigner, expected)


@pytest.fixture
def escn_settings(run_settings: dict[str, Any]) -> dict[str, Any]:
    """A small run of eSCN, with the schedule of the paper's."""
    run_settings["model"] = {"name": "fairchem_dens.models.ESCNDeNS", **copy.deepcopy(ESCN)}
    schedule = load_config(str(CONFIGS / RUNS[0]))[0]["optim"]["scheduler_params"]
    run_settings["optim"] |= {"scheduler_params": schedule, "optimizer_params": {"amsgrad": True}}
    return run_settings


class TestTraining:
    def test_trains_validates_and_predicts(self, escn_settings, make_trainer):
        trainer = make_trainer(escn_settings, print_every=12)
        before = {name: value.clone() for name, value in trainer._unwrapped_model.state_dict().items()}
        printed = metrics_printed_by(trainer)
        trainer.train(disable_eval_tqdm=True)
        assert trainer.step == 12
        after = trainer._unwrapped_model.state_dict()
        unchanged = {name for name, value in after.items() if torch.equal(value, before[name])}
        assert unchanged == {"sphere_points", "sphharm_weights.0"}
        assert {"denoising_energy_mae", "denoising_pos_mae"} <= printed
        validated = trainer.validate(disable_tqdm=True)
        assert validated["forces_mae"]["numel"] > 0
        assert not any("denoising" in name for name in validated)
        predictions = trainer.predict(trainer.test_loader, disable_tqdm=True)
        assert len(predictions["energy"]) == len(predictions["forces"]) == 6

    def test_without_dens(self, escn_settings, make_trainer):
        del escn_settings["dataset"]["train"]["transforms"]["dens"]
        del escn_settings["loss_functions"][2]
        trainer = make_trainer(escn_settings, print_every=12)
        printed = metrics_printed_by(trainer)
        trainer.train(disable_eval_tqdm=True)
        assert "forces_mae" in printed
        assert not any("denoising" in name for name in printed)
        assert not trainer._unwrapped_model.predict_noise

    def test_learns_forces_and_noise_of_one_batch(self, corrupted):
        """Random ones, by heart: both fall below a third of what predicting zero costs."""
        model = build(sphere_channels=16, hidden_channels=16, num_sphere_samples=64).train()
        corrupted.pos = corrupted.pos + corrupted.noise_vec
        noise, mask = corrupted.noise_vec / 0.1, corrupted.noise_mask
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, amsgrad=True)
        for _ in range(60):
            outputs = model(corrupted)
            of_forces = (outputs["forces"] - corrupted.forces)[~mask].norm(dim=1).mean()
            of_noise = (outputs["noise"] - noise)[mask].norm(dim=1).mean()
            optimizer.zero_grad()
            (of_forces + of_noise).backward()
            optimizer.step()
        assert of_forces.item() < corrupted.forces[~mask].norm(dim=1).mean().item() / 3
        assert of_noise.item() < noise[mask].norm(dim=1).mean().item() / 3

    def test_schedule_of_the_paper(self, escn_settings, make_trainer):
        """Of 6 steps an epoch: warm-up in the first, then a factor of .3 at 11.7, 15 and 18.3 epochs."""
        escn_settings["optim"]["max_epochs"] = 20
        trainer = make_trainer(escn_settings)
        (factor,) = trainer.scheduler.scheduler.lr_lambdas
        steps = {0: 0.2, 1: 1.0, 69: 1.0, 70: 0.3, 89: 0.3, 90: 0.09, 108: 0.09, 109: 0.027, 120: 0.027}
        assert {step: pytest.approx(factor(step)) for step in steps} == steps

    def test_embeddings_and_biases_are_not_decayed(self, escn_settings, make_trainer):
        """fairchem's rule, which the paper's code leaves to eSCN; not that of EquiformerV2."""
        escn_settings["optim"]["optimizer_params"]["weight_decay"] = 0.01
        trainer = make_trainer(escn_settings)
        names = {id(one): name for name, one in trainer._unwrapped_model.named_parameters()}
        kept, decayed = (
            {names[id(one)] for one in group["params"]}
            for group in sorted(trainer.optimizer.param_groups, key=lambda group: group["weight_decay"])
        )
        assert {"force_embedding.weight", "sphere_embedding.weight", "energy_block.fc1.bias"} <= kept
        assert {"energy_block.fc1.weight", "layer_blocks.0.fc1_sphere.weight"} <= decayed

    def test_the_schedule_of_the_settings_is_left_alone(self, escn_settings, make_trainer):
        """A job that SLURM starts again has the same settings in its hands."""
        optim = copy.deepcopy(escn_settings["optim"])
        make_trainer(escn_settings, optimizer=optim)
        assert optim["scheduler_params"] == escn_settings["optim"]["scheduler_params"]


class TestConfigurations:
    def test_row_of_the_paper(self):
        config, _, _ = load_config(str(CONFIGS / RUNS[0]))
        assert config["dataset"]["train"]["transforms"]["dens"] == {
            "prob": 0.5,
            "std": 0.15,
            "corrupt_ratio": 0.5,
            "switch": "batch",
        }
        assert config["loss_functions"] == [
            {"energy": {"fn": "mae", "coefficient": 2}},
            {"forces": {"fn": "l2mae", "coefficient": 100}},
            {"noise": {"fn": "l2mae", "coefficient": 10}},
        ]
        optim = config["optim"]
        assert (optim["lr_initial"], optim["batch_size"], optim["max_epochs"]) == (8e-4, 6, 20)
        assert optim["optimizer_params"] == {"amsgrad": True, "weight_decay": 0.01}
        assert optim["clip_grad_norm"] == 100 and optim["ema_decay"] == 0.999

    def test_the_baseline_differs_in_dens_alone(self):
        dens, baseline = (load_config(str(CONFIGS / run))[0] for run in RUNS)
        del dens["dataset"]["train"]["transforms"]["dens"]
        del dens["loss_functions"][2]
        assert dens == baseline

    @pytest.mark.parametrize("run", RUNS)
    def test_builds_a_model_of_the_size_in_the_header(self, run):
        config, overwritten, conflicts = load_config(str(CONFIGS / run))
        assert overwritten == conflicts == []
        settings = config["model"]
        model = registry.get_model_class(settings.pop("name"))(**settings)
        assert model.num_params == 51_878_784
        if run == RUNS[0]:
            assert f"{model.num_params:,} parameters" in (CONFIGS / run).read_text()
