"""What `validate_dens_model` lets pass, and that it names whichever contract a model breaks."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ase.build import bulk
from e3nn import o3
from fairchem.core import OCPCalculator
from fairchem.core.common.registry import registry
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from fairchem_dens import keys
from fairchem_dens.conformance import CONTRACTS, broken_contracts, validate_dens_model
from model_cases import MODELS, ModelCase, model_case
from printed import metrics_printed_by

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = ROOT / "docs" / "new_model.md"


@pytest.fixture
def batch(structure: Callable[..., Data]) -> Batch:
    return Batch.from_data_list([structure(0), structure(1, natoms=7), structure(2, natoms=9)])


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest, model_settings: dict[str, Any]) -> ModelCase:
    return model_case(request.param, model_settings)


class Plain(nn.Module):
    """Keeps every contract by the least means: each atom for itself, no neighbours.

    A subclass breaks one of them.
    """

    use_force_encoding = True

    def __init__(self, otf_graph: bool = True) -> None:
        super().__init__()
        self.elements = nn.Embedding(90, 4)
        self.from_forces = nn.Linear(3, 4)
        self.energy = nn.Linear(4, 1)
        self.forces = nn.Linear(4, 3)
        self.noise = nn.Linear(4, 3)
        self.register_buffer("passes", torch.zeros(()))

    def encoded(self, data: Any) -> Tensor:
        seen = self.use_force_encoding and keys.CONDITION_FORCES in data
        forces = data.condition_forces if seen else torch.zeros_like(data.pos)
        return self.from_forces(forces)

    def features(self, data: Any) -> Tensor:
        return torch.tanh(self.elements(data.atomic_numbers.long()) + self.encoded(data) + data.pos[:, :1])

    def sums(self, of_atoms: Tensor, data: Any) -> Tensor:
        return of_atoms.new_zeros(len(data.natoms)).index_add(0, data.batch, of_atoms)

    def has_noise(self, data: Any) -> bool:
        return self.training or keys.CONDITION_FORCES in data

    def forward(self, data: Any) -> dict[str, Tensor]:
        x = self.features(data)
        outputs = {"energy": self.sums(self.energy(x)[:, 0], data), "forces": self.forces(x)}
        if self.has_noise(data):
            outputs["noise"] = self.noise(x)
        return outputs


class WithoutArgument(Plain):
    def __init__(self) -> None:
        super().__init__()


class EnergyOfAnotherShape(Plain):
    def forward(self, data):
        outputs = super().forward(data)
        return {**outputs, "energy": outputs["energy"][:, None]}


class WithoutForces(Plain):
    def forward(self, data):
        outputs = super().forward(data)
        del outputs["forces"]
        return outputs


class NoiseInWholeNumbers(Plain):
    def forward(self, data):
        outputs = super().forward(data)
        return {**outputs, **{name: outputs[name].long() for name in outputs if name == "noise"}}


class NoiseThatIsNotFinite(Plain):
    def forward(self, data):
        outputs = super().forward(data)
        return {**outputs, **{name: outputs[name] / 0 for name in outputs if name == "noise"}}


class TupleOfOutputs(Plain):
    def forward(self, data):
        return tuple(super().forward(data).values())


class Crashing(Plain):
    def forward(self, data):
        return super().forward(data) if keys.SIGMAS in data else data.sigmas


class NoiseInPlainInference(Plain):
    def has_noise(self, data):
        return True


class NoNoiseWhereConditioned(Plain):
    def has_noise(self, data):
        return self.training


class NoNoiseInOrdinaryTraining(Plain):
    def has_noise(self, data):
        return keys.CONDITION_FORCES in data


class UnusedParameter(Plain):
    def __init__(self, otf_graph=True):
        super().__init__()
        self.forgotten = nn.Linear(2, 2)


class UsedInCorruptedBatchesOnly(Plain):
    def encoded(self, data):
        if keys.CONDITION_FORCES not in data or not data.corrupted.any():
            return data.pos.new_zeros(len(data.pos), 4)
        return super().encoded(data)


class ForcesWithoutGradient(Plain):
    def forward(self, data):
        outputs = super().forward(data)
        return {**outputs, "forces": outputs["forces"].detach()}


class GradientThatIsNotFinite(Plain):
    def features(self, data):
        encoded = self.encoded(data)
        return super().features(data) + (0 * encoded).square().sum(dim=1, keepdim=True).sqrt()


class OverwritesWhatTheGradientNeeds(Plain):
    def features(self, data):
        x = super().features(data)
        x += x * x
        x.mul_(2)
        return x.sigmoid().mul_(x)


class NoiseHeadAlways(Plain):
    def forward(self, data):
        outputs = super().forward(data)
        self.noise(self.features(data))
        return outputs


class AddsAField(Plain):
    def forward(self, data):
        data.edge_index = torch.zeros(2, 0, dtype=torch.long)
        return super().forward(data)


class ConvertsAField(Plain):
    def forward(self, data):
        data.atomic_numbers = data.atomic_numbers.int()
        return super().forward(data)


class MovesAtomsInPlace(Plain):
    def forward(self, data):
        data.pos -= 1e-3
        return super().forward(data)


class WantsGradientsOfPositions(Plain):
    def forward(self, data):
        data.pos.requires_grad_()
        return super().forward(data)


class RemovesAField(Plain):
    def forward(self, data):
        if keys.SIGMAS in data:
            del data[keys.SIGMAS]
        return super().forward(data)


class LeavesGradients(Plain):
    def forward(self, data):
        with torch.enable_grad():
            self.features(data).sum().backward()
        return super().forward(data)


class SwitchesItsMode(Plain):
    def forward(self, data):
        outputs = super().forward(data)
        self.noise.eval()
        return outputs


class CountsInEvaluation(Plain):
    def forward(self, data):
        self.passes += 1
        return super().forward(data)


class Random(Plain):
    def features(self, data):
        return super().features(data) + 0.01 * torch.randn(len(data.pos), 1)


class ReadsForces(Plain):
    def features(self, data):
        x = super().features(data)
        return x + data.forces[:, :1] if "forces" in data else x


class NeedsAnEnergy(Plain):
    def features(self, data):
        return super().features(data) + 0 * data.energy[data.batch][:, None]


class NormalisesOverTheBatch(Plain):
    def features(self, data):
        x = super().features(data)
        return x - x.mean(dim=0)


class TreatsZerosAsForces(Plain):
    def features(self, data):
        return super().features(data) + (0.5 if keys.CONDITION_FORCES in data else 0)


class BlindToForces(Plain):
    def encoded(self, data):
        return 0 * self.from_forces(torch.zeros_like(data.pos))


class SeesWhatIsHidden(Plain):
    def encoded(self, data):
        self.use_force_encoding = True
        encoded = super().encoded(data)
        self.use_force_encoding = False
        return encoded


class SharesItsConditioning(Plain):
    """Only within a batch of which every structure is corrupted, or it would break others first."""

    def features(self, data):
        x = super().features(data)
        if keys.CORRUPTED in data and data.corrupted.all() and len(data.natoms) > 1:
            x = x + 0.1 * self.encoded(data).mean(dim=0)
        return x


BROKEN = [
    (WithoutArgument, "arguments", "takes nothing"),
    (EnergyOfAnotherShape, "outputs", r"'energy' has the shape \(3, 1\) instead of \(3,\)"),
    (WithoutForces, "outputs", "there is no 'forces' but energy"),
    (NoiseInWholeNumbers, "outputs", "with 'condition_forces' 'noise' is of type torch.int64"),
    (NoiseThatIsNotFinite, "outputs", "'noise' is not finite"),
    (TupleOfOutputs, "outputs", "returns a tuple"),
    (Crashing, "outputs", "raises AttributeError.*sigmas"),
    (NoiseInPlainInference, "noise", "in evaluation without 'condition_forces' there is some"),
    (NoNoiseWhereConditioned, "noise", "in evaluation with 'condition_forces' there is none"),
    (NoNoiseInOrdinaryTraining, "noise", "in training without 'condition_forces' there is none"),
    (UnusedParameter, "gradients", "'forgotten.weight' and 1 more"),
    (
        UsedInCorruptedBatchesOnly,
        "gradients",
        "without corrupted structures gives none to 'from_forces.weight'",
    ),
    (ForcesWithoutGradient, "gradients", "'forces' cannot teach it"),
    (GradientThatIsNotFinite, "gradients", "not finite"),
    (OverwritesWhatTheGradientNeeds, "gradients", "inplace operation"),
    (NoiseHeadAlways, "noise_head", r"'noise\.(weight|bias)' and 1 more"),
    (AddsAField, "batch", "adds 'edge_index'"),
    (ConvertsAField, "batch", "changes 'atomic_numbers'"),
    (MovesAtomsInPlace, "batch", "in evaluation without 'condition_forces' it changes 'pos'"),
    (WantsGradientsOfPositions, "batch", "changes 'pos'"),
    (RemovesAField, "batch", "with 'condition_forces' it removes 'sigmas'"),
    (LeavesGradients, "model", "leaves a gradient on 'elements.weight' and 2 more"),
    (SwitchesItsMode, "model", "in training .* switches 'noise' to the other mode"),
    (CountsInEvaluation, "model", "in evaluation .* changes 'passes'"),
    (Random, "repeatable", "the second time"),
    (ReadsForces, "labels", "without 'energy' and 'forces'"),
    (NeedsAnEnergy, "labels", "raises AttributeError.*energy"),
    (NormalisesOverTheBatch, "singles", "in a batch .* raise 'max_neighbors'"),
    (TreatsZerosAsForces, "zeros", "with zeros 'energy' of structure 0 differs"),
    (BlindToForces, "conditioning", "structure 0 does not see its own"),
    (SeesWhatIsHidden, "conditioning", "'use_force_encoding' is False"),
    (SharesItsConditioning, "own_structure", r"those of structure 0 change 'energy' of structure 1 by"),
]


def describe(model: nn.Module) -> dict[str, Any]:
    """All that a check could leave changed."""
    return {
        "modes": {name: module.training for name, module in model.named_modules()},
        "gradients": {name: one.grad for name, one in model.named_parameters()},
        "tensors": {name: id(one) for name, one in (*model.named_parameters(), *model.named_buffers())},
        "values": {
            name: one.detach().tolist() for name, one in (*model.named_parameters(), *model.named_buffers())
        },
    }


class TestModels:
    @pytest.mark.parametrize(
        ("weights", "changes"),
        [("fresh", {}), ("build", {}), ("build", {"use_force_encoding": False})],
        ids=["fresh", "randomised", "blind"],
    )
    def test_ours_keep_every_contract(self, case, batch, weights, changes):
        model = getattr(case, weights)(**changes)
        assert broken_contracts(model, batch) == {}

    def test_validation_of_ours_is_silent(self, case, batch):
        assert validate_dens_model(case.build(), batch) is None

    def test_ours_without_a_noise_head_do_not(self, case, batch):
        with pytest.raises(ValueError, match=rf"^{case.model.__name__} breaks the contract 'noise'"):
            validate_dens_model(case.build(predict_noise=False), batch)

    def test_a_stock_model_does_not(self, batch, model_settings):
        """It has no noise, and rolls the frames of edges at random in evaluation too."""
        stock = registry.get_model_class(
            "fairchem.core.models.equiformer_v2.equiformer_v2_deprecated.EquiformerV2"
        )
        torch.manual_seed(3)
        assert list(broken_contracts(stock(**model_settings), batch)) == ["noise", "repeatable"]


class TestBroken:
    @pytest.mark.parametrize(
        ("model", "contract", "says"), BROKEN, ids=[model.__name__ for model, _, _ in BROKEN]
    )
    def test_the_contract_is_named(self, batch, model, contract, says):
        torch.manual_seed(0)
        broken = model()
        broken.use_force_encoding = model is not SeesWhatIsHidden
        match = rf"(?s)^{model.__name__} breaks the contract '{contract}' \(.*\): .*{says}"
        with pytest.raises(ValueError, match=match) as raised:
            validate_dens_model(broken, batch)
        assert broken_contracts(broken, batch)[contract] == str(raised.value)

    def test_none_of_it_is_due_to_the_model_that_they_are_made_from(self, batch):
        assert broken_contracts(Plain(), batch) == {}

    def test_each_contract_is_broken_by_one(self):
        assert {contract for _, contract, _ in BROKEN} == set(CONTRACTS)

    def test_all_are_reported(self, batch):
        class Several(NoiseHeadAlways, ReadsForces, AddsAField): ...

        assert list(broken_contracts(Several(), batch)) == ["noise_head", "batch", "labels"]

    @pytest.mark.parametrize("model", [EnergyOfAnotherShape, Random])
    def test_nothing_is_said_of_what_cannot_be_judged(self, batch, model):
        assert len(broken_contracts(model(), batch)) == 1


class TestLeavesNoTrace:
    @pytest.mark.parametrize(
        "model", [Plain, MovesAtomsInPlace, LeavesGradients, CountsInEvaluation, Crashing]
    )
    @pytest.mark.parametrize("training", [False, True])
    def test_on_the_model_the_batch_and_random_numbers(self, batch, model, training):
        model = model().train(training)
        model.energy.train(not training)
        model.passes = torch.tensor(math.nan)
        model.forces.weight.grad = torch.ones(3, 4)
        before, fields, state = describe(model), batch.clone().to_dict(), torch.get_rng_state()
        with contextlib.suppress(ValueError):
            validate_dens_model(model, batch)
        assert repr(describe(model)) == repr(before)
        assert torch.equal(torch.get_rng_state(), state)
        after = batch.to_dict()
        assert after.keys() == fields.keys()
        assert all(
            torch.equal(torch.as_tensor(after[name]), torch.as_tensor(fields[name])) for name in fields
        )

    def test_gives_back_a_buffer_that_was_replaced(self, batch):
        class Replaces(Plain):
            def forward(self, data):
                self.passes = self.passes + 1
                return super().forward(data)

        model = Replaces()
        passes = model.passes
        assert list(broken_contracts(model, batch)) == ["model"]
        assert model.passes is passes and passes == 0


class TestBatch:
    def test_what_was_corrupted_before_does_not_matter(self, batch):
        batch.condition_forces = 1 / torch.zeros_like(batch.pos)
        batch.noise_mask = torch.ones(batch.num_nodes, dtype=torch.bool)
        batch.md = torch.ones(3, dtype=torch.bool)
        validate_dens_model(Plain(), batch)

    def test_old_names_of_labels_will_do(self, structure):
        structures = [structure(0), structure(1)]
        for data in structures:
            data.force, data.y = data.forces, data.energy
            del data.forces, data.energy
        validate_dens_model(Plain(), Batch.from_data_list(structures))

    def test_of_one_structure_is_refused(self, structure):
        with pytest.raises(ValueError, match="two structures or more, found one of 1"):
            validate_dens_model(Plain(), Batch.from_data_list([structure(0)]))

    def test_of_another_kind_is_refused(self, structure):
        with pytest.raises(ValueError, match="found a Data"):
            validate_dens_model(Plain(), structure(0))

    @pytest.mark.parametrize(
        ("change", "says"), [("remove", "no 'forces'"), ("zero", "only zeros for 'forces'")]
    )
    def test_without_forces_is_refused(self, structure, change, says):
        structures = [structure(0), structure(1)]
        for data in structures[change == "zero" :]:
            data.forces = None if change == "remove" else torch.zeros_like(data.forces)
        with pytest.raises(ValueError, match=rf"Structure \d of the batch has {says}"):
            validate_dens_model(Plain(), Batch.from_data_list(structures))

    def test_tolerance_decides_what_is_rounding(self, batch):
        class Rough(Plain):
            def forward(self, data):
                outputs = super().forward(data)
                return outputs | {"forces": outputs["forces"] * (1 + 1e-3 * len(data.natoms))}

        assert list(broken_contracts(Rough(), batch)) == ["singles"]
        assert not broken_contracts(Rough(), batch, tolerance=0.1)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the example, importable by the name that its YAML has for it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module("new_model")
    del sys.modules["new_model"]


@pytest.fixture
def example_run(lmdb_folders: dict[str, Path]) -> dict[str, Any]:
    """The example's YAML on the tests' data, for two steps."""
    settings = yaml.safe_load((EXAMPLES / "new_model.yml").read_text())
    for split in ("train", "val"):
        settings["dataset"][split]["src"] = str(lmdb_folders[split])
    settings["optim"] |= {"batch_size": 12, "max_epochs": 1}
    return settings


class TestExample:
    """The model of `docs/new_model.md`."""

    def test_keeps_every_contract(self, example, batch):
        torch.manual_seed(0)
        assert broken_contracts(example.ScalarsAndVectors(), batch) == {}

    def test_registers_itself(self, example):
        for name in ("scalars_and_vectors", "new_model.ScalarsAndVectors"):
            assert registry.get_model_class(name) is example.ScalarsAndVectors

    def test_is_equivariant(self, example, batch):
        torch.manual_seed(0)
        model = example.ScalarsAndVectors(max_neighbors=500, cutoff=3.5).eval()
        batch.condition_forces = batch.forces
        turned, matrix = batch.clone(), o3.rand_matrix()
        for name in ("pos", "cell", "condition_forces"):
            turned[name] = batch[name] @ matrix.T
        with torch.no_grad():
            before, after = model(batch), model(turned)
        torch.testing.assert_close(after["energy"], before["energy"], rtol=1e-4, atol=1e-5)
        for name in ("forces", "noise"):
            torch.testing.assert_close(after[name], before[name] @ matrix.T, rtol=1e-3, atol=1e-5)

    def test_trains_two_steps(self, example, example_run, make_trainer):
        trainer = make_trainer(example_run, print_every=2)
        model = trainer._unwrapped_model
        assert type(model) is example.ScalarsAndVectors and model.predict_noise
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        printed = metrics_printed_by(trainer)
        trainer.train(disable_eval_tqdm=True)
        assert trainer.step == 2
        assert not [name for name, one in model.named_parameters() if torch.equal(one, before[name])]
        assert {"denoising_energy_mae", "denoising_pos_mae", "forces_mae"} <= printed

    def test_trains_without_dens(self, example, example_run, make_trainer):
        del example_run["dataset"]["train"]["transforms"]["dens"], example_run["loss_functions"][2]
        trainer = make_trainer(example_run, print_every=2)
        assert not trainer._unwrapped_model.predict_noise
        printed = metrics_printed_by(trainer)
        trainer.train(disable_eval_tqdm=True)
        assert "forces_mae" in printed
        assert not any("denoising" in name for name in printed)

    @pytest.mark.slow
    def test_trains_and_predicts_by_the_command(self, example_run, fairchem, monkeypatch, lmdb_folders):
        path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
        monkeypatch.setenv("PYTHONPATH", path)
        example_run["dataset"]["test"] = {"src": str(lmdb_folders["test"])}
        fairchem("train", example_run)
        checkpoint = fairchem.checkpoint()
        assert checkpoint["step"] == 2
        assert checkpoint["config"]["model"]["name"] == "new_model.ScalarsAndVectors"
        fairchem("predict", example_run, "--checkpoint", str(fairchem.file()), name="prediction")
        assert len(fairchem.results("prediction")["energy"]) == 6

        monkeypatch.syspath_prepend(EXAMPLES)
        atoms = bulk("Cu", cubic=True)
        atoms.calc = OCPCalculator(checkpoint_path=str(fairchem.file()), cpu=True, seed=0)
        assert np.isfinite(atoms.get_potential_energy()) and np.isfinite(atoms.get_forces()).all()

    def test_snippets_of_the_page_are_the_files(self):
        """What the page shows of the example is in it, line by line."""
        blocks = re.findall(r"^```(python|yaml)\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
        assert {language for language, _ in blocks} == {"python", "yaml"}
        files = {
            language: {line.strip() for line in (EXAMPLES / name).read_text().splitlines()}
            for language, name in (("python", "new_model.py"), ("yaml", "new_model.yml"))
        }
        for language, block in blocks:
            if "validate_dens_model" not in block:
                lines = {line.strip() for line in block.splitlines()}
                assert lines <= files[language]

    def test_the_pages_check_runs(self, example, write_lmdb, structure, tmp_path, monkeypatch, capsys):
        blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
        (check,) = (block for block in blocks if "validate_dens_model" in block)
        write_lmdb(tmp_path / "demo-output" / "data" / "train", [structure(seed) for seed in range(4)])
        monkeypatch.chdir(tmp_path)
        exec(check, {})
        assert capsys.readouterr().out.strip() == "{}"

    def test_the_page_explains_every_contract(self):
        *_, table = PAGE.read_text().partition("| contract |")
        assert re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE) == list(CONTRACTS)
