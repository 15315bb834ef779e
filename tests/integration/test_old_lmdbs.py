"""LMDBs as they were written years ago, read and trained on."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
import torch_geometric.data.data as data_module
import torch_geometric.data.storage as storage_module
from fairchem.core.datasets.lmdb_dataset import LmdbDataset
from torch_geometric.data import Data

from fairchem_dens import keys
from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.data.reader import LazyLmdbDataset

NEW_NAMES = {"y": "energy", "force": "forces"}


@contextmanager
def in_place_of(module: Any, name: str, stand_in: type) -> Iterator[None]:
    """Objects of the stand-in are pickled as ones of the class of that name."""
    stand_in.__module__, stand_in.__qualname__, stand_in.__name__ = module.__name__, name, name
    real = getattr(module, name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        setattr(module, name, real)


def pickled_by_version_1(fields: dict[str, Any], protocol: int) -> bytes:
    """torch_geometric 1.6 and 1.7: fields are attributes, those of graphs in general are there and None."""
    old_data = type("Data", (), {})
    data = old_data()
    general = dict.fromkeys(("x", "edge_index", "edge_attr", "y", "pos", "normal", "face"))
    data.__dict__.update(general | fields, __num_nodes__=len(fields["pos"]))
    with in_place_of(data_module, "Data", old_data):
        return pickle.dumps(data, protocol=protocol)


def pickled_by_version_2_0(fields: dict[str, Any], protocol: int) -> bytes:
    """torch_geometric 2.0: nothing but fields and the way back in the storage, nothing else in the Data."""
    old_data, old_storage = type("Data", (), {}), type("GlobalStorage", (), {})
    data, storage = old_data(), old_storage()
    storage.__dict__.update(_mapping=dict(fields), _parent=data)
    data.__dict__.update(_store=storage)
    with (
        in_place_of(data_module, "Data", old_data),
        in_place_of(storage_module, "GlobalStorage", old_storage),
    ):
        return pickle.dumps(data, protocol=protocol)


WRITERS: dict[str, Callable[[dict[str, Any], int], bytes]] = {
    "1.x": pickled_by_version_1,
    "2.0": pickled_by_version_2_0,
}


def as_oc20(data: Data) -> dict[str, Any]:
    """The fields of OC20's S2EF records: floats for whole numbers, a graph, no `pbc`."""
    natoms = len(data.pos)
    return {
        "pos": data.pos,
        "cell": data.cell,
        "atomic_numbers": data.atomic_numbers.float(),
        "natoms": natoms,
        "tags": data.tags,
        "fixed": data.fixed.float(),
        "y": data.energy,
        "force": data.forces,
        "sid": torch.LongTensor([data.sid]),
        "fid": torch.LongTensor([data.fid]),
        "edge_index": torch.randint(0, natoms, (2, 30)),
        "cell_offsets": torch.zeros(30, 3, dtype=torch.int8),
        "distances": torch.rand(30),
        "total_frames": None,
    }


def write(file: Path, records: list[bytes], *, with_length: bool) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    env = lmdb.open(str(file), subdir=False, map_size=2**24, lock=False)
    with env.begin(write=True) as transaction:
        for index, record in enumerate(records):
            transaction.put(str(index).encode("ascii"), record)
        if with_length:
            transaction.put(b"length", pickle.dumps(len(records)))
    env.close()


def write_old(folder: Path, structures: list[Data], versions: list[str]) -> Path:
    """A file for each version, with every protocol that was in use."""
    shards = [structures[at :: len(versions)] for at in range(len(versions))]
    for at, (version, shard) in enumerate(zip(versions, shards, strict=True)):
        records = [WRITERS[version](as_oc20(data), 2 + number % 4) for number, data in enumerate(shard)]
        write(folder / f"data.{at:04d}.lmdb", records, with_length=bool(at % 2))
    return folder


@pytest.mark.parametrize("version", WRITERS)
def test_what_is_written_is_of_that_version(structure: Callable[..., Data], version: str) -> None:
    """The tests below would prove nothing with records of today's."""
    record = WRITERS[version](as_oc20(structure(0)), 4)
    assert b"torch_geometric.data.data" in record and record != pickle.dumps(structure(0), protocol=4)
    assert (b"_store" in record) == (version == "2.0")
    assert (b"__num_nodes__" in record) == (version == "1.x")
    assert b"_edge_attr_cls" not in record and b"_edge_attr_cls" in pickle.dumps(structure(0))


@pytest.mark.parametrize("versions", [["1.x"], ["2.0"], ["1.x", "2.0"], ["2.0", "1.x"]], ids="+".join)
def test_old_records_hold_what_new_ones_hold(
    tmp_path: Path, structure: Callable[..., Data], versions: list[str]
) -> None:
    made = [structure(seed, natoms=4 + seed % 3) for seed in range(8)]
    folder = write_old(tmp_path / "old", made, versions)
    dataset = LazyLmdbDataset({"src": str(folder), "key_mapping": NEW_NAMES})
    read = {data.sid: data for data in dataset}
    assert len(dataset) == len(read) == 8
    assert {int(data.sid) for data in read_lmdb(folder)} == set(range(8))
    for expected in made:
        data = read[expected.sid]
        assert type(data) is Data and data.num_nodes == len(expected.pos)
        assert "total_frames" not in data and "x" not in data and "edge_index" in data
        for name in (
            keys.POS, keys.CELL, keys.ATOMIC_NUMBERS, keys.TAGS, keys.FIXED, keys.FORCES,
        ):  # fmt: skip
            assert data[name].dtype == expected[name].dtype and torch.equal(data[name], expected[name])
        for name in (keys.NATOMS, keys.SID, keys.FID, keys.ENERGY):
            assert data[name] == expected[name] and type(data[name]) is type(expected[name])
        # Useful for all that torch_geometric does with it.
        assert torch.equal(data.clone().pos, expected.pos) and len(data.to_dict()) == len(data.keys())
        assert pickle.loads(pickle.dumps(data)).natoms == expected.natoms


def test_energies_as_fairchem_reads_them(tmp_path: Path, structure: Callable[..., Data]) -> None:
    folder = write_old(tmp_path / "old", [structure(seed) for seed in range(4)], ["1.x"])
    ours, theirs = LazyLmdbDataset({"src": str(folder)}), LmdbDataset({"src": str(folder)})
    assert [ours[at].y for at in range(4)] == [float(theirs[at].y) for at in range(4)]


@pytest.mark.parametrize("workers", [0, 2])
def test_two_steps(
    run_settings: dict[str, Any],
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    structure: Callable[..., Data],
    write_lmdb: Callable[..., Path],
    workers: int,
) -> None:
    """On old files of both versions as on new ones: the same batches, the same weights."""
    made = [structure(seed, natoms=8) for seed in range(8)]
    old = write_old(tmp_path / "old", made, ["1.x", "2.0"])
    in_order = [made[at] for at in (*range(0, 8, 2), *range(1, 8, 2))]
    new = write_lmdb(tmp_path / "new", in_order, with_metadata=False)
    run_settings["optim"] |= {"max_epochs": 1, "num_workers": workers}
    weights = []
    for src, more in ((old, {"key_mapping": NEW_NAMES}), (new, {})):
        train = {**run_settings["dataset"]["train"], "src": str(src), **more}
        trainer = make_trainer({**run_settings, "dataset": {"train": train}})
        trainer.train(disable_eval_tqdm=True)
        assert trainer.step == 2
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
