"""Noise does not know how many ranks there are: two processes with gloo against one process without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption, batch_is_corrupted
from two_ranks import run_two_ranks

RANK = '''
"""One rank: trains as the settings say and writes what the model was given in each step."""
import json
import sys

import torch
from fairchem.core.common import distutils
from fairchem.core.common.registry import registry
from fairchem.core.common.utils import setup_imports

settings_file, folder = sys.argv[1:]
distutils.setup({"submit": False, "summit": False, "world_size": 2, "distributed_backend": "gloo"})
rank = distutils.get_rank()
setup_imports()
for name, settings in json.load(open(settings_file)).items():
    trainer = registry.get_trainer_class(settings.pop("trainer"))(
        optimizer=settings.pop("optim"), identifier=name, timestamp_id=name, run_dir=folder, local_rank=rank,
        seed=0, cpu=True, print_every=1000, **settings,
    )
    steps = []

    def look(module, inputs):
        batch = inputs[0]
        assert module.training
        structures = {}
        for index, sid in enumerate(batch.sid.tolist()):
            atoms = batch.batch == index
            structures[sid] = {key: batch[key][atoms] for key in ("pos", "noise_vec", "noise_mask", "sigmas")}
        steps.append(structures)

    trainer.model.register_forward_pre_hook(look)
    trainer.train(disable_eval_tqdm=True)
    weights = [parameter.detach() for parameter in trainer.model.parameters()]
    torch.save({"steps": steps, "weights": weights}, f"{folder}/{name}.{rank}.pt")
distutils.cleanup()
'''

Steps = list[dict[int, dict[str, torch.Tensor]]]
SWITCHES = ("structure", "batch")
EPOCHS = 3


def settings_of(run_settings: dict[str, Any], switch: str) -> dict[str, Any]:
    settings = copy.deepcopy(run_settings)
    settings["dataset"]["train"]["transforms"]["dens"] = {
        "prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5, "switch": switch,
    }  # fmt: skip
    del settings["dataset"]["val"], settings["dataset"]["test"]
    settings["optim"]["max_epochs"] = EPOCHS
    return settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture
def two_ranks(run_settings: dict[str, Any], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What both ranks saw, by `switch`; the processes run once for this file."""
    if not (folder / "finished").exists():
        runs = {switch: settings_of(run_settings, switch) for switch in SWITCHES}
        run_two_ranks(folder, RANK, runs, timeout=300)
        (folder / "finished").touch()
    return {
        switch: [torch.load(folder / f"{switch}.{rank}.pt", weights_only=True) for rank in range(2)]
        for switch in SWITCHES
    }


@pytest.fixture
def one_rank(run_settings: dict[str, Any], make_trainer: Callable[..., Any]) -> Callable[[str], Steps]:
    """Trains without any process group and returns what the model was given."""

    def run(switch: str) -> Steps:
        trainer = make_trainer(settings_of(run_settings, switch))
        steps: Steps = []

        def look(_module: Any, inputs: Any) -> None:
            batch = inputs[0]
            fields = (keys.POS, keys.NOISE_VEC, keys.NOISE_MASK, keys.SIGMAS)
            steps.append(
                {
                    sid: {key: batch[key][batch.batch == index].clone() for key in fields}
                    for index, sid in enumerate(batch.sid.tolist())
                }
            )

        trainer.model.register_forward_pre_hook(look)
        trainer.train(disable_eval_tqdm=True)
        return steps

    return run


def by_epoch(steps: Steps) -> list[dict[int, dict[str, torch.Tensor]]]:
    per_epoch = len(steps) // EPOCHS
    epochs: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in range(EPOCHS)]
    for at, structures in enumerate(steps):
        epochs[at // per_epoch] |= structures
    return epochs


@pytest.mark.parametrize("switch", SWITCHES)
def test_ranks_hold_different_structures(two_ranks: dict[str, list[dict[str, Any]]], switch: str) -> None:
    first, second = (by_epoch(rank["steps"]) for rank in two_ranks[switch])
    for one, other in zip(first, second, strict=True):
        assert len(one) == len(other) == 12
        assert one.keys() | other.keys() == set(range(24))
        noises = [
            fields[keys.NOISE_VEC]
            for fields in [*one.values(), *other.values()]
            if fields[keys.NOISE_MASK].any()
        ]
        if noises:  # with one coin for a batch, an epoch of three steps may have none
            values = torch.cat([noise[noise != 0] for noise in noises])
            assert len(values.unique()) == len(values)


def test_each_structure_has_the_noise_of_the_run_on_one_rank(
    two_ranks: dict[str, list[dict[str, Any]]], one_rank: Callable[[str], Steps]
) -> None:
    alone = by_epoch(one_rank("structure"))
    first, second = (by_epoch(rank["steps"]) for rank in two_ranks["structure"])
    corrupted = 0
    for expected, one, other in zip(alone, first, second, strict=True):
        both = one | other
        assert both.keys() == expected.keys() == set(range(24))
        for sid, fields in both.items():
            corrupted += int(fields[keys.NOISE_MASK].any())
            for key, value in fields.items():
                assert torch.equal(value, expected[sid][key])
    assert 20 < corrupted < 52  # of 72


def test_the_coin_of_a_batch_is_the_same_on_all_ranks(
    two_ranks: dict[str, list[dict[str, Any]]], one_rank: Callable[[str], Steps]
) -> None:
    corruption = Corruption(prob=0.5, std=0.1, corrupt_ratio=0.5, switch="batch")
    tossed = [batch_is_corrupted(corruption, seed=0, step=step) for step in range(1, 3 * EPOCHS + 1)]
    assert {True, False} == set(tossed)
    alone = by_epoch(one_rank("batch"))
    compared = 0
    for rank in two_ranks["batch"]:
        assert len(rank["steps"]) == len(tossed)
        for at, (structures, heads) in enumerate(zip(rank["steps"], tossed, strict=True)):
            for sid, fields in structures.items():
                assert bool(fields[keys.NOISE_MASK].any()) is heads
                # Steps are others there, but what was corrupted in the same epoch was so in the same way.
                expected = alone[at // 3][sid]
                if heads and expected[keys.NOISE_MASK].any():
                    compared += 1
                    assert all(torch.equal(value, expected[key]) for key, value in fields.items())
    assert compared > 0


@pytest.mark.parametrize("switch", SWITCHES)
def test_ranks_end_with_the_same_weights(two_ranks: dict[str, list[dict[str, Any]]], switch: str) -> None:
    first, second = (rank["weights"] for rank in two_ranks[switch])
    assert len(first) > 0
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
