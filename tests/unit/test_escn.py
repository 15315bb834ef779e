"""Heads, refused settings, checkpoints, weight decay, training and configurations of eSCN + DeNS."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import load_config
from fairchem.core.models.escn.escn import eSCN
from torch import Tensor
from torch_geometric.data import Batch, Data

from fairchem_dens.models import ESCNDeNS
from fairchem_dens.models.graph import edge_frames

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = ("oc20/escn_dens_2M_20ep.yml", "oc20/escn_2M_20ep.yml")

SETTINGS: dict[str, Any] = {
    "use_pbc": True,
    "regress_forces": True,
    "otf_graph": True,
    "max_neighbors": 12,
    "cutoff": 6.0,
    "num_layers": 2,
    "lmax_list": [2],
    "mmax_list": [1],
    "sphere_channels": 8,
    "hidden_channels": 8,
    "edge_channels": 8,
    "num_sphere_samples": 16,
    "distance_resolution": 0.2,
}
OWN = ("force_embedding.", "denoising_pos_block.")
"""Parameters that fairchem's eSCN has no counterpart of."""


@pytest.fixture
def batch(structure: Callable[..., Data]) -> Batch:
    """Two ordinary structures, of 12 and 7 atoms."""
    return Batch.from_data_list([structure(0), structure(1, natoms=7)])


@pytest.fixture
def corrupted(batch: Batch) -> Batch:
    """The first structure corrupted in every other atom, the second an ordinary one; both with all fields."""
    batch = batch.clone()
    first = batch.batch == 0
    batch.noise_mask = first & (torch.arange(len(first)) % 2 == 0)
    batch.noise_vec = 0.1 * torch.randn(len(first), 3) * batch.noise_mask[:, None]
    batch.condition_forces = batch.forces * batch.noise_mask[:, None]
    batch.sigmas = 0.1 * first[:, None]
    batch.corrupted = torch.tensor([True, False])
    return batch


def build(**changes: Any) -> ESCNDeNS:
    torch.manual_seed(0)
    return ESCNDeNS(**SETTINGS | changes).eval()


def randomised(model: ESCNDeNS) -> ESCNDeNS:
    """Of the size that learning makes them: signals neither vanish nor explode, biases are not zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(scale * torch.randn_like(parameter))
    return model


def predict(model: torch.nn.Module, data: Data) -> dict[str, Tensor]:
    # The stock model switches gradients on by itself.
    with torch.no_grad():
        return {name: value.detach() for name, value in model(data).items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """To within ``tolerance`` of the largest output."""
    for name in expected:
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance * scale, msg=name)


@pytest.fixture(scope="module")
def model() -> ESCNDeNS:
    """In evaluation mode; a test that changes anything about it makes its own."""
    return randomised(build())


def test_is_found_by_its_registered_and_its_dotted_name() -> None:
    importlib.import_module("fairchem_dens.register")
    for name in ("escn_dens", "fairchem_dens.models.ESCNDeNS"):
        assert registry.get_model_class(name) is ESCNDeNS


class TestOutputs:
    def test_shapes(self, model, corrupted):
        shapes = {name: tuple(value.shape) for name, value in predict(model, corrupted).items()}
        assert shapes == {"energy": (2,), "forces": (19, 3), "noise": (19, 3)}

    def test_noise_head_costs_nothing_in_plain_inference(self, model, batch, corrupted):
        calls: list[str] = []
        handle = model.denoising_pos_block.register_forward_hook(lambda *_: calls.append("called"))
        try:
            assert set(predict(model, batch)) == {"energy", "forces"}
            assert not calls
            predict(model, corrupted)
            assert calls == ["called"]
        finally:
            handle.remove()

    def test_noise_in_training_also_without_conditioning(self, batch):
        assert set(build().train()(batch)) == {"energy", "forces", "noise"}

    def test_noise_has_its_own_head(self, model, corrupted):
        before = predict(model, corrupted)
        assert not torch.equal(before["noise"], before["forces"])
        doubled = copy.deepcopy(model)
        with torch.no_grad():
            doubled.denoising_pos_block.fc3.weight.mul_(2)
        after = predict(doubled, corrupted)
        assert torch.equal(after["forces"], before["forces"])
        assert torch.equal(after["energy"], before["energy"])
        torch.testing.assert_close(after["noise"], 2 * before["noise"])

    @pytest.mark.parametrize("training", [False, True])
    def test_predict_noise_false_keeps_the_head_unused(self, corrupted, training):
        model = build(predict_noise=False).train(training)
        outputs = model(corrupted)
        assert set(outputs) == {"energy", "forces"}
        sum(value.sum() for value in outputs.values()).backward()
        assert set(model.state_dict()) == set(build().state_dict())
        assert not any(one.requires_grad for one in model.denoising_pos_block.parameters())

    def test_energy_alone(self, corrupted):
        model = build(regress_forces=False).train()
        outputs = model(corrupted)
        assert set(outputs) == {"energy"}
        assert not any("force_block" in name or "denoising" in name for name in model.state_dict())

    def test_labels_are_never_read(self, model, corrupted):
        expected = predict(model, corrupted)
        corrupted.forces, corrupted.energy = 100 * corrupted.forces, 100 * corrupted.energy
        corrupted.noise_vec, corrupted.noise_mask = 100 * corrupted.noise_vec, ~corrupted.noise_mask
        assert_equal(predict(model, corrupted), expected)


class TestConditioning:
    def test_is_seen(self, model, corrupted):
        expected = predict(model, corrupted)
        corrupted.condition_forces = 2 * corrupted.condition_forces
        found = predict(model, corrupted)
        scale = expected["noise"].abs().max()
        assert (found["noise"][:12] - expected["noise"][:12]).abs().max() > 1e-2 * scale
        assert torch.equal(found["noise"][12:], expected["noise"][12:])

    def test_of_zero_is_none(self, model, batch):
        zero = batch.clone()
        zero.condition_forces = torch.zeros_like(batch.forces)
        found = predict(model, zero)
        assert torch.isfinite(found.pop("noise")).all()
        assert_equal(found, predict(model, batch))

    def test_is_hidden_without_force_encoding(self, batch, corrupted):
        model = randomised(build(use_force_encoding=False))
        outputs = predict(model, corrupted)
        others = corrupted.clone()
        others.condition_forces = torch.randn_like(others.forces)
        assert_equal(predict(model, others), outputs)
        del outputs["noise"]
        assert_equal(outputs, predict(model, batch))

    def test_bias_is_there_in_every_mode(self, model, batch, corrupted):
        """It has the same effect as that much more atom embedding, whatever is conditioned."""
        folded, without = copy.deepcopy(model), copy.deepcopy(model)
        with torch.no_grad():
            folded.sphere_embedding.weight += folded.force_embedding.bias
            folded.force_embedding.bias.zero_()
            without.force_embedding.bias.zero_()
        everything = corrupted.clone()
        everything.condition_forces = everything.forces
        for data in (batch, corrupted, everything):
            expected = predict(model, data)
            # Single precision, through sums over 16 points that cancel.
            assert_close(predict(folded, data), expected, tolerance=1e-4)
            difference = predict(without, data)["energy"] - expected["energy"]
            assert difference.abs().max() > 1e-2 * expected["energy"].abs().max()

    def test_starts_small(self):
        """As the paper's code, which follows eSCN's embeddings of the atoms of an edge."""
        embedding = build(lmax_list=[6], sphere_channels=64).force_embedding
        assert 0.0009 < embedding.weight.abs().max() <= 0.001
        assert (embedding.bias == 0).all()


class TestSettings:
    def test_typo_is_refused_with_the_nearest_argument(self):
        with pytest.raises(ValueError, match=r"model\.num_layer'.*'num_layers'"):
            build(num_layer=3)

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
        model = build(**changes).train()
        outputs = model(batch if kind == "ordinary" else corrupted)
        sum(value.square().sum() for value in outputs.values()).backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name

    def test_force_embedding_learns_all_degrees_from_conditioned_batches(self, corrupted):
        model = build().train()
        model(corrupted)["noise"].square().sum().backward()
        assert (model.force_embedding.weight.grad.abs().amax(dim=(1, 2)) > 0).all()

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

    def test_unknown_element_is_refused(self, model, batch):
        batch.atomic_numbers[15] = 90
        with pytest.raises(ValueError, match=r"90 of structure 1.*'model\.max_num_elements'"):
            predict(model, batch)


class TestStateDict:
    def test_holds_parameters_only(self, model):
        assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]
        assert model.num_params == sum(value.numel() for value in model.state_dict().values())

    def test_round_trip(self, model, corrupted):
        other = build()
        assert not torch.equal(predict(other, corrupted)["energy"], predict(model, corrupted)["energy"])
        other.load_state_dict(model.state_dict(), strict=True)
        assert_equal(predict(other, corrupted), predict(model, corrupted))

    def test_copies_and_pickles(self, model, corrupted, tmp_path):
        torch.save(model, tmp_path / "model.pt")
        for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
            assert_equal(predict(other, corrupted), predict(model, corrupted))
            assert list(other.state_dict()) == list(model.state_dict())


@pytest.fixture(scope="module")
def stock() -> eSCN:
    """fairchem's own model, without DeNS, of the same arguments."""
    torch.manual_seed(3)
    return randomised(eSCN(**SETTINGS).eval())


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
        limited = randomised(build(max_neighbors=limit, enforce_max_neighbors_strictly=strict, **changes))
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
    run_settings["model"] = {"name": "fairchem_dens.models.ESCNDeNS", **copy.deepcopy(SETTINGS)}
    schedule = load_config(str(CONFIGS / RUNS[0]))[0]["optim"]["scheduler_params"]
    run_settings["optim"] |= {"scheduler_params": schedule, "optimizer_params": {"amsgrad": True}}
    return run_settings


class TestTraining:
    def test_trains_validates_and_predicts(self, escn_settings, make_trainer):
        trainer = make_trainer(escn_settings)
        before = {name: value.clone() for name, value in trainer._unwrapped_model.state_dict().items()}
        trainer.train(disable_eval_tqdm=True)
        assert trainer.step == 12
        after = trainer._unwrapped_model.state_dict()
        unchanged = {name for name, value in after.items() if torch.equal(value, before[name])}
        assert unchanged == {"sphere_points", "sphharm_weights.0"}
        assert {"denoising_energy_mae", "denoising_pos_mae"} <= set(trainer.metrics)
        validated = trainer.validate(disable_tqdm=True)
        assert validated["forces_mae"]["numel"] > 0
        assert not any("denoising" in name for name in validated)
        predictions = trainer.predict(trainer.test_loader, disable_tqdm=True)
        assert len(predictions["energy"]) == len(predictions["forces"]) == 6

    def test_without_dens(self, escn_settings, make_trainer):
        del escn_settings["dataset"]["train"]["transforms"]["dens"]
        del escn_settings["loss_functions"][2]
        trainer = make_trainer(escn_settings)
        trainer.train(disable_eval_tqdm=True)
        assert not any("denoising" in name for name in trainer.metrics)
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
