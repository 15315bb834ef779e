from __future__ import annotations

import dataclasses
import pickle

import lmdb
import numpy as np
import pytest
import torch
from ase.build import fcc111
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from fairchem.core.datasets import LmdbDataset, data_list_collater

from fairchem_dens.data import emt
from fairchem_dens.data import lmdb as lmdb_module
from fairchem_dens.data.lmdb import LmdbWriter, check_structure, data_from_atoms, read_lmdb
from fairchem_dens.randomness import generator

SMALL = emt.EmtSettings(
    train_systems=3, val_systems=2, test_systems=1, frames_per_system=4, relaxation_steps=12, md_steps=12
)


def structure(fid=0, sid=7, natoms=None):
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    slab.pbc = True
    slab.set_constraint(FixAtoms(indices=[0, 1, 2, 3]))
    slab.rattle(0.05, seed=fid)
    slab = slab[: natoms or len(slab)]
    forces = np.random.default_rng(fid).standard_normal((len(slab), 3))
    return data_from_atoms(slab, sid=sid, fid=fid, energy=-1.5 - fid, forces=forces)


@pytest.fixture(scope="module")
def systems():
    return [emt.simulate_system(sid, SMALL) for sid in range(6)]


# ---------------------------------------------------------------------------------------------- structures


def test_structure_has_shapes_and_types_that_batches_need():
    data = structure()
    assert data.pos.shape == (12, 3) and data.pos.dtype == torch.float32
    assert data.cell.shape == (1, 3, 3) and data.pbc.shape == (1, 3) and data.pbc.dtype == torch.bool
    assert data.fixed.tolist() == [1] * 4 + [0] * 8
    assert data.tags.tolist() == [3] * 4 + [2] * 4 + [1] * 4
    assert isinstance(data.natoms, int) and isinstance(data.energy, float)


def test_positions_are_wrapped_into_the_cell():
    slab = fcc111("Cu", (2, 2, 3), vacuum=6.0)
    slab.pbc = True
    slab.positions += 3 * slab.cell[0]
    data = data_from_atoms(slab, sid=0, fid=0)
    fractions = np.linalg.solve(data.cell[0].numpy().T, data.pos.numpy().T)
    assert fractions.min() > -1e-5 and fractions.max() < 1 + 1e-5


def test_structures_with_different_periodicity_share_a_batch():
    one, other = structure(), structure(1)
    other.pbc = torch.tensor([[True, True, False]])
    assert data_list_collater([one, other], otf_graph=True).pbc.tolist() == [[True] * 3, [True, True, False]]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("forces", None, "no field 'forces'"),
        ("forces", torch.zeros(3, 3), r"must be of shape \(12, 3\), found \(3, 3\)"),
        ("forces", torch.full((12, 3), torch.nan), "'forces' is not finite"),
        ("fixed", None, "no field 'fixed'"),
        ("pbc", torch.ones(3, dtype=torch.bool), r"'pbc' must be of shape \(1, 3\), found \(3,\)"),
        ("energy", float("inf"), "'energy' must be one finite number"),
        ("natoms", 11, "'natoms' must be 12"),
        ("fid", None, "no field 'fid'"),
        ("pos", torch.zeros(0, 3), "has no atoms"),
    ],
)
def test_structure_that_would_break_training_is_named_and_refused(field, value, message):
    data = structure(fid=3)
    if value is None:
        del data[field]
    else:
        data[field] = value
    with pytest.raises(ValueError, match=message) as error:
        check_structure(data)
    assert "sid 7" in str(error.value)


# ---------------------------------------------------------------------------------------------- writer


@pytest.mark.parametrize("structures_per_file", [None, 3])
def test_fairchem_reads_what_was_written(tmp_path, structures_per_file):
    with LmdbWriter(tmp_path / "train", structures_per_file=structures_per_file) as writer:
        for fid in range(7):
            writer.add(structure(fid, natoms=6 + fid))
    dataset = LmdbDataset({"src": str(tmp_path / "train")})
    assert len(dataset) == 7
    assert len(list((tmp_path / "train").glob("*.lmdb"))) == (3 if structures_per_file else 1)
    assert dataset.get_metadata("natoms", list(range(7))) == [6 + fid for fid in range(7)]
    for fid in range(7):
        assert dataset[fid].fid == fid and torch.equal(dataset[fid].pos, structure(fid, natoms=6 + fid).pos)
    batch = data_list_collater([dataset[fid] for fid in range(7)], otf_graph=True)
    assert batch.energy.tolist() == [-1.5 - fid for fid in range(7)]
    assert batch.natoms.tolist() == [6 + fid for fid in range(7)]
    assert [data.fid for data in read_lmdb(tmp_path / "train")] == list(range(7))


def test_file_has_integer_keys_and_a_length(tmp_path):
    with LmdbWriter(tmp_path / "set") as writer:
        writer.add(structure(0))
        writer.add(structure(1))
    file = tmp_path / "set" / "data.0000.lmdb"
    assert sorted(path.name for path in file.parent.iterdir()) == ["data.0000.lmdb", "metadata.npz"]
    with lmdb.open(str(file), subdir=False, readonly=True, lock=False) as env, env.begin() as transaction:
        assert {key for key, _ in transaction.cursor()} == {b"0", b"1", b"length"}
        assert pickle.loads(transaction.get(b"length")) == 2


def test_map_grows_with_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(lmdb_module, "_FIRST_MAP_SIZE", 2**16)
    monkeypatch.setattr(lmdb_module, "_STRUCTURES_PER_TRANSACTION", 10)
    with LmdbWriter(tmp_path / "set") as writer:
        for fid in range(200):
            writer.add(structure(fid))
    assert (tmp_path / "set" / "data.0000.lmdb").stat().st_size > 2**16
    assert [data.fid for data in read_lmdb(tmp_path / "set")] == list(range(200))


def test_nothing_appears_before_all_is_written(tmp_path):
    with LmdbWriter(tmp_path / "set") as writer:
        writer.add(structure())
        assert not (tmp_path / "set").exists()
    assert (tmp_path / "set").is_dir()


def test_failed_writer_leaves_the_old_set(tmp_path):
    with LmdbWriter(tmp_path / "set") as writer:
        writer.add(structure(5))
    bad = structure(7)
    del bad.forces

    def write():
        with LmdbWriter(tmp_path / "set", overwrite=True) as writer:
            writer.add(structure(6))
            writer.add(bad)

    with pytest.raises(ValueError, match="forces"):
        write()
    assert [data.fid for data in read_lmdb(tmp_path / "set")] == [5]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_overwriting_replaces_the_whole_set(tmp_path):
    with LmdbWriter(tmp_path / "set", structures_per_file=1) as writer:
        writer.add(structure(0))
        writer.add(structure(1))
    with pytest.raises(FileExistsError, match="exists already"):
        LmdbWriter(tmp_path / "set")
    with LmdbWriter(tmp_path / "set", overwrite=True) as writer:
        writer.add(structure(2))
    assert [data.fid for data in read_lmdb(tmp_path / "set")] == [2]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_remains_of_a_killed_writer_do_not_get_into_the_next_set(tmp_path):
    killed = LmdbWriter(tmp_path / "set", structures_per_file=1)
    killed.__enter__()
    for fid in range(3):
        killed.add(structure(fid))
    with LmdbWriter(tmp_path / "set") as writer:
        writer.add(structure(9))
    assert [data.fid for data in read_lmdb(tmp_path / "set")] == [9]


def test_empty_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="No structure was added"), LmdbWriter(tmp_path / "set"):
        pass
    assert not (tmp_path / "set").exists()


def test_missing_lmdb_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No LMDB at .*nowhere"):
        list(read_lmdb(tmp_path / "nowhere"))


# ---------------------------------------------------------------------------------------------- generated
# data


def test_system_is_a_pure_function_of_seed_and_id(systems):
    again = emt.simulate_system(2, SMALL)
    assert again.energies == systems[2].energies
    assert all(
        np.array_equal(a.positions, b.positions) for a, b in zip(again.atoms, systems[2].atoms, strict=True)
    )
    other = emt.simulate_system(2, dataclasses.replace(SMALL, seed=1))
    assert other.energies != systems[2].energies


def test_labels_are_those_of_the_potential(systems):
    frames = systems[0]
    for atoms, forces in zip(frames.atoms, frames.forces, strict=True):
        atoms.calc = EMT()
        assert np.allclose(atoms.get_forces(apply_constraint=False), forces, atol=1e-10)
    totals = np.array([atoms.get_potential_energy() for atoms in frames.atoms])
    # One reference for all frames of a system: energies of adsorption.
    assert np.ptp(totals - np.array(frames.energies)) < 1e-9


def test_reference_is_the_relaxed_clean_slab_and_the_gas_phase(systems):
    frames = systems[0]
    atoms = frames.atoms[0]
    adsorbate = atoms[atoms.get_tags() == 2]
    slab, _ = emt.build_slab(generator(SMALL.seed, 0))
    slab.calc = EMT()
    unrelaxed = slab.get_potential_energy()
    atoms.calc = EMT()
    gas = sum(emt.gas_phase_energy(symbol) for symbol in adsorbate.symbols)
    reference = atoms.get_potential_energy() - frames.energies[0] - gas
    assert unrelaxed - 2.0 < reference <= unrelaxed


def test_gas_phase_reference_of_another_element_is_refused():
    with pytest.raises(ValueError, match="no gas-phase reference for 'S'"):
        emt.gas_phase_energy("S")


def test_tags_and_constraints_follow_oc20(systems):
    for frames in systems:
        atoms = frames.atoms[0]
        tags = atoms.get_tags()
        data = data_from_atoms(atoms, sid=0, fid=0)
        assert set(tags) == {0, 1, 2}
        assert torch.equal(data.fixed == 1, data.tags == 0)
        assert data.pbc.all()
        assert atoms.positions[tags == 0, 2].max() < atoms.positions[tags == 1, 2].max()
        assert set(atoms.symbols[tags == 2]) <= set("HCNO") and set(atoms.symbols[tags < 2]) <= set(
            emt.METALS
        )
        assert 13 <= len(atoms) <= 20


def test_fixed_atoms_do_not_move_and_frames_are_far_from_equilibrium(systems):
    for frames in systems:
        fixed = frames.atoms[0].get_tags() == 0
        for atoms in frames.atoms[1:]:
            assert np.array_equal(atoms.positions[fixed], frames.atoms[0].positions[fixed])
    norms = [np.linalg.norm(forces[atoms.get_tags() > 0], axis=1).mean() for frames in systems
             for atoms, forces in zip(frames.atoms, frames.forces, strict=True)]  # fmt: skip
    assert np.mean(norms) > 0.2


def test_frames_are_as_many_as_asked_for_and_different(systems):
    for frames in systems:
        assert len(frames.atoms) == SMALL.frames_per_system
        positions = [atoms.positions.tobytes() for atoms in frames.atoms]
        assert len(set(positions)) == len(positions)


def test_frames_with_large_forces_are_left_out_and_counted(systems):
    strict = dataclasses.replace(SMALL, max_force=0.8)
    frames = emt.simulate_system(0, strict)
    assert frames.dropped["a force above 0.8 eV/Å"] > 0
    assert all(np.linalg.norm(forces, axis=1).max() <= 0.8 for forces in frames.forces)


def test_adsorbate_starts_in_touch_with_the_surface():
    for sid in range(30):
        rng = generator(0, sid)
        slab, _ = emt.build_slab(rng)
        for name in emt.ADSORBATES:
            system = emt.add_adsorbate(slab, name, rng)
            distances = system.get_all_distances(mic=True)[
                np.ix_(system.get_tags() == 2, system.get_tags() < 2)
            ]
            assert 1.0 < distances.min() < 3.6, (sid, name)


def test_chosen_frames_are_distinct_and_ordered():
    for length in range(1, 60):
        for count in range(length + 5):
            for dense in (True, False):
                chosen = emt._choose(list(range(length)), count, dense_start=dense)
                assert chosen == sorted(set(chosen)) and len(chosen) == min(count, length)


def test_generated_set_is_complete_split_by_system_and_not_made_twice(tmp_path):
    summary = emt.generate(tmp_path, SMALL, processes=2, progress=False)
    sids = {split: {data.sid for data in read_lmdb(tmp_path / split)} for split in emt.SPLITS}
    assert [len(sids[split]) for split in emt.SPLITS] == [3, 2, 1]
    assert len(set.union(*sids.values())) == 6
    train = list(read_lmdb(tmp_path / "train"))
    assert summary["splits"]["train"]["frames"] == len(train) == 12
    assert summary["splits"]["train"]["energy_mean"] == pytest.approx(
        np.mean([data.energy for data in train])
    )
    free = torch.cat([data.forces[data.fixed == 0] for data in train])
    assert summary["splits"]["train"]["force_rms"] == pytest.approx(
        free.square().mean().sqrt().item(), rel=1e-5
    )
    assert len({(data.sid, data.fid) for data in train}) == 12

    before = (tmp_path / "train" / "data.0000.lmdb").stat().st_mtime_ns
    assert emt.generate(tmp_path, SMALL, progress=False) == summary
    assert (tmp_path / "train" / "data.0000.lmdb").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"other settings \(different: seed\)"):
        emt.generate(tmp_path, dataclasses.replace(SMALL, seed=5), progress=False)

    # One process or two, here or in a worker: the same data.
    for data in train:
        frames = emt.simulate_system(data.sid, SMALL)
        assert frames.energies[data.fid] == pytest.approx(data.energy, abs=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_systems": 0}, "'train_systems' must be at least 1"),
        ({"max_force": 0.0}, "'max_force' must be above 0"),
        ({"frames_per_system": 20}, "near copies"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **change)
