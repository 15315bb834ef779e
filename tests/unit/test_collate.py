"""Our batches are fairchem's, with all that is needed to take them apart."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from fairchem.core.datasets.lmdb_dataset import data_list_collater
from torch.utils.data import DataLoader
from torch_geometric.data import Data

from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.data import collate as module
from fairchem_dens.data.collate import collate
from fairchem_dens.data.records import as_data


def check_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for name in ours:
            check_same(ours[name], theirs[name])
    else:
        assert ours == theirs


def check_batch(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs) and ours.num_graphs == theirs.num_graphs
    check_same(ours.to_dict(), theirs.to_dict())
    check_same(ours._slice_dict, theirs._slice_dict)
    check_same(ours._inc_dict, theirs._inc_dict)
    for one, other in zip(ours.to_data_list(), theirs.to_data_list(), strict=True):
        check_same(one.to_dict(), other.to_dict())


@pytest.fixture
def structures(structure: Callable[..., Data]) -> list[Data]:
    made = [structure(seed, natoms=1 + seed % 7, num_fixed=0) for seed in range(12)]
    for data in made:
        data.id = f"0_{data.sid}"
        data.is_bulk = bool(data.sid % 2)
    return made


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("corrupted", [False, True])
def test_equals_fairchems(structures: list[Data], size: int, corrupted: bool, monkeypatch: Any) -> None:
    if corrupted:
        corruption = Corruption(prob=0.5, std=0.1, corrupt_ratio=0.5)
        structures = [corrupt(data, corruption, seed=0, epoch=0) for data in structures]
    theirs = [data_list_collater(structures[:size], otf_graph=True)]
    monkeypatch.setattr(module, "data_list_collater", None)  # it is not asked
    ours = collate(structures[:size], otf_graph=True)
    check_batch(ours, theirs[0])
    check_batch(pickle.loads(pickle.dumps(ours)), theirs[0])
    check_batch(ours.clone(), theirs[0])


def test_a_batch_shares_no_memory_with_its_structures(structures: list[Data]) -> None:
    batch = collate(structures[:1], otf_graph=True)
    batch.pos.fill_(7)
    assert not (structures[0].pos == 7).any()
    other = collate(structures[:1], otf_graph=True)
    assert not (other.pos == 7).any() and other.keys() == batch.keys()


@pytest.mark.parametrize(
    "unusual",
    [
        {"edge_index": torch.zeros(2, 3, dtype=torch.long)},
        {"x": torch.ones(2, 4)},
        {"num_nodes": 2},
        {"charge": torch.tensor(2.0)},
        {"numbers": [torch.ones(2)]},
        {"array": np.arange(3)},
        {"sparse": torch.eye(2).to_sparse()},
    ],
    ids=lambda unusual: next(iter(unusual)),
)
def test_all_else_is_left_to_fairchem(unusual: dict[str, Any]) -> None:
    made = [Data(pos=torch.ones(2, 3), natoms=2, **unusual) for _ in range(3)]
    ours, theirs = collate(made, otf_graph=True), data_list_collater(made, otf_graph=True)
    assert repr(ours.to_dict()) == repr(theirs.to_dict())


def test_stored_edges_are_counted() -> None:
    made = [
        Data(pos=torch.ones(2, 3), edge_index=torch.zeros(2, count, dtype=torch.long)) for count in (3, 5)
    ]
    assert collate(made, otf_graph=False).neighbors.tolist() == [3, 5]


def test_types_that_differ(structures: list[Data]) -> None:
    structures[1].pos = structures[1].pos.double()
    check_batch(collate(structures[:3], otf_graph=True), data_list_collater(structures[:3], otf_graph=True))


@pytest.mark.parametrize("corrupted", [False, True])
def test_out_of_workers(structures: list[Data], corrupted: bool) -> None:
    if corrupted:
        corruption = Corruption(prob=0.5, std=0.1, corrupt_ratio=0.5)
        structures = [corrupt(data, corruption, seed=0, epoch=0) for data in structures]
    loader = DataLoader(structures, batch_size=4, num_workers=2, collate_fn=_collate)
    for start, batch in zip(range(0, 12, 4), loader, strict=True):
        theirs = data_list_collater(structures[start : start + 4], otf_graph=True)
        check_batch(batch, theirs)
        assert not batch.pos.is_shared()  # it came through the pipe
        batch.pos.add_(1)  # memory of its own, to write to
        assert torch.equal(batch.pos, theirs.pos + 1) and torch.equal(batch.batch, theirs.batch)


def test_out_of_a_worker_that_starts_from_nothing(structures: list[Data]) -> None:
    parcel = module._Parcel(collate(structures[:3], otf_graph=True))
    check_batch(pickle.loads(pickle.dumps(parcel)), data_list_collater(structures[:3], otf_graph=True))


def test_unusual_batches_out_of_workers() -> None:
    made = [Data(pos=torch.ones(2, 3, dtype=torch.bfloat16), natoms=2, x=torch.ones(2, 1)) for _ in range(4)]
    for batch in DataLoader(made, batch_size=2, num_workers=1, collate_fn=_collate):
        assert batch.pos.dtype == torch.bfloat16 and batch.x.shape == (4, 1)


def _collate(structures: list[Data]) -> Any:
    return collate(structures, otf_graph=True)


def test_fields_in_any_order(structures: list[Data]) -> None:
    random.seed(0)
    shuffled = []
    for data in structures[:4]:
        names = list(data.keys())
        random.shuffle(names)
        shuffled.append(as_data({name: data[name] for name in names}))
    check_batch(collate(shuffled, otf_graph=True), data_list_collater(shuffled, otf_graph=True))
