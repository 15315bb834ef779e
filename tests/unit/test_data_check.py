"""`fairchem-dens data check` and `fit-stats`: what is reported, what is found, what is written."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from torch_geometric.data import Data

from fairchem_dens.cli.main import main
from fairchem_dens.data.examine import TOO_CLOSE, close_pairs, examine
from fairchem_dens.data.inspect import inspect
from fairchem_dens.data.inspection import Inspection
from fairchem_dens.data.label_kinds import guess_energies
from fairchem_dens.data.report import describe
from fairchem_dens.data.source import find_source
from fairchem_dens.data.statistics import CompositionFit

Write = Callable[..., Path]
Make = Callable[..., Data]


def raw(folder: Path, records: Iterable[Any], name: str = "data.0000.lmdb") -> Path:
    """Writes records without any check; bytes as they are, other things pickled."""
    folder.mkdir(exist_ok=True)
    env = lmdb.open(str(folder / name), subdir=False, map_size=2**26, lock=False)
    with env.begin(write=True) as transaction:
        for index, record in enumerate(records):
            stored = record if isinstance(record, bytes) else pickle.dumps(record, protocol=-1)
            transaction.put(str(index).encode(), stored)
    env.close()
    return folder


def look(src: str | Path, split: str = "train", **options: Any) -> Inspection:
    return inspect(find_source(src, split), progress=False, **options)


def problems(inspection: Inspection) -> list[str]:
    return [finding.text for finding in inspection.findings if finding.problem]


def notes(inspection: Inspection) -> list[str]:
    return [finding.text for finding in inspection.findings if not finding.problem]


@pytest.fixture
def structures(structure: Make) -> list[Data]:
    return [structure(seed, natoms=10 + seed % 3) for seed in range(12)]


# ------------------------------------------------------------------ what is reported


def test_numbers(lmdb_folders: dict[str, Path], structure: Make) -> None:
    made = [structure(seed, natoms=10 + seed % 5) for seed in range(24)]
    inspection = look(lmdb_folders["train"])
    statistics = inspection.statistics
    assert inspection.healthy and inspection.complete and inspection.total == 24 and inspection.files == 1
    assert list(statistics.natoms) == [len(data.pos) for data in made]
    energies = np.array([data.energy for data in made])
    assert statistics.energy_scale().mean == pytest.approx(energies.mean())
    assert statistics.energy_scale().rmsd == pytest.approx(energies.std())
    free = np.concatenate([data.forces[data.fixed == 0].double().numpy() for data in made])
    assert statistics.forces_scale().mean == 0
    assert statistics.forces_scale().rmsd == pytest.approx(np.sqrt((free**2).mean()))
    norms = np.linalg.norm(free, axis=1)
    assert statistics.force_norm_sum / statistics.force_atoms == pytest.approx(norms.mean())
    assert statistics.force_max == pytest.approx(norms.max())
    assert statistics.force_histogram.sum() == len(norms)
    numbers = torch.cat([data.atomic_numbers for data in made])
    assert {n: int(statistics.element_atoms[n]) for n in statistics.elements} == {
        n: int((numbers == n).sum()) for n in (1, 8, 29, 46)
    }
    assert statistics.fixed_atoms / statistics.fixed_of == pytest.approx(4 * 24 / len(numbers))
    assert statistics.pbc == {(True, True, True): 24} and statistics.cells == {"skewed": 24}
    shapes = {
        (name, kind): form.shape(rank is not None)
        for name, forms in statistics.forms.items()
        for (kind, rank), form in forms.items()
    }
    assert shapes["pos", "float32"] == "(N, 3)" and shapes["tags", "int64"] == "(N,)"
    assert shapes["cell", "float32"] == "(1, 3, 3)" and shapes["energy", "float"] == ""


def test_report_fits_a_terminal(lmdb_folders: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "check", str(lmdb_folders["train"]), str(lmdb_folders["val"])]) == 0
    said = capsys.readouterr().out
    assert "nothing is wrong" in said and "structures          24, all read" in said
    paths = {str(folder) for folder in lmdb_folders.values()}
    assert not [line for line in said.splitlines() if len(line) > 80 and not any(p in line for p in paths)]


def test_values_to_paste(lmdb_folders: dict[str, Path]) -> None:
    inspection = look(lmdb_folders["train"])
    said = describe(inspection)
    pasted = yaml.safe_load(said[said.index("dataset:") :])
    normalizer = pasted["dataset"]["train"]["transforms"]["normalizer"]
    assert normalizer["energy"]["mean"] == pytest.approx(inspection.statistics.energy_scale().mean)
    assert normalizer["energy"]["rmsd"] == pytest.approx(inspection.statistics.energy_scale().rmsd)
    assert normalizer["forces"] == {"mean": 0, "rmsd": pytest.approx(inspection.statistics.forces_rms)}


def test_picture_and_json(lmdb_folders: dict[str, Path], tmp_path: Path) -> None:
    picture, report = tmp_path / "h.png", tmp_path / "r.json"
    folders = [str(lmdb_folders["train"]), str(lmdb_folders["val"])]
    assert main(["data", "check", *folders, "--histograms", str(picture), "--json", str(report)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    first, second = json.loads(report.read_text())["sources"]
    assert (first["structures"], second["structures"]) == (24, 6)
    assert set(first["normalizer"]) == {"energy", "forces"}
    assert first["healthy"] and first["atoms"] == {"min": 10, "median": 12, "max": 14}
    assert first["energy"]["kind"] == "referenced" and set(first["elements"]) == {"H", "O", "Cu", "Pd"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["h.png", "r.json"]


def test_outputs_are_checked_before_reading(
    lmdb_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = str(lmdb_folders["train"])
    assert main(["data", "check", data, "--json", str(tmp_path / "no" / "r.json")]) == 2
    assert "there is no folder" in (said := capsys.readouterr().err) and "reading" not in said
    assert main(["data", "check", data, "--histograms", str(tmp_path / "h.pdf")]) == 2
    assert "must end in .png" in capsys.readouterr().err


def test_sample_is_spread_and_the_same(write_lmdb: Write, structure: Make, tmp_path: Path) -> None:
    made = [structure(seed, natoms=5, num_fixed=2) for seed in range(40)]
    raw(tmp_path / "set", made[:25], "data.0000.lmdb")
    raw(tmp_path / "set", made[25:], "data.0001.lmdb")
    one, other = (look(tmp_path / "set", sample=9) for _ in range(2))
    assert one.statistics.places == other.statistics.places
    assert list(one.statistics.places) == [0, 5, 10, 15, 20, 24, 29, 34, 39]
    assert list(one.statistics.energies) == [made[place].energy for place in one.statistics.places]
    assert one.total == 40 and not one.complete
    assert "9 read, evenly spread" in describe(one)
    assert look(tmp_path / "set", sample=None).complete


def test_workers_see_the_same(lmdb_folders: dict[str, Path]) -> None:
    alone, together = look(lmdb_folders["train"]), look(lmdb_folders["train"], workers=1)
    assert describe(alone) == describe(together)


@pytest.mark.parametrize("value", ["0", "-3", "some"])
def test_bad_sample(value: str, lmdb_folders: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["data", "check", str(lmdb_folders["train"]), "--sample", value])
    assert "must be a whole number from 1, or 'all'" in capsys.readouterr().err


# ------------------------------------------------------------------ what is opened


def test_yaml_of_a_run(tmp_path: Path, structures: list[Data], monkeypatch: pytest.MonkeyPatch) -> None:
    for data in structures:
        data.y, data.force = data.energy, data.forces
        del data.energy, data.forces
    raw(tmp_path / "train", structures)
    raw(tmp_path / "val", structures[:4])
    settings = {
        "dataset": {
            "train": {
                "format": "lmdb",
                "src": "$DATA_OF_TEST/train",
                "key_mapping": {"y": "energy", "force": "forces"},
                "transforms": {"dens": {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5}},
            },
            "val": {"src": "$DATA_OF_TEST/val"},
        },
    }
    file = tmp_path / "run.yml"
    file.write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("DATA_OF_TEST", str(tmp_path))
    inspection = look(file)
    assert inspection.healthy and inspection.total == 12
    assert set(inspection.statistics.label_names) == {("energy", "forces")}
    assert "noise_vec" not in inspection.statistics.forms, "only a trainer corrupts"
    assert look(file, "val").total == 4
    with pytest.raises(ValueError, match=r"no 'dataset\.test\.src' \(it has one for: train, val\)"):
        find_source(file, "test")
    # By the folder alone, without the mapping.
    alone = look(tmp_path / "train")
    assert any("key_mapping: {y: energy, force: forces}" in note for note in notes(alone))
    assert alone.statistics.energies == inspection.statistics.energies


def test_what_cannot_be_opened(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["data", "check", str(tmp_path / "absent")]) == 2
    assert "which does not exist" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["data", "check", str(tmp_path / "empty")]) == 2
    assert "no *.lmdb file" in capsys.readouterr().err
    (tmp_path / "run.yml").write_text("dataset: {train: {src: x, format: lmbd}}")
    assert main(["data", "check", str(tmp_path / "run.yml")]) == 2
    assert "'lmbd', which does not exist (did you mean 'lmdb'?)" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path / "no.yml")]) == 2
    assert "There is no file" in capsys.readouterr().err
    (tmp_path / "list.yml").write_text("- a\n- b\n")
    assert main(["data", "check", str(tmp_path / "list.yml")]) == 2
    assert "is not the YAML of a run" in capsys.readouterr().err


def test_ase_database(tmp_path: Path) -> None:
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.db import connect

    rng = np.random.default_rng(0)
    with connect(tmp_path / "set.db") as database:
        for _ in range(5):
            atoms = Atoms("CuO", positions=[(0, 0, 0), (0, 0, 2)], cell=[6, 6, 6], pbc=True)
            atoms.calc = SinglePointCalculator(atoms, energy=rng.normal(), forces=rng.normal(size=(2, 3)))
            database.write(atoms)
    arguments = {"r_energy": True, "r_forces": True}
    settings = {"train": {"format": "ase_db", "src": str(tmp_path / "set.db"), "a2g_args": arguments}}
    (tmp_path / "run.yml").write_text(yaml.safe_dump({"dataset": settings}))
    inspection = look(tmp_path / "run.yml")
    assert inspection.total == 5 and inspection.files == 0 and inspection.source.format == "ase_db"
    assert inspection.statistics.elements == [8, 29] and len(inspection.statistics.energies) == 5
    assert inspection.statistics.force_atoms == 10


# ------------------------------------------------------------------ records that are wrong


def set_energy(value: Any) -> Callable[[Data], None]:
    return lambda data: data.update({"energy": value})


def spoil_forces_shape(data: Data) -> None:
    data.forces = data.forces[:-1]


def spoil_forces(data: Data) -> None:
    data.forces[2, 1] = torch.inf


def spoil_positions(data: Data) -> None:
    data.pos[3, 0] = torch.nan


def spoil_element(data: Data) -> None:
    data.atomic_numbers[4] = 130


def spoil_zero(data: Data) -> None:
    data.atomic_numbers[0] = 0


def put_on_top(data: Data) -> None:
    data.pos[5] = data.pos[2] + 0.05


def put_on_top_across_the_border(data: Data) -> None:
    data.pos[5] = data.pos[2] + data.cell[0, 0] - 2 * data.cell[0, 1] + 0.1


def make_cell_thin(data: Data) -> None:
    data.cell[0, 1] = data.cell[0, 0] + torch.tensor([0.0, 0.3, 0.0])


def spoil_cell(data: Data) -> None:
    data.cell[0, 1] = data.cell[0, 0]


def spoil_natoms(data: Data) -> None:
    data.natoms = 3


def spoil_fixed(data: Data) -> None:
    data.fixed = data.fixed[:2]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (set_energy(float("nan")), "energy' .*nan"),
        (set_energy(torch.tensor([1.0, 2.0])), "energy' of shape"),
        (spoil_forces_shape, r"forces' of shape \(9, 3\)"),
        (spoil_forces, "forces that are not finite"),
        (spoil_positions, "pos that are not finite"),
        (spoil_element, "from 1 to 118, found 130 of atom 4"),
        (spoil_zero, "from 1 to 118, found 0 of atom 0"),
        (put_on_top, r"atoms 2 and 5 are 0\.087 Å apart"),
        (put_on_top_across_the_border, r"atoms 2 and 5 are 0\.173 Å apart"),
        (spoil_cell, "'cell' has the volume"),
        (make_cell_thin, r"'cell' is 0\.\d+ Å thin"),
        (spoil_natoms, "natoms' that is 3 where 'pos' has 10 rows"),
        (spoil_fixed, r"fixed' of shape \(2,\)"),
    ],
)
def test_wrong_structure(
    spoil: Callable[[Data], None],
    words: str,
    structures: list[Data],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    spoil(structures[6])
    folder = raw(tmp_path / "set", structures[:5])
    raw(folder, structures[5:], "data.0001.lmdb")
    (record,) = look(folder).records
    assert record.file == str(folder / "data.0001.lmdb") and record.index == 1
    assert re_found(words, record.text), record.text
    assert main(["data", "check", str(folder)]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"{folder}/data.0001.lmdb record 1: " in said and "something is wrong" in said


def re_found(words: str, text: str) -> bool:
    import re

    return re.search(words, text) is not None


def test_examined_without_the_reader(structure: Make) -> None:
    """Other formats than LMDB come with no checks of their own."""
    for spoil, words in (
        (set_energy(float("nan")), "'energy' is nan"),
        (set_energy("many"), "'energy' must be one number, found 'many'"),
        (spoil_forces_shape, r"'forces' must be \(10, 3\), found the shape \(9, 3\)"),
        (spoil_forces, "'forces' is not finite for 1 atoms"),
        (spoil_positions, "'pos' is not finite for 1 atoms"),
        (spoil_natoms, r"'natoms' is 3, 'pos' has 10 rows"),
        (spoil_fixed, r"'fixed' must be \(10,\), found the shape \(2,\)"),
        (lambda data: data.update({"pos": torch.zeros(4)}), r"'pos' must be \(N, 3\)"),
        (lambda data: data.update({"cell": torch.zeros(2)}), r"'cell' must be \(1, 3, 3\)"),
        (lambda data: data.update({"cell": torch.zeros(1, 3, 3)}), "'pbc' says periodic, but 'cell' is zero"),
        (lambda data: data.update({"pbc": torch.ones(2)}), r"'pbc' must be \(1, 3\)"),
        (lambda data: data.update({"tags": torch.zeros(3)}), r"'tags' must be \(10,\)"),
    ):
        data = structure(0, natoms=10)
        spoil(data)
        (said,) = examine(data).problems
        assert re_found(words, said), said
    assert examine(structure(0, natoms=10)).problems == []


def test_records_that_do_not_unpickle(
    structures: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole = pickle.dumps(structures[3], protocol=-1)
    records = [*structures[:3], whole[: len(whole) // 2], b"", {"no": "structure"}, structures[4]]
    folder = raw(tmp_path / "set", records)
    inspection = look(folder)
    assert [record.index for record in inspection.records] == [3, 4, 5]
    assert all("cannot be unpickled" in record.text for record in inspection.records)
    assert len(inspection.statistics.energies) == 4 and inspection.statistics.read == 7
    assert problems(inspection) == []
    assert main(["data", "check", str(folder)]) == 1
    assert "WRONG RECORDS (3)" in capsys.readouterr().out


def test_record_that_is_missing(structures: list[Data], tmp_path: Path) -> None:
    folder = raw(tmp_path / "set", structures)
    env = lmdb.open(str(folder / "data.0000.lmdb"), subdir=False, lock=False)
    with env.begin(write=True) as transaction:
        transaction.delete(b"7")
        transaction.put(b"99", pickle.dumps(structures[7]))
    env.close()
    (record,) = look(folder).records
    assert record.index == 7 and "is missing" in record.text


def test_first_twenty_and_all(structure: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = raw(tmp_path / "set", [structure(0, natoms=5, num_fixed=1), *[b"nothing"] * 30])
    assert main(["data", "check", str(folder)]) == 1
    said = capsys.readouterr().out
    assert said.count("    record ") == 20 and "and 10 more (--all lists them)" in said
    assert main(["data", "check", str(folder), "--all"]) == 1
    assert capsys.readouterr().out.count("    record ") == 30


def test_file_cut_off_in_the_middle(
    structures: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = raw(tmp_path / "set", structures[:6])
    raw(folder, structures[6:], "data.0001.lmdb")
    cut = folder / "data.0000.lmdb"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    inspection = look(folder)
    (record,) = inspection.records
    assert record.file == str(cut) and record.index is None and "cut off" in record.text
    assert inspection.total == 6 and len(inspection.statistics.energies) == 6, "the other file is read"
    assert main(["data", "check", str(folder)]) == 1
    assert "cut off" in capsys.readouterr().out
    # Alone, there is nothing else to report on.
    assert main(["data", "check", str(cut)]) == 1


def test_file_that_is_no_lmdb(structures: list[Data], tmp_path: Path) -> None:
    folder = raw(tmp_path / "set", structures)
    (folder / "data.0001.lmdb").write_bytes(b"<html>404</html>" * 1000)
    (folder / "data.0002.lmdb").touch()
    inspection = look(folder)
    assert [Path(record.file).name for record in inspection.records] == ["data.0001.lmdb", "data.0002.lmdb"]
    assert inspection.total == 12


# ------------------------------------------------------------------ sets that are wrong


def test_fields_that_differ(structures: list[Data], tmp_path: Path) -> None:
    """Structures of other formats come as they are; the readers of LMDBs refuse a structure that differs."""
    del structures[4].tags
    (record,) = look(raw(tmp_path / "set", structures)).records
    assert record.index == 4 and "has no field 'tags'" in record.text


def test_fields_that_differ_in_other_formats(structures: list[Data]) -> None:
    from fairchem_dens.data.findings import _fields
    from fairchem_dens.data.statistics import Statistics

    del structures[4].tags
    structures[5].energy = torch.tensor(1.0)
    statistics = Statistics()
    for place, data in enumerate(structures):
        statistics.add(place, examine(data))
    said = [finding.text for finding in _fields(statistics)]
    assert said == [
        "'energy' differs in type: float (11), float32 of 0 dimensions (1); a batch of both cannot be made",
        "'tags' is in 11 of 12 structures: a batch of both cannot be made",
    ]


def test_files_that_do_not_go_together(structures: list[Data], tmp_path: Path) -> None:
    folder = raw(tmp_path / "set", structures[:6])
    for data in structures[6:]:
        del data.forces
    raw(folder, structures[6:], "data.0001.lmdb")
    inspection = look(folder)
    assert any(
        "cannot be opened as one data set" in text and "'forces'" in text for text in problems(inspection)
    )
    assert inspection.total == 12 and inspection.records == []


def test_missing_fields(structures: list[Data], tmp_path: Path) -> None:
    for data in structures:
        del data.tags, data.fixed, data.sid, data.forces
    inspection = look(raw(tmp_path / "set", structures))
    assert any("no structure has 'fixed'" in text for text in problems(inspection))
    said = " ".join(notes(inspection))
    assert "no structure has 'tags'" in said and "there are no forces" in said
    assert "12 structures have no 'sid'" in said
    assert "no normalisers: there are no forces" in describe(inspection)


def test_duplicates(structures: list[Data], tmp_path: Path) -> None:
    structures[9].sid, structures[9].fid = structures[2].sid, structures[2].fid
    structures[3].sid = structures[4].sid
    structures[3].fid = 5  # another frame of the same system
    folder = raw(tmp_path / "set", structures)
    (text,) = problems(look(folder))
    assert text.startswith(
        f"1 structures repeat the (sid, fid) of another, first: 2 of '{folder}/data.0000.lmdb' "
    )
    assert f"and 9 of '{folder}/data.0000.lmdb'" in text


def test_duplicates_of_one_kind_and_several(structures: list[Data], tmp_path: Path) -> None:
    for place, kind in ((1, 7), (4, 7), (11, 7), (0, 5), (8, 5)):
        structures[place].sid, structures[place].fid = f"system {kind}", 3
    for data in structures:
        data.sid = str(data.sid)
    found = look(raw(tmp_path / "set", structures)).statistics.duplicates()
    assert list(found) == [(1, 4), (0, 8), (1, 11)]


def test_large_forces_and_heavy_elements(structures: list[Data], tmp_path: Path) -> None:
    structures[3].forces[8, 0] = 80.0
    structures[3].forces[0, 0] = 500.0  # on a fixed atom, which nobody learns from
    structures[5].atomic_numbers[2] = 92
    structures[7].fixed[:] = 1
    inspection = look(raw(tmp_path / "set", structures))
    said = " ".join(notes(inspection))
    assert inspection.healthy
    assert "1 structures have a force above 50 eV/Å" in said and "in 3 of" in said
    assert 80 <= inspection.statistics.force_max < 81
    assert "U is among the elements: set model.max_num_elements to at least 93" in said
    assert "1 structures have no free atom" in said


@pytest.mark.parametrize("armed", [True, False])
def test_logs_of_md(armed: bool, structures: list[Data], tmp_path: Path) -> None:
    folder = raw(tmp_path / "set", structures)
    lines = [f"/x/{'md' if n % 3 == 0 else 'relaxations'}/{n}.traj,0,0" for n in range(12)]
    (folder / "data_log.0000.txt").write_text("\n".join(lines))
    inspection = look(folder)
    assert inspection.source.format == "dens_lmdb" and inspection.healthy
    assert inspection.statistics.md == {True: 4, False: 8}
    assert "from relaxations (8), from MD (4)" in describe(inspection)

    (folder / "data_log.0000.txt").write_text("\n".join(lines[:-1]))
    train: dict[str, Any] = {"format": "dens_lmdb", "src": str(folder)}
    if armed:
        train["transforms"] = {"dens": {"prob": 0.5, "std": 0.1}}
    (tmp_path / "run.yml").write_text(yaml.safe_dump({"dataset": {"train": train}}))
    inspection = look(tmp_path / "run.yml")
    (text,) = [text for text in (problems if armed else notes)(inspection) if "from MD" in text]
    assert "has 11 lines for 12 frames" in text
    assert inspection.healthy is not armed


# ------------------------------------------------------------------ metadata


def test_missing_metadata(structures: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = raw(tmp_path / "set", structures[:5])
    raw(folder, structures[5:], "data.0001.lmdb")
    assert main(["data", "check", str(folder), "--sample", "3"]) == 0
    assert "metadata.npz' is missing" in " ".join(capsys.readouterr().out.split())
    assert not (folder / "metadata.npz").exists()
    assert main(["data", "check", str(folder), "--sample", "3", "--write-metadata"]) == 0
    said = capsys.readouterr().out
    assert f"wrote {folder}/metadata.npz" in said and "is missing" not in said
    with np.load(folder / "metadata.npz") as arrays:
        assert arrays["natoms"].tolist() == [len(data.pos) for data in structures]
        assert np.issubdtype(arrays["natoms"].dtype, np.integer)
    assert sorted(path.name for path in folder.iterdir()) == [
        "data.0000.lmdb",
        "data.0001.lmdb",
        "metadata.npz",
    ]
    before = (folder / "metadata.npz").stat().st_mtime_ns
    assert main(["data", "check", str(folder), "--write-metadata"]) == 0
    assert (folder / "metadata.npz").stat().st_mtime_ns == before, "what is right stays"


@pytest.mark.parametrize(
    ("natoms", "words"),
    [
        (np.full(12, 10), "is wrong for 8 structures, first for 1: 10 instead of 11 atoms"),
        (np.full(7, 10), "tells the sizes of 7 structures, there are 12"),
        (np.full(12, 10.0), "'natoms' of type float64"),
        (None, "cannot be read"),
    ],
)
def test_wrong_metadata(natoms: Any, words: str, structures: list[Data], tmp_path: Path) -> None:
    folder = raw(tmp_path / "set", structures)
    np.savez(folder / "metadata.npz", **({"other": np.zeros(3)} if natoms is None else {"natoms": natoms}))
    (text,) = problems(look(folder))
    assert words in text
    assert main(["data", "check", str(folder)]) == 1
    assert main(["data", "check", str(folder), "--write-metadata"]) == 0
    assert look(folder).healthy


def test_metadata_is_not_written_with_gaps(
    structures: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = raw(tmp_path / "set", [*structures, b"nothing"])
    assert main(["data", "check", str(folder), "--write-metadata"]) == 2
    assert "was not written: its entries belong to the structures by their order" in capsys.readouterr().err
    raw(tmp_path / "two", structures[:5])
    raw(tmp_path / "two", structures[5:], "data.0001.lmdb")
    assert main(["data", "check", str(tmp_path / "two" / "data.0000.lmdb"), "--write-metadata"]) == 2
    assert "Give the folder itself" in capsys.readouterr().err
    assert not list(tmp_path.rglob("metadata.npz"))


# ------------------------------------------------------------------ kinds of labels

REFERENCES = {1: -3.4, 8: -6.7, 29: -2.7, 46: -3.4}


def with_totals(structures: Iterable[Data], offset: float = 0.0) -> list[Data]:
    """Total energies: references of the elements, a little more, and an offset."""
    made = []
    for data in structures:
        total = sum(REFERENCES[int(number)] for number in data.atomic_numbers)
        made.append(data.clone().update({"energy": total + 0.1 * data.energy + offset}))
    return made


def test_guess(structure: Make, tmp_path: Path) -> None:
    made = [structure(seed, natoms=6 + seed % 6, num_fixed=2) for seed in range(60)]
    kind, reason = guess_energies(look(raw(tmp_path / "referenced", made)).statistics)
    assert kind == "referenced" and "mean |E|/N is 0.0" in reason
    inspection = look(raw(tmp_path / "total", with_totals(made)))
    kind, reason = guess_energies(inspection.statistics)
    assert kind == "total" and re_found("composition explains (9|100)", reason)
    assert "Less fitted element references energies spread by 0.0" in describe(inspection)
    electrons = [data.clone().update({"energy": -400_000 + data.energy}) for data in made]
    kind, reason = guess_energies(look(raw(tmp_path / "electrons", electrons)).statistics)
    assert kind == "total" and "all electrons, or kcal/mol" in reason
    assert guess_energies(look(raw(tmp_path / "same", [made[0]] * 3)).statistics)[0] == "referenced"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        (list, with_totals, "energies are referenced in the first and total in the second"),
        (with_totals, lambda made: with_totals(made, -700.0), "mean energies are"),
    ],
)
def test_mixed_labels(
    first: Any, second: Any, words: str, structure: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = [structure(seed, natoms=6 + seed % 6, num_fixed=2) for seed in range(60)]
    train = raw(tmp_path / "train", first(made))
    val = raw(tmp_path / "val", second(made[:30]))
    assert main(["data", "check", str(train), str(val)]) == 1
    assert words in " ".join(capsys.readouterr().out.split())
    assert main(["data", "check", str(train), str(train)]) == 0


def test_another_functional(structure: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """An offset that is small against the spread of total energies shows once references are subtracted."""
    made = [structure(seed, natoms=6 + seed % 6, num_fixed=2) for seed in range(100)]
    train, val = with_totals(made[:60]), with_totals(made[60:], 2.0)
    assert np.std([data.energy for data in train]) > 2.0
    folders = [str(raw(tmp_path / "train", train)), str(raw(tmp_path / "val", val))]
    assert main(["data", "check", *folders]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "references fitted to one leave the energies of the other off by" in said
    same = str(raw(tmp_path / "same", with_totals(made[60:])))
    assert main(["data", "check", folders[0], same]) == 0


def test_forces_in_other_units_throughout(structures: list[Data], tmp_path: Path) -> None:
    for data in structures:
        data.forces *= 100
    said = notes(look(raw(tmp_path / "set", structures)))
    (note,) = [note for note in said if note.startswith("forces are above")]
    assert "50 eV/Å in 12 structures: if they are in kcal/mol/Å" in note


def test_units_of_forces(structure: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = [structure(seed, natoms=6, num_fixed=2) for seed in range(10)]
    folders = [raw(tmp_path / "eV", made)]
    for data in made:
        data.forces *= 23.06
    folders.append(raw(tmp_path / "kcal", made))
    assert main(["data", "check", *map(str, folders)]) == 1
    assert "forces differ in size" in " ".join(capsys.readouterr().out.split())


def test_settings_that_do_not_fit(structures: list[Data], tmp_path: Path) -> None:
    folder = raw(tmp_path / "set", with_totals(structures))
    normalizer = {"energy": {"mean": -0.75, "rmsd": 2.9}, "forces": {"mean": 0.0, "rmsd": 0.7}}
    transforms: dict[str, Any] = {"normalizer": normalizer}
    file = tmp_path / "run.yml"

    def write_run() -> None:
        run = {"dataset": {"train": {"src": str(folder), "transforms": transforms}}}
        file.write_text(yaml.safe_dump(run))

    write_run()
    assert any("total energies where referenced ones are expected" in note for note in notes(look(file)))
    coefficients = np.zeros(100)
    for number, value in REFERENCES.items():
        coefficients[number] = value
    np.savez(tmp_path / "references.npz", coeff=coefficients)
    transforms["element_references"] = {"energy": {"file": str(tmp_path / "references.npz")}}
    normalizer["energy"] = {"mean": 0.0, "rmsd": 0.1}
    write_run()
    inspection = look(file)
    assert inspection.healthy and not any("normalizer" in note for note in notes(inspection))
    said = describe(inspection)
    assert "(energies less its references)" in said
    coefficients[46] = 1e11
    np.savez(tmp_path / "references.npz", coeff=coefficients)
    assert any(
        "no usable reference for elements in the data: Pd (1e+11 eV)" in p for p in problems(look(file))
    )


# ------------------------------------------------------------------ distances


@pytest.mark.parametrize("seed", range(12))
def test_close_pairs_are_those_of_all_images(seed: int) -> None:
    """Against a sum over the neighbouring images, in cells of any shape."""
    rng = np.random.default_rng(seed)
    cell = rng.uniform(-1, 1, (3, 3)) + 3 * np.eye(3)
    periodic = rng.random(3) < 0.7
    cell = np.where(periodic[:, None], cell, 0.0)
    pos = rng.uniform(-4, 4, (30, 3))
    pairs, distances = close_pairs(pos, cell, TOO_CLOSE)
    steps = np.stack(np.meshgrid(*[np.arange(-6, 7)] * 3, indexing="ij"), -1).reshape(-1, 3)
    expected = {}
    for first in range(30):
        for second in range(first + 1, 30):
            shifted = pos[first] - pos[second] + steps @ cell
            nearest = np.linalg.norm(shifted, axis=1).min()
            if nearest < TOO_CLOSE:
                expected[first, second] = nearest
    found = {tuple(sorted(p)): d for p, d in zip(pairs.tolist(), distances, strict=True)}
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx([expected[pair] for pair in found])


def test_molecules(tmp_path: Path, structure: Make) -> None:
    made = [structure(seed, periodic=False) for seed in range(3)]
    for data in made:
        data.cell.zero_()
    inspection = look(raw(tmp_path / "set", made))
    assert inspection.healthy and inspection.statistics.cells == {"zero": 3}
    made[1].pos[4] = made[1].pos[3]
    (record,) = look(raw(tmp_path / "close", made)).records
    assert record.index == 1 and "atoms 3 and 4 are 0.000 Å apart" in record.text


# ------------------------------------------------------------------ fitting


def test_fit_in_parts_is_the_fit_of_all() -> None:
    rng = np.random.default_rng(3)
    compositions = np.zeros((500, 119), dtype=np.int64)
    compositions[:, [1, 6, 8, 29]] = rng.integers(0, 60, (500, 4))
    truth = np.zeros(119)
    truth[[1, 6, 8, 29]] = [-3.4, -8.1, -6.7, -2.7]
    energies = compositions @ truth + rng.normal(scale=0.3, size=500)
    fits = [CompositionFit(), CompositionFit()]
    for start in range(0, 500, 70):
        part = slice(start, start + 70)
        fits[start > 200].add(compositions[part], energies[part])
    fits[0].merge(fits[1])
    coefficients = fits[0].solve()
    seen = [1, 6, 8, 29]
    expected = np.linalg.lstsq(compositions[:, seen].astype(float), energies, rcond=None)[0]
    assert fits[0].count == 500 and fits[0].rank == 4
    assert np.flatnonzero(np.isfinite(coefficients)).tolist() == seen
    assert coefficients[seen] == pytest.approx(expected, abs=1e-11)
    residual = energies - compositions[:, seen] @ expected
    assert fits[0].residual(coefficients) == pytest.approx((residual.mean(), residual.std()), abs=1e-10)


def test_fit_stats(structure: Make, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = with_totals(structure(seed, natoms=6 + seed % 6, num_fixed=2) for seed in range(80))
    folder = raw(tmp_path / "set", made)
    out = tmp_path / "new" / "stats"
    assert main(["data", "fit-stats", str(folder), "--out", str(out), "--references", "fit"]) == 0
    said = capsys.readouterr().out
    assert "4 references fitted to 80 energies" in said and f"wrote {out}/data.yml" in said
    assert sorted(path.name for path in out.iterdir()) == [
        "data.yml", "energy_normalizer.npz", "energy_references.npz", "forces_normalizer.npz",
    ]  # fmt: skip
    with np.load(out / "energy_references.npz") as arrays:
        coefficients = arrays["coeff"]
    assert coefficients.dtype == np.float64 and coefficients.shape == (119,)
    assert np.flatnonzero(np.isfinite(coefficients)).tolist() == sorted(REFERENCES)
    assert coefficients[29] == pytest.approx(-2.7, abs=0.05)
    residuals = [data.energy - coefficients[data.atomic_numbers.numpy()].sum() for data in made]
    train = yaml.safe_load((out / "data.yml").read_text())["dataset"]["train"]
    assert train["src"] == str(folder)
    assert train["transforms"]["element_references"]["energy"]["file"] == str(out / "energy_references.npz")
    normalizer = train["transforms"]["normalizer"]
    assert normalizer["energy"]["mean"] == pytest.approx(np.mean(residuals), abs=1e-8)
    assert normalizer["energy"]["rmsd"] == pytest.approx(np.std(residuals), rel=1e-8)
    with np.load(out / "energy_normalizer.npz") as arrays:
        assert float(arrays["rmsd"]) == normalizer["energy"]["rmsd"]
    assert main(["data", "fit-stats", str(folder), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_fit_stats_into_one_yaml(structure: Make, tmp_path: Path) -> None:
    made = with_totals(structure(seed, natoms=6 + seed % 6, num_fixed=2) for seed in range(30))
    folder = raw(tmp_path / "set", made)
    out = tmp_path / "numbers.yml"
    assert main(["data", "fit-stats", str(folder), "--out", str(out)]) == 0
    train = yaml.safe_load(out.read_text())["dataset"]["train"]
    energies = [data.energy for data in made]
    assert train["transforms"]["normalizer"]["energy"]["mean"] == pytest.approx(np.mean(energies))
    assert "element_references" not in train["transforms"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["numbers.yml", "set"]
    fitted = tmp_path / "fitted.yml"
    assert main(["data", "fit-stats", str(folder), "--out", str(fitted), "--references", "fit"]) == 0
    named = yaml.safe_load(fitted.read_text())["dataset"]["train"]["transforms"]["element_references"]
    assert named["energy"]["file"] == str(tmp_path / "fitted_references.npz")
    # The file that was fitted, given back: the same numbers.
    given = tmp_path / "given.yml"
    arguments = ["--references", str(tmp_path / "fitted_references.npz")]
    assert main(["data", "fit-stats", str(folder), "--out", str(given), *arguments]) == 0
    assert yaml.safe_load(given.read_text()) == yaml.safe_load(fitted.read_text())


def test_fit_stats_of_all_md_with_old_names(structures: list[Data], tmp_path: Path) -> None:
    """Including what was written must not turn MD frames into ones that are corrupted."""
    for data in structures:
        data.y, data.force = data.energy, data.forces
        del data.energy, data.forces
    folder = raw(tmp_path / "set", structures)
    (folder / "data_log.0000.txt").write_text("/x/md/1.traj,0,0\n" * 12)
    assert main(["data", "fit-stats", str(folder), "--out", str(tmp_path / "numbers.yml")]) == 0
    train = yaml.safe_load((tmp_path / "numbers.yml").read_text())["dataset"]["train"]
    assert train["format"] == "dens_lmdb" and train["key_mapping"] == {"y": "energy", "force": "forces"}
    inspection = look(tmp_path / "numbers.yml")
    assert inspection.healthy and inspection.statistics.md == {True: 12}
    again = tmp_path / "again.yml"
    assert main(["data", "fit-stats", str(tmp_path / "numbers.yml"), "--out", str(again)]) == 0
    assert "src" not in yaml.safe_load(again.read_text())["dataset"]["train"], "a YAML has its own paths"


def test_what_fit_stats_refuses(
    structures: list[Data], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = str(tmp_path / "out")
    folder = str(raw(tmp_path / "bad", [*structures, b"nothing"]))
    assert main(["data", "fit-stats", folder, "--out", out]) == 2
    assert "1 records of" in (said := capsys.readouterr().err) and "12 of" in said
    folder = str(raw(tmp_path / "good", structures))
    np.savez(tmp_path / "r.npz", coeff=np.ones(30))
    assert main(["data", "fit-stats", folder, "--out", out, "--references", str(tmp_path / "r.npz")]) == 2
    assert "no usable reference for elements in the data: Pd (none)" in capsys.readouterr().err
    same = [data.clone().update({"energy": 1.0}) for data in structures]
    assert main(["data", "fit-stats", str(raw(tmp_path / "same", same)), "--out", out]) == 2
    assert "rmsd above 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_elements_that_always_occur_together(
    structure: Make, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    made = [structure(seed, natoms=6, num_fixed=2) for seed in range(20)]
    for index, data in enumerate(made):
        data.atomic_numbers = torch.tensor([29, 46] * (3 + index % 3))[:6]
        data.energy = -10.0 - index
    folder = raw(tmp_path / "set", made)
    out = tmp_path / "out"
    assert main(["data", "fit-stats", str(folder), "--out", str(out), "--references", "fit"]) == 0
    assert "The compositions determine 1 of them" in capsys.readouterr().out


def test_fairchem_reads_what_was_fitted(
    run_settings: dict[str, Any], lmdb_folders: dict[str, Path], make_trainer: Any, tmp_path: Path
) -> None:
    out = tmp_path / "stats"
    assert (
        main(["data", "fit-stats", str(lmdb_folders["train"]), "--out", str(out), "--references", "fit"]) == 0
    )
    made = yaml.safe_load((out / "data.yml").read_text())["dataset"]["train"]["transforms"]
    transforms = run_settings["dataset"]["train"]["transforms"]
    transforms["element_references"] = made["element_references"]
    transforms["normalizer"] = {
        name: {"file": str(out / f"{name}_normalizer.npz")} for name in ("energy", "forces")
    }
    trainer = make_trainer(run_settings)
    for name in ("energy", "forces"):
        assert trainer.normalizers[name].rmsd.item() == pytest.approx(made["normalizer"][name]["rmsd"])
    batch = next(iter(trainer.train_loader))
    energies = trainer.elementrefs["energy"].dereference(batch.energy.view(-1, 1), batch)
    assert torch.isfinite(energies).all()
