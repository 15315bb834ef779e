"""Who sees corrupted structures: the train split of our trainer, whatever the workers, and nobody else."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.base_dataset import create_dataset
from torch_geometric.data import Data

from fairchem_dens import keys
from fairchem_dens.corruption import Corruption, batch_is_corrupted, corrupt
from fairchem_dens.data.lmdb import read_lmdb

Seen = list[tuple[bool, dict[int, dict[str, torch.Tensor]]]]
DENS = {"prob": 1.0, "std": 0.1}


def stored(folder: Path | str) -> dict[int, Data]:
    """The records of a folder by sid, read without any data set."""
    return {int(data.sid): data for data in read_lmdb(folder)}


def by_sid(batch: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Positions and DeNS fields of each structure of a batch."""
    fields = [key for key in (keys.POS, keys.FORCES, *keys.DENS_FIELDS) if key in batch]
    result = {}
    for index, sid in enumerate(torch.as_tensor(batch.sid).tolist()):
        atoms = batch.batch == index
        result[sid] = {
            key: (batch[key][index] if key == keys.CORRUPTED else batch[key][atoms]).clone() for key in fields
        }
    return result


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


def check_clean(batches: Iterable[Any], folder: Path | str) -> None:
    """Bit for bit what is stored, all of it, and no field of ours."""
    records = stored(folder)
    seen = {}
    for batch in batches:
        assert not set(keys.DENS_FIELDS) & set(batch.keys())
        seen |= by_sid(batch)
    assert seen.keys() == records.keys()
    for sid, fields in seen.items():
        assert torch.equal(bits(fields[keys.POS]), bits(records[sid].pos))


def loaders(trainer: Any) -> dict[str, Any]:
    return {split: getattr(trainer, f"{split}_loader") for split in ("train", "val", "test", "relax")}


def watch(trainer: Any) -> Seen:
    """Record what the model is given from now on: whether in training, and the structures."""
    seen: Seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, inputs: seen.append((module.training, by_sid(inputs[0])))
    )
    return seen


@pytest.fixture
def four_splits(run_settings: dict[str, Any], lmdb_folders: dict[str, Path]) -> dict[str, Any]:
    """A run with a relax split that corrupts all it can."""
    run_settings["dataset"]["relax"] = {"src": str(lmdb_folders["test"])}
    run_settings["dataset"]["train"]["transforms"]["dens"] = dict(DENS)
    return run_settings


# ------------------------------------------------------------------ our trainer


def inherited(settings: dict[str, Any]) -> None:
    """`use_train_settings` is true by default: the transforms of train are those of all splits."""


def named_in_each_split(settings: dict[str, Any]) -> None:
    for split in settings["dataset"].values():
        split["transforms"] = copy.deepcopy(settings["dataset"]["train"]["transforms"])


def own_settings(settings: dict[str, Any]) -> None:
    for split in settings["dataset"].values():
        split |= {"use_train_settings": False, "format": "lmdb"}
        split["transforms"] = copy.deepcopy(settings["dataset"]["train"]["transforms"])


def dotted_name(settings: dict[str, Any]) -> None:
    transforms = settings["dataset"]["train"]["transforms"]
    transforms["fairchem_dens.transforms.dens"] = transforms.pop("dens")


def one_folder_for_all(settings: dict[str, Any]) -> None:
    for split in settings["dataset"].values():
        split["src"] = settings["dataset"]["train"]["src"]


def our_data_set(settings: dict[str, Any]) -> None:
    settings["dataset"]["train"] |= {"format": "dens_lmdb", "md_logs": "ignore"}


def part_of_train(settings: dict[str, Any]) -> None:
    """fairchem wraps the data set in a subset that is shuffled."""
    settings["dataset"]["train"]["sample_n"] = 24
    for split in ("val", "test"):
        settings["dataset"][split]["sample_n"] = 6


@pytest.mark.parametrize("switch", ["structure", "batch"])
@pytest.mark.parametrize(
    "variant",
    [
        inherited,
        named_in_each_split,
        own_settings,
        dotted_name,
        one_folder_for_all,
        our_data_set,
        part_of_train,
    ],
)
def test_only_train_is_corrupted(
    four_splits: dict[str, Any], make_trainer: Callable[..., Any], variant: Callable[..., None], switch: str
) -> None:
    four_splits["dataset"]["train"]["transforms"]["dens"]["switch"] = switch
    variant(four_splits)
    trainer = make_trainer(four_splits)
    for split in ("val", "test", "relax"):
        check_clean(loaders(trainer)[split], four_splits["dataset"][split]["src"])

    records = stored(four_splits["dataset"]["train"]["src"])
    seen = {}
    for batch in trainer.train_loader:
        assert set(keys.DENS_FIELDS) <= set(batch.keys())
        seen |= by_sid(batch)
    assert seen.keys() == records.keys()
    for sid, fields in seen.items():
        # With one coin for a batch, the loader's structures are still clean.
        expected = corrupt(records[sid], Corruption(**DENS), seed=0, epoch=0, selected=switch == "structure")
        assert bool(fields[keys.CORRUPTED]) is (switch == "structure")
        for key in (keys.POS, keys.FORCES, *keys.DENS_FIELDS[:-1]):
            assert torch.equal(fields[key], expected[key])


def test_the_settings_are_left_as_they_are(
    four_splits: dict[str, Any], make_trainer: Callable[..., Any]
) -> None:
    """What was armed stays in the trainer: its config, checkpoints and later data sets have nothing of it."""
    written = four_splits["dataset"]["train"]["transforms"]["dens"]
    shared = copy.deepcopy(four_splits["dataset"])
    trainer = make_trainer(four_splits, dataset=shared)
    assert shared == four_splits["dataset"]
    assert trainer.config["dataset"]["transforms"]["dens"] == written
    dataset = create_dataset(trainer.config["dataset"], "train")
    records = stored(trainer.config["dataset"]["src"])
    for index in range(len(dataset)):
        data = dataset[index]
        assert not set(keys.DENS_FIELDS) & set(data.keys())
        assert torch.equal(bits(data.pos), bits(records[int(data.sid)].pos))


@pytest.mark.parametrize("switch", ["structure", "batch"])
def test_what_the_model_is_given(
    four_splits: dict[str, Any], make_trainer: Callable[..., Any], lmdb_folders: dict[str, Path], switch: str
) -> None:
    """Training, the evaluations in its midst, validation and prediction, at the last door."""
    dens = {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5, "switch": switch}
    four_splits["dataset"]["train"]["transforms"]["dens"] = dens
    four_splits["optim"] |= {"eval_every": 5, "max_epochs": 2}
    trainer = make_trainer(four_splits)
    seen = watch(trainer)
    trainer.train(disable_eval_tqdm=True)

    train, val = stored(lmdb_folders["train"]), stored(lmdb_folders["val"])
    steps = [structures for training, structures in seen if training]
    assert len(steps) == 12
    corruption = Corruption(**dens)
    number_corrupted = 0
    for at, structures in enumerate(steps):
        selected = None
        if switch == "batch":
            selected = batch_is_corrupted(corruption, seed=0, step=at + 1)
        for sid, fields in structures.items():
            expected = corrupt(train[sid], corruption, seed=0, epoch=at // 6, selected=selected)
            number_corrupted += int(expected[keys.CORRUPTED])
            for key in (keys.POS, keys.NOISE_VEC, keys.NOISE_MASK, keys.CONDITION_FORCES, keys.SIGMAS):
                assert torch.equal(fields[key], expected[key]), key
            assert torch.equal(fields[keys.FORCES], train[sid].forces)
    assert 6 < number_corrupted < 42  # of 48

    evaluated = [structures for training, structures in seen if not training]
    assert sum(map(len, evaluated)) >= 2 * len(val)
    seen.clear()
    trainer.validate("val", disable_tqdm=True)
    trainer.predict(trainer.test_loader, results_file=None, disable_tqdm=True)
    evaluated += [structures for _, structures in seen]
    records = val | stored(lmdb_folders["test"])
    for structures in evaluated:
        for sid, fields in structures.items():
            assert not set(keys.DENS_FIELDS) & set(fields)
            assert torch.equal(bits(fields[keys.POS]), bits(records[sid].pos))


def test_evaluation_tosses_no_coin(
    four_splits: dict[str, Any], make_trainer: Callable[..., Any], lmdb_folders: dict[str, Path]
) -> None:
    """With a coin that always falls, and between the steps of a training."""
    four_splits["dataset"]["train"]["transforms"]["dens"]["switch"] = "batch"
    trainer = make_trainer(four_splits)
    trainer.step = 3
    seen = watch(trainer)
    trainer.validate("val", disable_tqdm=True)
    trainer.predict(trainer.test_loader, results_file=None, disable_tqdm=True)
    records = stored(lmdb_folders["val"]) | stored(lmdb_folders["test"])
    assert {sid for _, structures in seen for sid in structures} == set(records)
    for training, structures in seen:
        assert not training
        for sid, fields in structures.items():
            assert not set(keys.DENS_FIELDS) & set(fields)
            assert torch.equal(bits(fields[keys.POS]), bits(records[sid].pos))


def test_what_the_model_is_given_in_relaxations(
    four_splits: dict[str, Any], make_trainer: Callable[..., Any], lmdb_folders: dict[str, Path]
) -> None:
    four_splits["task"] = {
        "relaxation_steps": 2,
        "relaxation_fmax": 0.001,
        "relax_dataset": {"src": str(lmdb_folders["test"])},
        "relax_opt": {"maxstep": 0.04, "memory": 10, "damping": 1.0, "alpha": 70.0, "traj_dir": None},
    }
    trainer = make_trainer(four_splits)
    seen = watch(trainer)
    trainer.run_relaxations()
    assert seen and not any(training for training, _ in seen)
    records = stored(lmdb_folders["test"])
    started = set()
    for _, structures in seen:
        for sid, fields in structures.items():
            assert not set(keys.DENS_FIELDS) & set(fields)
            if sid not in started:  # later its atoms have moved
                started.add(sid)
                assert torch.equal(bits(fields[keys.POS]), bits(records[sid].pos))
    assert started == set(records)


# ------------------------------------------------------------------ stock trainers and scripts


@pytest.mark.parametrize("name", ["ocp", "equiformerv2_forces"])
@pytest.mark.parametrize("variant", [inherited, named_in_each_split, dotted_name, our_data_set])
def test_stock_trainers_see_no_corrupted_structure(
    four_splits: dict[str, Any], make_trainer: Callable[..., Any], name: str, variant: Callable[..., None]
) -> None:
    variant(four_splits)
    shared = copy.deepcopy(four_splits["dataset"])
    make_trainer(
        four_splits, dataset=shared
    )  # ours, of the same settings, has armed its own train split by then
    four_splits["loss_functions"].pop()
    # Their schedules divide by a warm-up that rounds to no step, and the plain trainer has no cosine.
    four_splits["optim"]["scheduler_params"]["warmup_epochs"] = 1
    if name == "ocp":
        four_splits["optim"]["scheduler"] = "Null"
    trainer = make_trainer(four_splits, trainer=registry.get_trainer_class(name), dataset=shared)
    for split, loader in loaders(trainer).items():
        check_clean(loader, four_splits["dataset"][split]["src"])


def test_scripts_see_no_corrupted_structure(four_splits: dict[str, Any]) -> None:
    for format_ in ("lmdb", "dens_lmdb"):
        settings = four_splits["dataset"]["train"] | {"format": format_}
        dataset = registry.get_dataset_class(format_)(settings)
        records = stored(settings["src"])
        for index in range(len(dataset)):
            data = dataset[index]
            assert not set(keys.DENS_FIELDS) & set(data.keys())
            assert torch.equal(bits(data.pos), bits(records[int(data.sid)].pos))


# ------------------------------------------------------------------ workers and epochs


def epochs(
    trainer: Any, *, context: str | None = None, count: int = 2
) -> list[list[dict[str, torch.Tensor]]]:
    """All structures of some epochs in the order of the train loader, as fairchem's loop goes through it."""
    if context is not None:
        trainer.train_loader.multiprocessing_context = context
    result = []
    for epoch in range(count):
        trainer.train_sampler.set_epoch_and_start_iteration(epoch, 0)
        result.append(
            [
                {"sid": torch.tensor(sid), **fields}
                for batch in trainer.train_loader
                for sid, fields in by_sid(batch).items()
            ]
        )
    return result


def check_same(
    first: list[list[dict[str, torch.Tensor]]], second: list[list[dict[str, torch.Tensor]]]
) -> None:
    assert [len(epoch) for epoch in first] == [len(epoch) for epoch in second]
    for one, other in zip(sum(first, []), sum(second, []), strict=True):  # noqa: RUF017  # a few dozen
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("format_", "context", "workers"),
    [
        ("lmdb", "fork", 2),
        ("lmdb", "fork", 4),
        ("dens_lmdb", "fork", 2),
        ("dens_lmdb", "fork", 4),
        ("dens_lmdb", "spawn", 2),
        pytest.param("dens_lmdb", "spawn", 4, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_workers(
    run_settings: dict[str, Any], make_trainer: Callable[..., Any], format_: str, context: str, workers: int
) -> None:
    """fairchem's own data set cannot be sent to a spawned worker."""
    run_settings["dataset"]["train"] |= {"format": format_}
    if format_ == "dens_lmdb":
        run_settings["dataset"]["train"]["md_logs"] = "ignore"
    count = 1 if context == "spawn" else 2  # each epoch starts its workers anew
    alone = epochs(make_trainer(run_settings), count=count)
    assert {bool(fields[keys.CORRUPTED]) for fields in alone[0]} == {True, False}
    run_settings["optim"]["num_workers"] = workers
    # fairchem's data set closes its files when it is collected; a forked worker must not come to do that.
    gc.collect()
    check_same(alone, epochs(make_trainer(run_settings), context=context, count=count))


def test_another_epoch_another_noise(run_settings: dict[str, Any], make_trainer: Callable[..., Any]) -> None:
    run_settings["dataset"]["train"]["transforms"]["dens"] = dict(DENS)
    first, second = (
        {int(fields["sid"]): fields for fields in epoch} for epoch in epochs(make_trainer(run_settings))
    )
    assert first.keys() == second.keys() and len(first) == 24
    for sid, fields in first.items():
        mask = fields[keys.NOISE_MASK]
        assert mask.any()
        assert not torch.isclose(fields[keys.NOISE_VEC], second[sid][keys.NOISE_VEC], rtol=1e-3)[mask].any()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_goes_on_with_the_same_noise(
    run_settings: dict[str, Any], make_trainer: Callable[..., Any], workers: int
) -> None:
    run_settings["optim"]["num_workers"] = workers
    undisturbed = epochs(make_trainer(run_settings))[1]
    trainer = make_trainer(run_settings)
    trainer.train_sampler.set_epoch_and_start_iteration(1, 2)
    rest = [fields for batch in trainer.train_loader for fields in by_sid(batch).values()]
    assert len(rest) == 16
    for one, other in zip(undisturbed[8:], rest, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in other)


def test_seeds(run_settings: dict[str, Any], make_trainer: Callable[..., Any]) -> None:
    run_settings["dataset"]["train"]["transforms"]["dens"] = dict(DENS)

    def noise(seed: int | None) -> dict[int, torch.Tensor]:
        (epoch,) = epochs(make_trainer(run_settings, seed=seed), count=1)
        return {int(fields["sid"]): fields[keys.NOISE_VEC] for fields in epoch}

    zero, none, one = noise(0), noise(None), noise(1)
    for sid in zero:
        assert torch.equal(zero[sid], none[sid])
        assert not torch.equal(zero[sid], one[sid])


# ------------------------------------------------------------------ old names of labels


KEPT = (keys.POS, keys.CELL, keys.PBC, keys.NATOMS, keys.FIXED, keys.TAGS, keys.SID, keys.FID)


def write_old(folder: Path, structures: Iterable[Data]) -> Path:
    """As OC20 was published: `y`, `force`, atomic numbers as floats, no metadata."""
    folder.mkdir()
    env = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, map_size=2**24, lock=False)
    with env.begin(write=True) as transaction:
        for index, data in enumerate(structures):
            old = Data(
                **{key: data[key] for key in KEPT},
                atomic_numbers=data.atomic_numbers.float(),
                y=data.energy,
                force=data.forces,
            )  # fmt: skip
            transaction.put(str(index).encode(), pickle.dumps(old, protocol=-1))
        transaction.put(b"length", pickle.dumps(index + 1, protocol=-1))
    env.close()
    return folder


@pytest.mark.parametrize("switch", ["structure", "batch"])
def test_old_oc20_files_train_alike(
    run_settings: dict[str, Any],
    make_trainer: Callable[..., Any],
    lmdb_folders: dict[str, Path],
    tmp_path: Path,
    switch: str,
) -> None:
    """Under the old names: the same noise in every step, and the same weights at the end."""
    run_settings["dataset"]["train"]["transforms"]["dens"]["switch"] = switch
    run_settings["optim"]["max_epochs"] = 1
    runs = []
    for old in (False, True):
        if old:
            for split in ("train", "val"):
                records = stored(lmdb_folders[split]).values()
                run_settings["dataset"][split]["src"] = str(write_old(tmp_path / f"old_{split}", records))
            run_settings["dataset"]["train"]["key_mapping"] = {"y": "energy", "force": "forces"}
            run_settings["dataset"].pop("test")
        trainer = make_trainer(run_settings)
        seen = watch(trainer)
        trainer.train(disable_eval_tqdm=True)
        runs.append((seen, trainer.model.state_dict()))
    (new_seen, new_weights), (old_seen, old_weights) = runs
    assert len(new_seen) == len(old_seen) == 6
    for (_, new), (_, old) in zip(new_seen, old_seen, strict=True):
        assert new.keys() == old.keys()
        for sid in new:
            assert all(
                torch.equal(new[sid][key], old[sid][key])
                for key in (keys.POS, keys.FORCES, *keys.DENS_FIELDS)
            )
    assert any(bool(fields[keys.CORRUPTED]) for _, structures in new_seen for fields in structures.values())
    assert all(torch.equal(new_weights[name], old_weights[name]) for name in new_weights)
