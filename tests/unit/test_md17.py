"""MD17: reading both formats, the paper's split, energies to the last digit, refusals, and the YAMLs."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import subprocess
import sys
import urllib.error
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_geometric.datasets
import yaml
from ase.build import molecule as ase_molecule
from fairchem.core.common.utils import load_config
from fairchem.core.datasets.lmdb_dataset import LmdbDataset, data_list_collater
from fairchem.core.modules.normalization.normalizer import create_normalizer
from fairchem.core.modules.scheduler import CosineLRLambda

from fairchem_dens.cli.main import main
from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.data.md17 import make_md17, split_frames
from fairchem_dens.data.md17_file import MOLECULES, read_npz
from fairchem_dens.models import EquiformerDeNS

CONFIGS = Path(__file__).parents[2] / "configs"
FRAMES = 60
SIZES = {"train_size": 30, "val_size": 10}
ETHANOL = ase_molecule("CH3CH2OH")

Arrays = dict[str, np.ndarray]


def original_arrays(frames: int = FRAMES, seed: int = 0) -> Arrays:
    """What an original MD17 file of ethanol holds: total energies, in a column."""
    rng = np.random.default_rng(seed)
    shape = (frames, len(ETHANOL), 3)
    return {
        "E": -406_737.0 + rng.normal(scale=5.0, size=(frames, 1)),  # as large as aspirin's
        "F": rng.normal(scale=20.0, size=shape),
        "R": ETHANOL.positions + rng.normal(scale=0.1, size=shape),
        "z": ETHANOL.numbers.astype(np.uint8),
        "name": np.array("ethanol"),
    }


def revised_arrays(frames: int = FRAMES, seed: int = 0) -> Arrays:
    """The same frames as a revised MD17 file, which has the original labels too."""
    original = original_arrays(frames, seed)
    rng = np.random.default_rng(seed + 1)
    old_energies = original["E"][:, 0]
    return {
        "nuclear_charges": original["z"],
        "coords": original["R"],
        "energies": old_energies + 462.0 + rng.normal(scale=1.0, size=frames),
        "forces": original["F"] + rng.normal(scale=3.0, size=original["F"].shape),
        "old_indices": np.arange(frames) * 7,
        "old_energies": old_energies,
        "old_forces": original["F"],
    }


FORMATS = {"original": original_arrays, "revised": revised_arrays}


@pytest.fixture
def write_npz(tmp_path: Path) -> Callable[[Arrays], Path]:
    def write(arrays: Arrays, name: str = "molecule.npz") -> Path:
        np.savez(tmp_path / name, **arrays)
        return tmp_path / name

    return write


make_ethanol = partial(make_md17, "ethanol", progress=False, **SIZES)


# ---------------------------------------------------------------------- split


@pytest.mark.parametrize("num_frames", [1001, 9633, 133_770])
def test_split_is_that_of_the_papers_code(num_frames: int) -> None:
    """Written as there: an array of indices, permuted; train first, then val, then the rest."""
    indices = np.random.default_rng(1).permutation(np.arange(num_frames, dtype=int))
    splits = split_frames(num_frames)
    assert list(splits) == ["train", "val", "test"]
    np.testing.assert_array_equal(splits["train"], indices[:950])
    np.testing.assert_array_equal(splits["val"], indices[950:1000])
    np.testing.assert_array_equal(splits["test"], indices[1000:])


def test_split_by_numbers() -> None:
    """Numbers, so that a change of numpy's generator would be seen."""
    splits = split_frames(12, train_size=4, val_size=3, test_size=2, seed=1)
    assert {name: frames.tolist() for name, frames in splits.items()} == SPLIT_OF_TWELVE
    other = split_frames(12, train_size=4, val_size=3, seed=2)
    assert other["train"].tolist() != SPLIT_OF_TWELVE["train"]
    assert sorted(np.concatenate(list(other.values()))) == list(range(12))


SPLIT_OF_TWELVE = {"train": [8, 11, 4, 7], "val": [5, 0, 1], "test": [9, 2]}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"train_size": 0}, "train split must have at least 1"),
        ({"val_size": -3}, "val split must have at least 1 frame, found -3"),
        ({"test_size": 0}, "test split must have at least 1"),
        ({"train_size": 90, "val_size": 10}, "has 100 frames, the splits need at least 101"),
        ({"train_size": 50, "val_size": 40, "test_size": 11}, "need at least 101 .train 50, val 40, test 11"),
        ({"train_size": 5, "val_size": 4, "seed": -1}, "seed must not be negative"),
    ],
)
def test_impossible_splits(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        split_frames(100, **sizes)


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("published_as", "labels", "energies", "forces"),
    [
        ("original", "original", "E", "F"),
        ("revised", "original", "old_energies", "old_forces"),
        ("revised", "revised", "energies", "forces"),
    ],
)
def test_round_trip(
    write_npz, tmp_path: Path, published_as: str, labels: str, energies: str, forces: str
) -> None:
    arrays = FORMATS[published_as]()
    file = write_npz(arrays)
    summary = make_ethanol(labels, tmp_path / "out", npz=file)
    splits = split_frames(FRAMES, **SIZES)
    positions = arrays["R" if published_as == "original" else "coords"]
    for name, frames in splits.items():
        structures = list(read_lmdb(tmp_path / "out" / name))
        assert [data.fid for data in structures] == frames.tolist()
        for data in structures:
            frame = data.fid
            assert data.sid == f"ethanol-{frame}"
            assert data.energy + summary["energy_offset"] == pytest.approx(
                arrays[energies].reshape(-1)[frame], rel=0, abs=1e-9
            )
            np.testing.assert_allclose(data.forces, arrays[forces][frame], rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(data.pos, positions[frame], rtol=1e-6, atol=1e-6)
            assert data.atomic_numbers.tolist() == ETHANOL.numbers.tolist()
            assert data.natoms == 9 and not data.pbc.any() and data.pbc.shape == (1, 3)
            assert data.cell.shape == (1, 3, 3) and not data.cell.any()
            assert not data.fixed.any() and not data.tags.any()
            assert "md" not in data, "frames of molecular dynamics, yet corrupted in training"
        with np.load(tmp_path / "out" / name / "metadata.npz") as metadata:
            assert metadata["natoms"].tolist() == [9] * len(frames)


def test_summary_settings_and_normalizers(write_npz, tmp_path: Path) -> None:
    file = write_npz(original_arrays())
    summary = make_ethanol("original", tmp_path / "out", npz=file)
    train = original_arrays()["E"][split_frames(FRAMES, **SIZES)["train"], 0]
    offset = summary["energy_offset"]
    assert offset == round(train.mean())
    std = float(torch.tensor(train - offset).std())  # as the paper's code: with n - 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert summary["molecule"] == "ethanol" and summary["labels"] == "original"
    assert summary["units"] == {"positions": "Å", "energy": "kcal/mol", "forces": "kcal/mol/Å"}
    assert summary["source"] == {
        "file": "molecule.npz",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "published_as": "original",
        "frames": FRAMES,
    }
    assert {name: summary["split"][name] for name in ("seed", "train", "val", "test")} == {
        "seed": 1,
        "train": 30,
        "val": 10,
        "test": 20,
    }
    dataset = yaml.safe_load((tmp_path / "out" / "data.yml").read_text())["dataset"]
    assert dataset["train"]["format"] == "lmdb"
    assert {name: Path(split["src"]) for name, split in dataset.items()} == {
        name: tmp_path / "out" / name for name in ("train", "val")
    }, "fairchem would predict a test split in training, again and again"
    expected = {"energy": (train.mean() - offset, std), "forces": (0.0, std)}
    for target, (mean, rmsd) in expected.items():
        assert dataset["train"]["transforms"]["normalizer"][target] == pytest.approx(
            {"mean": mean, "rmsd": rmsd}
        )
        from_file = create_normalizer(file=tmp_path / "out" / f"{target}_normalizer.npz")
        assert (from_file.mean.item(), from_file.rmsd.item()) == pytest.approx((mean, rmsd))


def test_energies_keep_their_digits_through_fairchem(write_npz, tmp_path: Path) -> None:
    """Read, collated, normalised and back, as the trainer does it."""
    arrays = original_arrays()
    summary = make_ethanol("original", tmp_path / "out", npz=write_npz(arrays))
    dataset = LmdbDataset({"src": str(tmp_path / "out" / "val")})
    batch = data_list_collater([dataset[index] for index in range(len(dataset))], otf_graph=True)
    truth = arrays["E"][batch.fid.numpy(), 0]
    normalizer = create_normalizer(file=tmp_path / "out" / "energy_normalizer.npz")
    normed = normalizer.norm(batch.energy).float()
    back = normalizer.denorm(normed)
    assert abs(normed.mean()) < 1 and 0.3 < normed.std() < 3
    for energy in (batch.energy, back):
        np.testing.assert_allclose(energy.double() + summary["energy_offset"], truth, rtol=0, atol=2e-5)
    # What storing total energies would have cost.
    naive = torch.tensor(truth.tolist())
    assert np.abs(naive.double().numpy() - truth).max() > 5e-3


def test_same_bytes_again(write_npz, tmp_path: Path) -> None:
    file = write_npz(revised_arrays())
    for name in ("one", "two"):
        make_ethanol("revised", tmp_path / name / "ethanol", npz=file)
    one, two = (
        {
            str(data.fid): data
            for split in ("train", "val")
            for data in read_lmdb(tmp_path / name / "ethanol" / split)
        }
        for name in ("one", "two")
    )
    assert list(one) == list(two)
    for fid, data in one.items():
        assert data.energy == two[fid].energy and torch.equal(data.pos, two[fid].pos)
    read = [(tmp_path / name / "ethanol" / "summary.json").read_bytes() for name in ("one", "two")]
    assert read[0] == read[1]


def test_real_files(real_data, tmp_path: Path) -> None:
    """The two label sets of the same file, told apart by their size."""
    file = real_data("rmd17/rmd17_ethanol.npz")
    original = make_md17("ethanol", "original", tmp_path / "o", npz=file, test_size=5, progress=False)
    revised = make_md17("ethanol", "revised", tmp_path / "r", npz=file, test_size=5, progress=False)
    assert (original["energy_offset"], revised["energy_offset"]) == (-97196, -97076)
    assert original["split"]["train"] == 950 and original["split"]["val"] == 50
    for summary in (original, revised):
        assert 3.5 < summary["energy_std"] < 5
        assert summary["source"]["frames"] == 9633 and summary["source"]["published_as"] == "revised"
    with pytest.raises(ValueError, match="holds C2H6O, but aspirin is C9H8O4: it is the file of ethanol"):
        read_npz(file, "aspirin", "original")


# ---------------------------------------------------------------------- refusals


def changed(arrays: Arrays, **changes: Any) -> Arrays:
    arrays = {**arrays, **{key: value for key, value in changes.items() if value is not None}}
    return {key: value for key, value in arrays.items() if changes.get(key, 0) is not None}


def with_value(values: np.ndarray, place: Any, value: float) -> np.ndarray:
    values = np.array(values, dtype=float)
    values[place] = value
    return values


ORIGINAL, REVISED = original_arrays(), revised_arrays()
MIXED = np.where(np.arange(FRAMES) < 25, REVISED["energies"], REVISED["old_energies"])
TWO_MOLECULES = np.tile(ORIGINAL["z"], (FRAMES, 1))
TWO_MOLECULES[17] = TWO_MOLECULES[17, ::-1]


@pytest.mark.parametrize(
    ("arrays", "labels", "words"),
    [
        (
            changed(ORIGINAL, E=None),
            "original",
            "lacks 'E' for the original labels. Its keys are F, R, z, name",
        ),
        (
            changed(REVISED, old_forces=None, old_energies=None),
            "original",
            "lacks 'old_energies', 'old_forces' for the original labels. Its keys are nuclear_charges, ",
        ),
        (
            {"x": ORIGINAL["R"], "y": ORIGINAL["E"]},
            "original",
            r"neither of MD17 \(keys E, F, R, z\) nor of revised MD17 \(keys coords, .*\): its keys are x, y",
        ),
        ({}, "revised", "its keys are none"),
        (ORIGINAL, "revised", r"original labels only \(keys E, F, R, z, name\): give the file of revised"),
        (changed(ORIGINAL, R=ORIGINAL["R"][..., :2]), "original", r"'R' must be .* found \(60, 9, 2\)"),
        (changed(ORIGINAL, E=ORIGINAL["E"][:-1]), "original", r"'E' must be .*\(60, 1\), found \(59, 1\)"),
        (changed(ORIGINAL, F=ORIGINAL["F"][:, :-1]), "original", r"'F' must be .*'R'.*found \(60, 8, 3\)"),
        (changed(ORIGINAL, z=ORIGINAL["z"][:-1]), "original", r"'z' must be of shape \(9,\), found \(8,\)"),
        (changed(ORIGINAL, z=TWO_MOLECULES), "original", "the same in all frames, but frame 17 differs"),
        (changed(ORIGINAL, z=ORIGINAL["z"] * 0), "original", "atomic numbers from 0 to 0"),
        (changed(ORIGINAL, z=ORIGINAL["z"] * 0 + 6), "original", "holds C9, but ethanol is C2H6O"),
        (changed(ORIGINAL, E=with_value(ORIGINAL["E"], 31, np.nan)), "original", "'E' is not finite.* is 31"),
        (
            changed(REVISED, forces=with_value(REVISED["forces"], ([8, 5], 2, 1), np.inf)),
            "revised",
            "'forces' is not finite in 2 frames, the first of them is 5",
        ),
        (changed(ORIGINAL, R=with_value(ORIGINAL["R"], (3, 0), np.nan)), "original", "'R' is not finite"),
        (changed(ORIGINAL, E=np.full((FRAMES, 1), "low")), "original", "'E' must be numbers, found <U3"),
        (
            changed(REVISED, energies=MIXED),
            "revised",
            "'energies' fall into two groups, 35 frames around -40673.* and 25 around -40627.*frame 0",
        ),
        (
            changed(REVISED, old_energies=with_value(REVISED["old_energies"], 40, -406_275.0)),
            "original",
            "'old_energies' fall into two groups, 59 frames .* and 1 around -406275.0 .*frame 40",
        ),
        (
            changed(REVISED, old_energies=with_value(REVISED["old_energies"], 40, -406_275.0)),
            "revised",
            "the differences between 'energies' and 'old_energies' fall into two groups",
        ),
    ],
)
def test_bad_files(write_npz, tmp_path: Path, arrays: Arrays, labels: Any, words: str) -> None:
    file = write_npz(arrays)
    with pytest.raises(ValueError, match=words) as refused:
        make_ethanol(labels, tmp_path / "out", npz=file)
    assert str(file) in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["molecule.npz"], "something was left behind"


def test_atomic_numbers_may_be_given_for_each_frame(write_npz) -> None:
    file = write_npz(changed(ORIGINAL, z=np.tile(ORIGINAL["z"], (FRAMES, 1))))
    assert read_npz(file, "ethanol", "original").numbers.tolist() == ETHANOL.numbers.tolist()


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "array", "objects", "member"])
def test_unreadable_files(tmp_path: Path, damage: str) -> None:
    buffer = io.BytesIO()
    arrays = changed(ORIGINAL, E=np.array([{}], dtype=object)) if damage == "objects" else ORIGINAL
    np.savez_compressed(buffer, **arrays)
    whole = buffer.getvalue()
    middle = len(whole) // 2
    content = {
        "truncated": whole[:middle],
        "text": b"<html>not found</html>",
        "empty": b"",
        "array": b"",
        "objects": whole,
        "member": whole[: middle - 50] + bytes(100) + whole[middle + 50 :],
    }[damage]
    file = tmp_path / "bad.npz"
    file.write_bytes(content)
    if damage == "array":
        with file.open("wb") as stream:
            np.save(stream, ORIGINAL["E"])
    with pytest.raises(ValueError, match=r"bad\.npz'.*(cannot be read|not an \.npz)"):
        read_npz(file, "ethanol", "original")


def test_existing_folder_is_kept_unless_overwritten(write_npz, tmp_path: Path) -> None:
    file, out = write_npz(ORIGINAL), tmp_path / "out"
    make_ethanol("original", out, npz=file)
    before = (out / "summary.json").read_bytes()
    with pytest.raises(FileExistsError, match="exists already"):
        make_ethanol("original", out, npz=file, seed=5)
    bad = write_npz(changed(ORIGINAL, E=ORIGINAL["E"] * np.nan), "bad.npz")
    with pytest.raises(ValueError, match="not finite"):
        make_ethanol("original", out, npz=bad, overwrite=True)
    assert (out / "summary.json").read_bytes() == before
    make_ethanol("original", out, npz=file, seed=5, overwrite=True)
    assert json.loads((out / "summary.json").read_text())["split"]["seed"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.npz", "molecule.npz", "out"]


def test_killed_while_writing(write_npz, tmp_path: Path) -> None:
    """No folder that looks complete is left, and the next run makes it."""
    file, out = write_npz(ORIGINAL), tmp_path / "sets" / "out"
    code = f"""
import os, signal
from fairchem_dens.data import lmdb, md17
add, written = lmdb.LmdbWriter.add, []
def add_and_die(writer, data):
    add(writer, data)
    written.append(data)
    if len(written) == 45:
        os.kill(os.getpid(), signal.SIGKILL)
lmdb.LmdbWriter.add = add_and_die
md17.make_md17("ethanol", "original", {str(out)!r}, npz={str(file)!r}, train_size=30, val_size=10)
"""
    killed = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    make_ethanol("original", out, npz=file)
    assert list(out.parent.iterdir()) == [out]


# ---------------------------------------------------------------------- download


@pytest.mark.parametrize("molecule", ["ethanol", "salicylic"])
@pytest.mark.parametrize("labels", ["original", "revised"])
def test_offline_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, molecule: str, labels: Any
) -> None:
    def offline(dataset: Any) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(torch_geometric.datasets.MD17, "download", offline)
    name = f"{'' if labels == 'original' else 'r'}md17_{molecule}.npz"
    with pytest.raises(FileNotFoundError, match=f"'{name}'.*cannot be downloaded .*'--npz FILE'") as refused:
        make_md17(molecule, labels, tmp_path / "out")
    assert "http" not in str(refused.value) and ".org" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("labels", ["original", "revised"])
def test_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: str) -> None:
    calls = []

    def online(dataset: Any) -> None:
        calls.append(dataset.name)
        path = Path(dataset.raw_paths[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **FORMATS[labels]())

    monkeypatch.setattr(torch_geometric.datasets.MD17, "download", online)
    for out in ("one", "two"):
        summary = make_ethanol(labels, tmp_path / out)
        assert summary["source"]["published_as"] == labels
    assert calls == ["ethanol" if labels == "original" else "revised ethanol"]


def test_names_of_torch_geometric() -> None:
    """Each molecule is there, with both label sets."""
    names = torch_geometric.datasets.MD17.file_names
    for molecule in MOLECULES:
        name = "salicylic acid" if molecule == "salicylic" else molecule
        assert molecule in names[name] and names[f"revised {name}"] == f"rmd17_{molecule}.npz"


# ---------------------------------------------------------------------- the command


def test_command(write_npz, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = write_npz(REVISED), tmp_path / "out"
    command = ["data", "md17", "ethanol", "--npz", str(file), "--out", str(out)]
    sizes = ["--train-size", "30", "--val-size", "10", "--test-size", "7"]
    assert main([*command, *sizes, "--labels", "original"]) == 0
    said = capsys.readouterr().out
    assert "train 30, val 10, test 7" in said and "kcal/mol" in said and "original labels" in said
    assert "total energy = energy + (-406" in said
    assert "not those of the paper's split" in said
    assert "configs/md17" in said and str(out / "data.yml") in said
    assert len(list(read_lmdb(out / "test"))) == 7

    assert main([*command, *sizes, "--labels", "revised"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, *sizes, "--labels", "revised", "--overwrite"]) == 0
    assert "paper's split" not in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["labels"] == "revised"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["ethanole", "--labels", "original"],
            "'ethanole' is not a molecule of MD17 (did you mean 'ethanol'?)",
        ),
        (["salicylic_acid", "--labels", "original"], "(did you mean 'salicylic'?)"),
        (["ethanol", "--labels", "revized"], "must be 'original' or 'revised', found 'revized'"),
        (["ethanol", "--labels", "original", "--npz", "no/such.npz"], "There is no file 'no/such.npz'"),
    ],
)
def test_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["data", "md17", *words, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_command_warns_of_many_train_frames(
    write_npz, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_npz(original_arrays(frames=1003))
    command = ["data", "md17", "ethanol", "--labels", "original", "--npz", str(file), "--val-size", "1"]
    assert main([*command, "--out", str(tmp_path / "many"), "--train-size", "1001"]) == 0
    assert "warning: MD17 should not be trained on more than 1000 frames" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "few"), "--train-size", "1000"]) == 0
    assert "warning" not in capsys.readouterr().err


# ---------------------------------------------------------------------- configurations

PAPER = list(MOLECULES)[:8]
COEFFICIENTS = {"malonaldehyde": (1, 100), "naphthalene": (2, 20), "uracil": (1, 20)}
EXPECTED = {  # energy meV, force meV/Å on the test split: L2, L3 without DeNS; L2, L3 with
    "aspirin": ("5.3/7.2", "5.3/6.6", "5.1/5.7", "5.0/5.2"),
    "benzene": ("2.2/6.6", "2.5/8.1", "2.3/6.1", "2.3/6.1"),
    "ethanol": ("2.2/3.1", "2.2/2.9", "2.2/2.6", "2.2/2.4"),
    "malonaldehyde": ("3.3/5.8", "3.2/5.4", "3.2/4.4", "3.2/4.1"),
    "naphthalene": ("3.7/2.1", "4.4/2.0", "3.7/1.7", "3.7/1.6"),
    "salicylic": ("4.5/4.1", "4.3/3.9", "4.4/3.7", "4.2/3.2"),
    "toluene": ("3.8/2.1", "3.7/2.1", "3.5/1.9", "3.4/1.8"),
    "uracil": ("4.3/3.3", "4.3/3.4", "4.2/3.3", "4.1/2.9"),
}
# The paper's 4.00M and 6.35M, without DeNS 3.50M and 5.50M.
PARAMETERS = {(2, True): 4_000_577, (3, True): 6_354_241, (2, False): 3_496_001, (3, False): 5_500_865}
RUNS = [(name, lmax, dens) for name in PAPER for lmax in (2, 3) for dens in (True, False)]
each_run = pytest.mark.parametrize(("molecule", "lmax", "dens"), RUNS)


def run_file(molecule: str, lmax: int, dens: bool) -> Path:
    return CONFIGS / "md17" / f"{molecule}{'_l3' if lmax == 3 else ''}{'' if dens else '_baseline'}.yml"


def load(path: Path) -> dict[str, Any]:
    loaded, overwritten, conflicts = load_config(str(path))
    assert not overwritten and not conflicts, "says the same thing in two files"
    return loaded


def test_one_file_for_each_run() -> None:
    assert {run_file(*run) for run in RUNS} == set((CONFIGS / "md17").glob("*.yml"))


@each_run
def test_settings_are_the_papers(molecule: str, lmax: int, dens: bool) -> None:
    config = load(run_file(molecule, lmax, dens))
    large = lmax == 3 and molecule != "benzene"
    lr = 1e-4 if molecule == "benzene" else 2e-4 if large else 5e-4
    energy, forces = COEFFICIENTS.get(molecule, (1, 80))
    losses = [
        {"energy": {"fn": "mae", "coefficient": energy}},
        {"forces": {"fn": "l2mae", "coefficient": forces}},
    ]
    train = config["dataset"]["train"]
    if dens:
        losses.append(
            {"noise": {"fn": "l2mae", "coefficient": 5, "reduction": "separate", "decay": "linear"}}
        )
        prob, std = (0.125, 0.025) if molecule == "toluene" else (0.25, 0.05)
        settings = {"prob": prob, "std": std, "corrupt_ratio": 0.25, "switch": "structure"}
        assert train["transforms"]["dens"] == settings
    else:
        assert set(train["transforms"]) == {"normalizer"}
    assert config["loss_functions"] == losses
    optim = config["optim"]
    assert (optim["batch_size"], optim["max_epochs"]) == ((5, 2000) if large else (8, 1500))
    assert (optim["optimizer"], optim["optimizer_params"]) == ("AdamW", {"weight_decay": 1e-6})
    assert not {"ema_decay", "clip_grad_norm", "load_balancing"} & set(optim)

    params = optim["scheduler_params"]
    assert (optim["scheduler"], params["lambda_type"], params["warmup_epochs"]) == ("LambdaLR", "cosine", 10)
    factor = CosineLRLambda(10, params["warmup_factor"], optim["max_epochs"], params["lr_min_factor"])
    assert optim["lr_initial"] == lr
    rates = [lr * factor(epoch) for epoch in (0, 10, optim["max_epochs"])]
    assert rates == pytest.approx([1e-6, lr, 1e-6])

    assert train["format"] == "lmdb" and config["task"]["prediction_dtype"] == "float32"
    root = "${FAIRCHEM_DENS_DATA:-data}/md17/" + molecule
    assert {name: split["src"] for name, split in config["dataset"].items()} == {
        name: f"{root}/{name}" for name in ("train", "val")
    }
    for target, normalizer in train["transforms"]["normalizer"].items():
        assert normalizer == {"file": f"{root}/{target}_normalizer.npz"}


@each_run
def test_model_is_the_papers(molecule: str, lmax: int, dens: bool) -> None:
    model = load(run_file(molecule, lmax, dens))["model"]
    sh = "+".join(f"1x{degree}e" for degree in range(lmax + 1))
    channels = {2: (4, 2, 1), 3: (4, 2, 2, 1)}[lmax]

    def irreps(times: int) -> str:
        return "+".join(f"{times * count}x{degree}e" for degree, count in enumerate(channels))

    assert model["name"] == "fairchem_dens.models.EquiformerDeNS"
    assert (model["use_pbc"], model["regress_forces"], model["otf_graph"]) == (False, True, True)
    assert (model["max_radius"], model["number_of_basis"], model["basis_type"]) == (5.0, 32, "exp")
    assert (model["num_layers"], model["num_heads"], model["fc_neurons"]) == (6, 4, [64, 64])
    assert model["irreps_sh"] == sh
    assert model["irreps_node_embedding"] == model["irreps_pre_attn"] == irreps(32)
    assert (model["irreps_head"], model["irreps_mlp_mid"]) == (irreps(8), irreps(96))
    assert model["irreps_equivariant_inputs"] == (sh if dens else None)
    assert model["irreps_feature"] == (irreps(128) if dens else "512x0e")


@each_run
def test_header_says_what_the_run_is(molecule: str, lmax: int, dens: bool) -> None:
    path = run_file(molecule, lmax, dens)
    header = path.read_text().partition("includes:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    words = " ".join(header.replace("#", " ").split())
    optim = load(path)["optim"]
    mine, other = (EXPECTED[molecule][lmax - 2 + 2 * with_dens].split("/") for with_dens in (dens, not dens))
    assert f"energy MAE {mine[0]} meV, force MAE {mine[1]} meV/Å on MD17 test" in words
    assert f"({'without' if dens else 'with'} DeNS: {other[0]} and {other[1]})" in words
    in_kcal = [f"{float(value) / 43.3641:.3f}" for value in mine]
    assert f"kcal/mol and kcal/mol/Å, where these are {in_kcal[0]} and {in_kcal[1]}" in words
    assert f"{optim['batch_size']} per GPU × 1 GPU = {optim['batch_size']}" in words
    assert f"{optim['max_epochs']} epochs ({PARAMETERS[lmax, dens]:,} parameters)" in words
    assert f"lr, epochs {optim['lr_initial'] * 1e4:.0f}e-4, {optim['max_epochs']}" in words
    assert f"fairchem-dens data md17 {molecule} --labels original --out data/md17/{molecule}" in words
    assert f"fairchem --mode train --config-yml configs/md17/{path.name} " in words and "--seed 1" in words


@pytest.mark.slow
@pytest.mark.parametrize(("lmax", "dens"), PARAMETERS)
def test_number_of_parameters(lmax: int, dens: bool) -> None:
    settings = load(run_file("aspirin", lmax, dens))["model"]
    settings.pop("name")
    model = EquiformerDeNS(**settings)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[lmax, dens]
