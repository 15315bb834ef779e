"""Records that cannot be read: named, or skipped where the YAML says so, the same ones in any run."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import pytest
import torch
from torch.utils.data import DataLoader

from fairchem_dens.data.reader import LazyLmdbDataset
from fairchem_dens.data.skipping import SkippedRecords
from fairchem_dens.errors import UnreadableRecord

BAD = (0, 5, 6, 11)
"""Of 12; the ones that are read instead are 1, 7, 7 and, round the end, 1."""
INSTEAD = {0: 1, 5: 7, 6: 7, 11: 1}


@pytest.fixture
def damaged(write_lmdb: Callable[..., Path], structure: Any, tmp_path: Path) -> Path:
    """Twelve structures, four of which cannot be read, each for another reason."""
    folder = write_lmdb(tmp_path / "damaged", [structure(seed) for seed in range(12)])
    (file,) = folder.glob("*.lmdb")
    env = lmdb.open(str(file), subdir=False, map_size=1 << 28)
    with env.begin(write=True) as writing:
        sick = structure(5)
        sick.forces[3, 1] = float("nan")
        writing.put(b"0", b"not a pickle")
        writing.put(b"5", pickle.dumps(sick))
        writing.delete(b"6")
        writing.put(b"something else", b"as many keys as before")
        writing.put(b"11", pickle.dumps({"pos": "here"}))
    env.close()
    return folder


def first_only(structures: list[Any]) -> int:
    return int(structures[0].sid)


def test_without_the_setting_the_record_is_named(damaged: Path) -> None:
    with pytest.raises(UnreadableRecord, match=r"Record 0 of '.*\.lmdb'"):
        LazyLmdbDataset({"src": str(damaged)})
    good = LazyLmdbDataset({"src": str(damaged), "skip_bad_records": True})
    good.skip_bad_records = False
    for index in BAD:
        with pytest.raises(UnreadableRecord, match=rf"Record {index} of '.*\.lmdb' \(.*id 0_{index}\)"):
            good[index]


def test_an_error_travels_out_of_a_worker(damaged: Path) -> None:
    dataset = LazyLmdbDataset({"src": str(damaged), "skip_bad_records": True})
    dataset.skip_bad_records = False
    loader = DataLoader(dataset, batch_size=1, num_workers=1, collate_fn=first_only, sampler=[1, 5])
    with pytest.raises(UnreadableRecord, match="Record 5 of"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_one_takes_its_place(
    damaged: Path, tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = LazyLmdbDataset({"src": str(damaged), "skip_bad_records": True})
    dataset.skipped = SkippedRecords(tmp_path / "skipped", rank=3)
    loader = DataLoader(dataset, batch_size=1, num_workers=workers, collate_fn=first_only)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert list(loader) == [INSTEAD.get(index, index) for index in range(12)]
    assert len(dataset) == 12 and dataset[-1].sid == 1
    with pytest.raises(IndexError):
        dataset[12]
    found = dataset.skipped.all()
    assert sorted(int(place.split()[1]) for place in found) == list(BAD)
    (file,) = damaged.glob("*.lmdb")
    assert all(place.endswith(f"of '{file}'") for place in found)
    assert "forces that are not finite" in found[f"record 5 of '{file}'"]
    said = dataset.skipped.summary()
    assert said is not None and said.startswith("4 records of 'dataset.train.src' could not be read")
    names = {path.name for path in (tmp_path / "skipped").iterdir()}
    assert names == (
        {"rank3.txt"} if not workers else {"rank3.txt", "rank3.worker0.txt", "rank3.worker1.txt"}
    )
    if not workers:
        assert len([line for line in caplog.messages if "is skipped" in line]) == 4, "said once each"


def test_nothing_but_bad_records(write_lmdb: Any, structure: Any, tmp_path: Path) -> None:
    folder = write_lmdb(tmp_path / "bad", [structure(seed) for seed in range(3)])
    dataset = LazyLmdbDataset({"src": str(folder), "skip_bad_records": True})
    (file,) = folder.glob("*.lmdb")
    dataset.close_db()
    env = lmdb.open(str(file), subdir=False, map_size=1 << 28)
    with env.begin(write=True) as writing:
        for index in range(3):
            writing.put(str(index).encode(), b"no pickle")
    env.close()
    with pytest.raises(UnreadableRecord, match="in a row cannot be read"):
        dataset[0]
    with pytest.raises(UnreadableRecord, match="Record 0"):
        LazyLmdbDataset({"src": str(folder), "skip_bad_records": True})
    with pytest.raises(ValueError, match="skip_bad_records' must be True or False, found 'yes'"):
        LazyLmdbDataset({"src": str(folder), "skip_bad_records": "yes"})


def test_a_run_counts_them_in_the_end(
    run_settings: dict[str, Any], make_trainer: Any, damaged: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_settings["model"] = {"name": "toy_model.ToyDeNS"}
    run_settings["logger"] = "none"
    run_settings["dataset"]["train"] |= {"src": str(damaged), "skip_bad_records": True}
    weights = []
    for name, workers in (("one", 0), ("other", 1)):
        run_settings["optim"]["num_workers"] = workers
        trainer = make_trainer(run_settings, timestamp_id=name)
        with caplog.at_level(logging.WARNING):
            trainer.train(disable_eval_tqdm=True)
        assert "4 records of 'dataset.train.src' could not be read" in caplog.messages[-1]
        assert trainer.config["cmd"]["results_dir"] in caplog.messages[-1]
        weights.append(list(trainer.model.parameters()))
    assert all(map(torch.equal, *weights))
    assert trainer.val_dataset.dataset.skip_bad_records is False


@pytest.mark.parametrize("split", ["val", "test"])
def test_what_is_measured_is_not_changed(run_settings: dict[str, Any], make_trainer: Any, split: str) -> None:
    run_settings["dataset"][split]["skip_bad_records"] = True
    with pytest.raises(ValueError, match=rf"'dataset\.{split}\.skip_bad_records' would evaluate other"):
        make_trainer(run_settings)
