"""The data set on LMDB files as they are in the wild: what it accepts and what it refuses, in which words."""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.base_dataset import create_dataset
from fairchem.core.datasets.lmdb_dataset import LmdbDataset, data_list_collater
from torch.utils.data import DataLoader
from torch_geometric.data import Data

from fairchem_dens import keys
from fairchem_dens.data.environment import LazyEnvironment
from fairchem_dens.data.lmdb import LmdbWriter, read_lmdb
from fairchem_dens.data.reader import READERS, LazyLmdbDataset, with_our_readers

Spoil = Callable[[Data], None]
DOTTED = "fairchem_dens.data.reader.LazyLmdbDataset"
collate = partial(data_list_collater, otf_graph=True)


def write(file: Path, records: Sequence[Any], *, length: int | str | None = "right") -> Path:
    """One LMDB; a record may be bytes, or None for one that is not there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    env = lmdb.open(str(file), subdir=False, map_size=2**24, lock=False)
    with env.begin(write=True) as transaction:
        for index, record in enumerate(records):
            if record is not None:
                stored = record if isinstance(record, bytes) else pickle.dumps(record, protocol=-1)
                transaction.put(str(index).encode("ascii"), stored)
        if length is not None:
            transaction.put(b"length", pickle.dumps(len(records) if length == "right" else length))
    env.close()
    return file


def open_folder(folder: Path, **config: Any) -> LazyLmdbDataset:
    return LazyLmdbDataset({"src": str(folder), **config})


def changed(data: Data, **fields: Any) -> Data:
    data = copy.copy(data)
    for name, value in fields.items():
        if value is None:
            del data[name]
        else:
            data[name] = value
    return data


def check_same(ours: Any, theirs: Any) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    else:
        assert ours == theirs


@pytest.fixture
def some(structure: Callable[..., Data]) -> list[Data]:
    return [structure(seed, natoms=3 + seed % 3, num_fixed=1) for seed in range(7)]


@pytest.fixture
def folder(tmp_path: Path, some: list[Data]) -> Path:
    """Two files, one of which does not say how many records it has."""
    write(tmp_path / "set" / "data.0000.lmdb", some[:4])
    write(tmp_path / "set" / "data.0001.lmdb", some[4:], length=None)
    return tmp_path / "set"


# ------------------------------------------------------------------ ordinary files


def test_reads_what_fairchem_reads(folder: Path) -> None:
    ours, theirs = open_folder(folder), LmdbDataset({"src": str(folder)})
    assert isinstance(ours, LmdbDataset) and len(ours) == len(theirs) == 7
    assert np.array_equal(ours.indices, theirs.indices)
    for index in range(7):
        assert set(ours[index].keys()) == set(theirs[index].keys())
        for name in ours[index].keys():  # noqa: SIM118  # a Data iterates over pairs
            check_same(ours[index][name], theirs[index][name])
    assert ours[-1].sid == 6
    with pytest.raises(IndexError):
        ours[7]


def test_one_file(folder: Path) -> None:
    dataset = LazyLmdbDataset({"src": [str(folder / "data.0001.lmdb")]})
    assert [data.sid for data in dataset] == [4, 5, 6]
    assert dataset[1].id == "0_1"


def test_transforms_then_key_mapping(folder: Path, some: list[Data], monkeypatch: pytest.MonkeyPatch) -> None:
    import fairchem.core.modules.transforms as fairchem_transforms

    def probe(data: Data, settings: Any) -> Data:
        assert "energy" in data and settings == {"on": 1}
        data.seen = 1
        return data

    monkeypatch.setattr(fairchem_transforms, "probe", probe, raising=False)
    dataset = open_folder(
        folder, transforms={"normalizer": {}, "probe": {"on": 1}}, key_mapping={"energy": ["e1", "e2"]}
    )
    data = dataset[0]
    assert data.e1 == data.e2 == some[0].energy and "energy" not in data and data.seen == 1


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shards_cover_the_set(folder: Path, count: int) -> None:
    shards = [open_folder(folder, shard=shard, total_shards=count) for shard in range(count)]
    assert [data.sid for shard in shards for data in shard] == list(range(7))
    theirs = [
        LmdbDataset({"src": str(folder), "shard": shard, "total_shards": count}) for shard in range(count)
    ]
    assert [len(shard) for shard in shards] == [len(shard) for shard in theirs]
    # fairchem's own shards, beyond the first, cannot be opened this way.
    config = {"format": DOTTED, "src": str(folder), "total_shards": count, "no_shuffle": True}
    subsets = [create_dataset({**config, "shard": shard}, "train") for shard in range(count)]
    assert [data.sid for shard in subsets for data in shard] == list(range(7))


@pytest.mark.parametrize("shard", [-1, 3])
def test_a_shard_that_does_not_exist(folder: Path, shard: int) -> None:
    with pytest.raises(ValueError, match=rf"'dataset\.\*\.shard' must be from 0 to 2.*found {shard}"):
        open_folder(folder, shard=shard, total_shards=3)


def test_more_shards_than_structures(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"'dataset\.\*\.total_shards' is 9, but .* holds only 7 structures"):
        open_folder(folder, shard=8, total_shards=9)


# ------------------------------------------------------------------ metadata


@pytest.fixture
def with_metadata(folder: Path, some: list[Data]) -> Path:
    natoms = np.array([data.natoms for data in some])
    np.savez(folder / "metadata.npz", natoms=natoms, energy_above=np.arange(7) - 3.0)
    return folder


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_atoms": 4}, [0, 1, 3, 4, 6]),
        ({"subset_to": [{"metadata_key": "energy_above", "op": "abs_le", "rhv": 1}]}, [2, 3, 4]),
        ({"subset_to": [{"metadata_key": "natoms", "op": "in", "rhv": [5]}]}, [2, 5]),
        ({"first_n": 3}, [0, 1, 2]),
        ({"max_atoms": 4, "first_n": 2}, [0, 1]),
        ({"max_atoms": 4, "shard": 1, "total_shards": 2}, [4, 6]),
    ],
)
def test_fairchems_choices(with_metadata: Path, settings: dict[str, Any], expected: list[int]) -> None:
    config = {"format": DOTTED, "src": str(with_metadata), **settings}
    if "first_n" not in settings:
        config["no_shuffle"] = True
    assert [data.sid for data in create_dataset(config, "train")] == expected


def test_a_sample(with_metadata: Path) -> None:
    config = {"src": str(with_metadata), "sample_n": 5}
    ours = [data.sid for data in create_dataset({**config, "format": DOTTED}, "train")]
    theirs = [data.sid for data in create_dataset({**config, "format": "lmdb"}, "train")]
    assert ours == theirs and len(ours) == 5


def test_metadata_of_a_subset(with_metadata: Path, some: list[Data]) -> None:
    subset = create_dataset(
        {"format": DOTTED, "src": str(with_metadata), "shard": 1, "total_shards": 2}, "train"
    )
    assert subset.metadata_hasattr("natoms")
    assert subset.get_metadata("natoms", 0) == subset[0].natoms


@pytest.mark.parametrize("key", ["max_atoms", "subset_to"])
def test_choices_that_need_metadata(folder: Path, key: str) -> None:
    with pytest.raises(
        ValueError, match=rf"'dataset\.\*\.{key}' needs '.*set/metadata\.npz', which does not"
    ):
        open_folder(folder, **{key: 4 if key == "max_atoms" else [{}]})


def test_metadata_of_other_data(folder: Path) -> None:
    np.savez(folder / "metadata.npz", natoms=np.array([3, 4]))
    with pytest.raises(ValueError, match=r"metadata\.npz' has 'natoms' of 2 structures and '.*set' holds 7"):
        create_dataset({"format": DOTTED, "src": str(folder)}, "train")


@pytest.mark.parametrize("content", [b"", b"no archive", "no natoms"])
def test_metadata_that_is_none(folder: Path, content: bytes | str) -> None:
    file = folder / "metadata.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.savez(file, other=np.arange(7))
    with pytest.raises(ValueError, match=r"metadata\.npz' is not an \.npz file with 'natoms'.*data check"):
        create_dataset({"format": DOTTED, "src": str(folder)}, "train")


# ------------------------------------------------------------------ records of all kinds


NUMBER_KINDS: dict[str, Callable[[float], Any]] = {
    "float": float,
    "numpy": np.float64,
    "numpy32": np.float32,
    "no dimension": torch.tensor,
    "one": lambda value: torch.tensor([value]),
    "one in double": lambda value: torch.tensor([value], dtype=torch.float64),
    "one by one": lambda value: torch.tensor([[value]]),
    "array": lambda value: np.array([value]),
}


@pytest.mark.parametrize("first", NUMBER_KINDS)
@pytest.mark.parametrize("name", ["energy", "y", "y_relaxed"])
def test_energies_of_any_kind_share_a_batch(tmp_path: Path, some: list[Data], first: str, name: str) -> None:
    order = [first, *(kind for kind in NUMBER_KINDS if kind != first)]
    records = [
        changed(some[0], **{"energy": None, "sid": at, name: NUMBER_KINDS[kind](0.25 * at)})
        for at, kind in enumerate(order)
    ]
    for at, record in enumerate(records):
        write(tmp_path / f"data.{at:04d}.lmdb", [record])
    batch = collate(list(open_folder(tmp_path)))
    assert batch[name].dtype == torch.float32
    assert batch[name].tolist() == [0.25 * at for at in range(len(order))]


@pytest.mark.parametrize("reverse", [False, True])
def test_fields_of_two_origins_share_a_batch(tmp_path: Path, some: list[Data], reverse: bool) -> None:
    """Both orders: what comes first must not decide."""
    one = changed(some[0], custom=1.5)
    other = changed(
        some[1],
        pos=some[1].pos.double(),
        forces=some[1].forces.double(),
        cell=some[1].cell.reshape(3, 3).double(),
        pbc=some[1].pbc.reshape(3),
        atomic_numbers=some[1].atomic_numbers.to(torch.uint8),
        fixed=some[1].fixed.float(),
        tags=some[1].tags.float(),
        natoms=torch.tensor([some[1].natoms]),
        sid=torch.tensor(1),
        fid=torch.tensor([0]),
        custom=torch.tensor([2.5]),
    )
    third = changed(
        some[2],
        atomic_numbers=some[2].atomic_numbers.float(),
        natoms=np.int64(5),
        sid=np.int32(2),
        custom=torch.tensor(3.5),
    )
    files = [one, other, third]
    for at, record in enumerate(files[::-1] if reverse else files):
        write(tmp_path / f"data.{at:04d}.lmdb", [record])
    structures = sorted(open_folder(tmp_path), key=lambda data: data.sid)
    for data, expected in zip(structures, some, strict=False):
        for name in (keys.POS, keys.FORCES, keys.CELL, keys.PBC, keys.ATOMIC_NUMBERS, keys.FIXED, keys.TAGS):
            check_same(data[name], expected[name])
        for name in (keys.NATOMS, keys.SID, keys.FID):
            assert type(data[name]) is int and data[name] == expected[name]
    for order in (structures, structures[::-1]):
        assert sorted(collate(order).custom.tolist()) == [1.5, 2.5, 3.5]
        assert collate(order).atomic_numbers.dtype == torch.int64


def test_in_a_worker_too(tmp_path: Path, some: list[Data]) -> None:
    """There torch_geometric gives the batch the type of its first structure."""
    write(
        tmp_path / "data.0000.lmdb", [changed(some[0], atomic_numbers=some[0].atomic_numbers.to(torch.uint8))]
    )
    write(tmp_path / "data.0001.lmdb", some[1:2])
    loader = DataLoader(open_folder(tmp_path), batch_size=2, num_workers=1, collate_fn=collate)
    (batch,) = loader
    assert (
        batch.atomic_numbers.tolist() == torch.cat([some[0].atomic_numbers, some[1].atomic_numbers]).tolist()
    )


@pytest.mark.parametrize("reverse", [False, True])
def test_ids_that_are_numbers_here_and_text_there(tmp_path: Path, some: list[Data], reverse: bool) -> None:
    files = [some[0], changed(some[1], sid="mp-31")]
    for at, record in enumerate(files[::-1] if reverse else files):
        write(tmp_path / f"data.{at:04d}.lmdb", [record])
    assert sorted(collate(list(open_folder(tmp_path))).sid) == ["0", "mp-31"]


def test_ids_that_are_text(tmp_path: Path, some: list[Data]) -> None:
    write(tmp_path / "data.0000.lmdb", [changed(data, sid=f"random{data.sid}") for data in some])
    assert collate(list(open_folder(tmp_path))).sid[:2] == ["random0", "random1"]


@pytest.mark.parametrize("reverse", [False, True])
def test_periodicity_that_only_some_files_state(tmp_path: Path, some: list[Data], reverse: bool) -> None:
    """fairchem's models take a structure that does not say for periodic."""
    files = [changed(some[0], pbc=torch.tensor([[True, True, False]])), changed(some[1], pbc=None)]
    for at, record in enumerate(files[::-1] if reverse else files):
        write(tmp_path / f"data.{at:04d}.lmdb", [record])
    structures = sorted(open_folder(tmp_path), key=lambda data: data.sid)
    assert collate(structures).pbc.tolist() == [[True, True, False], [True, True, True]]


def test_what_no_file_has_stays_away(tmp_path: Path, some: list[Data]) -> None:
    molecules = [changed(data, cell=None, pbc=None, tags=None) for data in some]
    write(tmp_path / "data.0000.lmdb", molecules)
    batch = collate(list(open_folder(tmp_path)))
    assert not {"cell", "pbc", "tags", "md"} & set(batch.keys())


@pytest.mark.parametrize("reverse", [False, True])
def test_what_only_some_files_have_is_left_out(
    tmp_path: Path, some: list[Data], reverse: bool, caplog: pytest.LogCaptureFixture
) -> None:
    files = [changed(some[0], tags=None, bandgap=2.0), changed(some[1], edge_index=torch.zeros(2, 3).long())]
    for at, record in enumerate(files[::-1] if reverse else files):
        write(tmp_path / f"data.{at:04d}.lmdb", [record])
    dataset = open_folder(tmp_path)
    assert "Only some files of" in caplog.text and "bandgap, edge_index, tags" in caplog.text
    assert not {"tags", "bandgap", "edge_index"} & set(collate(list(dataset)).keys())


@pytest.mark.parametrize("name", ["fixed", "forces", "energy", "cell", "sid", "atomic_numbers"])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_training_needs_must_be_everywhere(
    tmp_path: Path, some: list[Data], name: str, reverse: bool
) -> None:
    files = [some[0], changed(some[1], **{name: None})]
    for at, record in enumerate(files[::-1] if reverse else files):
        write(tmp_path / f"data.{at:04d}.lmdb", [record])
    having, lacking = ("0001", "0000") if reverse else ("0000", "0001")
    message = rf"data\.{having}\.lmdb' have a field '{name}' and those of '.*data\.{lacking}\.lmdb' have not"
    with pytest.raises(ValueError, match=message):
        open_folder(tmp_path)


@pytest.mark.parametrize("reverse", [False, True])
def test_old_and_new_names_of_labels(tmp_path: Path, some: list[Data], reverse: bool) -> None:
    old = changed(some[1], energy=None, forces=None, y=some[1].energy, force=some[1].forces)
    files = [some[0], old]
    for at, record in enumerate(files[::-1] if reverse else files):
        write(tmp_path / f"data.{at:04d}.lmdb", [record])
    with pytest.raises(ValueError, match=r"have not.*set 'key_mapping: \{y: energy\}'"):
        open_folder(tmp_path)
    dataset = open_folder(tmp_path, key_mapping={"y": "energy", "force": "forces"})
    batch = collate(sorted(dataset, key=lambda data: data.sid))
    assert batch.energy.tolist() == pytest.approx([some[0].energy, some[1].energy])
    assert torch.equal(batch.forces, torch.cat([some[0].forces, some[1].forces]))
    assert not {"y", "force"} & set(batch.keys())


def test_both_names_at_once(tmp_path: Path, some: list[Data]) -> None:
    write(tmp_path / "data.0000.lmdb", [some[0], changed(some[1], y=1.0)])
    with pytest.raises(ValueError, match=r"Record 1 of .* has both 'y' and 'energy'.*remove 'y' from"):
        list(open_folder(tmp_path, key_mapping={"y": "energy"}))


def test_md_is_never_left_out(tmp_path: Path, some: list[Data]) -> None:
    """Left out, the frame would be corrupted."""
    write(tmp_path / "data.0000.lmdb", [some[0], changed(some[1], md=1)])
    assert open_folder(tmp_path)[1].md.tolist() == [True]
    write(tmp_path / "data.0001.lmdb", [changed(some[2], md=torch.tensor(True))])
    assert collate(list(open_folder(tmp_path))).md.tolist() == [False, True, True]


def test_graphs_are_kept_or_left_out(tmp_path: Path, some: list[Data]) -> None:
    graph = {
        "edge_index": torch.zeros(2, 4).long(),
        "cell_offsets": torch.zeros(4, 3),
        "distances": torch.ones(4),
    }
    write(tmp_path / "data.0000.lmdb", [changed(data, **graph) for data in some])
    assert set(graph) <= set(open_folder(tmp_path)[0].keys())
    assert not set(graph) & set(open_folder(tmp_path, keep_graph=False)[0].keys())


def test_arrays_and_missing_counts(tmp_path: Path, some: list[Data]) -> None:
    arrays = changed(
        some[0], natoms=None, **{name: some[0][name].numpy() for name in ("pos", "fixed", "forces")}
    )
    write(tmp_path / "data.0000.lmdb", [arrays])
    data = open_folder(tmp_path)[0]
    assert data.natoms == some[0].natoms
    for name in ("pos", "fixed", "forces"):
        check_same(data[name], some[0][name])


def test_a_large_sum_is_not_infinite(tmp_path: Path, some: list[Data]) -> None:
    forces = torch.full_like(some[0].forces, 3e38)
    write(tmp_path / "data.0000.lmdb", [changed(some[0], forces=forces)])
    assert torch.equal(open_folder(tmp_path)[0].forces, forces)


# ------------------------------------------------------------------ damage


def set_field(name: str, value: Any) -> Spoil:
    def spoil(data: Data) -> None:
        data[name] = value

    return spoil


def nan_in(name: str) -> Spoil:
    def spoil(data: Data) -> None:
        data[name][1, 2] = math.nan

    return spoil


BAD_FIELDS: dict[str, tuple[Spoil, str]] = {
    "nan force": (nan_in("forces"), r"has forces that are not finite\. Remove the structure"),
    "nan position": (nan_in("pos"), r"has pos that are not finite"),
    "nan energy": (
        set_field("energy", math.nan),
        r"has a field 'energy' that is not a finite number \(nan\)",
    ),
    "inf energy": (
        set_field("energy", torch.tensor([math.inf])),
        r"'energy' that is not a finite number \(inf\)",
    ),
    "energy as text": (set_field("energy", "-3.0"), r"'energy' that is not a finite number \(-3\.0\)"),
    "two energies": (
        set_field("energy", torch.zeros(2)),
        r"'energy' of shape \(2,\) where one number is right",
    ),
    "forces of fewer atoms": (
        set_field("forces", torch.zeros(2, 3)),
        r"'forces' of shape \(2, 3\) where \(5, 3\) is right",
    ),
    "flat forces": (
        set_field("forces", torch.zeros(15)),
        r"'forces' of shape \(15,\) where \(5, 3\) is right",
    ),
    "fixed of fewer atoms": (
        set_field("fixed", torch.zeros(4)),
        r"'fixed' of shape \(4,\) where \(5,\) is right",
    ),
    "a cell of six": (
        set_field("cell", torch.zeros(6)),
        r"'cell' of shape \(6,\) where \(1, 3, 3\) is right",
    ),
    "natoms": (set_field("natoms", 9), r"'natoms' that is 9 where 'pos' has 5 rows"),
    "no atoms": (set_field("pos", torch.zeros(0, 3)), r"has no atoms: remove it from the data set"),
    "energy as bytes": (set_field("energy", b"-3"), r"'energy' that is not a finite number \(b'-3'\)"),
    "several energies": (set_field("energy", [1.0, 2.0]), r"'energy' that is not a finite number"),
    "no md": (set_field("md", []), r"'md' of shape \(0,\) where \(1,\) is right"),
    "words": (set_field("forces", ["a", "b"]), r"a field 'forces' that is no array of numbers"),
}


@pytest.mark.parametrize("bad", BAD_FIELDS)
def test_a_bad_field(tmp_path: Path, some: list[Data], bad: str) -> None:
    spoil, message = BAD_FIELDS[bad]
    spoil(some[2])
    write(tmp_path / "data.0000.lmdb", some)
    dataset = open_folder(tmp_path)
    assert dataset[1].sid == 1
    where = rf"Record 2 of '.*data\.0000\.lmdb' \(sid 2, fid 0, id 0_2\) .*{message}"
    with pytest.raises(ValueError, match=where):
        dataset[2]
    assert dataset[3].sid == 3


@pytest.mark.parametrize("name", ["forces", "fixed", "tags", "sid", "pos"])
def test_a_field_that_one_record_lacks(tmp_path: Path, some: list[Data], name: str) -> None:
    write(tmp_path / "data.0000.lmdb", [*some[:4], changed(some[4], **{name: None})])
    with pytest.raises(ValueError, match=rf"Record 4 of '.*data\.0000\.lmdb'.*has no field '{name}'"):
        list(open_folder(tmp_path))


@pytest.mark.parametrize("name", ["forces", "fixed", "cell", "energy"])
def test_a_field_that_the_first_record_lacks(tmp_path: Path, some: list[Data], name: str) -> None:
    """Not left out of all structures without a word."""
    write(tmp_path / "data.0000.lmdb", [changed(some[0], **{name: None}), *some[1:]])
    message = rf"Record 1 of .* has a field '{name}' that record 0 of '.*data\.0000\.lmdb' lacks"
    with pytest.raises(ValueError, match=message):
        list(open_folder(tmp_path))


DAMAGED = {
    "cut off": (lambda stored: stored[: len(stored) // 2], "cannot be unpickled"),
    "nothing": (lambda stored: b"", "cannot be unpickled"),
    "garbage": (lambda stored: b"\x80\x05garbage", "cannot be unpickled"),
    "another object": (
        lambda stored: pickle.dumps({"pos": 1}),
        r"cannot be unpickled .*it is a builtins\.dict",
    ),
    "not there": (lambda stored: None, r"is missing\. Preprocess the file again"),
}


def damaged(folder: Path, some: list[Data], damage: str) -> str:
    spoil, message = DAMAGED[damage]
    records: list[Any] = list(some)
    records[3] = spoil(pickle.dumps(some[3]))
    # `length` makes up for the missing one, as a writer that was killed would have left it.
    write(folder / "data.0000.lmdb", [*records, *([some[0]] if records[3] is None else [])],
          length=len(records))  # fmt: skip
    return rf"Record 3 of '.*data\.0000\.lmdb' \(id 0_3\) {message}"


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_record(tmp_path: Path, some: list[Data], damage: str) -> None:
    message = damaged(tmp_path, some, damage)
    dataset = open_folder(tmp_path)
    with pytest.raises(ValueError, match=message):
        dataset[3]
    assert dataset[4].sid == 4
    with pytest.raises(ValueError, match=message):
        list(read_lmdb(tmp_path))


@pytest.mark.parametrize("damage", ["cut off", "not there"])
def test_a_damaged_record_that_a_worker_meets(tmp_path: Path, some: list[Data], damage: str) -> None:
    message = damaged(tmp_path, some, damage)
    loader = DataLoader(open_folder(tmp_path), batch_size=2, num_workers=1, collate_fn=collate)
    with pytest.raises(ValueError, match=message):
        list(loader)


def test_a_file_that_is_cut_off(folder: Path) -> None:
    """Its first pages are whole: LMDB opens it, and reading behind the end would kill the process."""
    file = folder / "data.0001.lmdb"
    used = LazyEnvironment(file)
    size = (used._opened().info()["last_pgno"] + 1) * used.stat()["psize"]
    used.close()
    for cut in (size - 1, size // 2, 8192):
        os.truncate(file, cut)
        with pytest.raises(ValueError, match=rf"data\.0001\.lmdb' cannot be opened .*cut off, with {cut} of"):
            open_folder(folder)
        with pytest.raises(ValueError, match=rf"cut off, with {cut} of"):
            list(read_lmdb(folder))


def test_a_file_without_its_unused_end_is_whole(folder: Path) -> None:
    """Copying may drop what the map reserves but does not hold."""
    file = folder / "data.0001.lmdb"
    used = LazyEnvironment(file)
    size = (used._opened().info()["last_pgno"] + 1) * used.stat()["psize"]
    used.close()
    os.truncate(file, size)
    assert [data.sid for data in open_folder(folder)] == list(range(7))


@pytest.mark.parametrize(
    ("content", "found"),
    [(b"", "it is empty"), (b"text " * 5000, "MDB_INVALID"), (b"x", "MDB_INVALID|cut off")],
)
def test_a_file_that_is_no_lmdb(folder: Path, content: bytes, found: str) -> None:
    (folder / "data.0000.lmdb").write_bytes(content)
    message = (
        rf"data\.0000\.lmdb' cannot be opened as an LMDB.*({found}).*Copy or preprocess it again, or remove"
    )
    with pytest.raises(ValueError, match=message):
        open_folder(folder)


def test_a_file_that_promises_more(tmp_path: Path, some: list[Data]) -> None:
    write(tmp_path / "data.0000.lmdb", some, length=9)
    with pytest.raises(ValueError, match="it says that it holds 9 structures and holds 7"):
        open_folder(tmp_path)


@pytest.mark.parametrize("length", ["seven", [7]])
def test_a_length_that_is_no_number(tmp_path: Path, some: list[Data], length: Any) -> None:
    write(tmp_path / "data.0000.lmdb", some, length=length)
    with pytest.raises(ValueError, match="its 'length' is not a number"):
        open_folder(tmp_path)


def test_a_length_says_what_counts(tmp_path: Path, some: list[Data]) -> None:
    """As in fairchem: what lies behind it, such as other keys, is not read."""
    write(tmp_path / "data.0000.lmdb", some, length=5)
    assert len(open_folder(tmp_path)) == len(LmdbDataset({"src": str(tmp_path)})) == 5


def test_nothing_in_it(tmp_path: Path) -> None:
    write(tmp_path / "data.0000.lmdb", [])
    with pytest.raises(ValueError, match=r"data\.0000\.lmdb' holds no structure"):
        open_folder(tmp_path)


def test_an_empty_file_among_others(folder: Path) -> None:
    write(folder / "data.0000a.lmdb", [])
    assert [data.sid for data in open_folder(folder)] == list(range(7))


def test_total_energies_are_another_format(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"train_on_oc20_total_energies' needs 'dataset\.\*\.format: oc22_lmdb'"
    ):
        open_folder(folder, train_on_oc20_total_energies=True)


def test_linear_references_are_not_silently_ignored(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    open_folder(folder, lin_ref="nowhere.npz")
    assert "'dataset.*.lin_ref' does nothing" in caplog.text and "element_references" in caplog.text


def test_the_same_structure_twice(tmp_path: Path, some: list[Data]) -> None:
    with LmdbWriter(tmp_path / "new") as writer:
        for data in some:
            writer.add(data)
        with pytest.raises(ValueError, match=r"Structure \(sid 1, fid 0\) was added before, as number 1"):
            writer.add(some[1])
    assert [data.sid for data in open_folder(tmp_path / "new")] == list(range(7))


# ------------------------------------------------------------------ processes


def test_opened_on_first_use_and_pickled_without(folder: Path) -> None:
    def open_files() -> int:
        return sum(os.path.realpath(fd).endswith(".lmdb") for fd in Path("/proc/self/fd").iterdir())

    before = open_files()
    dataset = open_folder(folder)
    assert open_files() == before
    assert len(list(dataset)) == 7 and open_files() == before + 2
    again = pickle.loads(pickle.dumps(dataset))
    assert [data.sid for data in again] == list(range(7))
    again.close_db()
    assert [data.sid for data in dataset] == list(range(7))
    dataset.close_db()
    assert open_files() == before


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers(folder: Path, context: str) -> None:
    dataset = open_folder(folder)
    assert len(list(dataset)) == 7  # the files are open when the workers start
    for _ in range(2 if context == "fork" else 1):
        loader = DataLoader(
            dataset, batch_size=2, num_workers=2, collate_fn=collate, multiprocessing_context=context
        )
        assert [sid for batch in loader for sid in batch.sid.tolist()] == list(range(7))


# ------------------------------------------------------------------ who reads with it


def test_settings_of_all_splits() -> None:
    splits = {
        "train": {"src": "a", "format": "trajectory_lmdb"},
        "val": {"src": "b"},
        "test": {"src": "c", "use_train_settings": False},
        "relax": {},
    }
    before = copy.deepcopy(splits)
    replaced = with_our_readers(splits, keep_graph=False)
    assert splits == before
    assert [replaced[name].get("format") for name in splits] == [DOTTED, DOTTED, DOTTED, None]
    assert replaced["relax"] == {} and replaced["val"]["keep_graph"] is False
    assert (
        with_our_readers({"train": {"src": "a", "format": "ase_db"}}, keep_graph=True)["train"]["format"]
        == "ase_db"
    )
    oc22 = with_our_readers(
        {"train": {"src": "a", "format": "oc22_lmdb"}, "val": {"src": "b"}}, keep_graph=True
    )
    assert {settings["format"] for settings in oc22.values()} == {READERS["oc22_lmdb"]}
    own = with_our_readers(
        {"train": {"src": "a", "format": "dens_lmdb", "keep_graph": True}}, keep_graph=False
    )
    assert own["train"] == {"src": "a", "format": "dens_lmdb", "keep_graph": True}


@pytest.mark.parametrize("format_", [None, "lmdb", "single_point_lmdb", "trajectory_lmdb"])
def test_our_trainer_reads_with_it_and_keeps_the_users_word(
    run_settings: dict[str, Any], make_trainer: Callable[..., Any], format_: str | None
) -> None:
    train = run_settings["dataset"]["train"]
    del train["format"]
    if format_ is not None:
        train["format"] = format_
    run_settings["dataset"]["relax"] = {"src": run_settings["dataset"]["test"]["src"]}
    trainer = make_trainer(run_settings)
    for split in ("train", "val", "test"):
        assert type(getattr(trainer, f"{split}_dataset").dataset) is LazyLmdbDataset
    assert type(trainer.relax_dataset) is LazyLmdbDataset
    assert trainer.config["dataset"].get("format") == format_
    assert not any("keep_graph" in trainer.config[key] for key in ("dataset", "val_dataset", "test_dataset"))


def test_a_stock_trainer_reads_with_fairchems(
    run_settings: dict[str, Any], make_trainer: Callable[..., Any]
) -> None:
    make_trainer(run_settings)
    del run_settings["dataset"]["train"]["transforms"]["dens"]
    run_settings["loss_functions"].pop()
    run_settings["optim"]["scheduler"] = "Null"
    trainer = make_trainer(run_settings, trainer=registry.get_trainer_class("ocp"))
    assert type(trainer.train_dataset.dataset) is LmdbDataset
    assert registry.get_dataset_class("lmdb") is LmdbDataset


def test_stored_graphs_are_read_where_they_are_used(
    run_settings: dict[str, Any], make_trainer: Callable[..., Any], tmp_path: Path, some: list[Data]
) -> None:
    graph = {"edge_index": torch.zeros(2, 4).long(), "cell_offsets": torch.zeros(4, 3)}
    write(tmp_path / "graphs" / "data.0000.lmdb", [changed(data, **graph) for data in some])
    run_settings["dataset"] = {"train": run_settings["dataset"]["train"] | {"src": str(tmp_path / "graphs")}}
    trainer = make_trainer(run_settings)
    assert not set(graph) & set(next(iter(trainer.train_loader)).keys())
    del run_settings["dataset"]["train"]["transforms"]["dens"]
    run_settings["loss_functions"].pop()
    run_settings["model"]["otf_graph"] = False
    batch = next(iter(make_trainer(run_settings).train_loader))
    assert set(graph) <= set(batch.keys()) and batch.neighbors.tolist() == [4] * 4
