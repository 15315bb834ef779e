"""A step as one recorded function: what can be seen of it without a GPU. The rest is in tests/cuda."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch, Data

from fairchem_dens import graphed, keys
from fairchem_dens.cuda_graph import CALLS_BEFORE_RECORDING, MAX_RECORDS, Recorded
from fairchem_dens.graphed import GraphedSteps
from fairchem_dens.models import EquiformerDeNS
from model_cases import EQUIFORMER
from structures import molecule, partly_corrupted


class Recorder:
    """Records as CUDA does: nothing is computed before the first replay, results stay where they are."""

    def __init__(self) -> None:
        self.replays = 0

    def __call__(self, call):
        results: dict[str, Tensor] = {}

        def replay() -> None:
            self.replays += 1
            for name, value in call().items():
                results.setdefault(name, torch.empty_like(value)).copy_(value)

        return replay, results


class TestRecorded:
    def make(self, function=lambda tensors, numbers: {"y": tensors["x"] * numbers["a"]}):
        recorder = Recorder()
        return recorder, Recorded(function, torch.device("cpu"), recorder)

    def test_results_are_those_of_the_last_input(self):
        recorder, recorded = self.make()
        for count in range(6):
            x = torch.full((3,), float(count))
            assert torch.equal(recorded({"x": x}, {"a": count + 1.0})["y"], x * (count + 1))
        assert recorder.replays == 6 - CALLS_BEFORE_RECORDING

    def test_recorded_results_stay_in_place_and_inputs_are_not_kept(self):
        _, recorded = self.make()
        x = torch.ones(3)
        places = {recorded({"x": x}, {"a": 1.0})["y"].data_ptr() for _ in range(9)}
        x.zero_()
        assert len(places) <= CALLS_BEFORE_RECORDING + 1
        assert recorded({"x": torch.ones(3)}, {"a": 1.0})["y"].sum() == 3

    def test_each_shape_and_type_has_its_own_record(self):
        recorder, recorded = self.make()
        for _ in range(CALLS_BEFORE_RECORDING + 1):
            for x in (torch.ones(3), torch.ones(2), torch.ones(3, dtype=torch.float64)):
                assert recorded({"x": x}, {"a": 2.0})["y"].dtype == x.dtype
        assert recorder.replays == recorded.num_records == 3

    def test_too_many_shapes_run_as_they_are(self):
        recorder, recorded = self.make()
        for _ in range(CALLS_BEFORE_RECORDING + 2):
            for size in range(1, MAX_RECORDS + 3):
                assert recorded({"x": torch.ones(size)}, {"a": 2.0})["y"].sum() == 2 * size
        assert recorded.num_records == MAX_RECORDS and recorder.replays == 2 * MAX_RECORDS


@pytest.fixture(scope="module")
def folders(tmp_path_factory, write_lmdb):
    root = tmp_path_factory.mktemp("molecules")
    seeds = {"train": range(14), "val": range(100, 105), "test": range(200, 205)}
    return {
        split: write_lmdb(root / split, [molecule(seed, natoms=7) for seed in chosen])
        for split, chosen in seeds.items()
    }


@pytest.fixture
def settings(run_settings, folders):
    """Molecules of one size, in batches of four and a last one of two, as on MD17."""
    settings = run_settings
    settings["model"] = {"name": "equiformer_dens", **copy.deepcopy(EQUIFORMER)}
    for split, folder in folders.items():
        settings["dataset"][split]["src"] = str(folder)
    settings["dataset"]["train"]["transforms"] = {
        "normalizer": {"energy": {"mean": 20.0, "rmsd": 10.0}, "forces": {"mean": 0.0, "rmsd": 10.0}},
        "dens": {"prob": 0.5, "std": 0.05, "corrupt_ratio": 0.5, "switch": "structure"},
    }
    settings["loss_functions"] = [
        {"energy": {"fn": "mae", "coefficient": 1}},
        {"forces": {"fn": "l2mae", "coefficient": 10}},
        {"noise": {"fn": "l2mae", "coefficient": 1, "reduction": "separate", "decay": "linear"}},
    ]
    settings["optim"].update(batch_size=4, lr_initial=0.01, max_epochs=5, clip_grad_norm=5)
    return settings


def without_dens(settings: dict[str, Any]) -> dict[str, Any]:
    settings["model"] |= {"irreps_equivariant_inputs": None, "irreps_feature": "12x0e"}
    del settings["dataset"]["train"]["transforms"]["dens"], settings["loss_functions"][2]
    return settings


def train(trainer: Any, recorder: Recorder | None) -> tuple[dict[str, Tensor], list[float]]:
    """Return the weights, and the losses of all steps."""
    if recorder is not None:
        trainer._steps_graphed = True
        trainer._graphed = GraphedSteps(
            trainer, lambda function, device: Recorded(function, device, recorder)
        )
    losses: list[float] = []
    backward = trainer._backward

    def watched(loss: Tensor) -> None:
        losses.append(float(loss))
        backward(loss)

    trainer._backward = watched
    trainer.train(disable_eval_tqdm=True)
    return {name: one.detach() for name, one in trainer._unwrapped_model.named_parameters()}, losses


@pytest.mark.parametrize(
    ("dens", "epochs"),
    [
        (True, 2),
        pytest.param(True, 5, marks=pytest.mark.slow),
        pytest.param(False, 5, marks=pytest.mark.slow),
    ],
    ids=["DeNS", "DeNS, last batch too", "baseline"],
)
def test_a_run_of_recorded_steps_is_the_ordinary_run(settings, make_trainer, dens, epochs):
    """Losses, decay of λ_N, schedule, clipping, moving average, evaluation, and the last, smaller batch."""
    settings["model"]["num_layers"] = 1
    settings["optim"] |= {"max_epochs": epochs, "eval_every": 4 * epochs, "lr_initial": 1e-3}
    if not dens:
        settings = without_dens(settings)
    plain = make_trainer(settings)
    weights, losses = train(plain, None)
    graphed_trainer, recorder = make_trainer(settings), Recorder()
    found, found_losses = train(graphed_trainer, recorder)
    assert len(losses) == 4 * epochs and recorder.replays == (3 * epochs - 3) + max(epochs - 3, 0)
    torch.testing.assert_close(torch.tensor(found_losses), torch.tensor(losses), rtol=1e-4, atol=1e-4)
    # Adam makes a step of full size out of a gradient that is nothing but rounding: hence not closer.
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-3, msg=name)
    assert graphed_trainer.step == plain.step == graphed_trainer._step_of_weights
    for ours, theirs in zip(graphed_trainer.ema.shadow_params, plain.ema.shadow_params, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=2e-3)


class TestSetting:
    def test_without_a_gpu_it_is_said_to_have_no_effect(self, settings, make_trainer, caplog):
        settings["optim"]["cuda_graph"] = True
        with caplog.at_level(logging.INFO):
            assert not graphed.is_wanted(make_trainer(settings))
        assert "'optim.cuda_graph' has no effect without a GPU" in caplog.text
        assert "Nobody reads" not in caplog.text

    def test_nonsense_is_refused(self, settings, make_trainer):
        settings["optim"]["cuda_graph"] = "yes"
        trainer = make_trainer(settings)
        with pytest.raises(ValueError, match=r"'optim\.cuda_graph' must be True or False, found 'yes'"):
            graphed.is_wanted(trainer)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"scaler": object()}, "--amp"),
            ({"elementrefs": {"energy": object()}}, "element_references"),
            ({"optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)}, "SGD"),
            ({"_unwrapped_model": torch.nn.Linear(1, 1)}, "EquiformerDeNS"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_cannot_be_recorded_is_named(self, settings, make_trainer, change, reason):
        trainer = make_trainer(settings)
        assert graphed.why_not(trainer) is None

        class Changed:
            def __getattr__(self, name: str) -> Any:
                return change[name] if name in change else getattr(trainer, name)

        assert reason in str(graphed.why_not(Changed()))


def test_large_molecules_are_not_recorded():
    """Their neighbours are searched, and counted on the host."""
    torch.manual_seed(0)
    model = EquiformerDeNS(**EQUIFORMER)
    sizes = {65: True, 66: False}
    for size, expected in sizes.items():
        batch = Data(natoms=torch.tensor([3, size]))
        assert model.has_static_shapes(batch) is expected


def test_counts_of_an_optimizer_move_to_the_device_and_back():
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    graphed.set_capturable(optimizer, True)
    assert optimizer.param_groups[0]["capturable"]
    graphed.set_capturable(optimizer, False)
    optimizer.step()
    assert optimizer.state[parameter]["step"] == 2 and not optimizer.param_groups[0]["capturable"]


@pytest.mark.parametrize("dens", [True, False], ids=["DeNS", "baseline"])
def test_forward_and_double_backward_never_wait_for_the_device(monkeypatch, dens):
    """On torch's meta device tensors have shapes but no values: whoever asks for a value fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not known there
    changes = {} if dens else {"irreps_equivariant_inputs": None, "irreps_feature": "12x0e"}
    model = EquiformerDeNS(**EQUIFORMER | changes).to("meta").train()
    plain = partly_corrupted(Batch.from_data_list([molecule(seed, natoms=6) for seed in range(3)]), std=0.05)
    fields = (keys.POS, keys.ATOMIC_NUMBERS, keys.NATOMS, keys.BATCH, keys.CONDITION_FORCES)
    batch = Data(**{name: plain[name].to("meta") for name in fields})
    batch[keys.LARGEST] = 6
    outputs = model(batch)
    assert set(outputs) == {"energy", "forces", *(["noise"] if dens else [])}
    sum(value.abs().sum() for value in outputs.values()).backward()
    del batch[keys.LARGEST]
    with pytest.raises(RuntimeError, match="meta"):
        model(batch)
