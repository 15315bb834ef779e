"""OC22 and OC22 with OC20: the energies of fairchem's data set, and clear words where there is none."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from fairchem.core.common.registry import registry
from fairchem.core.datasets.lmdb_dataset import data_list_collater
from fairchem.core.datasets.oc22_lmdb_dataset import OC22LmdbDataset
from torch.utils.data import DataLoader
from torch_geometric.data import Data

from fairchem_dens.data.oc22_lmdb import LazyOC22LmdbDataset

collate = partial(data_list_collater, otf_graph=True)
REFERENCE = 100.5
Change = Callable[[Data], None]


def write(file: Path, records: Sequence[Data], *, with_length: bool = True) -> None:
    file.parent.mkdir(exist_ok=True)
    env = lmdb.open(str(file), subdir=False, map_size=2**24, lock=False)
    with env.begin(write=True) as transaction:
        for index, record in enumerate(records):
            transaction.put(str(index).encode("ascii"), pickle.dumps(record, protocol=-1))
        if with_length:
            transaction.put(b"length", pickle.dumps(len(records)))
    env.close()


def as_stored(data: Data, **fields: Any) -> Data:
    """With the old names of labels, as both sets were published."""
    kept = {
        name: data[name]
        for name in ("pos", "cell", "atomic_numbers", "natoms", "fixed", "tags", "sid", "fid")
    }
    return Data(**{**kept, "y": data.energy, "force": data.forces, **fields})


@pytest.fixture
def oc22(structure: Callable[..., Data]) -> list[Data]:
    return [as_stored(structure(seed, natoms=4), oc22=1, nads=0) for seed in range(3)]


@pytest.fixture
def oc20(structure: Callable[..., Data]) -> list[Data]:
    graph = {
        "edge_index": torch.zeros(2, 5).long(),
        "cell_offsets": torch.zeros(5, 3),
        "distances": torch.ones(5),
    }
    return [
        as_stored(structure(seed, natoms=5), sid=torch.tensor([seed]), fid=torch.tensor([seed % 2]), **graph)
        for seed in range(10, 13)
    ]


@pytest.fixture
def references(tmp_path: Path) -> Path:
    file = tmp_path / "oc20_ref.pkl"
    file.write_bytes(pickle.dumps({f"random{sid}": REFERENCE + sid for sid in range(20)}))
    return file


def both(config: dict[str, Any]) -> tuple[list[Data], list[Data]]:
    ours, theirs = LazyOC22LmdbDataset(config), OC22LmdbDataset(config)
    assert isinstance(ours, OC22LmdbDataset)
    assert len(ours) == len(theirs)
    result = [ours[index] for index in range(len(ours))], [theirs[index] for index in range(len(theirs))]
    theirs.close_db()
    return result


def check_same(ours: list[Data], theirs: list[Data]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert set(one.keys()) - {"id"} == set(other.keys()) - {"id"}
        for name in set(other.keys()) - {"id"}:
            expected = torch.as_tensor(other[name])
            found = torch.as_tensor(one[name], dtype=expected.dtype)
            assert torch.equal(found.reshape(expected.shape), expected), name


@pytest.mark.parametrize("with_length", [True, False])
@pytest.mark.parametrize("as_file", [True, False])
def test_oc22_alone(tmp_path: Path, oc22: list[Data], with_length: bool, as_file: bool) -> None:
    write(tmp_path / "set" / "data.0000.lmdb", oc22, with_length=with_length)
    src = tmp_path / "set" / "data.0000.lmdb" if as_file else tmp_path / "set"
    ours, theirs = both({"src": str(src), "key_mapping": {"y": "energy", "force": "forces"}})
    check_same(ours, theirs)
    assert collate(ours).energy.tolist() == pytest.approx([data.y for data in oc22])


def test_the_file_of_references_is_read_only_for_oc20(tmp_path: Path, oc22: list[Data]) -> None:
    write(tmp_path / "set" / "data.0000.lmdb", oc22)
    config = {"src": str(tmp_path / "set"), "train_on_oc20_total_energies": True, "oc20_ref": "not/here.pkl"}
    assert LazyOC22LmdbDataset(config)[0].oc22 == 1


@pytest.mark.parametrize("number", [float, torch.tensor, lambda value: torch.tensor([value])])
@pytest.mark.parametrize("first", ["oc20", "oc22"])
def test_both_in_one_folder(
    tmp_path: Path, oc20: list[Data], oc22: list[Data], references: Path, number: Any, first: str
) -> None:
    for data in oc20:
        data.y = number(data.y)
    files = [oc20, oc22] if first == "oc20" else [oc22, oc20]
    for at, records in enumerate(files):
        write(tmp_path / "set" / f"data.{at:04d}.lmdb", records)
    config = {"src": str(tmp_path / "set"), "train_on_oc20_total_energies": True, "oc20_ref": str(references)}
    ours, theirs = both(config)
    check_same(ours, theirs)
    for order in (ours, ours[::-1]):
        batch = collate(order)
        expected = {int(data.sid): float(data.y) + REFERENCE + int(data.sid) for data in oc20}
        expected |= {data.sid: data.y for data in oc22}
        assert batch.y.tolist() == pytest.approx([expected[sid] for sid in batch.sid.tolist()], rel=1e-6)
        assert batch.oc22.tolist() == [int(sid < 10) for sid in batch.sid.tolist()]
        assert batch.nads.tolist() == [int(sid >= 10) for sid in batch.sid.tolist()]
    loader = DataLoader(LazyOC22LmdbDataset(config), batch_size=3, num_workers=2, collate_fn=collate)
    assert sum(len(batch.sid) for batch in loader) == 6


def test_reading_twice_adds_once(tmp_path: Path, oc20: list[Data], references: Path) -> None:
    write(tmp_path / "set" / "data.0000.lmdb", oc20)
    config = {"src": str(tmp_path / "set"), "train_on_oc20_total_energies": True, "oc20_ref": str(references)}
    dataset = pickle.loads(pickle.dumps(LazyOC22LmdbDataset(config)))
    assert dataset[1].y == dataset[1].y == pytest.approx(oc20[1].y + REFERENCE + 11)


def test_relaxed_energies(tmp_path: Path, oc20: list[Data], oc22: list[Data], references: Path) -> None:
    for data in oc20:
        del data.force
        data.y_relaxed, data.y_init, data.force = data.y - 1, data.y, torch.zeros(5, 3)
        del data.y
    write(tmp_path / "set" / "data.0000.lmdb", oc20)
    config = {"src": str(tmp_path / "set"), "train_on_oc20_total_energies": True, "oc20_ref": str(references)}
    ours, theirs = both(config)
    check_same(ours, theirs)
    assert "y_init" not in ours[0] and "force" not in ours[0]


def test_test_data(tmp_path: Path, oc22: list[Data]) -> None:
    for data in oc22:
        del data.y, data.force
    write(tmp_path / "set" / "data.0000.lmdb", oc22)
    ours, theirs = both({"src": str(tmp_path / "set")})
    check_same(ours, theirs)


@pytest.mark.parametrize(("wanted", "expected"), [("slabs", [1]), ("adslabs", [0, 2]), ("all", [0, 1, 2])])
def test_slabs_or_adslabs(tmp_path: Path, oc22: list[Data], wanted: str, expected: list[int]) -> None:
    write(tmp_path / "set" / "data.0000.lmdb", oc22)
    (tmp_path / "set" / "data_log.0000.txt").write_text("one,0\nclean_two,0\nthree,0\n")
    dataset = LazyOC22LmdbDataset({"src": str(tmp_path / "set"), "data2train": wanted})
    assert [data.sid for data in dataset] == expected


def test_slabs_without_their_lines(tmp_path: Path, oc22: list[Data]) -> None:
    write(tmp_path / "set" / "data.0000.lmdb", oc22)
    with pytest.raises(ValueError, match=r"'dataset\.\*\.data2train: slabs' needs one line.*found 0 for 3"):
        LazyOC22LmdbDataset({"src": str(tmp_path / "set"), "data2train": "slabs"})
    with pytest.raises(ValueError, match=r"'dataset\.\*\.data2train' must be one of .*found 'slab'"):
        LazyOC22LmdbDataset({"src": str(tmp_path / "set"), "data2train": "slab"})


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({}, ValueError, r"Record 0 of .*sid 10, .*of OC20.*'dataset\.\*\.train_on_oc20_total_energies: T"),
        ({"train_on_oc20_total_energies": True}, ValueError, r"'dataset\.\*\.oc20_ref' is missing"),
        (
            {"train_on_oc20_total_energies": True, "oc20_ref": "nowhere.pkl"},
            FileNotFoundError,
            r"'dataset\.\*\.oc20_ref' is 'nowhere\.pkl', which does not exist",
        ),
        (
            {"train_on_oc20_total_energies": True, "oc20_ref": "{bad}"},
            ValueError,
            "no pickled dictionary from",
        ),
        (
            {"train_on_oc20_total_energies": True, "oc20_ref": "{other}"},
            ValueError,
            r"Record 0 of .*the system 'random10', which 'dataset\.\*\.oc20_ref' .*has no energy for",
        ),
    ],
)
def test_energies_of_oc20_that_cannot_be_made_total(
    tmp_path: Path, oc20: list[Data], config: dict[str, Any], kind: type[Exception], message: str
) -> None:
    write(tmp_path / "set" / "data.0000.lmdb", oc20)
    files = {"bad": tmp_path / "bad.pkl", "other": tmp_path / "other.pkl"}
    files["bad"].write_bytes(b"no pickle")
    files["other"].write_bytes(pickle.dumps({"random3": 1.0}))
    config = {
        key: value.format(**files) if isinstance(value, str) else value for key, value in config.items()
    }
    with pytest.raises(kind, match=message):
        LazyOC22LmdbDataset({"src": str(tmp_path / "set"), **config})


def test_a_bad_record_is_named(tmp_path: Path, oc22: list[Data]) -> None:
    oc22[1].y = float("nan")
    write(tmp_path / "set" / "data.0000.lmdb", oc22)
    dataset = LazyOC22LmdbDataset({"src": str(tmp_path / "set")})
    with pytest.raises(
        ValueError, match=r"Record 1 of .*data\.0000\.lmdb' \(sid 1, fid 0, id 0_1\).*'y'.*nan"
    ):
        list(dataset)


def test_our_trainer_reads_with_it(
    run_settings: dict[str, Any],
    make_trainer: Callable[..., Any],
    tmp_path: Path,
    oc20: list[Data],
    oc22: list[Data],
    references: Path,
) -> None:
    """Joint batches, all the way through two steps."""
    write(tmp_path / "set" / "data.0000.lmdb", oc22)
    write(tmp_path / "set" / "data.0001.lmdb", oc20)
    train = run_settings["dataset"]["train"] | {
        "format": "oc22_lmdb", "src": str(tmp_path / "set"), "train_on_oc20_total_energies": True,
        "oc20_ref": str(references), "key_mapping": {"y": "energy", "force": "forces"},
    }  # fmt: skip
    run_settings["dataset"] = {"train": train}
    run_settings["optim"] |= {"batch_size": 3, "max_epochs": 1}
    trainer = make_trainer(run_settings)
    assert type(trainer.train_dataset.dataset) is LazyOC22LmdbDataset
    assert trainer.config["dataset"]["format"] == "oc22_lmdb"
    assert registry.get_dataset_class("oc22_lmdb") is OC22LmdbDataset
    trainer.train(disable_eval_tqdm=True)
    assert trainer.step == 2
