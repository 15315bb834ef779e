"""The data set `dens_lmdb`: which frames are from MD, and LMDB files in several processes."""

from __future__ import annotations

import gzip
import operator
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from fairchem.core.datasets.base_dataset import create_dataset
from fairchem.core.datasets.lmdb_dataset import LmdbDataset, data_list_collater
from torch.utils.data import DataLoader
from torch_geometric.data import Data

from fairchem_dens import transforms
from fairchem_dens.corruption import Corruption, corrupt
from fairchem_dens.data.dens_lmdb import DeNSLmdbDataset
from fairchem_dens.data.environment import LazyEnvironment

RELAXATION = "/somewhere/relaxations/3/random{sid}.traj,{fid},9\n"
MD = "/somewhere/md/3/random{sid}.traj,{fid},9\n"

# Uneven on purpose: a flag that is looked up in the wrong file or place shows.
SHARDS: list[list[bool]] = [
    [False, True, True],
    [True],
    [False, False, True, False, True, False, False, True, True, False],
]
FLAT = [flag for shard in SHARDS for flag in shard]


def structure(sid: int, fid: int) -> Data:
    """As OC20's records are: old label names, `sid` says which frame it is."""
    rng = np.random.default_rng(sid)
    natoms = 2 + sid % 3
    return Data(
        pos=torch.from_numpy(rng.normal(size=(natoms, 3))).float(),
        atomic_numbers=torch.full((natoms,), 29.0),
        cell=10 * torch.eye(3)[None],
        natoms=natoms,
        fixed=torch.tensor([1.0] + [0.0] * (natoms - 1)),
        tags=torch.zeros(natoms),
        y=float(rng.normal()),
        force=torch.from_numpy(rng.normal(size=(natoms, 3))).float(),
        sid=sid,
        fid=fid,
    )


def write_lmdb(path: Path, records: Sequence[Data], *, with_length: bool = True) -> None:
    env = lmdb.open(str(path), subdir=False, map_size=2**24, lock=False)
    with env.begin(write=True) as transaction:
        for index, record in enumerate(records):
            transaction.put(str(index).encode("ascii"), pickle.dumps(record, protocol=-1))
        if with_length:
            transaction.put(b"length", pickle.dumps(len(records), protocol=-1))
    env.close()


def write_folder(folder: Path, shards: Sequence[Sequence[bool]] = SHARDS, *, logs: bool = True) -> Path:
    """One LMDB and one log a shard; `sid` counts through all shards."""
    folder.mkdir(parents=True)
    sid = 0
    for number, shard in enumerate(shards):
        records = []
        lines = ""
        for fid, is_md in enumerate(shard):
            records.append(structure(sid, fid))
            lines += (MD if is_md else RELAXATION).format(sid=sid, fid=fid)
            sid += 1
        write_lmdb(folder / f"data.{number:04d}.lmdb", records, with_length=number % 2 == 0)
        if logs:
            (folder / f"data_log.{number:04d}.txt").write_text(lines)
    return folder


def flags(dataset: Any) -> list[bool]:
    return [bool(dataset[index].md) for index in range(len(dataset))]


def armed(prob: float = 1.0) -> transforms.ArmedCorruption:
    corruption = Corruption(prob=prob, std=0.1, corrupt_ratio=None, all_atoms=True)
    return transforms.ArmedCorruption(corruption, 0, epoch=lambda: 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "train")


def test_marks_the_frames_of_every_shard(folder: Path) -> None:
    dataset = DeNSLmdbDataset({"src": str(folder)})
    dataset.check_md_logs()
    assert [int(dataset[index].sid) for index in range(len(dataset))] == list(range(len(FLAT)))
    assert flags(dataset) == FLAT
    assert dataset[0].md.shape == (1,) and dataset[0].md.dtype == torch.bool


def test_is_fairchems_dataset_otherwise(folder: Path) -> None:
    config = {"src": str(folder), "key_mapping": {"y": "energy", "force": "forces"}}
    ours = DeNSLmdbDataset(config)
    theirs = [LmdbDataset(config)[index] for index in range(len(ours))]
    assert len(ours) == len(theirs)
    for index, theirs_at in enumerate(theirs):
        ours_at = ours[index]
        assert set(ours_at.keys()) - set(theirs_at.keys()) == {"md"}
        for key in theirs_at.keys():  # noqa: SIM118  # a Data iterates over pairs
            same = torch.equal if isinstance(theirs_at[key], torch.Tensor) else operator.eq
            assert same(ours_at[key], theirs_at[key]), key


def test_single_file(folder: Path) -> None:
    dataset = DeNSLmdbDataset({"src": str(folder / "data.0002.lmdb")})
    dataset.check_md_logs()
    assert flags(dataset) == SHARDS[2]
    assert int(dataset[4].sid) == 8


def test_single_file_without_number(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "data.lmdb", [structure(0, 0), structure(1, 1)])
    (tmp_path / "data_log.txt").write_text(MD + RELAXATION)
    assert flags(DeNSLmdbDataset({"src": str(tmp_path / "data.lmdb")})) == [True, False]


def test_a_log_belongs_to_its_file_by_name(folder: Path) -> None:
    """Notes of the user, and more logs than files, shift nothing."""
    (folder / "a_note.txt").write_text("md\nmd\nmd\n")
    (folder / "data_log.0000.txt.bak").write_text(MD)
    (folder / "data_log.0007.txt").write_text(MD)
    assert flags(DeNSLmdbDataset({"src": str(folder)})) == FLAT


@pytest.mark.parametrize(
    ("path", "is_md"),
    [
        ("/somewhere/relaxations/7/random1331004.traj", False),
        ("/somewhere/md/7/random1331004.traj", True),
        ("/home/mdavis/relaxations/random0.traj", False),
        ("/home/mdavis/oc20/md/random0.traj", True),
        ("/data/relaxations_of_2020/md/random0.traj", True),  # the last part that says it
        ("/data/md/relaxations/random0.traj", False),
        ("/data/oc20_md/random0.traj", True),
        ("/data/s2ef-md-3/random0.traj", True),
        ("relaxations/random0.traj", False),
        ("md/random0.traj", True),
    ],
)
def test_paths(tmp_path: Path, path: str, is_md: bool) -> None:
    folder = write_folder(tmp_path / "train", [[False]])
    (folder / "data_log.0000.txt").write_text(f"{path},258,365\n\n")
    dataset = DeNSLmdbDataset({"src": str(folder)})
    dataset.check_md_logs()
    assert flags(dataset) == [is_md]


@pytest.mark.parametrize(
    "path", ["/home/mdavis/random0.traj", "/data/cmd/random0.traj", "/data/relaxations_md/random0.traj"]
)
def test_paths_that_leave_it_open(tmp_path: Path, path: str) -> None:
    """Two letters of a name are no word."""
    folder = write_folder(tmp_path / "train", [[False]])
    (folder / "data_log.0000.txt").write_text(f"{path},258,365\n")
    with pytest.raises(ValueError, match=r"line 1 of '.*data_log\.0000\.txt' names neither .*random0"):
        DeNSLmdbDataset({"src": str(folder)}).check_md_logs()


def test_compressed_logs(folder: Path) -> None:
    for number in (0, 2):
        log = folder / f"data_log.{number:04d}.txt"
        (folder / f"{log.name}.gz").write_bytes(gzip.compress(log.read_bytes()))
        log.unlink()
    dataset = DeNSLmdbDataset({"src": str(folder)})
    dataset.check_md_logs()
    assert flags(dataset) == FLAT


def test_a_damaged_compressed_log(folder: Path) -> None:
    log = folder / "data_log.0002.txt"
    (folder / f"{log.name}.gz").write_bytes(gzip.compress(log.read_bytes())[:-9])
    log.unlink()
    with pytest.raises(ValueError, match="It is not known which frames are from MD"):
        DeNSLmdbDataset({"src": str(folder)}).check_md_logs()


def test_only_the_path_of_a_line_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "train", [[True]])
    (folder / "data_log.0000.txt").write_text("/somewhere/md/random0.traj,relaxations,9\n")
    assert flags(DeNSLmdbDataset({"src": str(folder)})) == [True]


def test_fairchems_sharding(folder: Path) -> None:
    parts = [DeNSLmdbDataset({"src": str(folder), "shard": shard, "total_shards": 3}) for shard in range(3)]
    assert [flag for part in parts for flag in flags(part)] == FLAT


def test_md_is_there_before_the_transforms(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fairchem.core.modules.transforms as fairchem_transforms

    seen: list[tuple[int, bool]] = []

    def probe(data: Data, settings: Any) -> Data:
        seen.append((int(data.sid), bool(data.md)))
        assert settings == {"on": True} and "force" in data  # transforms run before key_mapping
        return data

    monkeypatch.setattr(fairchem_transforms, "probe", probe, raising=False)
    dataset = DeNSLmdbDataset(
        {
            "src": str(folder),
            "transforms": {"normalizer": {}, "probe": {"on": True}},
            "key_mapping": {"force": "forces"},
        }
    )
    assert set(dataset.transforms.config) == {"normalizer", "probe"}
    assert "forces" in dataset[0]
    flags(dataset)
    assert seen[1:] == list(enumerate(FLAT))


def test_no_md_frame_is_ever_corrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fairchem.core.modules.transforms as fairchem_transforms

    monkeypatch.setattr(fairchem_transforms, "dens", transforms.dens, raising=False)
    settings = {"prob": 1.0, "std": 0.1, "all_atoms": True}
    config = {"format": "dens_lmdb_under_test", "src": str(folder), "transforms": {"dens": settings}}
    subset = create_dataset(config, "train")
    clean = {int(data.sid): data.pos for data in (subset[index] for index in range(len(subset)))}
    dataset = subset.dataset
    dataset.check_md_logs()
    dataset.transforms.config["dens"] = armed()
    for data in (subset[index] for index in range(len(subset))):
        is_md = FLAT[int(data.sid)]
        assert bool(data.corrupted) is not is_md
        assert torch.equal(data.pos, clean[int(data.sid)]) is is_md


def test_no_md_frame_of_a_batch_is_ever_corrupted(folder: Path) -> None:
    dataset = DeNSLmdbDataset({"src": str(folder), "key_mapping": {"force": "forces"}})
    batch = data_list_collater([dataset[index] for index in range(len(dataset))], otf_graph=True)
    assert batch.md.tolist() == FLAT
    corruption = Corruption(prob=1.0, std=0.1, all_atoms=True, switch="batch")
    corrupted = corrupt(batch, corruption, seed=0, epoch=0, selected=True)
    assert corrupted.corrupted.tolist() == [not is_md for is_md in FLAT]


def all_md_run(
    run_settings: dict[str, Any], structure_of: Callable[..., Data], folder: Path, switch: str
) -> dict[int, Data]:
    """Set a run up that corrupts all it may, on frames of both kinds; returns them by sid."""
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder)
    records = {}
    sid = 0
    for number, shard in enumerate(SHARDS):
        (folder / f"data.{number:04d}.lmdb").unlink()
        of_file = []
        for _ in shard:
            of_file.append(structure_of(sid, natoms=6, num_fixed=1))
            records[sid] = of_file[-1]
            sid += 1
        write_lmdb(folder / f"data.{number:04d}.lmdb", of_file)
    run_settings["dataset"]["train"] |= {"format": "dens_lmdb", "src": str(folder)}
    run_settings["dataset"]["train"]["transforms"]["dens"] = {
        "prob": 1.0, "std": 0.1, "all_atoms": True, "switch": switch,
    }  # fmt: skip
    run_settings["optim"] |= {"max_epochs": 2, "batch_size": 3, "eval_every": 3}
    return records


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("switch", ["structure", "batch"])
def test_no_md_frame_is_corrupted_in_a_whole_training(
    run_settings: dict[str, Any],
    make_trainer: Callable[..., Any],
    structure: Callable[..., Data],
    tmp_path: Path,
    switch: str,
    workers: int,
) -> None:
    """What the model is given in each step: all relaxation frames corrupted, all MD frames as they were."""
    records = all_md_run(run_settings, structure, tmp_path / "all_md", switch)
    run_settings["optim"]["num_workers"] = workers
    trainer = make_trainer(run_settings)
    seen: list[int] = []

    def look(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        batch = inputs[0]
        if not module.training:
            assert "corrupted" not in batch  # val inherits format and transforms, and has no logs
            return
        for index, sid in enumerate(batch.sid.tolist()):
            atoms = batch.batch == index
            seen.append(sid)
            assert bool(batch.md[index]) is FLAT[sid]
            assert bool(batch.corrupted[index]) is not FLAT[sid]
            assert torch.equal(batch.pos[atoms], records[sid].pos) is FLAT[sid]
            assert bool(batch.noise_mask[atoms].any()) is not FLAT[sid]
            assert bool(batch.condition_forces[atoms].any()) is not FLAT[sid]

    trainer.model.register_forward_pre_hook(look)
    trainer.train(disable_eval_tqdm=True)
    assert {seen.count(sid) for sid in records} >= {2}  # twice each; the sampler repeats some to fill ranks
    assert set(seen) == set(records)


def test_logs_are_needed_where_the_corruption_is_armed(
    run_settings: dict[str, Any],
    make_trainer: Callable[..., Any],
    structure: Callable[..., Data],
    tmp_path: Path,
) -> None:
    all_md_run(run_settings, structure, tmp_path / "all_md", "structure")
    (tmp_path / "all_md" / "data_log.0001.txt").unlink()
    with pytest.raises(
        ValueError, match=r"data_log\.0001\.txt' is missing.*'dataset\.train\.md_logs: ignore'"
    ):
        make_trainer(run_settings)
    run_settings["dataset"]["train"]["md_logs"] = "ignore"
    (batch, *_) = make_trainer(run_settings).train_loader
    assert batch.corrupted.all() and not batch.md.any()


@pytest.fixture(autouse=True)
def _registered() -> Any:
    """A name of this test's own, whatever the package registers."""
    from fairchem.core.common.registry import registry

    names = registry.mapping["dataset_name_mapping"]
    names["dens_lmdb_under_test"] = DeNSLmdbDataset
    yield
    del names["dens_lmdb_under_test"]


# --- logs that are missing or wrong ---


def test_missing_logs_are_harmless_until_checked(tmp_path: Path) -> None:
    dataset = DeNSLmdbDataset({"src": str(write_folder(tmp_path / "val", logs=False))})
    assert len(dataset) == len(FLAT)
    assert "md" not in dataset[0]
    with pytest.raises(ValueError, match=r"data_log\.0000\.txt' is missing.*md_logs: ignore"):
        dataset.check_md_logs()


def test_the_missing_log_is_named(folder: Path) -> None:
    (folder / "data_log.0001.txt").unlink()
    dataset = DeNSLmdbDataset({"src": str(folder)})
    with pytest.raises(ValueError, match=r"data_log\.0001\.txt' is missing") as error:
        dataset.check_md_logs()
    assert "0000" not in str(error.value) and "0002" not in str(error.value)


def test_many_missing_logs_are_counted(tmp_path: Path) -> None:
    dataset = DeNSLmdbDataset({"src": str(write_folder(tmp_path / "train", [[False]] * 9, logs=False))})
    with pytest.raises(ValueError, match="and 6 more"):
        dataset.check_md_logs()


@pytest.mark.parametrize(("extra", "found"), [(MD, 4), ("", 2)])
def test_count_mismatch(folder: Path, extra: str, found: int) -> None:
    log = folder / "data_log.0000.txt"
    log.write_text(log.read_text() + extra if extra else "".join(log.read_text().splitlines(True)[:-1]))
    dataset = DeNSLmdbDataset({"src": str(folder)})
    assert "md" not in dataset[0]
    with pytest.raises(ValueError, match=rf"data_log\.0000\.txt' has {found} lines for 3 frames"):
        dataset.check_md_logs()


def test_equal_totals_do_not_hide_a_mismatch(folder: Path) -> None:
    first, second = folder / "data_log.0000.txt", folder / "data_log.0001.txt"
    lines = first.read_text().splitlines(True)
    first.write_text("".join(lines[:-1]))
    second.write_text(lines[-1] + second.read_text())
    with pytest.raises(ValueError, match=r"has 2 lines for 3 frames.*has 2 lines for 1 frames"):
        DeNSLmdbDataset({"src": str(folder)}).check_md_logs()


def test_a_line_that_names_neither(folder: Path) -> None:
    log = folder / "data_log.0001.txt"
    log.write_text("random1331004,258,365\n")
    with pytest.raises(ValueError, match=r"line 1 of .*data_log\.0001\.txt.*random1331004"):
        DeNSLmdbDataset({"src": str(folder)}).check_md_logs()


def test_ignore_treats_all_as_relaxations(folder: Path) -> None:
    (folder / "data_log.0001.txt").unlink()
    dataset = DeNSLmdbDataset({"src": str(folder), "md_logs": "ignore"})
    dataset.check_md_logs()
    assert flags(dataset) == [False] * len(FLAT)


def test_a_stored_flag_stays_without_logs(tmp_path: Path) -> None:
    record = structure(0, 0)
    record.md = torch.tensor([True])
    write_lmdb(tmp_path / "data.0000.lmdb", [record])
    assert DeNSLmdbDataset({"src": str(tmp_path)})[0].md.tolist() == [True]


# --- bad paths and settings ---


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset\.\*\.src.*nowhere', which does not exist"):
        DeNSLmdbDataset({"src": str(tmp_path / "nowhere")})


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dataset\.\*\.src.*without any \*\.lmdb"):
        DeNSLmdbDataset({"src": str(tmp_path)})


@pytest.mark.parametrize("config", [{}, {"src": None}, {"src": ""}, {"src": ["a", "b"]}])
def test_src_must_be_one_path(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"dataset\.\*\.src.*must be the path"):
        DeNSLmdbDataset(config)


def test_unknown_md_logs(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset\.\*\.md_logs.*'require'.*'ignore'.*found 'never'"):
        DeNSLmdbDataset({"src": str(folder), "md_logs": "never"})


def test_a_file_that_is_no_lmdb(tmp_path: Path) -> None:
    (tmp_path / "data.0000.lmdb").write_bytes(b"not an LMDB" * 1000)
    with pytest.raises(ValueError, match=r"data\.0000\.lmdb' cannot be opened as an LMDB"):
        DeNSLmdbDataset({"src": str(tmp_path)})


# --- files in several processes ---


def open_count() -> int:
    """LMDB files that this process holds open."""
    return sum(os.path.realpath(fd).endswith(".lmdb") for fd in Path("/proc/self/fd").iterdir())


def load(dataset: DeNSLmdbDataset, workers: int, context: str | None) -> list[tuple[int, bool]]:
    loader = DataLoader(
        dataset,
        batch_size=3,
        num_workers=workers,
        multiprocessing_context=context,
        collate_fn=partial(data_list_collater, otf_graph=True),
    )
    return [pair for batch in loader for pair in zip(batch.sid.tolist(), batch.md.tolist(), strict=True)]


@pytest.mark.parametrize("used_before", [False, True])
def test_forked_workers(folder: Path, used_before: bool) -> None:
    dataset = DeNSLmdbDataset({"src": str(folder)})
    expected = list(enumerate(FLAT))
    if used_before:
        assert load(dataset, 0, None) == expected
    for _ in range(2):  # fairchem starts its workers anew in each epoch
        assert load(dataset, 2, "fork") == expected
        assert load(dataset, 0, None) == expected


def test_spawned_worker(folder: Path) -> None:
    dataset = DeNSLmdbDataset({"src": str(folder)})
    expected = list(enumerate(FLAT))
    assert load(dataset, 0, None) == expected  # the files are open when the data set is pickled
    assert load(dataset, 1, "spawn") == expected
    assert load(dataset, 0, None) == expected


def test_files_are_opened_on_first_use(folder: Path) -> None:
    before = open_count()
    dataset = DeNSLmdbDataset({"src": str(folder)})
    assert open_count() == before
    assert dataset[0].sid == 0
    assert open_count() == before + 1
    flags(dataset)
    assert open_count() == before + len(SHARDS)
    del dataset
    assert open_count() == before


def test_pickle_carries_no_open_file(folder: Path) -> None:
    dataset = DeNSLmdbDataset({"src": str(folder)})
    flags(dataset)
    copy = pickle.loads(pickle.dumps(dataset))
    assert flags(copy) == FLAT
    assert flags(dataset) == FLAT


def test_two_data_sets_may_read_the_same_file(folder: Path, tmp_path: Path) -> None:
    """LMDB itself refuses; train and val on one folder, or on a link to it, are nothing unusual."""
    (tmp_path / "link").symlink_to(folder)
    train, val = DeNSLmdbDataset({"src": str(folder)}), DeNSLmdbDataset({"src": str(tmp_path / "link")})
    assert [bool(train[i].md) is bool(val[i].md) for i in range(len(FLAT))] == [True] * len(FLAT)
    del train
    assert flags(val) == FLAT


def test_a_forked_child_opens_its_own(folder: Path) -> None:
    file = folder / "data.0000.lmdb"
    handle = LazyEnvironment(file)
    record = handle.begin().get(b"1")
    child = os.fork()
    if child == 0:
        # A second handle on a file that the parent had open, and then the inherited one.
        same = LazyEnvironment(file).begin().get(b"1") == record and handle.begin().get(b"1") == record
        os._exit(0 if same and open_count() == 1 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert handle.begin().get(b"1") == record
