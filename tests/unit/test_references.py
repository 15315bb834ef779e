"""Element references: what counts as one, conversion, and the guard in a run."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Batch, Data

from fairchem_dens.cli.main import main
from fairchem_dens.data.references import (
    NUM_COEFFICIENTS,
    ReferenceGuard,
    convert,
    padded,
    read_references,
    usable,
    without_reference,
)

GOOD = {1: -3.4, 8: -6.7, 29: -2.7, 46: -3.4}
"""Of the elements in the tests' structures."""


def coefficients(values: dict[int, float], length: int = 100) -> np.ndarray:
    made = np.zeros(length)
    for number, value in values.items():
        made[number] = value
    return made


def write(file: Path, values: dict[int, float], length: int = 100, key: str = "coeff") -> Path:
    np.savez(file, **{key: coefficients(values, length)})
    return file


# ------------------------------------------------------------------ what counts as a reference


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf, 1e12, -3.1e7, -23340.0, -4690.0])
def test_absurd_and_absent(value: float) -> None:
    known = usable(coefficients(GOOD | {36: value}))
    assert not known[36]
    assert np.flatnonzero(known).tolist() == sorted(GOOD)


def test_energies_of_all_electrons_are_references() -> None:
    # Free atoms in eV; the rule must not be one about plane waves with pseudopotentials.
    values = {1: -13.6, 6: -1030.0, 7: -1485.0, 8: -2042.0, 29: -45000.0, 79: -517000.0}
    assert np.flatnonzero(usable(coefficients(values))).tolist() == sorted(values)


def test_nothing_but_zeros() -> None:
    assert not usable(np.zeros(100)).any()


def test_most_of_a_file_may_be_absurd() -> None:
    garbage = {number: 1e11 * number for number in range(50, 60)}
    assert np.flatnonzero(usable(coefficients(GOOD | garbage))).tolist() == sorted(GOOD)


def test_padding() -> None:
    complete = padded(coefficients(GOOD | {9: 1e9}))
    assert complete.shape == (NUM_COEFFICIENTS,) and complete.dtype == np.float64
    assert np.flatnonzero(np.isfinite(complete)).tolist() == sorted(GOOD)
    assert without_reference([46, 8, 8, 9, 118, 0], complete) == [0, 9, 118]


# ------------------------------------------------------------------ files


@pytest.mark.parametrize("key", ["coeff", "element_references"])
def test_reading(tmp_path: Path, key: str) -> None:
    read = read_references(write(tmp_path / "r.npz", GOOD, key=key))
    assert np.array_equal(read, coefficients(GOOD))


def test_what_is_no_file_of_references(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"some key: there is no file .*absent\.npz"):
        read_references(tmp_path / "absent.npz", "some key")
    with pytest.raises(ValueError, match=r"holds other and not 'coeff'"):
        read_references(write(tmp_path / "key.npz", GOOD, key="other"))
    np.savez(tmp_path / "shape.npz", coeff=np.zeros((3, 40)))
    with pytest.raises(ValueError, match=r"has the shape \(3, 40\)"):
        read_references(tmp_path / "shape.npz")
    np.savez(tmp_path / "long.npz", coeff=np.zeros(300))
    with pytest.raises(ValueError, match=r"at most 119"):
        read_references(tmp_path / "long.npz")
    (tmp_path / "text.npz").write_text("H -3.4")
    with pytest.raises(ValueError, match=r"text\.npz' is not a file of element references"):
        read_references(tmp_path / "text.npz")
    np.save(tmp_path / "array.npy", np.zeros(100))
    with pytest.raises(ValueError, match=r"one array without a name"):
        read_references(tmp_path / "array.npy")
    np.savez(tmp_path / "objects.npz", coeff=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"objects\.npz' is not a file"):
        read_references(tmp_path / "objects.npz")


def test_converting(tmp_path: Path) -> None:
    from fairchem.core.modules.normalization.element_references import create_element_references

    file = write(tmp_path / "in.npz", GOOD | {15: 3.1e7})
    convert(file, tmp_path / "new" / "out.npz", [1, 8])
    references = create_element_references(file=tmp_path / "new" / "out.npz").element_references
    assert references.dtype == torch.float64 and references.shape == (NUM_COEFFICIENTS,)
    assert references[29] == -2.7
    assert torch.isnan(references[15]) and torch.isnan(references[57]) and torch.isnan(references[110])
    assert not list(tmp_path.rglob(".*"))


def test_refusing_to_convert(tmp_path: Path) -> None:
    file = write(tmp_path / "in.npz", GOOD | {15: 3.1e7})
    with pytest.raises(ValueError, match=r"P \(3\.1e\+07 eV\), La \(0 eV\), Og \(none\)"):
        convert(file, tmp_path / "out.npz", [1, 15, 57, 118])
    assert not (tmp_path / "out.npz").exists()
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        convert(file, tmp_path / "out.pt")
    (tmp_path / "there.npz").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"there\.npz"):
        convert(file, tmp_path / "there.npz")


def test_command(tmp_path: Path, lmdb_folders: dict[str, Path], capsys: pytest.CaptureFixture) -> None:
    data, out = str(lmdb_folders["train"]), tmp_path / "out.npz"
    lacking = {number: value for number, value in GOOD.items() if number != 46} | {15: 1e9}
    file = write(tmp_path / "in.npz", lacking)
    assert main(["data", "references", str(file), "--out", str(out), "--data", data]) == 2
    assert "Pd (0 eV)" in capsys.readouterr().err and not out.exists()
    assert main(["data", "references", str(file), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "absurd coefficients, not used: P (1e+09 eV)" in said
    assert "coefficient 0, which is none: He, Li" in said
    file = write(tmp_path / "good.npz", GOOD | {43: 156.4})
    assert main(["data", "references", str(file), "--out", str(tmp_path / "2.npz"), "--data", data]) == 0
    assert "far larger than the others: Tc (156.4 eV)" in capsys.readouterr().out


def test_real_files(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    oc22 = convert(real_data("linref/oc22_linfit_coeffs.npz"), tmp_path / "oc22.npz")
    bad = {"He", "B", "F", "Ne", "P", "S", "Cl", "Ar", "Br", "Kr", "La", "U"}
    from ase.data import atomic_numbers

    assert not usable(oc22)[[atomic_numbers[symbol] for symbol in bad]].any()
    good = ["H", "C", "O", "Ti", "V", "Ru", "Sn", "Ir", "W", "Hg"]
    assert usable(oc22)[[atomic_numbers[symbol] for symbol in good]].all()
    oc20 = usable(convert(real_data("linref/oc20_linref.npz"), tmp_path / "oc20.npz"))
    assert oc20[[1, 6, 7, 8, 29, 15, 16, 17]].all() and not oc20[[2, 3, 4, 9, 12, 53, 58]].any()


# ------------------------------------------------------------------ the guard


def batch_of(structure: Callable[..., Data], *changes: tuple[int, int]) -> Any:
    structures = [structure(seed) for seed in range(3)]
    for place, number in changes:
        structures[place].atomic_numbers[5] = number
    return Batch.from_data_list(structures)


def test_guard(structure: Callable[..., Data]) -> None:
    references = torch.tensor(coefficients(GOOD | {15: 3.1e7}))
    guard = ReferenceGuard.of(references, "'the.key'")
    assert torch.isnan(references[15]) and references[8] == -6.7
    guard.check(batch_of(structure))
    guard.check(structure(3))
    with pytest.raises(ValueError, match=r"\(sid 1\) contains P, and 'the\.key' .*: P \(3\.1e\+07 eV\)\."):
        guard.check(batch_of(structure, (1, 15)))
    with pytest.raises(ValueError, match=r"\(sid 2\) contains Og, .*Og \(none\)"):
        guard.check(batch_of(structure, (2, 118)))
    numbers = batch_of(structure, (1, 15))
    numbers.atomic_numbers = numbers.atomic_numbers.to(torch.uint8)
    with pytest.raises(ValueError, match=r"\(sid 1\) contains P"):
        guard.check(numbers)


def with_references(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    transforms = settings["dataset"]["train"]["transforms"]
    transforms["element_references"] = {"energy": {"file": str(file)}}
    transforms["normalizer"]["energy"] = {"mean": 40.0, "rmsd": 5.0}
    return settings


@pytest.fixture
def spoilt(
    tmp_path: Path, write_lmdb: Callable[..., Path], structure: Callable[..., Data]
) -> Callable[[int, int], Path]:
    """Makes a set in which one structure, of sid 777, has phosphorus."""

    def make(count: int, place: int) -> Path:
        structures = [structure(seed, natoms=5, num_fixed=2) for seed in range(count)]
        structures[place].sid = 777
        structures[place].atomic_numbers[3] = 15
        return write_lmdb(tmp_path / f"spoilt{count}", structures)

    return make


MESSAGE = (
    r"\(sid 777\) contains P, and 'dataset\.train\.transforms\.element_references\.energy\.file' "
    r"\('.*r\.npz'\) has no usable coefficient for: P"
)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("absurd", [3.1e7, 0.0])
def test_seen_at_the_start(
    split: str, absurd: float, spoilt: Any, run_settings: dict[str, Any], make_trainer: Any, tmp_path: Path
) -> None:
    settings = with_references(run_settings, write(tmp_path / "r.npz", GOOD | {15: absurd}))
    settings["dataset"][split]["src"] = str(spoilt(20, 3))
    with pytest.raises(ValueError, match=rf"of 'dataset\.{split}\.src' " + MESSAGE):
        make_trainer(settings)


def test_seen_in_training_validation_and_prediction(
    spoilt: Any, run_settings: dict[str, Any], make_trainer: Any, tmp_path: Path
) -> None:
    settings = with_references(run_settings, write(tmp_path / "r.npz", GOOD | {15: 3.1e7}))
    rare = str(spoilt(200, 1))
    for split in ("train", "val", "test"):
        settings["dataset"][split] = copy.deepcopy(settings["dataset"][split]) | {"src": rare}
    trainer = make_trainer(settings)
    assert torch.isnan(trainer.elementrefs["energy"].element_references[15])
    with pytest.raises(ValueError, match=MESSAGE):
        trainer.train(disable_eval_tqdm=True)
    with pytest.raises(ValueError, match=MESSAGE):
        trainer.validate("val", disable_tqdm=True)
    with pytest.raises(ValueError, match=MESSAGE):
        trainer.predict(trainer.test_loader, disable_tqdm=True)


def test_references_of_a_checkpoint(
    run_settings: dict[str, Any], make_trainer: Any, tmp_path: Path, structure: Callable[..., Data]
) -> None:
    """They win over those of the YAML, whatever their number, and are guarded as well."""
    first = make_trainer(with_references(run_settings, write(tmp_path / "r.npz", GOOD)))
    file = first.save(checkpoint_file="checkpoint.pt")
    other = {number: value + 1 for number, value in GOOD.items()}
    longer = with_references(copy.deepcopy(run_settings), write(tmp_path / "longer.npz", other, 119))
    second = make_trainer(longer)
    assert second.elementrefs["energy"].element_references[8] == pytest.approx(-5.7)
    second.load_checkpoint(file)
    assert second.elementrefs["energy"].element_references.shape == (100,)
    assert second.elementrefs["energy"].element_references[8] == pytest.approx(-6.7)
    with pytest.raises(ValueError, match=r"contains P, and the checkpoint '.*checkpoint\.pt' has no"):
        second._forward(batch_of(structure, (1, 15)))

    inference = make_trainer(run_settings | {"dataset": {}}, inference_only=True)
    inference.load_checkpoint(file, inference_only=True)
    inference.model.eval()
    inference._forward(batch_of(structure))
    with pytest.raises(ValueError, match=r"\(sid 1\) contains P, and the checkpoint"):
        inference._forward(batch_of(structure, (1, 15)))


def test_checkpoint_without_references_leaves_those_of_the_yaml(
    run_settings: dict[str, Any], make_trainer: Any, tmp_path: Path
) -> None:
    file = make_trainer(copy.deepcopy(run_settings)).save(checkpoint_file="checkpoint.pt")
    trainer = make_trainer(with_references(run_settings, write(tmp_path / "r.npz", GOOD)))
    trainer.load_checkpoint(file)
    assert trainer.elementrefs["energy"].element_references[8] == pytest.approx(-6.7)


def test_bad_settings(run_settings: dict[str, Any], make_trainer: Any, tmp_path: Path) -> None:
    where = r"'dataset\.train\.transforms\.element_references\.energy"
    with pytest.raises(FileNotFoundError, match=where + r"\.file'.*absent\.npz"):
        make_trainer(with_references(copy.deepcopy(run_settings), tmp_path / "absent.npz"))
    wrong = write(tmp_path / "w.npz", GOOD, key="linref")
    with pytest.raises(ValueError, match=where + r"\.file': .*w\.npz.*holds linref and not 'coeff'"):
        make_trainer(with_references(copy.deepcopy(run_settings), wrong))
    text = tmp_path / "references.txt"
    text.write_text("")
    with pytest.raises(ValueError, match=where + r"\.file' must end in \.npz or \.pt"):
        make_trainer(with_references(copy.deepcopy(run_settings), text))
    settings = copy.deepcopy(run_settings)
    settings["dataset"]["train"]["transforms"]["element_references"] = {"energy": str(wrong)}
    with pytest.raises(ValueError, match=where + r"' must be \{file: FILE\.npz\}"):
        make_trainer(settings)


def test_authors_key_is_guarded_too(
    spoilt: Any, run_settings: dict[str, Any], make_trainer: Any, tmp_path: Path
) -> None:
    run_settings["dataset"]["train"] |= {
        "src": str(spoilt(20, 3)),
        "lin_ref": str(write(tmp_path / "r.npz", GOOD | {15: 3.1e7})),
    }
    with pytest.raises(ValueError, match=MESSAGE):
        make_trainer(run_settings)


def test_a_fit_in_the_run_is_guarded_too(
    spoilt: Any, run_settings: dict[str, Any], make_trainer: Any
) -> None:
    """fairchem gives 0 to elements that its fit did not see."""
    run_settings["dataset"]["train"]["transforms"]["element_references"] = {
        "fit": {"targets": ["energy"], "batch_size": 4}
    }
    run_settings["dataset"]["val"]["src"] = str(spoilt(20, 3))
    with pytest.raises(ValueError, match=r"contains P, and the fit that '.*element_references\.fit'"):
        make_trainer(run_settings)
