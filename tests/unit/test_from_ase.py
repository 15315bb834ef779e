"""`fairchem-dens data from-ase`, from files on disk to LMDBs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import fcc111, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixCartesian, FixedPlane, FixScaled
from fairchem.core.common.utils import load_config
from fairchem.core.datasets import LmdbDataset
from fairchem.core.modules.normalization.element_references import create_element_references
from fairchem.core.modules.normalization.normalizer import create_normalizer

from fairchem_dens.cli.main import main
from fairchem_dens.data.from_ase import labels, parts, sources, systems
from fairchem_dens.data.from_ase.energies import fit_references, undetermined
from fairchem_dens.data.from_ase.settings import Settings
from fairchem_dens.data.lmdb import read_lmdb
from fairchem_dens.shipped import configs_folder


def labelled(atoms: Atoms, energy: float | None, forces: np.ndarray | None) -> Atoms:
    atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
    return atoms


def steps(seed: int, count: int = 4, *, metal: str = "Cu", energy: float = -50.0) -> list[Atoms]:
    """A made-up relaxation of a slab with O on it: the energy falls by 1 eV each step, to `energy`."""
    rng = np.random.default_rng(seed)
    slab = fcc111(metal, (1, 2, 3), vacuum=5.0)
    slab += Atoms("O", positions=[slab.positions[-1] + [0, 0, 1.6]])
    slab.pbc = True
    slab.set_tags(0)
    slab.set_constraint(FixAtoms(indices=[0, 1]))
    frames = []
    for step in range(count):
        slab.positions[2:] += rng.normal(scale=0.02, size=(len(slab) - 2, 3))
        frames.append(labelled(slab.copy(), energy + count - 1 - step, rng.normal(size=(len(slab), 3))))
    return frames


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Ten trajectories of four frames, in two folders."""
    folder = tmp_path / "runs"
    for seed in range(10):
        file = folder / f"set{seed % 2}" / f"random{1000 + seed}.traj"
        file.parent.mkdir(parents=True, exist_ok=True)
        ase.io.write(file, steps(seed, metal="Cu" if seed % 3 else "Pd", energy=-50.0 - seed))
    return folder


def convert(out: Path, *arguments: object) -> int:
    return main(["data", "from-ase", *map(str, arguments), "--out", str(out), "--workers", "1"])


def contents(folder: Path) -> dict[str, list[dict[str, object]]]:
    """All fields of all structures of a data set, bit by bit, under the name of their file."""

    def exact(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return type(value), value
        return value.dtype, tuple(value.shape), value.numpy().tobytes()

    return {
        str(file.relative_to(folder)): [
            {key: exact(structure[key]) for key in structure.keys()}  # noqa: SIM118  # not a mapping
            for structure in read_lmdb(file)
        ]
        for file in sorted(folder.glob("*/*.lmdb"))
    }


def summary_of(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


def error_of(capsys: pytest.CaptureFixture, out: Path, *arguments: object) -> str:
    assert convert(out, *arguments) == 2
    assert not out.exists()
    return capsys.readouterr().err.strip().splitlines()[-1]


# ---------------------------------------------------------------------------------------------- end to end


def test_trajectories_become_a_data_set(runs, tmp_path, capsys):
    out = tmp_path / "data"
    assert convert(out, runs / "**/*.traj", "--val", "0.2", "--test", "1") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "data.yml", "energy_normalizer.npz", "forces_normalizer.npz", "summary.json", "systems.json",
        "test", "train", "train.yml", "val",
    ]  # fmt: skip
    assert not list(tmp_path.glob(".*")), "something was left beside it"

    data = {split: list(read_lmdb(out / split)) for split in ("train", "val", "test")}
    sids = {split: {structure.sid for structure in found} for split, found in data.items()}
    assert {split: len(found) for split, found in sids.items()} == {"train": 7, "val": 2, "test": 1}
    assert set.union(*sids.values()) == set(range(1000, 1010))
    for found in data.values():
        for structure in found:
            original = ase.io.read(next(runs.glob(f"*/random{structure.sid}.traj")), index=structure.fid)
            assert structure.energy == original.calc.results["energy"]
            # Those of fixed atoms, too, are the raw ones.
            expected = torch.tensor(original.calc.results["forces"], dtype=torch.float32)
            assert torch.equal(structure.forces, expected)
            assert structure.fixed.tolist() == [1, 1, 0, 0, 0, 0, 0]
            assert structure.tags.tolist() == [0, 0, 1, 1, 1, 1, 2]
            assert structure.pbc.all() and structure.pos.dtype == torch.float32

    named = json.loads((out / "systems.json").read_text())
    for name, system in named.items():
        assert system["sid"] == int(name.removeprefix("random")) and system["sid"] in sids[system["split"]]
        assert (system["frames"], system["frames_read"]) == (4, 4)
        assert [Path(file).stem for file in system["files"]] == [name]

    said = capsys.readouterr().out
    assert "10 files, 40 frames, 10 systems by file of a trajectory (40 frames)" in said
    assert "left out: 0 frames of 40" in said and f"fairchem-dens data check {out}/train" in said


def test_normalisers_are_those_of_train(runs, tmp_path):
    out = tmp_path / "data"
    assert convert(out, runs, "--val", 3) == 0
    train = list(read_lmdb(out / "train"))
    energies = np.array([structure.energy for structure in train])
    free = torch.cat([structure.forces[structure.fixed == 0] for structure in train])
    energy = create_normalizer(file=out / "energy_normalizer.npz")
    forces = create_normalizer(file=out / "forces_normalizer.npz")
    assert energy.mean.item() == pytest.approx(energies.mean())
    assert energy.rmsd.item() == pytest.approx(energies.std())
    assert forces.mean.item() == 0
    assert forces.rmsd.item() == pytest.approx(free.square().mean().sqrt().item(), rel=1e-6)
    dataset = yaml.safe_load((out / "data.yml").read_text())["dataset"]
    assert dataset["train"]["transforms"]["normalizer"]["forces"]["rmsd"] == forces.rmsd.item()
    assert dataset["train"]["src"] == str(out / "train") and dataset["val"] == {"src": str(out / "val")}
    assert "test" not in dataset and not (out / "test").exists()
    assert len(LmdbDataset({"src": str(out / "train")})) == len(train)


def test_yaml_to_train_with_is_complete(runs, tmp_path, capsys):
    out = tmp_path / "data"
    assert convert(out, runs) == 0
    assert f"fairchem --mode train --config-yml {out}/train.yml" in capsys.readouterr().out
    config, warnings, duplicates = load_config(out / "train.yml")
    assert duplicates == warnings == []
    of_paper, _, _ = load_config(configs_folder() / "oc20/equiformer_v2_dens_2M_12ep.yml")
    defaults = {"max_num_elements": 90, "enforce_max_neighbors_strictly": True}
    assert config["model"] | defaults == of_paper["model"] | defaults
    assert config["loss_functions"] == of_paper["loss_functions"]
    assert set(config["optim"]) == set(of_paper["optim"]) - {"eval_every"}
    assert set(config["dataset"]["train"]["transforms"]) == {"dens", "normalizer"}
    assert config["dataset"]["train"]["src"] == str(out / "train")
    assert config["task"] == {"strict_load": True, "prediction_dtype": "float32"}


def test_frames_per_file(runs, tmp_path):
    assert convert(tmp_path / "data", runs, "--frames-per-file", 10) == 0
    lengths = [len(structures) for name, structures in contents(tmp_path / "data").items() if "train" in name]
    assert lengths == [10, 10, 10, 6]


def test_dry_run_says_the_same_and_writes_nothing(runs, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", "from-ase", str(runs), "--dry-run", "--workers", "1"]) == 0
    dry = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert convert(tmp_path / "data", runs) == 0
    assert dry.split("\n\nNothing was written")[0] in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- files


def test_patterns_are_sorted_and_each_file_counts_once(runs):
    by_glob = sources.find_sources([str(runs / "**" / "*.traj")])
    by_all = sources.find_sources([str(runs), str(runs / "set0" / "*"), str(runs / "set0/random1000.traj")])
    assert by_all == by_glob and len(by_glob) == 10
    assert [source.path for source in by_glob] == sorted(source.path for source in by_glob)


def test_home_is_expanded_in_quotes(runs, monkeypatch):
    monkeypatch.setenv("HOME", str(runs.parent))
    assert len(sources.find_sources(["~/runs/**/*.traj"])) == 10


def test_packed_files(tmp_path):
    import gzip

    (tmp_path / "x").mkdir()
    steps_text = "".join(OUTCAR_STEP.format(free=-9.5, energy=-9.25 - i, force=0.5) for i in range(2))
    (tmp_path / "x" / "OUTCAR.gz").write_bytes(gzip.compress((OUTCAR + steps_text).encode()))
    assert convert(tmp_path / "d", tmp_path / "x", "--val", 0) == 0
    assert [(s.sid, s.energy) for s in read_lmdb(tmp_path / "d/train")] == [("x", -9.25), ("x", -10.25)]


def test_pattern_without_a_match_is_named(runs, tmp_path, capsys):
    assert "nowhere/*.traj' names nothing" in error_of(
        capsys, tmp_path / "d", runs, tmp_path / "nowhere/*.traj"
    )
    (tmp_path / "empty").mkdir()
    assert "a folder without any file of a known name" in error_of(capsys, tmp_path / "d", tmp_path / "empty")


def test_file_is_called_by_what_tells_it_from_the_others(tmp_path):
    for name in ("a/relax.traj", "b/relax.traj", "b/other.extxyz", "c/x/OUTCAR", "c/y/vasprun.xml.gz"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    found = sources.find_sources([str(tmp_path)])
    assert [source.name for source in found] == ["a:relax", "other", "b:relax", "x", "y"]


def test_run_written_twice_is_refused(tmp_path, capsys):
    (tmp_path / "OUTCAR").touch()
    (tmp_path / "vasprun.xml").touch()
    assert "seem to be the same run, written twice" in error_of(capsys, tmp_path / "d", tmp_path)
    (tmp_path / "x").mkdir()
    ase.io.write(tmp_path / "x" / "a.traj", steps(0))
    ase.io.write(tmp_path / "x" / "a.extxyz", steps(0))
    assert "seem to be the same run" in error_of(capsys, tmp_path / "d", tmp_path / "x")


@pytest.mark.parametrize("suffix", ["extxyz", "xyz", "traj", "db", "json"])
def test_formats_agree(tmp_path, suffix):
    frames = steps(3)
    if suffix in ("db", "json"):
        with ase.db.connect(tmp_path / f"a.{suffix}") as database:
            for atoms in frames:
                database.write(atoms, system="mine")
    else:
        # Not every format keeps constraints by itself.
        options = {"columns": ["symbols", "positions", "forces", "move_mask"]} if "xyz" in suffix else {}
        ase.io.write(tmp_path / f"a.{suffix}", frames, format="extxyz" if options else "traj", **options)
    assert convert(tmp_path / "data", tmp_path / f"a.{suffix}", "--val", 0) == 0
    written = list(read_lmdb(tmp_path / "data" / "train"))
    assert [structure.fid for structure in written] == (
        [1, 2, 3, 4] if suffix in ("db", "json") else [0, 1, 2, 3]
    )
    for structure, atoms in zip(written, frames, strict=True):
        assert structure.sid == ("mine" if suffix in ("db", "json") else "a")
        assert structure.energy == pytest.approx(atoms.calc.results["energy"], abs=1e-7)
        assert np.allclose(structure.forces, atoms.calc.results["forces"], atol=1e-6)
        assert structure.fixed.tolist() == [1, 1, 0, 0, 0, 0, 0]


OUTCAR = """\
 POTCAR:    PAW_PBE Cu 22Jun2005
 POTCAR:    PAW_PBE O 08Apr2002
 POTCAR:    PAW_PBE Cu 22Jun2005
 POTCAR:    PAW_PBE O 08Apr2002
   ISPIN  =      1    spin polarized calculation?
   ions per type =               1   1
--------------------------------------- Iteration      1(   1)  ---------------------------------------
"""
OUTCAR_STEP = """\
      direct lattice vectors                 reciprocal lattice vectors
     5.0  0.0  0.0     0.2  0.0  0.0
     0.0  5.0  0.0     0.0  0.2  0.0
     0.0  0.0  9.0     0.0  0.0  0.111
 POSITION                                       TOTAL-FORCE (eV/Angst)
 -----------------------------------------------------------------------------------
      0.0  0.0  0.0     0.1  0.2  0.3
      0.0  0.0  1.9    -0.1 -0.2 {force}
 -----------------------------------------------------------------------------------
  FREE ENERGIE OF THE ION-ELECTRON SYSTEM (eV)
  ---------------------------------------------------
  free  energy   TOTEN  =       {free} eV

  energy  without entropy=       -9.0  energy(sigma->0) =       {energy}
"""
POSCAR = """\
made up
1.0
5 0 0
0 5 0
0 0 9
Cu O
1 1
Selective dynamics
Cartesian
0 0 0 F F F
0 0 1.9 T T F
"""


def test_outcar_takes_selective_dynamics_from_beside_it(tmp_path):
    folder = tmp_path / "Cu_O"
    folder.mkdir()
    chunks = [OUTCAR_STEP.format(free=-9.5 - i, energy=-9.25 - i, force=0.5 + i) for i in range(3)]
    (folder / "OUTCAR").write_text(OUTCAR + "".join(chunks))
    (folder / "POSCAR").write_text(POSCAR)
    assert convert(tmp_path / "data", folder, "--val", 0) == 0
    written = list(read_lmdb(tmp_path / "data" / "train"))
    assert [structure.energy for structure in written] == [-9.25, -10.25, -11.25]
    assert [round(structure.forces[1, 2].item(), 4) for structure in written] == [0.5, 1.5, 2.5]
    assert written[0].fixed.tolist() == [1, 0] and written[0].sid == "Cu_O"


def vasprun(energies: list[float]) -> str:
    def rows(name: str, values: list[str]) -> str:
        return f'<varray name="{name}">' + "".join(f"<v>{row}</v>" for row in values) + "</varray>"

    crystal = "<crystal>" + rows("basis", ["5 0 0", "0 5 0", "0 0 9"]) + "</crystal>"
    places = rows("positions", ["0 0 0", "0 0 0.2"])
    energy = '<energy><i name="e_fr_energy">{0}</i><i name="e_0_energy">{0}</i></energy>'
    calculations = "".join(
        f"<calculation><scstep>{energy.format(value)}</scstep><structure>{crystal}{places}</structure>"
        f"{rows('forces', ['0.1 0.2 0.3', '-0.1 -0.2 -0.3'])}{energy.format(value)}</calculation>"
        for value in energies
    )
    atoms = "<set><rc><c>Cu</c><c>1</c></rc><rc><c>O</c><c>2</c></rc></set>"
    return (
        '<modeling><kpoints><varray name="kpointlist"><v>0 0 0</v></varray><varray name="weights"><v>1</v>'
        f'</varray></kpoints><atominfo><array name="atoms">{atoms}</array></atominfo>'
        f'<structure name="initialpos">{crystal}{places}{rows("selective", ["F F F", "T T T"])}</structure>'
        f"{calculations}</modeling>"
    )


def test_vasprun(tmp_path):
    for name, energies in (("one", [-9.0, -9.5]), ("two", [-8.0])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vasprun.xml").write_text(vasprun(energies))
    assert convert(tmp_path / "data", tmp_path / "*/vasprun.xml", "--val", 0, "--split-by", "file") == 0
    written = list(read_lmdb(tmp_path / "data" / "train"))
    assert [(s.sid, s.fid, s.energy) for s in written] == [
        ("one", 0, -9.0),
        ("one", 1, -9.5),
        ("two", 0, -8.0),
    ]
    assert written[0].fixed.tolist() == [1, 0] and np.allclose(written[0].forces[0], [0.1, 0.2, 0.3])


def test_files_that_ase_ships(tmp_path):
    folder = importlib.util.find_spec("ase.test").submodule_search_locations[0]
    if not (file := Path(folder) / "testdata" / "vasp" / "OUTCAR_example_1").is_file():
        pytest.skip("this ASE comes without its test data")
    shutil.copy(file, tmp_path / "OUTCAR")
    assert convert(tmp_path / "data", tmp_path / "OUTCAR", "--val", 0, "--energy", "total") == 2  # one energy
    frame = ase.io.read(file)
    assert labels.energy_of(frame) == frame.calc.results["energy"]
    assert labels.forces_of(frame).shape == (18, 3)


def test_format_can_be_forced(tmp_path, capsys):
    ase.io.write(tmp_path / "frames.unheard", steps(0), format="extxyz")
    assert "does not recognise" in error_of(capsys, tmp_path / "d", tmp_path / "frames.unheard")
    assert "is not a format of ASE" in error_of(
        capsys, tmp_path / "d", tmp_path / "frames.unheard", "--format", "extxys"
    )
    assert convert(tmp_path / "d", tmp_path / "frames.unheard", "--format", "extxyz", "--val", 0) == 0


def test_aselmdb_without_its_package_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ase_db_backends.aselmdb", None)
    (tmp_path / "a.aselmdb").write_bytes(b"")
    said = error_of(capsys, tmp_path / "d", tmp_path / "a.aselmdb", "--skip-unreadable")
    assert "pip install ase-db-backends" in said


def test_aselmdb_is_opened_for_reading_only(tmp_path, monkeypatch):
    """Through a stand-in for the package; the next test uses the real one where it is installed."""
    with ase.db.connect(tmp_path / "a.json") as database:
        for atoms in steps(0):
            database.write(atoms, data={"sid": 17})
    opened = {}

    def connect(name, **options):
        opened.update(options)
        return ase.db.connect(str(Path(name).with_suffix(".json")))

    backend = types.SimpleNamespace(LMDBDatabase=connect)
    monkeypatch.setitem(sys.modules, "ase_db_backends", types.SimpleNamespace(aselmdb=backend))
    monkeypatch.setitem(sys.modules, "ase_db_backends.aselmdb", backend)
    (tmp_path / "a.aselmdb").touch()
    assert convert(tmp_path / "data", tmp_path / "a.aselmdb", "--val", 0) == 0
    assert opened["readonly"] is True
    assert [(s.sid, s.fid) for s in read_lmdb(tmp_path / "data/train")] == [
        (17, 1),
        (17, 2),
        (17, 3),
        (17, 4),
    ]


def test_aselmdb(tmp_path):
    pytest.importorskip("ase_db_backends", reason="needs ase-db-backends")
    with ase.db.connect(str(tmp_path / "a.aselmdb")) as database:
        for atoms in steps(0):
            database.write(atoms, data={"sid": 17})
    assert convert(tmp_path / "data", tmp_path / "a.aselmdb", "--val", 0) == 0
    assert [structure.sid for structure in read_lmdb(tmp_path / "data/train")] == [17] * 4


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bad.traj", b"- of Ulmxxxxxxxx"),
        ("bad.extxyz", b"3\nLattice\nCu 0 0\n"),
        ("bad.db", b"SQLite format 3\0abc"),
    ],
)
def test_unreadable_file_is_named_or_left_out(runs, tmp_path, capsys, name, content):
    (runs / name).write_bytes(content)
    said = error_of(capsys, tmp_path / "d", runs)
    assert name in said and "cannot be read" in said
    assert convert(tmp_path / "d", runs, "--skip-unreadable") == 0
    assert name in capsys.readouterr().out
    summary = summary_of(tmp_path / "d")
    assert list(summary["unreadable"]) == [str(runs / name)] and summary["frames"]["written"] == 40


def test_truncated_trajectory_is_named_with_its_frame(runs, tmp_path, capsys):
    file = runs / "set0" / "random1000.traj"
    text = ase.io.read(file, index=":")
    ase.io.write(runs / "cut.extxyz", text)
    whole = (runs / "cut.extxyz").read_text().splitlines(keepends=True)
    (runs / "cut.extxyz").write_text("".join(whole[:-3]))
    said = error_of(capsys, tmp_path / "d", runs)
    assert "cut.extxyz' cannot be read after frame 2 as extxyz" in said


# ---------------------------------------------------------------------------------------------- systems


def test_sid_in_the_frame_names_the_system(tmp_path, capsys):
    frames = [*steps(0, 2), *steps(1, 2), *steps(2, 2)]
    for place, atoms in enumerate(frames):
        atoms.info |= {"sid": place // 2, "fid": place % 2}
    ase.io.write(tmp_path / "all.extxyz", frames)
    assert convert(tmp_path / "d", tmp_path / "all.extxyz", "--val", 1, "--test", 1) == 0
    assert "3 systems by name in the frame (6 frames)" in capsys.readouterr().out
    found = {split: {(s.sid, s.fid) for s in read_lmdb(tmp_path / "d" / split)} for split in systems.SPLITS}
    assert sorted(len({sid for sid, _ in ids}) for ids in found.values()) == [1, 1, 1]
    assert set.union(*found.values()) == {(sid, fid) for sid in range(3) for fid in range(2)}


def test_single_structures_of_a_database_are_grouped_by_formula(tmp_path, capsys):
    for name in ("a", "b"):
        with ase.db.connect(tmp_path / f"{name}.db") as database:
            for metal in ("Cu", "Pd", "Cu", "Ag"):
                database.write(steps(len(database), 1, metal=metal, energy=-len(database))[0])
    assert convert(tmp_path / "d", tmp_path, "--val", 1, "--max-force", 100) == 0
    assert "3 systems by formula of single structures (8 frames)" in capsys.readouterr().out
    ids = sorted((s.sid, s.fid) for split in ("train", "val") for s in read_lmdb(tmp_path / "d" / split))
    # Row ids, counted on in the second file.
    assert ids == [
        ("Ag6O", 4), ("Ag6O", 9), ("Cu6O", 1), ("Cu6O", 3), ("Cu6O", 5), ("Cu6O", 7), ("OPd6", 2), ("OPd6", 5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "number"),
    [("file", 10), ("formula", 2), ("regex:/(set[01])/", 2), ("regex:100[0-4]", 5), ("key:run", 3)],
)
def test_rules(tmp_path, runs, rule, number):
    if rule == "key:run":
        for file in runs.rglob("*.traj"):
            frames = ase.io.read(file, index=":")
            for atoms in frames:
                atoms.info["run"] = f"x/{int(file.stem[6:]) % 3}"
            ase.io.write(file, frames)
    if rule == "regex:100[0-4]":
        for place in range(5, 10):
            next(runs.rglob(f"random100{place}.traj")).unlink()
    assert convert(tmp_path / "d", runs, "--split-by", rule, "--val", 1) == 0
    named = json.loads((tmp_path / "d" / "systems.json").read_text())
    assert len(named) == number
    assert [system["split"] for system in named.values()].count("val") == 1
    assert not any("/" in name for name in named)
    ids = [(s.sid, s.fid) for split in ("train", "val") for s in read_lmdb(tmp_path / "d" / split)]
    assert len(set(ids)) == len(ids) == sum(system["frames"] for system in named.values())


def test_rule_that_finds_nothing_is_an_error(runs, tmp_path, capsys):
    assert "matches nothing in" in error_of(capsys, tmp_path / "d", runs, "--split-by", "regex:nope")
    said = error_of(capsys, tmp_path / "d", runs, "--split-by", "key:nope")
    assert "random1000.traj', frame 0: it has no 'nope'" in said
    assert "not a regular expression" in error_of(capsys, tmp_path / "d", runs, "--split-by", "regex:(")
    assert "'--split-by' must be one of" in error_of(capsys, tmp_path / "d", runs, "--split-by", "frame")


def test_same_sid_and_fid_in_two_files_is_an_error(tmp_path, capsys):
    for name in ("a", "b"):
        frames = steps(0, 3)
        for atoms in frames:
            atoms.info["sid"] = 7
        ase.io.write(tmp_path / f"{name}.traj", frames)
    said = error_of(capsys, tmp_path / "d", tmp_path, "--val", 0)
    assert "a.traj' and frame 0 of" in said and "b.traj' are both fid 0 of the system '7'" in said
    assert convert(tmp_path / "d", tmp_path, "--val", 1, "--split-by", "file") == 0


def test_one_system_cannot_be_split(tmp_path, capsys):
    ase.io.write(tmp_path / "a.traj", steps(0))
    assert "There is 1 system (a)" in error_of(capsys, tmp_path / "d", tmp_path / "a.traj")


def test_split_depends_on_seed_and_name_and_moves_little():
    names = [f"system{number}" for number in range(200)]
    settings = Settings(val=0.1, test=0.1)
    splits = systems.assign(names, settings)
    assert Counter(splits.values()) == {"train": 160, "val": 20, "test": 20}
    assert systems.assign(names[::-1], settings) == splits
    assert systems.assign(names, dataclasses.replace(settings, seed=1)) != splits
    more = systems.assign([*names, *(f"new{number}" for number in range(10))], settings)
    assert sum(more[name] != split for name, split in splits.items()) <= 4
    assert Counter(systems.assign(names[:5], Settings(val=0.01)).values()) == {"train": 4, "val": 1}


def test_ids_are_numbers_only_if_all_are():
    assert systems.stored_ids(["random12", "set:random7", "3"]) == [12, 7, 3]
    assert systems.stored_ids(["random12", "Cu"]) == ["random12", "Cu"]
    assert systems.stored_ids(["a:random1", "b:random1"]) == ["a:random1", "b:random1"]


# ---------------------------------------------------------------------------------------------- labels


def test_frames_without_labels_are_counted(tmp_path, capsys):
    frames = steps(0, 6)
    frames[1].calc = None
    frames[2].calc = SinglePointCalculator(frames[2], forces=np.zeros((7, 3)))
    frames[3].calc = SinglePointCalculator(frames[3], energy=-1.0)
    ase.io.write(tmp_path / "a.traj", frames)
    assert convert(tmp_path / "d", tmp_path / "a.traj", "--val", 0) == 0
    assert summary_of(tmp_path / "d")["frames"]["dropped"] == {"no energy": 2, "no forces": 1}
    assert [structure.fid for structure in read_lmdb(tmp_path / "d/train")] == [0, 4, 5]

    for atoms in frames:
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    ase.io.write(tmp_path / "b.traj", frames)
    said = error_of(capsys, tmp_path / "e", tmp_path / "b.traj")
    assert "None of the 6 frames is left (no forces: 6). DeNS needs energy and forces" in said


def test_labels_under_other_names(tmp_path):
    frames = steps(0, 3)
    for atoms in frames:
        atoms.info["E_dft"] = atoms.calc.results["energy"]
        atoms.arrays["F_dft"] = atoms.calc.results["forces"]
        atoms.calc = None
    ase.io.write(tmp_path / "a.extxyz", frames)
    names = ("--energy-key", "E_dft", "--forces-key", "F_dft")
    assert convert(tmp_path / "d", tmp_path / "a.extxyz", "--val", 0, *names) == 0
    assert [structure.energy for structure in read_lmdb(tmp_path / "d/train")] == [-48, -49, -50]


def test_labels_of_the_wrong_shape_are_named(tmp_path, capsys):
    frames = steps(0, 3)
    for atoms in frames:
        atoms.info["F"] = np.zeros(4)
    ase.io.write(tmp_path / "a.extxyz", frames)
    said = error_of(capsys, tmp_path / "d", tmp_path / "a.extxyz", "--forces-key", "F")
    assert "a.extxyz', frame 0: 'F' has the shape (4,) and must have (7, 3)" in said


def test_fixed_atoms():
    atoms = Atoms("H7", positions=np.arange(21).reshape(7, 3))
    atoms.set_constraint(
        [
            FixAtoms(indices=[0]),
            FixScaled([1], mask=(True, True, True)),
            FixScaled([2], mask=(True, False, True)),
            FixCartesian([3]),
            FixCartesian([4], mask=(False, False, True)),
            FixedPlane(5, (0, 0, 1)),
        ]
    )
    assert labels.fixed_atoms(atoms).tolist() == [True, True, False, True, False, False, False]


def test_tags():
    slab = fcc111("Cu", (1, 1, 3), vacuum=5.0)
    slab += molecule("CH3OH")
    fixed = np.arange(len(slab)) < 1
    stored = [3, 2, 1, 0, 0, 0, 0, 0, 0]
    ruled = [0, 1, 1, 2, 2, 2, 2, 2, 2]
    for source, tags in (("auto", stored), ("file", stored), ("rule", ruled), ("none", [0] * 9)):
        found, by_rule = labels.tags_of(slab, fixed, source, "HCNO")
        assert found.tolist() == tags and by_rule == (source == "rule")
    slab.set_tags(0)
    assert labels.tags_of(slab, fixed, "auto", "HCNO")[0].tolist() == ruled
    assert labels.tags_of(slab, fixed, "auto", ["Cu"])[0].tolist() == [0, 2, 2, 1, 1, 1, 1, 1, 1]
    assert labels.tags_of(slab, fixed, "file", "HCNO")[0].tolist() == [0] * 9


def test_options_on_tags_and_fixed_atoms(tmp_path, capsys):
    ase.io.write(tmp_path / "a.traj", steps(0))
    options = ("--val", 0, "--fixed", "none", "--adsorbate-elements", "Cu")
    assert convert(tmp_path / "d", tmp_path / "a.traj", *options) == 0
    structure = next(read_lmdb(tmp_path / "d/train"))
    assert structure.fixed.tolist() == [0] * 7 and structure.tags.tolist() == [2] * 6 + [1]
    assert "tags: by the rule in 4 frames of 4" in capsys.readouterr().out
    said = error_of(capsys, tmp_path / "e", tmp_path / "a.traj", "--adsorbate-elements", "H,Xx")
    assert "'Xx', which is no element" in said


def test_molecules_without_a_cell(tmp_path):
    water = molecule("H2O")
    frames = [labelled(water.copy(), -14.0 - i, np.ones((3, 3))) for i in range(3)]
    ase.io.write(tmp_path / "water.extxyz", frames)
    assert convert(tmp_path / "d", tmp_path / "water.extxyz", "--val", 0) == 0
    structure = next(read_lmdb(tmp_path / "d/train"))
    assert not structure.pbc.any() and structure.fixed.tolist() == [0, 0, 0]


# ---------------------------------------------------------------------------------------------- energies


@pytest.mark.parametrize(("which", "zero"), [("last", 4.0), ("first", 0.0), ("lowest", -9.0)])
def test_relative_energies_count_from_an_unfiltered_frame(tmp_path, which, zero):
    frames = steps(0, 5, energy=4.0)  # 8, 7, 6, 5, 4 eV
    for place, energy in ((0, 0.0), (2, -9.0)):
        frames[place].calc.results["energy"] = energy
    for place in (0, 2, 4):  # all three that may be the reference are filtered
        frames[place].calc.results["forces"] = np.full((7, 3), 40.0)
    frames.append(frames[0].copy())  # nor does the last frame have an energy
    ase.io.write(tmp_path / "a.traj", frames)
    options = ("--val", 0, "--energy", "relative", "--relative-to", which, "--max-force", 50)
    assert convert(tmp_path / "d", tmp_path / "a.traj", *options) == 0
    assert [structure.energy for structure in read_lmdb(tmp_path / "d/train")] == [7 - zero, 5 - zero]
    assert json.loads((tmp_path / "d/systems.json").read_text())["a"]["reference_energy"] == zero


def test_relative_energies_of_single_frames_are_refused(tmp_path, capsys):
    for seed in range(3):
        ase.io.write(tmp_path / f"{seed}.traj", steps(seed, 1))
    options = ("--energy", "relative", "--split-by", "file")
    assert "makes all energies 0" in error_of(capsys, tmp_path / "d", tmp_path, *options)


def oxides(tmp_path: Path, formulas: list[str]) -> Path:
    """Single structures whose energy is the sum of their atoms' plus a little."""
    rng = np.random.default_rng(0)
    atomic = {"Cu": -3.7, "Pd": -5.2, "O": -4.9, "H": -3.4}
    (tmp_path / "oxides").mkdir()
    for place, formula in enumerate(formulas):
        atoms = Atoms(formula, cell=[6, 6, 6], pbc=True)
        atoms.positions = rng.uniform(0, 6, (len(atoms), 3))
        energy = sum(atomic[symbol] for symbol in atoms.symbols) + rng.normal(scale=0.01)
        atoms = labelled(atoms, energy, rng.normal(size=(len(atoms), 3)))
        ase.io.write(tmp_path / "oxides" / f"{place}.extxyz", atoms)
    return tmp_path / "oxides"


def test_referenced_energies_come_back_as_totals(tmp_path, capsys):
    formulas = ["Cu2O", "CuO", "PdO", "PdO2", "Cu4O3", "CuPdO2", "H2O", "CuOH", "Cu3", "PdH"]
    folder = oxides(tmp_path, formulas)
    assert convert(tmp_path / "d", folder, "--val", 2, "--energy", "referenced") == 0
    references = create_element_references(file=tmp_path / "d/energy_references.npz")
    coefficients = references.element_references
    assert coefficients[[29, 46, 8, 1]].tolist() == pytest.approx([-3.7, -5.2, -4.9, -3.4], abs=0.05)
    settings = yaml.safe_load((tmp_path / "d/data.yml").read_text())
    transforms = settings["dataset"]["train"]["transforms"]
    assert transforms["element_references"]["energy"]["file"] == str(tmp_path / "d/energy_references.npz")
    seen = []
    for structure in read_lmdb(tmp_path / "d/train"):
        formula = Atoms(structure.atomic_numbers.numpy()).get_chemical_formula()
        assert structure.energy == pytest.approx(-4.5 * structure.natoms, abs=8), formula  # a total
        seen.append(structure.energy - coefficients[structure.atomic_numbers].sum().item())
    assert transforms["normalizer"]["energy"]["mean"] == pytest.approx(np.mean(seen), abs=1e-9)
    assert transforms["normalizer"]["energy"]["rmsd"] == pytest.approx(np.std(seen), abs=1e-9)
    assert transforms["normalizer"]["energy"]["rmsd"] < 0.02
    assert "fit to train of 4 elements (rank 4)" in capsys.readouterr().out
    assert summary_of(tmp_path / "d")["energy"]["residual_rmse"] == pytest.approx(
        np.sqrt(np.mean(np.square(seen)))
    )


def test_element_that_only_val_has_is_refused(tmp_path, capsys):
    folder = oxides(tmp_path, ["Cu2O", "CuO", "Cu4O3", "PdO"])
    said = []
    for seed in range(8):
        options = ("--val", 1, "--energy", "referenced", "--seed", seed)
        if convert(tmp_path / f"d{seed}", folder, *options) == 2:
            said.append(capsys.readouterr().err)
    # Where PdO is in val, and only there.
    assert 0 < len(said) < 8 and all("OPd (Pd occurs in no formula of train)" in line for line in said)


def test_formulas_that_a_fit_does_not_determine():
    assert undetermined(["CuO", "Cu2O2"], ["Cu3O3"]) == {}
    assert undetermined(["CuO", "Cu2O2"], ["Cu2O"]) == {"Cu2O": "the formulas of train do not determine it"}
    assert undetermined(["CuO", "Cu2O"], ["Cu7O9", "CuPd"]) == {"CuPd": "Pd occurs in no formula of train"}


def test_fit_is_that_of_all_rows_in_double_precision():
    rng = np.random.default_rng(1)
    formulas = ["CuO", "Cu2O", "PdO", "Cu3PdO4", "Pd2O3"]
    compositions = rng.integers(0, 5, 500)
    counts = np.array(
        [[Atoms(f).symbols.formula.count().get(e, 0) for e in ("O", "Cu", "Pd")] for f in formulas]
    )
    energies = counts[compositions] @ [-1000.1, -2000.2, -3000.3] + rng.normal(size=500)
    fit = fit_references(formulas, energies, compositions)
    expected = np.linalg.lstsq(counts[compositions].astype(float), energies, rcond=None)[0]
    assert np.allclose(fit.coefficients[[8, 29, 46]], expected, atol=1e-9, rtol=0)
    assert (
        fit.elements == [8, 29, 46] and fit.rank == 3 and fit.coefficients[[0, 1, 118]].tolist() == [0, 0, 0]
    )


def test_deficient_fit_is_said(tmp_path, capsys):
    folder = oxides(tmp_path, ["CuO", "Cu2O2", "Cu3O3"])
    assert convert(tmp_path / "d", folder, "--val", 1, "--energy", "referenced") == 0
    assert "determine 1 combinations of 2 references" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- filters


def test_filters_count_each_frame_once_under_its_first_reason(tmp_path, capsys):
    frames = steps(0, 30, energy=-30.0)  # 29 eV above the last, and so on down to 0
    frames[3].calc.results["forces"][6] = [60, 0, 0]
    frames[4].calc.results["forces"][0] = [0, 60, 0]  # a fixed atom's counts, too
    frames[25].calc.results["forces"][2] = [0, 0, 60]
    frames[26].calc.results["energy"] = np.nan
    frames[27].positions[6] = frames[27].positions[5] + [0, 0, 0.3]
    frames[27].calc = SinglePointCalculator(
        frames[27], **frames[25].calc.results | {"forces": np.zeros((7, 3))}
    )
    frames[28].calc.results["forces"][6, 2] = np.inf
    big = frames[28].repeat((2, 1, 1))
    frames.insert(28, labelled(big, -28.0, np.zeros((14, 3))))
    ase.io.write(tmp_path / "a.traj", frames)
    options = ("--max-force", 50, "--max-energy-above", 20, "--max-atoms", 10, "--min-distance", 0.5)
    positions = ("--skip-first", 12, "--every", 2, "--max-frames", 3)
    assert convert(tmp_path / "d", tmp_path / "a.traj", "--val", 0, *options, *positions) == 0
    summary = summary_of(tmp_path / "d")
    assert summary["frames"]["dropped"] == {
        "positions, cell, energy or forces not finite": 2,
        "more than 10 atoms": 1,
        "a force above 50.0 eV/Å": 3,
        "atoms closer than 0.5 Å": 1,
        "energy more than 20.0 eV above the last frame": 7,
        "among the first 12 of the system": 3,
        "not one in 2": 6,
        "more than 3 of a system": 5,
    }
    # Left for the last filter: 12, 14, ..., 24 and 30.
    assert [structure.fid for structure in read_lmdb(tmp_path / "d/train")] == [12, 20, 30]
    assert summary["frames"] | {"dropped": 0, "tags_by_rule": 0} == {
        "read": 31, "written": 3, "dropped": 0, "tags_by_rule": 0
    }  # fmt: skip
    said = capsys.readouterr().out
    assert "left out: 28 frames of 31" in said and "      3 a force above 50.0 eV/Å" in said


def test_large_forces_are_named_where_they_are_kept(runs, tmp_path, capsys):
    frames = steps(20)
    frames[0].calc.results["forces"][0] = [80, 0, 0]
    ase.io.write(runs / "large.traj", frames)
    assert convert(tmp_path / "d", runs) == 0
    assert "1 frames have a force above 50 eV/Å (1)" in capsys.readouterr().out


def test_system_without_a_frame_left_is_in_no_split(runs, tmp_path):
    frames = steps(30)
    for atoms in frames:
        atoms.calc.results["forces"] += 90
    ase.io.write(runs / "random5.traj", frames)
    assert convert(tmp_path / "d", runs, "--max-force", 50) == 0
    named = json.loads((tmp_path / "d/systems.json").read_text())
    assert named["random5"]["split"] is None and named["random5"]["frames"] == 0


def test_nothing_left_says_why(runs, tmp_path, capsys):
    said = error_of(capsys, tmp_path / "d", runs, "--max-force", 0.001)
    assert "None of the 40 frames is left (a force above 0.001 eV/Å: 40)." in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--val", "1.0"), "'--val' must be a share"),
        (("--test", "-1"), "'--test' must be a share"),
        (("--max-force", "0"), "'--max-force' must be above 0"),
        (("--every", "0"), "'--every' must be at least 1"),
        (("--skip-first", "-1"), "'--skip-first' must be at least 0"),
        (("--workers", "0"), "'--workers' must be at least 1"),
        (("--frames-per-file", "0"), "'--frames-per-file' must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, capsys, arguments, message):
    ase.io.write(tmp_path / "a.traj", steps(0))
    assert main(["data", "from-ase", str(tmp_path), "--out", str(tmp_path / "d"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_out_is_needed_and_must_be_new(runs, tmp_path, capsys):
    assert main(["data", "from-ase", str(runs)]) == 2
    assert "'--out DIR' is missing" in capsys.readouterr().err
    assert convert(tmp_path / "d", runs) == 0
    before = contents(tmp_path / "d")
    assert convert(tmp_path / "d", runs, "--seed", 4) == 2
    assert "exists already" in capsys.readouterr().err and contents(tmp_path / "d") == before
    assert convert(tmp_path / "d", runs, "--seed", 4, "--overwrite") == 0
    assert contents(tmp_path / "d") != before and sorted(p.name for p in tmp_path.iterdir()) == ["d", "runs"]


# ---------------------------------------------------------------------------------------------- going on


def test_all_atoms_fixed_is_refused(tmp_path, capsys):
    frames = steps(0)
    for atoms in frames:
        atoms.set_constraint(FixAtoms(indices=range(7)))
    ase.io.write(tmp_path / "a.traj", frames)
    assert "All atoms of train are fixed" in error_of(capsys, tmp_path / "d", tmp_path / "a.traj", "--val", 0)


def test_interrupted_run_goes_on_and_reads_anew_what_changed(runs, tmp_path, capsys, monkeypatch):
    assert convert(tmp_path / "whole", runs) == 0
    made, make = [], parts.make

    def interrupted(task):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(task.path)
        return make(task)

    monkeypatch.setattr(parts, "make", interrupted)
    assert convert(tmp_path / "data", runs) == 130
    assert "The same command goes on from here." in capsys.readouterr().err
    assert not (tmp_path / "data").exists()

    # The first file changes, and becomes what it was only in its content; a second one disappears.
    ase.io.write(made[0], ase.io.read(made[0], index=":"))
    again = []
    monkeypatch.setattr(parts, "make", lambda task: again.append(task.path) or make(task))
    capsys.readouterr()
    assert convert(tmp_path / "data", runs) == 0
    assert "3 of 10 files were read before." in capsys.readouterr().err
    assert len(again) == 7 and made[0] in again and not set(made[1:]) & set(again)
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "runs", "whole"]


def test_other_settings_are_not_mixed_up_with_what_is_there(runs, tmp_path, monkeypatch):
    def fails(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fairchem_dens.data.from_ase.convert.make_plan", fails)
        assert convert(tmp_path / "data", runs, "--tags", "none") == 130
    assert convert(tmp_path / "data", runs, "--tags", "rule") == 0
    assert next(read_lmdb(tmp_path / "data/train")).tags.tolist() == [0, 0, 1, 1, 1, 1, 2]


def test_failure_while_writing_leaves_nothing_that_looks_complete(runs, tmp_path, monkeypatch, capsys):
    written = []

    def full(*arguments, **_):
        written.append(arguments)
        if len(written) == 20:
            raise ValueError("made up: the disk is full")
        return real(*arguments, **_)

    from fairchem_dens.data.from_ase import convert as module

    real = module.data_from_atoms
    with monkeypatch.context() as patch:
        patch.setattr(module, "data_from_atoms", full)
        assert "the disk is full" in error_of(capsys, tmp_path / "data", runs, "--val", 0.3)
    assert convert(tmp_path / "data", runs, "--val", 0) == 0
    assert not (tmp_path / "data" / "val").exists() and len(list(read_lmdb(tmp_path / "data/train"))) == 40


@pytest.mark.slow
def test_killed_command_goes_on_to_the_same_data_with_any_number_of_workers(tmp_path):
    runs = tmp_path / "runs"
    runs.mkdir()
    for seed in range(40):
        ase.io.write(runs / f"random{seed}.traj", steps(seed, 60))
    program = [sys.executable, "-m", "fairchem_dens.cli.main", "data", "from-ase", str(runs / "*.traj")]
    options = ["--val", "0.2", "--energy", "relative", "--min-distance", "0.1"]

    def command(out: str, workers: int) -> list[str]:
        return [*program, *options, "--out", str(tmp_path / out), "--workers", str(workers)]

    subprocess.run(command("whole", 1), check=True, capture_output=True)
    process = subprocess.Popen(command("data", 2), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    found = tmp_path / ".data.partial" / "parts"
    while len(list(found.glob("*.npz"))) < 5:
        assert process.poll() is None, "it was over too soon"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "data").exists()
    done = subprocess.run(command("data", 3), check=True, capture_output=True, text=True)
    number = int(done.stderr.split(" of 40 files were read before.")[0].split()[-1])
    assert 5 <= number < 40
    assert contents(tmp_path / "data") == contents(tmp_path / "whole")
    for name in ("summary.json", "systems.json", "energy_normalizer.npz", "forces_normalizer.npz"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---------------------------------------------------------------------------------------------- real data


@pytest.mark.slow
def test_real_trajectories(real_data, tmp_path, capsys):
    filters = ("--max-force", 50, "--max-energy-above", 10)
    folder = real_data("oc20_trajectories")
    assert convert(tmp_path / "d", folder / "*.traj", "--energy", "relative", *filters, "--test", 2) == 0
    summary = summary_of(tmp_path / "d")
    assert summary["frames"]["read"] - summary["frames"]["written"] == 14
    assert summary["after_filters"]["free_force_rms"] == pytest.approx(0.257, abs=0.001)
    assert [found["systems"] for found in summary["splits"].values()] == [17, 2, 2]
    sids = [{structure.sid for structure in read_lmdb(tmp_path / "d" / split)} for split in systems.SPLITS]
    assert len(set.union(*sids)) == 21 and 1000100 in set.union(*sids)
    capsys.readouterr()
    assert main(["data", "from-ase", str(folder), "--dry-run"]) == 0
    assert "14 frames have a force above 50 eV/Å" in capsys.readouterr().out


def test_real_oxides(real_data, tmp_path):
    assert convert(tmp_path / "d", real_data("oc22/oxides.db"), "--energy", "referenced", "--val", 0.2) == 0
    summary = summary_of(tmp_path / "d")
    assert summary["frames"]["written"] == 295 and summary["systems"]["written"] == 20
    assert summary["normalizers"]["energy"]["rmsd"] < 0.1 * summary["splits"]["train"]["energy_std"]
