"""Building and checking submissions, against fairchem's own writers and its `make_submission_file`."""

from __future__ import annotations

import argparse
import io
import itertools
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io import Trajectory
from fairchem.core.models.equiformer_v2.trainers.forces_trainer import EquiformerV2ForcesTrainer
from fairchem.core.scripts import make_submission_file
from fairchem.core.trainers import ocp_trainer
from fairchem.core.trainers.base_trainer import BaseTrainer
from torch_geometric.data import Data

from fairchem_dens.cli.main import main
from fairchem_dens.submission import build as builder
from fairchem_dens.submission.arrays import names_of, read_array
from fairchem_dens.submission.build import build_submission
from fairchem_dens.submission.check import check_submission, describe
from fairchem_dens.submission.faults import differences
from fairchem_dens.submission.runs import Relaxation, Running, predict_splits, relax_splits
from fairchem_dens.submission.sources import load_predictions
from fairchem_dens.submission.splits import (
    IS2RE,
    IS2RS,
    LEADERBOARDS,
    OC20,
    OC22,
    S2EF,
    Leaderboard,
    Task,
    guess,
)
from fairchem_dens.submission.wanted import find_lmdbs, read_wanted
from fairchem_dens.trainer import DeNSTrainer

Structure = Callable[..., Data]
Arrays = dict[str, np.ndarray]


class World:
    """Test LMDBs of both leaderboards in a folder each, and results as fairchem writes them."""

    def __init__(self, root: Path, structure: Structure, write_lmdb: Callable[..., Path]) -> None:
        self.root = root
        self.frames: dict[str, list[Data]] = {}
        for number, split in enumerate(("id", "ood_ads", "ood_cat", "ood_both", "ood")):
            frames = []
            for place in range(4):
                # The second system has no free atom, the third no fixed one.
                natoms = 6 + number + place
                held = {1: natoms, 2: 0}.get(place, 3)
                data = structure(100 * number + place, natoms=natoms, num_fixed=held)
                data.sid, data.fid = 100 * number + 7 * place, place
                frames.append(data)
            self.frames[split] = frames
        for name, board in LEADERBOARDS.items():
            for split in board.splits:
                write_lmdb(root / name / f"test_{split}", self.frames[split])

    def lmdbs(self, board: Leaderboard) -> dict[str, Path]:
        return find_lmdbs([str(self.folder(board))], board)

    def folder(self, board: Leaderboard) -> Path:
        return self.root / board.name.lower()

    def predictions(
        self, out: Path, board: Leaderboard, *, frames: bool = True, change: Callable[..., None] | None = None
    ) -> dict[str, Path]:
        """Let fairchem write predictions of all splits; `change` may edit what it gathers."""
        files = {}
        for split in board.splits:
            rng = np.random.default_rng(len(split))
            gathered: dict[str, list[Any]] = {"energy": [], "forces": [], "chunk_idx": [], "ids": []}
            for data in self.frames[split]:
                free = int((data.fixed == 0).sum())
                gathered["energy"].append(rng.normal(size=1).astype(board.prediction_dtype))
                gathered["forces"].append(rng.normal(size=(free, 3)).astype(board.prediction_dtype))
                gathered["chunk_idx"].append(free)
                gathered["ids"].append(f"{data.sid}_{data.fid}" if frames else f"{data.sid}")
            if not frames:
                del gathered["forces"], gathered["chunk_idx"]
            if change is not None:
                change(split, gathered)
            folder = out / split
            folder.mkdir(parents=True)
            writer = SimpleNamespace(config={"cmd": {"results_dir": str(folder)}}, name="s2ef")
            BaseTrainer.save_results(writer, gathered, "predictions")
            files[split] = folder / "s2ef_predictions.npz"
        return files

    def positions(self, out: Path, board: Leaderboard) -> dict[str, Path]:
        """Relaxed positions, laid out as fairchem's `run_relaxations` does."""
        out.mkdir(parents=True, exist_ok=True)
        files = {}
        for split in board.splits:
            by_id = {str(data.sid): self.relaxed(data) for data in self.frames[split]}
            ids = sorted(by_id)
            files[split] = out / f"{split}.npz"
            np.savez_compressed(
                files[split],
                ids=np.array(ids),
                pos=np.concatenate([by_id[sid].tolist() for sid in ids]),
                chunk_idx=np.cumsum([len(by_id[sid]) for sid in ids])[:-1],
            )
        return files

    @staticmethod
    def relaxed(data: Data) -> np.ndarray:
        free = (data.fixed == 0).numpy()
        return data.pos.numpy() + 0.1 * free[:, None]

    def trajectories(self, out: Path, board: Leaderboard) -> dict[str, Path]:
        for split in board.splits:
            (out / split).mkdir(parents=True)
            for data in self.frames[split]:
                with Trajectory(out / split / f"{data.sid}.traj", "w") as trajectory:
                    for step in range(2):
                        atoms = Atoms(
                            data.atomic_numbers.numpy(),
                            self.relaxed(data),
                            cell=data.cell[0].numpy(),
                            pbc=True,
                            constraint=FixAtoms(mask=(data.fixed == 1).tolist()),
                        )
                        atoms.wrap()
                        atoms.calc = SinglePointCalculator(atoms, energy=-0.37 * data.sid - step)
                        trajectory.write(atoms)
        return {split: out / split for split in board.splits}


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, structure: Structure, write_lmdb: Callable[..., Path]
) -> World:
    return World(tmp_path_factory.mktemp("world"), structure, write_lmdb)


def contents(file: Path) -> Arrays:
    with np.load(file, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def made_by_fairchem(out: Path, board: Leaderboard, sources: Mapping[str, Path], **flags: bool) -> Arrays:
    settings = {"dataset": board.name, "out_path": str(out), "is2re_relaxations": False, "hybrid": False}
    make_submission_file.main(
        argparse.Namespace(
            **{split: str(source) for split, source in sources.items()}, **{**settings, **flags}
        )
    )
    return contents(out)


def assert_same_arrays(ours: Arrays, theirs: Arrays) -> None:
    assert set(ours) == set(theirs)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def by_id(arrays: Arrays, board: Leaderboard) -> dict[str, dict[str, float]]:
    return {
        split: dict(zip(arrays[f"{split}_ids"].tolist(), arrays[f"{split}_energy"].tolist(), strict=True))
        for split in board.splits
    }


BOARDS = pytest.mark.parametrize("board", [OC20, OC22], ids=["oc20", "oc22"])


class TestSameArraysAsFairchem:
    @BOARDS
    def test_s2ef(self, world: World, board: Leaderboard, tmp_path: Path) -> None:
        sources = world.predictions(tmp_path, board)
        report = build_submission(tmp_path / "ours.npz", board, S2EF, sources, lmdbs=world.lmdbs(board))
        assert report.healthy and not report.findings, describe(report)
        ours = contents(tmp_path / "ours.npz")
        assert_same_arrays(ours, made_by_fairchem(tmp_path / "theirs.npz", board, sources))
        assert ours["id_forces"].dtype == board.prediction_dtype and ours["id_energy"].shape == (4, 1)

    @BOARDS
    def test_is2re_from_predictions_of_systems(
        self, world: World, board: Leaderboard, tmp_path: Path
    ) -> None:
        sources = world.predictions(tmp_path, board, frames=False)
        report = build_submission(tmp_path / "ours.npz", board, IS2RE, sources, lmdbs=world.lmdbs(board))
        assert report.healthy and not report.findings, describe(report)
        assert_same_arrays(
            contents(tmp_path / "ours.npz"), made_by_fairchem(tmp_path / "theirs.npz", board, sources)
        )

    @BOARDS
    def test_is2re_from_predictions_of_relaxed_frames(
        self, world: World, board: Leaderboard, tmp_path: Path
    ) -> None:
        sources = world.predictions(tmp_path, board)
        report = build_submission(tmp_path / "ours.npz", board, IS2RE, sources, lmdbs=world.lmdbs(board))
        assert report.healthy, describe(report)
        theirs = made_by_fairchem(
            tmp_path / "theirs.npz", board, sources, is2re_relaxations=True, hybrid=True
        )
        assert_same_arrays(contents(tmp_path / "ours.npz"), theirs)

    @BOARDS
    def test_is2re_from_trajectories(self, world: World, board: Leaderboard, tmp_path: Path) -> None:
        sources = world.trajectories(tmp_path, board)
        report = build_submission(tmp_path / "ours.npz", board, IS2RE, sources, lmdbs=world.lmdbs(board))
        assert report.healthy, describe(report)
        ours = contents(tmp_path / "ours.npz")
        theirs = made_by_fairchem(tmp_path / "theirs.npz", board, sources, is2re_relaxations=True)
        # fairchem takes trajectories as the file system lists them.
        assert by_id(ours, board) == by_id(theirs, board)
        assert {name: array.dtype for name, array in ours.items()} == {
            name: array.dtype for name, array in theirs.items()
        }
        assert by_id(ours, board)["id"]["21"] == pytest.approx(-0.37 * 21 - 1)
        assert ours["id_ids"].tolist() == sorted(ours["id_ids"].tolist())

    @BOARDS
    def test_is2rs(self, world: World, board: Leaderboard, tmp_path: Path) -> None:
        sources = world.positions(tmp_path, board)
        report = build_submission(tmp_path / "ours.npz", board, IS2RS, sources, lmdbs=world.lmdbs(board))
        assert report.healthy and not report.findings, describe(report)
        assert_same_arrays(
            contents(tmp_path / "ours.npz"), made_by_fairchem(tmp_path / "theirs.npz", board, sources)
        )

    def test_is2rs_from_trajectories_up_to_whole_cells(self, world: World, tmp_path: Path) -> None:
        out = tmp_path / "ours.npz"
        sources = world.trajectories(tmp_path / "trajectories", OC20)
        report = build_submission(out, OC20, IS2RS, sources, lmdbs=world.lmdbs(OC20))
        assert report.healthy, describe(report)
        ours = contents(out)
        theirs = contents(world.positions(tmp_path / "positions", OC20)["id"])
        np.testing.assert_array_equal(ours["id_ids"], theirs["ids"])
        np.testing.assert_array_equal(ours["id_chunk_idx"], theirs["chunk_idx"])

    def test_real_trajectories(self, real_data: Callable[[str], Path], tmp_path: Path) -> None:
        files = sorted(real_data("oc20_trajectories").glob("*.traj"))
        for place, file in enumerate(files):
            folder = tmp_path / OC20.splits[place % 4]
            folder.mkdir(exist_ok=True)
            (folder / file.name).symlink_to(file)
        sources = {split: tmp_path / split for split in OC20.splits}
        assert build_submission(tmp_path / "ours.npz", OC20, IS2RE, sources).healthy
        theirs = made_by_fairchem(tmp_path / "theirs.npz", OC20, sources, is2re_relaxations=True)
        assert by_id(contents(tmp_path / "ours.npz"), OC20) == by_id(theirs, OC20)

    def test_only_one_structure_in_a_split(
        self, structure: Structure, write_lmdb: Callable[..., Path], tmp_path: Path
    ) -> None:
        frames = {split: [structure(seed)] for seed, split in enumerate(OC22.splits)}
        lmdbs = {split: write_lmdb(tmp_path / split, frames[split]) for split in frames}
        sources = {}
        for split, (data,) in frames.items():
            sources[split] = tmp_path / f"{split}.npz"
            np.savez(
                sources[split],
                ids=np.array([f"{data.sid}_{data.fid}"]),
                energy=np.zeros((1, 1), np.float32),
                forces=np.zeros((8, 3), np.float32),
                chunk_idx=np.cumsum([8])[:-1],
            )
        assert build_submission(tmp_path / "s.npz", OC22, S2EF, sources, lmdbs=lmdbs).healthy


# ---------------------------------------------------------------------- what the check finds


@pytest.fixture
def sound(world: World, tmp_path: Path) -> Arrays:
    """The arrays of a sound OC20 S2EF submission."""
    build_submission(tmp_path / "sound.npz", OC20, S2EF, world.predictions(tmp_path, OC20))
    return contents(tmp_path / "sound.npz")


def said_of(
    arrays: Mapping[str, np.ndarray],
    folder: Path,
    world: World | None,
    board: Leaderboard = OC20,
    task: Task = S2EF,
) -> list[str]:
    """The problems of a submission, compared with LMDBs if a world is given."""
    file = folder / "changed.npz"
    np.savez_compressed(file, **arrays)
    lmdbs = world.lmdbs(board) if world is not None else None
    report = check_submission(file, board, task, lmdbs=lmdbs, progress=False)
    return [finding.text for finding in report.findings if finding.problem]


def without(name: str) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        for key in [key for key in arrays if key == name or key.startswith(f"{name}_")]:
            del arrays[key]

    return change


def with_entry(name: str, index: Any, value: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][index] = value

    return change


def turned(name: str, how: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = how(arrays[name])

    return change


def with_fixed_atoms_everywhere(arrays: Arrays) -> None:
    """As predictions of all atoms would be."""
    counts = [6, 8, 9, 7]  # sorted by the text of the ids
    arrays["id_forces"] = np.zeros((sum(counts), 3), np.float16)
    arrays["id_chunk_idx"] = np.cumsum(counts)[:-1]


def ends(chunk_idx: np.ndarray) -> np.ndarray:
    return np.append(chunk_idx, 17)


WRONG = {
    "missing split": (without("ood_cat"), "the split 'ood_cat' is missing"),
    "missing array": (without("ood_cat_forces"), "the array 'ood_cat_forces' is missing"),
    "nan energy": (
        with_entry("id_energy", 2, np.nan),
        "'id_energy' is not finite (nan or infinite) for 1 str",
    ),
    "nan force": (with_entry("ood_ads_forces", (5, 1), np.nan), "'ood_ads_forces' is not finite"),
    "overflow": (with_entry("id_forces", (0, 0), np.inf), "in float16 all above 65504 is infinite"),
    "duplicated id": (with_entry("id_ids", 1, "0_0"), "'id_ids' holds 1 id more than once: '0_0'"),
    "ids as numbers": (turned("id_ids", lambda ids: np.arange(len(ids))), "and ids must be text"),
    "ids as bytes": (turned("id_ids", lambda ids: ids.astype("S")), "and ids must be text"),
    "no forces": (turned("id_forces", lambda f: f[:0]), "must rise from 0 to at most 0"),
    "no ids": (turned("id_ids", lambda ids: ids[:0]), "must be a list with at least one id"),
    "float32 forces": (
        turned("id_forces", lambda f: f.astype(np.float32)),
        "'id_forces' is of type float32, OC20 takes float16",
    ),
    "text energies": (
        turned("id_energy", lambda e: e.astype(str)),
        "OC20 takes float16 or float32 or float64",
    ),
    "too few energies": (turned("id_energy", lambda e: e[1:]), "for 4 ids it must be (4,) or (4, 1)"),
    "flat forces": (turned("id_forces", np.ravel), "it must be (atoms, 3)"),
    "real chunk_idx": (turned("id_chunk_idx", lambda c: c.astype(float)), "must be whole numbers"),
    "chunk_idx with the end": (turned("id_chunk_idx", ends), "leave out the last entry"),
    "chunk_idx of counts": (
        turned("id_chunk_idx", lambda c: np.diff(np.concatenate([[0], c, [17]]))),
        "it holds numbers of atoms",
    ),
    "short chunk_idx": (
        turned("id_chunk_idx", lambda c: c[:-1]),
        "it must be numpy.cumsum(numbers of atoms)[:-1]",
    ),
    "too few rows": (turned("id_forces", lambda f: f[:-1]), "must rise from 0 to at most 16"),
    "chunk_idx beyond the rows": (with_entry("id_chunk_idx", 2, 18), "must rise from 0 to at most 17"),
    "falling chunk_idx": (with_entry("id_chunk_idx", 1, 1), "must rise from 0 to at most 17"),
    "negative chunk_idx": (with_entry("id_chunk_idx", 0, -1), "must rise from 0 to at most 17"),
}
ONLY_AGAINST_LMDBS = {
    "extra id": (with_entry("id_ids", 3, "21_9"), "'id_ids' has 1 id that '"),
    "ids of floats": (with_entry("id_ids", 3, "21._3"), "'id_ids' lacks 1 id of"),
    "moved boundary": (with_entry("id_chunk_idx", 0, 2), "there are as many rows as atoms"),
    "too many rows": (
        turned("id_forces", lambda f: np.append(f, f[:1], axis=0)),
        "first 1 for '7_1', which has 0 free atoms",
    ),
    "fixed atoms": (with_fixed_atoms_everywhere, "these are all atoms, leave out the fixed ones"),
}


class TestWhatTheCheckFinds:
    @pytest.mark.parametrize("case", WRONG)
    def test_without_lmdbs(self, case: str, sound: Arrays, tmp_path: Path) -> None:
        assert said_of(sound, tmp_path, None) == []
        change, expected = WRONG[case]
        change(sound)
        said = said_of(sound, tmp_path, None)
        assert len(said) == 1 and expected in said[0], said

    @pytest.mark.parametrize("case", ONLY_AGAINST_LMDBS)
    def test_with_lmdbs(self, case: str, world: World, sound: Arrays, tmp_path: Path) -> None:
        assert said_of(sound, tmp_path, world) == []
        change, expected = ONLY_AGAINST_LMDBS[case]
        change(sound)
        assert said_of(sound, tmp_path, None) == []
        said = said_of(sound, tmp_path, world)
        assert any(expected in problem for problem in said), said

    def test_a_structure_left_out(self, world: World, sound: Arrays, tmp_path: Path) -> None:
        sound["id_ids"] = sound["id_ids"][:-1]
        sound["id_energy"] = sound["id_energy"][:-1]
        sound["id_forces"] = sound["id_forces"][: sound["id_chunk_idx"][-1]]
        sound["id_chunk_idx"] = sound["id_chunk_idx"][:-1]
        assert said_of(sound, tmp_path, None) == []
        said = said_of(sound, tmp_path, world)
        assert said[0].startswith("'id' has 3 structures, '") and said[0].endswith("' has 4")
        assert said[1].startswith("'id_ids' lacks 1 id of '")

    def test_splits_that_changed_places(self, world: World, sound: Arrays, tmp_path: Path) -> None:
        swapped = {
            name.replace("ood_ads", "*").replace("ood_cat", "ood_ads").replace("*", "ood_cat"): array
            for name, array in sound.items()
        }
        assert said_of(swapped, tmp_path, None) == []
        said = said_of(swapped, tmp_path, world)
        assert any("'ood_ads_ids' lacks 4 ids" in problem for problem in said)

    def test_one_split_given_twice(self, sound: Arrays, tmp_path: Path) -> None:
        for name in S2EF.arrays:
            sound[f"ood_cat_{name}"] = sound[f"ood_ads_{name}"]
        (said,) = said_of(sound, tmp_path, None)
        assert "the splits 'ood_ads' and 'ood_cat' share 4 ids" in said

    def test_any_order_of_structures_is_right(self, world: World, sound: Arrays, tmp_path: Path) -> None:
        order = [2, 0, 3, 1]
        parts = np.split(sound["id_forces"], sound["id_chunk_idx"])
        sound["id_ids"], sound["id_energy"] = sound["id_ids"][order], sound["id_energy"][order].ravel()
        sound["id_forces"] = np.concatenate([parts[place] for place in order])
        sound["id_chunk_idx"] = np.cumsum([len(parts[place]) for place in order])[:-1]
        assert said_of(sound, tmp_path, world) == []

    def test_half_precision_is_refused_for_oc22(self, world: World, tmp_path: Path) -> None:
        # What fairchem writes by default, whatever the data.
        half = world.predictions(
            tmp_path,
            OC22,
            change=lambda _, g: g.update(
                energy=[e.astype(np.float16) for e in g["energy"]],
                forces=[f.astype(np.float16) for f in g["forces"]],
            ),
        )
        report = build_submission(tmp_path / "s.npz", OC22, S2EF, half)
        said = [finding.text for finding in report.findings if finding.problem]
        assert len(said) == 4 and all("'task.prediction_dtype: float32'" in text for text in said)
        with pytest.raises(ValueError, match="cannot be made as precise as float32"):
            build_submission(tmp_path / "s.npz", OC22, S2EF, half, cast=True)
        assert not (tmp_path / "s.npz").exists()

    def test_ids_of_frames_for_systems(self, world: World, tmp_path: Path) -> None:
        arrays = {}
        for split, file in world.predictions(tmp_path, OC20).items():
            arrays |= {f"{split}_{name}": read_array(file, name) for name in IS2RE.arrays}
        said = said_of(arrays, tmp_path, None, task=IS2RE)
        assert len(said) == 4 and "'id_ids' holds ids of frames, as '0_0'" in said[0]

    @pytest.mark.parametrize("kind", ["order of atoms", "fixed atom moved", "free atoms alone"])
    def test_relaxed_positions(self, kind: str, world: World, tmp_path: Path) -> None:
        files = world.positions(tmp_path, OC20)
        arrays = {
            f"{split}_{name}": array for split in files for name, array in contents(files[split]).items()
        }
        assert said_of(arrays, tmp_path, world, task=IS2RS) == []
        if kind == "free atoms alone":
            arrays["id_pos"], arrays["id_chunk_idx"] = np.zeros((17, 3)), np.array([3, 3, 11])
            expected = "first 3 for '0', which has 6 atoms"
        else:
            arrays["id_pos"] = arrays["id_pos"].copy()
            expected = "fixed atoms of 1 structure are not where the LMDB has them"
            if kind == "order of atoms":
                arrays["id_pos"][:6] = arrays["id_pos"][:6][::-1]
            else:
                arrays["id_pos"][0] += 0.05
        (said,) = said_of(arrays, tmp_path, world, task=IS2RS)
        assert expected in said

    def test_no_free_atom_at_all(self, sound: Arrays, tmp_path: Path) -> None:
        sound["id_forces"], sound["id_chunk_idx"] = np.empty((0, 3), np.float16), np.zeros(3, np.int64)
        assert said_of(sound, tmp_path, None) == []

    def test_notes(self, sound: Arrays, tmp_path: Path) -> None:
        file = tmp_path / "stored.npz"
        np.savez(file, id_stress=np.zeros(3), **sound)
        report = check_submission(file, OC20, S2EF, progress=False)
        assert report.healthy
        said = describe(report)
        assert "PROBLEMS" not in said and "NOTES (3)" in said
        for words in ("OC20 S2EF has no use for 'id_stress'", "--test-lmdbs", "not compressed"):
            assert words in " ".join(said.split())


# ---------------------------------------------------------------------- files from elsewhere


class Exploit:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def damaged_files(folder: Path, arrays: Arrays) -> Iterator[tuple[str, Path, str]]:
    trace = folder / "executed"
    file = folder / "objects.npz"
    np.savez(file, **{**arrays, "id_energy": np.array([Exploit(trace)], dtype=object)})
    yield "objects", file, "it holds Python objects, which could run code"
    file = folder / "pickle.npz"
    file.write_bytes(pickle.dumps(Exploit(trace)))
    yield "pickle", file, "it is no archive of arrays"
    whole = folder / "whole.npz"
    np.savez_compressed(whole, **arrays)
    file = folder / "cut.npz"
    file.write_bytes(whole.read_bytes()[:-200])
    yield "cut off", file, "cannot be read as an .npz"
    file = folder / "empty.npz"
    file.touch()
    yield "empty", file, "cannot be read as an .npz"
    file = folder / "flipped.npz"
    content = bytearray(whole.read_bytes())
    content[120] ^= 0xFF  # inside the compressed bytes of the first array
    file.write_bytes(bytes(content))
    yield "flipped", file, "The array 'id_ids' in"
    file = folder / "single.npz"
    with file.open("wb") as opened:
        np.save(opened, arrays["id_forces"])
    yield "single array", file, "is a single array (.npy)"
    file = folder / "text.npz"
    with zipfile.ZipFile(file, "w") as archive:
        for name in arrays:
            archive.writestr(f"{name}.npy", "not an array")
    yield "no arrays", file, "is not an array of numpy"
    file = folder / "twice.npz"
    ids = io.BytesIO()
    np.save(ids, arrays["id_ids"])
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("id_ids.npy", ids.getvalue())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("id_ids.npy", ids.getvalue())
    yield "twice", file, "holds the array 'id_ids' 2 times"
    file = folder / "huge.npz"
    with zipfile.ZipFile(file, "w") as archive:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f8", "fortran_order": False, "shape": (10**15,)}
        )
        for name in arrays:
            archive.writestr(f"{name}.npy", header.getvalue())
    yield "huge", file, "cannot be read"
    yield "absent", folder / "absent.npz", "There is no file"


def test_damaged_and_malicious_files(sound: Arrays, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for kind, file, expected in damaged_files(tmp_path, sound):
        status = main(["submission", "check", str(file), "--dataset", "oc20", "--task", "s2ef"])
        said = capsys.readouterr().err
        assert status == 2 and expected in said and said.count("\n") == 1, (kind, said)
        build = ["submission", "s2ef", "--dataset", "oc22", "--out", str(tmp_path / "built.npz")]
        assert main([*build, "--id", str(file), "--ood", str(tmp_path / "whole.npz")]) == 2, kind
        capsys.readouterr()
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "built.npz").exists()


# ---------------------------------------------------------------------- building


class TestBuilding:
    def test_nothing_is_overwritten_unasked(self, world: World, tmp_path: Path) -> None:
        sources = world.predictions(tmp_path, OC20)
        out = tmp_path / "s.npz"
        out.write_text("precious")
        with pytest.raises(FileExistsError, match="give --overwrite"):
            build_submission(out, OC20, S2EF, sources)
        assert out.read_text() == "precious"
        assert build_submission(out, OC20, S2EF, sources, overwrite=True).healthy
        assert len(names_of(out)) == 16

    def test_a_file_that_appeared_meanwhile_is_kept(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "s.npz"
        check = builder.check_submission

        def checked(*args: Any, **options: Any) -> Any:
            out.write_text("precious")
            return check(*args, **options)

        monkeypatch.setattr(builder, "check_submission", checked)
        with pytest.raises(FileExistsError):
            build_submission(out, OC20, S2EF, world.predictions(tmp_path, OC20))
        assert out.read_text() == "precious"
        assert not list(tmp_path.glob(".*"))

    def test_what_is_wrong_is_not_written(self, world: World, tmp_path: Path) -> None:
        def break_it(split: str, gathered: dict[str, list[Any]]) -> None:
            if split == "ood_cat":
                gathered["forces"][0][:] = 1e6  # of which float16 makes inf

        with np.errstate(over="ignore"):
            sources = world.predictions(tmp_path, OC20, change=break_it)
        report = build_submission(tmp_path / "s.npz", OC20, S2EF, sources)
        assert not report.healthy and "'ood_cat_forces' is not finite" in report.findings[0].text
        assert {path.name for path in tmp_path.iterdir()} == set(OC20.splits)

    def test_an_exception_leaves_nothing(
        self, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(builder, "check_submission", fail)
        with pytest.raises(KeyboardInterrupt):
            build_submission(tmp_path / "s.npz", OC20, S2EF, world.predictions(tmp_path, OC20))
        assert {path.name for path in tmp_path.iterdir()} == set(OC20.splits)

    def test_a_missing_or_foreign_split(self, world: World, tmp_path: Path) -> None:
        sources = world.predictions(tmp_path, OC20)
        file = sources.pop("ood_cat")
        with pytest.raises(ValueError, match="predictions of ood_cat are missing: give --ood-cat"):
            build_submission(tmp_path / "s.npz", OC20, S2EF, sources)
        with pytest.raises(ValueError, match="OC20 has no test split 'ood'"):
            build_submission(tmp_path / "s.npz", OC20, S2EF, {**sources, "ood": file})
        with pytest.raises(ValueError, match="--ood-ads and --ood-cat both name"):
            build_submission(tmp_path / "s.npz", OC20, S2EF, {**sources, "ood_cat": sources["ood_ads"]})

    def test_results_of_another_task(self, world: World, tmp_path: Path) -> None:
        energies = world.predictions(tmp_path / "energies", OC20, frames=False)
        folders = world.trajectories(tmp_path / "folders", OC20)
        positions = world.positions(tmp_path / "positions", OC20)
        with pytest.raises(ValueError, match="has no array 'forces'"):
            build_submission(tmp_path / "s.npz", OC20, S2EF, energies)
        with pytest.raises(ValueError, match="has no array 'energy'"):
            build_submission(tmp_path / "s.npz", OC20, IS2RE, positions)
        with pytest.raises(ValueError, match="is a folder where a file of predictions is needed"):
            build_submission(tmp_path / "s.npz", OC20, S2EF, folders)

    def test_an_output_that_cannot_be(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"must end in \.npz"):
            build_submission(tmp_path / "s.zip", OC20, S2EF, {})
        with pytest.raises(FileNotFoundError, match="there is no folder"):
            build_submission(tmp_path / "no" / "s.npz", OC20, S2EF, {})

    def test_arrays_that_nobody_wants_are_left_out(self, world: World, tmp_path: Path) -> None:
        sources = world.predictions(tmp_path, OC20)
        np.savez(tmp_path / "more.npz", stress=np.zeros((4, 9)), **contents(sources["id"]))
        sources["id"] = tmp_path / "more.npz"
        assert build_submission(tmp_path / "s.npz", OC20, S2EF, sources).healthy
        assert "id_stress" not in names_of(tmp_path / "s.npz")

    def test_forces_of_higher_precision_are_converted_if_asked(self, world: World, tmp_path: Path) -> None:
        sources = world.predictions(tmp_path, OC20)
        precise = contents(sources["id"])
        precise["forces"] = precise["forces"].astype(np.float32) * np.float32(1.0001)
        sources["id"] = tmp_path / "precise.npz"
        np.savez(sources["id"], **precise)
        report = build_submission(tmp_path / "s.npz", OC20, S2EF, sources)
        assert "'submission s2ef --cast' converts" in report.findings[0].text
        assert build_submission(tmp_path / "s.npz", OC20, S2EF, sources, cast=True).healthy
        np.testing.assert_array_equal(
            read_array(tmp_path / "s.npz", "id_forces"), precise["forces"].astype(np.float16)
        )
        precise["forces"][0, 0] = 7e4
        np.savez(sources["id"], **precise)
        report = build_submission(tmp_path / "s.npz", OC20, S2EF, sources, cast=True, overwrite=True)
        assert "in float16 all above 65504 is infinite" in report.findings[0].text

    @pytest.mark.parametrize("task", [IS2RE, IS2RS], ids=["is2re", "is2rs"])
    def test_trajectories_that_are_not_whole(self, task: Task, world: World, tmp_path: Path) -> None:
        sources = world.trajectories(tmp_path, OC22)
        started = sources["id"] / "5.traj_tmp"
        started.touch()
        with pytest.raises(ValueError, match="1 unfinished relaxations, as"):
            build_submission(tmp_path / "s.npz", OC22, task, sources)
        started.unlink()
        (sources["id"] / "7.traj").write_bytes(b"- of Ulm")
        with pytest.raises(ValueError, match=r"7\.traj' cannot be read as a trajectory"):
            build_submission(tmp_path / "s.npz", OC22, task, sources)
        Trajectory(sources["id"] / "7.traj", "w").close()
        with pytest.raises(ValueError, match=r"7\.traj' holds no frame: the forces .* from the start"):
            build_submission(tmp_path / "s.npz", OC22, task, sources)
        (sources["id"] / "7.traj").unlink()
        report = build_submission(tmp_path / "s.npz", OC22, task, sources, lmdbs=world.lmdbs(OC22))
        assert [finding.text for finding in report.findings][1].startswith("'id_ids' lacks 1 id of '")
        for file in sources["id"].iterdir():
            file.unlink()
        with pytest.raises(FileNotFoundError, match="holds no trajectories"):
            build_submission(tmp_path / "s.npz", OC22, task, sources)


# ---------------------------------------------------------------------- LMDBs


class TestLmdbs:
    def test_what_they_ask_for(self, world: World) -> None:
        wanted = read_wanted(world.lmdbs(OC20)["id"], OC20, S2EF)
        assert wanted.ids.tolist() == ["0_0", "7_1", "14_2", "21_3"]
        assert wanted.natoms.tolist() == [6, 7, 8, 9] and wanted.free.tolist() == [3, 0, 8, 6]
        assert not len(wanted.pos)
        wanted = read_wanted(world.lmdbs(OC22)["ood"], OC22, IS2RS)
        assert wanted.ids.tolist() == ["400", "407", "414", "421"]
        assert len(wanted.pos) == len(wanted.fixed) == wanted.natoms.sum() and wanted.cells.shape == (4, 3, 3)

    @pytest.mark.slow
    def test_workers_read_the_same(
        self, structure: Structure, write_lmdb: Callable[..., Path], tmp_path: Path
    ) -> None:
        frames = []
        for place in range(2100):
            data = structure(place % 7, natoms=5 + place % 3)
            data.sid = place
            frames.append(data)
        path = write_lmdb(tmp_path / "many", frames)
        one, two = (read_wanted(path, OC20, IS2RS, workers=workers) for workers in (0, 2))
        for name in ("ids", "natoms", "free", "cells", "pos", "fixed"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
        assert len(one.ids) == 2100

    def test_numbers_that_are_tensors_or_floats(
        self, structure: Structure, write_lmdb: Callable[..., Path], tmp_path: Path
    ) -> None:
        data = structure(0)
        data.sid, data.fid = torch.tensor([12.0]), torch.tensor(3)
        assert read_wanted(write_lmdb(tmp_path / "lmdb", [data]), OC20, S2EF).ids.tolist() == ["12_3"]

    def test_structures_that_cannot_be_told_apart(
        self, structure: Structure, write_lmdb: Callable[..., Path], tmp_path: Path
    ) -> None:
        frames = [structure(0) for _ in range(3)]
        for fid, data in enumerate(frames):
            data.fid = fid
        path = write_lmdb(tmp_path / "lmdb", frames)
        assert len(read_wanted(path, OC20, S2EF).ids) == 3
        with pytest.raises(ValueError, match=r"holds 3 structures with the id '0'.* initial structures"):
            read_wanted(path, OC20, IS2RE)

    def test_without_fixed_atoms(self, structure: Structure, tmp_path: Path) -> None:
        import lmdb

        data = structure(0)
        del data.fixed
        (tmp_path / "lmdb").mkdir()
        with lmdb.open(str(tmp_path / "lmdb" / "data.lmdb"), subdir=False) as env, env.begin(write=True) as t:
            t.put(b"0", pickle.dumps(data))
        with pytest.raises(ValueError, match=r"Record 0 of .* has no field 'fixed'"):
            read_wanted(tmp_path / "lmdb", OC20, S2EF)

    def test_finding_them(self, world: World, tmp_path: Path) -> None:
        folder = world.folder(OC22)
        pairs = [f"{split}={folder / f'test_{split}'}" for split in OC22.splits]
        assert find_lmdbs([], OC22) == {}
        assert find_lmdbs([str(folder)], OC22) == find_lmdbs(pairs, OC22)
        with pytest.raises(FileNotFoundError, match="holds neither 'test_ood' nor 'ood'"):
            find_lmdbs([str(world.folder(OC20))], OC22)
        with pytest.raises(ValueError, match="names no LMDBs for the split 'ood'"):
            find_lmdbs(pairs[:1], OC22)
        for wrong in ("val=x", pairs[0], "ood=", "ood"):
            with pytest.raises(ValueError, match="must be split=path"):
                find_lmdbs([pairs[0], wrong], OC22)
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="a folder without any"):
            find_lmdbs([pairs[0], f"ood={tmp_path / 'empty'}"], OC22)


# ---------------------------------------------------------------------- the command line


class TestCommand:
    def test_build_and_check(self, world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        sources = world.predictions(tmp_path, OC20)
        out = tmp_path / "s.npz"
        named = [
            text for split, file in sources.items() for text in (f"--{split.replace('_', '-')}", str(file))
        ]
        lmdbs = ["--test-lmdbs", str(world.folder(OC20))]
        assert main(["submission", "s2ef", "--dataset", "oc20", "--out", str(out), *named, *lmdbs]) == 0
        said = capsys.readouterr().out
        assert f"wrote {out}" in said and "nothing is wrong" in said and "ood_both" in said
        assert main(["submission", "check", str(out), *lmdbs]) == 0
        assert "OC20 S2EF" in capsys.readouterr().out
        assert main(["submission", "check", str(out)]) == 0
        assert "name the test LMDBs" in " ".join(capsys.readouterr().out.split())
        assert main(["submission", "s2ef", "--dataset", "oc20", "--out", str(out), *named]) == 2
        assert "exists already" in capsys.readouterr().err

    def test_something_wrong(self, world: World, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        sources = world.predictions(tmp_path, OC22)
        (tmp_path / "swapped").mkdir()
        named = ["--id", str(sources["ood"]), "--ood", str(sources["id"])]
        out = tmp_path / "s.npz"
        lmdbs = ["--test-lmdbs", str(world.folder(OC22))]
        assert main(["submission", "s2ef", "--dataset", "oc22", "--out", str(out), *named, *lmdbs]) == 1
        said = capsys.readouterr().out
        assert "PROBLEMS" in said and f"{out} was not written" in said and not out.exists()
        assert main(["submission", "s2ef", "--dataset", "oc22", "--out", str(out), *named]) == 0
        assert main(["submission", "check", str(out), *lmdbs]) == 1

    @pytest.mark.parametrize(("name", "task"), [("is2re", IS2RE), ("is2rs", IS2RS)])
    def test_relaxations(self, name: str, task: Task, world: World, tmp_path: Path) -> None:
        sources = world.trajectories(tmp_path, OC22)
        out = tmp_path / "s.npz"
        command = ["submission", name, "--dataset", "oc22", "--out", str(out)]
        command += ["--id", str(sources["id"]), "--ood", str(sources["ood"])]
        assert main([*command, "--test-lmdbs", str(world.folder(OC22))]) == 0
        assert guess(names_of(out)) == (OC22, task)

    def test_names_that_do_not_tell(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        np.savez(tmp_path / "s.npz", id_ids=np.array(["1"]), id_energy=np.zeros(1))
        assert main(["submission", "check", str(tmp_path / "s.npz")]) == 2
        assert "give --dataset and --task" in capsys.readouterr().err
        assert (
            main(["submission", "check", str(tmp_path / "s.npz"), "--dataset", "oc22", "--task", "is2re"])
            == 1
        )
        assert "the split 'ood' is missing" in capsys.readouterr().out


# ---------------------------------------------------------------------- from a checkpoint


@pytest.fixture
def checkpoint(run_settings: dict[str, Any], make_trainer: Callable[..., Any]) -> Callable[..., Path]:
    """Saves a tiny model that was not trained; returns the file and its trainer."""

    def make(**outputs: Any) -> tuple[Path, Any]:
        for output in run_settings["outputs"].values():
            output.update(outputs)
        trainer = make_trainer(run_settings)
        return Path(trainer.save(checkpoint_file="checkpoint.pt", training_state=False)), trainer

    return make


class TestFromACheckpoint:
    @BOARDS
    def test_predictions_are_fairchems(
        self,
        board: Leaderboard,
        world: World,
        checkpoint: Callable[..., Any],
        tmp_path: Path,
        capsys: pytest.CaptureFixture,
    ) -> None:
        # The run asked for the other precision; the leaderboard decides.
        other = {"float16": "float32", "float32": "float16"}[board.prediction_dtype]
        file, trainer = checkpoint(prediction_dtype=other)
        out, kept = tmp_path / "s.npz", tmp_path / "s.results"
        command = ["submission", "s2ef", "--dataset", board.name.lower(), "--out", str(out), "--cpu"]
        command += ["--checkpoint", str(file), "--test-lmdbs", str(world.folder(board))]
        assert main([*command, "--batch-size", "3"]) == 0
        said = capsys.readouterr().out
        assert f"wrote {out}" in said

        sources = {split: kept / split / "s2ef_predictions.npz" for split in board.splits}
        assert_same_arrays(contents(out), made_by_fairchem(tmp_path / "theirs.npz", board, sources))
        data = {"src": str(world.lmdbs(board)["id"])}
        trainer.config["test_dataset"] = data
        trainer.config["task"]["prediction_dtype"] = "float32"
        trainer.load_datasets()
        trainer.config["cmd"]["results_dir"] = str(tmp_path)
        trainer.predict(trainer.test_loader, results_file="predictions")
        stock = contents(tmp_path / "s2ef_predictions.npz")
        ours = contents(out)
        assert ours["id_forces"].dtype == board.prediction_dtype
        for name in ("ids", "chunk_idx"):
            np.testing.assert_array_equal(ours[f"id_{name}"], stock[name])
        for name in ("energy", "forces"):
            np.testing.assert_allclose(ours[f"id_{name}"], stock[name], rtol=2e-3, atol=1e-4)

    def test_an_interrupted_build_goes_on(
        self, world: World, checkpoint: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file, _ = checkpoint()
        kept, lmdbs = tmp_path / "kept", world.lmdbs(OC22)
        predicted: list[str] = []
        original = DeNSTrainer.save_results

        def save(self: Any, *args: Any, **options: Any) -> None:
            predicted.append(self.config["test_dataset"]["src"])
            if len(predicted) == 2:
                raise KeyboardInterrupt
            original(self, *args, **options)

        def predict(board: Leaderboard = OC22, paths: Mapping[str, Path] = lmdbs) -> dict[str, Path]:
            return predict_splits(file, board, paths, kept, Running(cpu=True))

        monkeypatch.setattr(DeNSTrainer, "save_results", save)
        with pytest.raises(KeyboardInterrupt):
            predict()
        assert [path.name for path in kept.glob("[!.]*")] == ["id"]
        files = predict()
        assert [Path(src).name for src in predicted] == ["test_id", "test_ood", "test_ood"]
        assert build_submission(tmp_path / "s.npz", OC22, S2EF, files, lmdbs=lmdbs).healthy
        assert predict() == files and len(predicted) == 3

        with pytest.raises(ValueError, match="made with another lmdbs"):
            predict(paths={**lmdbs, "id": world.lmdbs(OC20)["id"]})
        with pytest.raises(ValueError, match=r"made with another dtype \(float32, and now float16\)"):
            predict(OC20, world.lmdbs(OC20))
        with pytest.raises(ValueError, match="made with another task"):
            relax_splits(file, OC22, IS2RE, lmdbs, kept, Running(cpu=True), Relaxation())
        file.write_bytes(file.read_bytes() + b" ")
        with pytest.raises(ValueError, match="made with another checkpoint_sha256"):
            predict()
        (kept / "id" / "made_from.json").unlink()
        with pytest.raises(ValueError, match="does not say what its results were made from"):
            predict()

    def test_what_does_not_go_together(
        self, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        lmdbs = ["--test-lmdbs", str(world.folder(OC22))]
        for name in ("s2ef", "is2re", "is2rs"):
            command = ["submission", name, "--dataset", "oc22", "--out", str(tmp_path / "s.npz")]
            command += ["--checkpoint", str(tmp_path / "none.pt")]
            for arguments, expected in (
                ([], "needs structures: give --test-lmdbs"),
                ([*lmdbs, "--id", "x"], "leave out those, or the checkpoint"),
                (lmdbs, "There is no checkpoint"),
            ):
                assert main([*command, *arguments]) == 2
                assert expected in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="at least 1 step and an fmax above 0, found 0"):
            Relaxation(steps=0)

    def test_a_model_without_forces(
        self, world: World, run_settings: dict[str, Any], checkpoint: Callable[..., Any], tmp_path: Path
    ) -> None:
        file, _ = checkpoint()
        saved = torch.load(file, weights_only=True)
        del saved["config"]["outputs"]["forces"]
        saved["config"]["loss_functions"] = saved["config"]["loss_functions"][:1]
        torch.save(saved, file)
        with pytest.raises(ValueError, match="predicts energy and no 'forces'"):
            predict_splits(file, OC22, world.lmdbs(OC22), tmp_path / "kept", Running(cpu=True))


class TestRelaxationsByACheckpoint:
    @pytest.fixture
    def command(
        self, world: World, checkpoint: Callable[..., Any], tmp_path: Path
    ) -> Callable[..., list[str]]:
        file, _ = checkpoint()

        def make(name: str) -> list[str]:
            return [
                *("submission", name, "--dataset", "oc22", "--out", str(tmp_path / f"{name}.npz"), "--cpu"),
                *("--checkpoint", str(file), "--test-lmdbs", str(world.folder(OC22))),
                *("--results", str(tmp_path / "kept"), "--batch-size", "2"),
                *("--relaxation-steps", "2", "--relaxation-fmax", "1e-6"),
            ]

        return make

    def test_energies_and_structures_of_one_run(
        self, world: World, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert main(command("is2re")) == 0
        trajectories = {split: tmp_path / "kept" / split / "trajectories" for split in OC22.splits}
        theirs = made_by_fairchem(tmp_path / "theirs.npz", OC22, trajectories, is2re_relaxations=True)
        assert by_id(contents(tmp_path / "is2re.npz"), OC22) == by_id(theirs, OC22)

        monkeypatch.setattr(DeNSTrainer, "run_relaxations", None)  # not to be called again
        assert main(command("is2rs")) == 0
        positions = {split: tmp_path / "kept" / split / "relaxed_positions.npz" for split in OC22.splits}
        theirs = made_by_fairchem(tmp_path / "theirs.npz", OC22, positions)
        ours = contents(tmp_path / "is2rs.npz")
        assert_same_arrays(ours, theirs)
        relaxed = dict(zip(ours["id_ids"], np.split(ours["id_pos"], ours["id_chunk_idx"]), strict=True))
        for data in world.frames["id"]:
            moved = np.abs(relaxed[str(data.sid)] - data.pos.numpy()).max(axis=1) > 0
            assert moved.tolist() == (data.fixed == 0).tolist()

    def test_an_interrupted_run_goes_on(
        self, world: World, command: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert main(command("is2re")) == 0
        undisturbed = contents(tmp_path / "is2re.npz")
        (tmp_path / "is2re.npz").unlink()
        shutil.rmtree(tmp_path / "kept")

        calls: list[str] = []
        original, run = ocp_trainer.ml_relax, DeNSTrainer.run_relaxations

        def stop_in_the_second_batch(*args: Any, **options: Any) -> Any:
            calls.append("batch")
            if len(calls) == 2:
                raise KeyboardInterrupt
            return original(*args, **options)

        def stop_after_the_last_batch(self: Any) -> None:
            run(self)
            raise KeyboardInterrupt

        def relaxed() -> dict[str, int]:
            files = (tmp_path / "kept").rglob("*.traj")
            return {file.stem: file.stat().st_mtime_ns for file in files}

        seen: list[dict[str, int]] = []
        for target, name, stop in (
            (ocp_trainer, "ml_relax", stop_in_the_second_batch),
            (DeNSTrainer, "run_relaxations", stop_after_the_last_batch),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(target, name, stop)
                with pytest.raises(KeyboardInterrupt):
                    main(command("is2re"))
            assert not (tmp_path / "kept" / "id").exists()
            seen.append(relaxed())
        assert main([*command("is2re"), "--relaxation-fmax", "0.1"]) == 2
        assert main(command("is2re")) == 0
        seen.append(relaxed())
        assert [len(files) for files in seen] == [2, 4, 8]
        for before, after in itertools.pairwise(seen):
            assert before.items() <= after.items()  # none was made again
        assert by_id(contents(tmp_path / "is2re.npz"), OC22) == by_id(undisturbed, OC22)
        assert main(command("is2rs")) == 0


def test_relaxations_by_fairchems_own_trainer(
    world: World, run_settings: dict[str, Any], make_trainer: Callable[..., Any], tmp_path: Path
) -> None:
    """It writes no frame of what needs no step, here the system without a free atom."""
    settings = {
        "write_pos": True,
        "relaxation_steps": 1,
        "relaxation_fmax": 1e-6,
        "relax_opt": {"traj_dir": str(tmp_path / "trajectories")},
    }
    run_settings["dataset"]["relax"] = {"src": str(world.lmdbs(OC22)["id"])}
    del run_settings["dataset"]["train"]["transforms"]["dens"]
    run_settings["loss_functions"].pop()
    run_settings["optim"]["scheduler_params"]["warmup_epochs"] = 1
    run_settings["model"]["name"] = "equiformer_v2"
    trainer = make_trainer({**run_settings, "task": settings}, trainer=EquiformerV2ForcesTrainer)
    trainer.config["cmd"]["results_dir"] = str(tmp_path)
    trainer.run_relaxations()
    with pytest.raises(ValueError, match=r"7\.traj' holds no frame"):
        load_predictions(tmp_path / "trajectories", OC22, IS2RE)
    arrays = load_predictions(tmp_path / "relaxed_positions.npz", OC22, IS2RS)
    wanted = read_wanted(world.lmdbs(OC22)["id"], OC22, IS2RS)
    assert list(differences("id", arrays, IS2RS, wanted)) == []
