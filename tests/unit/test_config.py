"""Settings: what is refused and how, and what the authors' keys mean here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fairchem_dens import config
from fairchem_dens.corruption import Corruption
from fairchem_dens.objective import NoiseLoss
from fairchem_dens.validation import nearest, refuse_unknown_keys, require_mapping, require_number

WHERE = "dataset.train.transforms.dens"

# ------------------------------------------------------------------ Corruption


def test_minimal_and_full_settings() -> None:
    made = Corruption.from_config({"prob": 0.5, "std": 0.1}, where=WHERE)
    assert made == Corruption(
        prob=0.5, std=0.1, corrupt_ratio=None, all_atoms=False, switch="structure", where=WHERE
    )
    assert made.strict_max_ratio is None and made.max_force_norm is None
    full = {
        "prob": 0.125, "std_low": 0.01, "std_high": 0.3, "num_steps": 4, "corrupt_ratio": 0.25,
        "all_atoms": True, "switch": "batch", "strict_max_ratio": 0.75, "max_force_norm": 5.0,
    }  # fmt: skip
    made = Corruption.from_config(full)
    assert {name: getattr(made, name) for name in full} == full
    # Nulls of a YAML are what was left out.
    nulls = {
        "std_low": None,
        "std_high": None,
        "num_steps": None,
        "corrupt_ratio": None,
        "max_force_norm": None,
    }
    assert Corruption.from_config({"prob": 0.5, "std": 0.1, **nulls}) == Corruption(prob=0.5, std=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"std": 0}, r"'{w}\.std' must be above 0, found 0"),
        ({"std": 0.0}, r"'{w}\.std' must be above 0, found 0"),
        ({"std": -0.1}, r"'{w}\.std' must be above 0, found -0\.1"),
        ({"std": math.nan}, r"'{w}\.std' must be above 0, found nan"),
        ({"std": math.inf}, r"'{w}\.std' must be above 0, found inf"),
        ({"std": "1e-1"}, r"'{w}\.std' must be a number, found '1e-1'.*1\.0e-1"),
        ({"std": True}, r"'{w}\.std' must be a number, found True"),
        ({"std": [0.1]}, r"'{w}\.std' must be a number"),
        ({"prob": -0.1}, r"'{w}\.prob' must be from 0 and at most 1, found -0\.1"),
        ({"prob": 1.5}, r"'{w}\.prob' must be from 0 and at most 1, found 1\.5"),
        ({"prob": math.nan}, r"'{w}\.prob' must be from 0 and at most 1, found nan"),
        ({"prob": None}, r"'{w}\.prob' must be a number, found None"),
        ({"corrupt_ratio": 0}, r"'{w}\.corrupt_ratio' must be above 0 and at most 1, found 0"),
        ({"corrupt_ratio": -0.5}, r"'{w}\.corrupt_ratio' must be above 0 and at most 1, found -0\.5"),
        ({"corrupt_ratio": 1.01}, r"'{w}\.corrupt_ratio' must be above 0 and at most 1, found 1\.01"),
        ({"corrupt_ratio": "half"}, r"'{w}\.corrupt_ratio' must be a number, found 'half'"),
        ({"strict_max_ratio": 0}, r"'{w}\.strict_max_ratio' must be above 0 and at most 1"),
        ({"strict_max_ratio": 2}, r"'{w}\.strict_max_ratio' must be above 0 and at most 1, found 2"),
        ({"max_force_norm": 0}, r"'{w}\.max_force_norm' must be above 0"),
        ({"max_force_norm": -3}, r"'{w}\.max_force_norm' must be above 0, found -3"),
        ({"all_atoms": 1}, r"'{w}\.all_atoms' must be True or False, found 1"),
        ({"all_atoms": "yes"}, r"'{w}\.all_atoms' must be True or False, found 'yes'"),
        ({"switch": "atom"}, r"'{w}\.switch' must be 'structure'.*'batch'.*found 'atom'"),
        ({"std": None}, r"'{w}' needs a noise level: give 'std'.*missing: std_low, std_high, num_steps"),
        ({"std": None, "std_low": 0.1, "num_steps": 3}, r"'{w}' needs a noise level.*missing: std_high\)"),
        ({"std_low": 0.1}, r"'{w}\.std' is one fixed noise level and '{w}\.std_low' belongs to multi-scale"),
        ({"num_steps": 5}, r"'{w}\.std' is one fixed noise level and '{w}\.num_steps' belongs"),
    ],
)  # fmt: skip
def test_impossible_settings(changes: dict[str, Any], message: str) -> None:
    settings = {"prob": 0.5, "std": 0.1, "corrupt_ratio": 0.5} | changes
    with pytest.raises(ValueError, match=message.format(w=WHERE.replace(".", r"\."))):
        Corruption.from_config(settings, where=WHERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"std_low": 0.0}, r"'{w}\.std_low' must be above 0"),
        ({"std_high": -1}, r"'{w}\.std_high' must be above 0, found -1"),
        ({"std_low": 2.0}, r"'{w}\.std_low' \(2\.0\) is larger than '{w}\.std_high' \(0\.5\)"),
        ({"num_steps": 0}, r"'{w}\.num_steps' must be a whole number from 1, found 0"),
        ({"num_steps": 2.5}, r"'{w}\.num_steps' must be a whole number from 1, found 2\.5"),
        ({"num_steps": True}, r"'{w}\.num_steps' must be a whole number from 1, found True"),
        ({"num_steps": "3"}, r"'{w}\.num_steps' must be a whole number from 1, found '3'"),
    ],
)
def test_impossible_multi_scale_settings(changes: dict[str, Any], message: str) -> None:
    settings = {"prob": 0.5, "std_low": 0.1, "std_high": 0.5, "num_steps": 3} | changes
    with pytest.raises(ValueError, match=message.format(w=WHERE.replace(".", r"\."))):
        Corruption.from_config(settings, where=WHERE)


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("corrupt_ration", "corrupt_ratio"),
        ("probability", "prob"),
        ("stdd", "std"),
        ("std_hi", "std_high"),
        ("all_atom", "all_atoms"),
        ("swich", "switch"),
        ("num_step", "num_steps"),
        ("max_force_norn", "max_force_norm"),
    ],
)
def test_a_typo_is_refused_with_the_nearest_key(typo: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"Unknown setting '{WHERE}\.{typo}' \(did you mean '{meant}'\?\)"):
        Corruption.from_config({"prob": 0.5, "std": 0.1, typo: 1}, where=WHERE)


def test_other_refusals_of_the_transform() -> None:
    # `where` is an argument of ours and no key of a YAML.
    with pytest.raises(ValueError, match=r"Unknown setting 'dens\.where'"):
        Corruption.from_config({"prob": 0.5, "std": 0.1, "where": "x"})
    with pytest.raises(
        ValueError, match=r"Unknown setting 'dens\.zzz'\. Known under 'dens': all_atoms, corrupt_ratio"
    ):
        Corruption.from_config({"prob": 0.5, "std": 0.1, "zzz": 1})
    with pytest.raises(ValueError, match=r"'dens\.prob' is missing"):
        Corruption.from_config({"std": 0.1})
    with pytest.raises(ValueError, match=r"'dens\.prob' is missing"):
        Corruption.from_config(None)
    with pytest.raises(ValueError, match=r"'dens' must be a mapping of settings, found 0\.5"):
        Corruption.from_config(0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"'dens\.stdd'.*'dens\.probb' \(did you mean 'prob'\?\)"):
        Corruption.from_config({"stdd": 0.1, "probb": 1})


# ------------------------------------------------------------------ the loss on the noise


def test_noise_loss_is_taken_out_and_the_rest_stays() -> None:
    written = [
        {"energy": {"fn": "mae", "coefficient": 2}},
        {"noise": {"coefficient": 5, "decay": "linear", "reduction": "separate", "decay_floor": 0.1}},
        {"forces": {"fn": "l2mae", "coefficient": 100}},
    ]
    before = copy.deepcopy(written)
    noise, others = config.take_noise_loss(written)
    assert written == before
    assert others == [before[0], before[2]]
    assert noise == NoiseLoss(
        coefficient=5,
        fn="l2mae",
        decay="linear",
        reduction="separate",
        decay_floor=0.1,
        where="loss_functions[1].noise",
    )
    # Several targets in one entry are legal in fairchem.
    noise, others = config.take_noise_loss([{"noise": {"coefficient": 1}, "forces": {"fn": "mae"}}])
    assert noise is not None and others == [{"forces": {"fn": "mae"}}]
    assert config.take_noise_loss(before[:1]) == (None, before[:1])
    assert config.take_noise_loss(None) == (None, [])
    assert config.take_noise_loss({}) == (None, [])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fn": "l2mae"}, r"'{w}\.coefficient' is missing"),
        (None, r"'{w}\.coefficient' is missing"),
        (10, r"'{w}' must be a mapping of settings, found 10"),
        ({"coefficient": -1}, r"'{w}\.coefficient' must be finite and not negative, found -1"),
        ({"coefficient": "1e1"}, r"'{w}\.coefficient' must be a number, found '1e1'"),
        ({"coefficent": 10}, r"Unknown setting '{w}\.coefficent' \(did you mean 'coefficient'\?\)"),
        (
            {"coefficient": 10, "reduce": "joint"},
            r"Unknown setting '{w}\.reduce' \(did you mean 'reduction'\?\)",
        ),
        (
            {"coefficient": 10, "reduction": "mean"},
            r"'{w}\.reduction' must be 'joint'.*'separate'.*found 'mean'",
        ),
        ({"coefficient": 10, "decay": "cosine"}, r"'{w}\.decay' must be null or 'linear', found 'cosine'"),
        (
            {"coefficient": 10, "decay": "linear", "decay_floor": 1.5},
            r"'{w}\.decay_floor' is a share.*found 1\.5",
        ),
        (
            {"coefficient": 10, "decay": "linear", "decay_floor": -1},
            r"'{w}\.decay_floor' is a share.*found -1",
        ),
        (
            {"coefficient": 10, "decay_floor": 0.5},
            r"'{w}\.decay_floor' has no effect without '{w}\.decay: linear'",
        ),
        ({"coefficient": 10, "where": "here"}, r"Unknown setting '{w}\.where'"),
    ],
)
def test_impossible_noise_losses(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.format(w=r"loss_functions\[1\]\.noise")):
        config.take_noise_loss([{"energy": {}}, {"noise": settings}])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_coefficient_is_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"loss_functions\.noise\.coefficient"):
        NoiseLoss(coefficient=value)


def test_two_noise_losses() -> None:
    with pytest.raises(ValueError, match="several entries 'noise': keep one"):
        config.take_noise_loss([{"noise": {"coefficient": 1}}, {"noise": {"coefficient": 2}}])


def test_targets_of_losses() -> None:
    outputs = {
        "energy": {"level": "system"},
        "forces": None,
        "stress": {"decomposition": {"stress_isotropic": {}, "stress_anisotropic": {}}},
    }
    losses = [{name: {}} for name in ("energy", "forces", "stress_isotropic")]
    config.check_targets(losses, outputs)
    with pytest.raises(
        ValueError, match=r"'loss_functions' names 'force'.*not under 'outputs' \(did you mean 'forces'\?\)"
    ):
        config.check_targets([{"force": {}}], outputs)
    with pytest.raises(ValueError, match=r"'loss_functions' names 'noize'.*\(did you mean 'noise'\?\)"):
        config.check_targets([{"noize": {}}], outputs)
    with pytest.raises(ValueError, match=r"'outputs\.noise' is not an output of its own: remove it"):
        config.check_targets(losses, {**outputs, "noise": {"level": "atom"}})


# ------------------------------------------------------------------ transforms and folders


def test_transforms_that_do_not_exist() -> None:
    good = {
        "dens": {},
        "fairchem_dens.transforms.dens": {},
        "normalizer": {},
        "element_references": {},
        "decompose_tensor": {},
    }
    config.check_transforms(good, ["decompose_tensor"], "dataset.train.transforms")
    config.check_transforms(None, [], "dataset.train.transforms")
    config.check_transforms({"mine.own": {}}, ["mine"], "dataset.train.transforms")
    for typo, meant in (
        ("denss", "dens"),
        ("normaliser", "normalizer"),
        ("element_reference", "element_references"),
    ):
        with pytest.raises(
            ValueError,
            match=rf"'dataset\.val\.transforms\.{typo}' is not a transform \(did you mean '{meant}'\?\)",
        ):
            config.check_transforms({typo: {}}, ["decompose_tensor"], "dataset.val.transforms")
    with pytest.raises(
        ValueError, match=r"'dataset\.val\.transforms' must be a mapping of settings, found \['dens'\]"
    ):
        config.check_transforms(["dens"], [], "dataset.val.transforms")  # type: ignore[arg-type]


def test_folders_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "data.0000.lmdb").touch()
    file = tmp_path / "full" / "data.0000.lmdb"
    for src in (tmp_path / "full", file):
        config.check_sources(
            {"train": {"src": str(src)}, "val": {}, "relax": {"src": str(src), "format": "dens_lmdb"}}
        )
    for format_ in ("lmdb", "dens_lmdb", "trajectory_lmdb", "oc22_lmdb"):
        with pytest.raises(
            FileNotFoundError, match=r"'dataset\.val\.src' names '.*absent', which does not exist"
        ):
            config.check_sources({"val": {"src": str(tmp_path / "absent"), "format": format_}})
        with pytest.raises(
            FileNotFoundError, match=r"'dataset\.test\.src' names the folder '.*empty'.*no \*\.lmdb file"
        ):
            config.check_sources({"test": {"src": str(tmp_path / "empty"), "format": format_}})
    # Formats that are not folders of LMDBs are none of our business.
    config.check_sources({"train": {"src": "s3://bucket", "format": "ase_db"}})


def test_single_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    there, absent = str(tmp_path / "there"), str(tmp_path / "absent")
    ways: dict[str, Callable[[str], dict[str, Any]]] = {
        "transforms.normalizer.file": lambda file: {"transforms": {"normalizer": {"file": file}}},
        "transforms.normalizer.energy.file": lambda file: {
            "transforms": {"normalizer": {"fit": {"targets": ["forces"]}, "energy": {"file": file}}}
        },
        "metadata_path": lambda file: {"metadata_path": file},
        "oc20_ref": lambda file: {"train_on_oc20_total_energies": True, "oc20_ref": file},
    }
    for key, settings in ways.items():
        config.check_sources({"val": settings(there)})
        with pytest.raises(FileNotFoundError, match=rf"'dataset\.val\.{key}' names '{absent}', which is not"):
            config.check_sources({"val": settings(absent)})
    # Read by nobody, as in the authors' code.
    config.check_sources({"val": {"oc20_ref": absent}})


@pytest.mark.parametrize("empty", [None, "", []])
@pytest.mark.parametrize("format_", ["lmdb", "ase_db"])
def test_a_source_that_was_not_filled_in(empty: Any, format_: str) -> None:
    with pytest.raises(ValueError, match=r"'dataset\.train\.src' is empty: set it"):
        config.check_sources({"train": {"src": empty, "format": format_}})


# ------------------------------------------------------------------ paths


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENS_A", "/a")
    monkeypatch.setenv("DENS_EMPTY", "")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("DENS_UNSET", raising=False)


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("$DENS_A/x", "/a/x"),
        ("${DENS_A}/x", "/a/x"),
        ("x$DENS_A", "x/a"),
        ("${DENS_A}_x/${DENS_A}", "/a_x//a"),
        ("${DENS_A:-/b}/x", "/a/x"),
        ("${DENS_UNSET:-data}/x", "data/x"),
        ("${DENS_UNSET:-}x", "x"),
        ("${DENS_EMPTY:-data}/x", "data/x"),
        ("${DENS_UNSET:-$DENS_A}/x", "/a/x"),
        ("~/x", "/home/me/x"),
        ("${DENS_UNSET:-~/data}/x", "/home/me/data/x"),
        ("a~b/~", "a~b/~"),
        ("pa$$word", "pa$word"),
        ("$$DENS_A", "$DENS_A"),
        ("5$", "5$"),
        ("plain/path", "plain/path"),
    ],
)
def test_expansion(written: str, meant: str) -> None:
    assert config.expanded(written, "here") == meant


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize("written", ["$DENS_UNSET/x", "${DENS_UNSET}/x", "${DENS_EMPTY}/x"])
def test_a_variable_that_is_not_set(written: str) -> None:
    name = "DENS_EMPTY" if "EMPTY" in written else "DENS_UNSET"
    dataset = {"train": {"src": "x"}, "val": {"src": ["y", written]}}
    with pytest.raises(
        ValueError, match=rf"'dataset\.val\.src\[1\]' is .*environment variable {name} is not"
    ):
        config.tidied(dataset)


SPLIT = {
    "format": "lmdb",
    "src": "$DENS_A/src",
    "transforms": {
        "element_references": {"energy": {"file": "$DENS_A/references.npz"}, "file": "~/all.pt"},
        "normalizer": {"forces": {"file": "${DENS_UNSET:-b}/forces.npz"}, "energy": {"mean": 1.5, "rmsd": 2}},
    },
    "lin_ref": "$DENS_A/lin_ref.npz",
    "oc20_ref": "$DENS_A/ref.pkl",
    "metadata_path": "$DENS_A/metadata.npz",
    "subset_to": [{"op": "in", "metadata_key": "natoms", "rhv": "$DENS_A/natoms.txt"}],
    "key_mapping": {"y": "energy"},
    "first_n": 3,
    "no_shuffle": True,
    "lin": None,
}
EXPANDED_SPLIT = {
    "format": "lmdb",
    "src": "/a/src",
    "transforms": {
        "element_references": {"energy": {"file": "/a/references.npz"}, "file": "/home/me/all.pt"},
        "normalizer": {"forces": {"file": "b/forces.npz"}, "energy": {"mean": 1.5, "rmsd": 2}},
    },
    "lin_ref": "/a/lin_ref.npz",
    "oc20_ref": "/a/ref.pkl",
    "metadata_path": "/a/metadata.npz",
    "subset_to": [{"op": "in", "metadata_key": "natoms", "rhv": "/a/natoms.txt"}],
    "key_mapping": {"y": "energy"},
    "first_n": 3,
    "no_shuffle": True,
    "lin": None,
}


@pytest.mark.usefixtures("variables")
@pytest.mark.parametrize("split", ["train", "val", "test", "relax"])
def test_every_path_of_every_split(split: str) -> None:
    dataset = {"train": {"src": "x"}, split: SPLIT}
    before = copy.deepcopy(dataset)
    assert config.tidied(dataset) == {"train": {"src": "x"}, split: EXPANDED_SPLIT}
    assert dataset == before
    listed = {**SPLIT, "src": ["$DENS_A/1", "~/2"]}
    assert config.tidied({split: listed})[split]["src"] == ["/a/1", "/home/me/2"]


@pytest.mark.usefixtures("variables")
def test_paths_of_data_sets_as_a_list_or_alone() -> None:
    assert config.tidied([{"src": "x"}, SPLIT, {"src": "~"}]) == [
        {"src": "x"},
        EXPANDED_SPLIT,
        {"src": "/home/me"},
    ]
    assert config.tidied(SPLIT) == EXPANDED_SPLIT
    assert config.tidied(None) is None and config.tidied({}) == {}
    for dataset, key in (
        ([{"src": "$DENS_UNSET"}], r"dataset\[0\]\.src"),
        ({"src": "$DENS_UNSET"}, r"dataset\.src"),
    ):
        with pytest.raises(ValueError, match=f"'{key}' is '.DENS_UNSET'"):
            config.tidied(dataset)


def test_null_transforms_are_none() -> None:
    assert config.tidied({"train": {"src": "x", "transforms": None}}) == {
        "train": {"src": "x", "transforms": {}}
    }


def test_the_old_place_of_the_structures_to_relax() -> None:
    task = {"relax_dataset": {"src": "r"}, "write_pos": True}
    relax = {"src": "r"}
    assert config.with_relax_dataset({"train": {"src": "x"}}, task) == {"train": {"src": "x"}, "relax": relax}
    assert config.with_relax_dataset({"src": "x"}, task) == {"train": {"src": "x"}, "relax": relax}
    assert config.with_relax_dataset([{"src": "x"}, {"src": "y"}], task) == {
        "train": {"src": "x"},
        "val": {"src": "y"},
        "relax": relax,
    }
    for nothing in (None, {}, {"relax_dataset": None}, {"relax_dataset": {"src": None}}):
        assert config.with_relax_dataset({"train": {}}, nothing) == {"train": {}}
    same = {"train": {}, "relax": {"src": "r"}}
    assert config.with_relax_dataset(same, task) == same
    with pytest.raises(ValueError, match=r"twice, by 'task\.relax_dataset' and by 'dataset\.relax'"):
        config.with_relax_dataset({"train": {}, "relax": {"src": "other"}}, task)


def test_settings_that_nobody_reads() -> None:
    known = {"batch_size": 1, "scheduler_params": {}, "ema_decay": 0.9}
    assert config.unread_settings(known) == []
    assert config.unread_settings(known | {"clip_grad_nrom": 1, "force_coefficient": 1}) == [
        "Nobody reads 'optim.clip_grad_nrom' (did you mean 'clip_grad_norm'?): remove or correct it.",
        "Nobody reads 'optim.force_coefficient': remove or correct it.",
    ]
    # fairchem's other schedule takes its settings from here.
    assert config.unread_settings({"lr_gamma": 0.1}) == []


# ------------------------------------------------------------------ the authors' keys

PARAMS = {
    "prob": 0.5, "fixed_noise_std": True, "std": 0.1, "num_steps": 50, "std_low": 0.1, "std_high": 0.5,
    "corrupt_ratio": 0.5, "all_atoms": False,
}  # fmt: skip
LOSSES = [{"energy": {"fn": "mae", "coefficient": 2}}, {"forces": {"fn": "l2mae", "coefficient": 100}}]


def authors(**params: Any) -> dict[str, Any]:
    params = {key: value for key, value in {**PARAMS, **params}.items() if value is not ...}
    return {
        "lr_initial": 2e-4, "use_denoising_pos": True, "denoising_pos_params": params,
        "denoising_pos_coefficient": 10,
    }  # fmt: skip


def test_authors_keys_with_fixed_noise() -> None:
    """With ``fixed_noise_std`` the multi-scale values are there and mean nothing."""
    optim, dataset = authors(), {"train": {"src": "x", "transforms": {"normalizer": {}}}, "val": {"src": "y"}}
    before = copy.deepcopy((optim, dataset, LOSSES))
    new_optim, new_dataset, losses = config.translate_authors_keys(optim, dataset, LOSSES)
    assert (optim, dataset, LOSSES) == before
    assert new_optim == {"lr_initial": 2e-4}
    assert new_dataset["val"] == {"src": "y"}
    transforms = new_dataset["train"]["transforms"]
    assert set(transforms) == {"normalizer", "dens"}
    assert Corruption.from_config(transforms["dens"]) == Corruption(
        prob=0.5, std=0.1, corrupt_ratio=0.5, all_atoms=False, switch="batch"
    )
    assert losses[:2] == LOSSES
    noise, others = config.take_noise_loss(losses)
    assert others == LOSSES
    assert noise == NoiseLoss(
        coefficient=10, fn="l2mae", reduction="joint", decay=None, where="loss_functions[2].noise"
    )


@pytest.mark.parametrize("switch", [{"fixed_noise_std": False}, {"fixed_noise_std": ...}])
def test_authors_keys_with_multi_scale_noise(switch: dict[str, Any]) -> None:
    optim = authors(**switch, std=..., corrupt_ratio=None, all_atoms=True, prob=0.125)
    _, dataset, _ = config.translate_authors_keys(optim, {"train": {"src": "x"}}, LOSSES)
    expected = Corruption(
        prob=0.125,
        std_low=0.1,
        std_high=0.5,
        num_steps=50,
        corrupt_ratio=None,
        all_atoms=True,
        switch="batch",
    )
    assert Corruption.from_config(dataset["train"]["transforms"]["dens"]) == expected
    # A fixed σ that stands beside it is unused there as well.
    optim = authors(**switch, std=0.3, corrupt_ratio=None, all_atoms=True, prob=0.125)
    _, dataset, _ = config.translate_authors_keys(optim, {"train": {"src": "x"}}, LOSSES)
    assert Corruption.from_config(dataset["train"]["transforms"]["dens"]) == expected


def test_authors_keys_for_data_sets_as_a_list_or_alone() -> None:
    for dataset in ([{"src": "x"}, {"src": "y"}], {"src": "x", "format": "lmdb"}):
        _, new, losses = config.translate_authors_keys(authors(), dataset, LOSSES)
        train = new[0] if isinstance(new, list) else new
        assert train["transforms"]["dens"]["std"] == 0.1
        assert "noise" in losses[-1]


def test_authors_keys_switched_off() -> None:
    optim = authors() | {"use_denoising_pos": False}
    optim, dataset, losses = config.translate_authors_keys(optim, {"train": {"src": "x"}}, LOSSES)
    assert optim == {"lr_initial": 2e-4} and dataset == {"train": {"src": "x"}} and losses == LOSSES


def test_without_authors_keys_nothing_changes() -> None:
    given = {"lr_initial": 1}, {"train": {"src": "x", "transforms": {"dens": {}}}}, [*LOSSES, {"noise": {}}]
    assert config.translate_authors_keys(*copy.deepcopy(given)) == given
    assert config.translate_authors_keys({}, None, None) == ({}, None, None)
    assert config.translate_authors_keys({}, [{}], {}) == ({}, [{}], {})


@pytest.mark.parametrize("name", config.TRANSFORM_NAMES)
def test_both_styles_at_once(name: str) -> None:
    dataset = {"train": {"src": "x", "transforms": {name: {"prob": 0.5, "std": 0.1}}}}
    message = (
        rf"configured twice, by 'optim\.use_denoising_pos'.*'dataset\.train\.transforms\.{name}': remove one"
    )
    with pytest.raises(ValueError, match=message.replace("fairchem_dens.", r"fairchem_dens\.")):
        config.translate_authors_keys(authors(), dataset, LOSSES)
    with pytest.raises(
        ValueError, match=r"configured twice.*'optim\.use_denoising_pos'.*'loss_functions\.noise'"
    ):
        config.translate_authors_keys(
            authors(), {"train": {"src": "x"}}, [*LOSSES, {"noise": {"coefficient": 10}}]
        )
    # One of their keys alone beside ours is as ambiguous.
    with pytest.raises(ValueError, match=r"configured twice, by 'optim\.denoising_pos_coefficient'"):
        config.translate_authors_keys({"denoising_pos_coefficient": 10}, dataset, LOSSES)


def test_authors_keys_that_are_incomplete_or_misspelt() -> None:
    train = {"train": {"src": "x"}}
    for key in ("denoising_pos_params", "denoising_pos_coefficient"):
        optim = authors()
        value = optim.pop(key)
        with pytest.raises(
            ValueError, match=rf"'optim\.use_denoising_pos' is on but 'optim\.{key}' is missing"
        ):
            config.translate_authors_keys(optim, train, LOSSES)
        with pytest.raises(
            ValueError, match=rf"'optim\.{key}' is given without 'optim\.use_denoising_pos: True'"
        ):
            config.translate_authors_keys({key: value}, train, LOSSES)
    with pytest.raises(
        ValueError,
        match=r"Unknown setting 'optim\.denoising_pos_params\.corupt_ratio' \(did you mean 'corrupt_ratio'",
    ):
        config.translate_authors_keys(authors(corupt_ratio=0.5), train, LOSSES)
    with pytest.raises(ValueError, match=r"'optim\.denoising_pos_params' must be a mapping"):
        config.translate_authors_keys(authors() | {"denoising_pos_params": 0.5}, train, LOSSES)


def test_a_typo_in_an_authors_key_itself() -> None:
    """``use_denoising_pos`` misspelt would leave DeNS off; the other keys say that it was meant."""
    optim = authors()
    optim["use_denoising_poss"] = optim.pop("use_denoising_pos")
    with pytest.raises(
        ValueError, match=r"'optim\.denoising_pos_params' is given without 'optim\.use_denoising_pos"
    ):
        config.translate_authors_keys(optim, {"train": {"src": "x"}}, LOSSES)


def test_linear_references_become_a_transform(tmp_path: Path) -> None:
    file = tmp_path / "linref.npz"
    np.savez(file, coeff=np.zeros(100))
    dataset = {"train": {"src": "x", "lin_ref": str(file)}, "val": {"src": "y", "lin_ref": str(file)}}
    _, new, _ = config.translate_authors_keys({}, dataset, LOSSES)
    assert new == {
        "train": {"src": "x", "transforms": {"element_references": {"energy": {"file": str(file)}}}},
        "val": {"src": "y"},
    }
    # It is put beside transforms that are there, and beside the references of other targets.
    there = {
        "src": "x",
        "lin_ref": str(file),
        "transforms": {"normalizer": {"a": 1}, "element_references": {"stress": {}}},
    }
    _, new, _ = config.translate_authors_keys({}, {"train": there}, LOSSES)
    assert new["train"]["transforms"] == {
        "normalizer": {"a": 1},
        "element_references": {"stress": {}, "energy": {"file": str(file)}},
    }
    twice = {
        "src": "x",
        "lin_ref": str(file),
        "transforms": {"element_references": {"energy": {"file": "z"}}},
    }
    with pytest.raises(
        ValueError,
        match=r"given twice, by 'dataset\.train\.lin_ref'.*'dataset\.train\.transforms\.element_references'",
    ):
        config.translate_authors_keys({}, {"train": twice}, LOSSES)
    for empty in (None, False, ""):
        _, new, _ = config.translate_authors_keys({}, {"train": {"src": "x", "lin_ref": empty}}, LOSSES)
        assert new == {"train": {"src": "x"}}


REFERENCES = {"element_references": {"energy": {"file": "f.npz"}}}


@pytest.mark.parametrize(
    ("dataset", "meant"),
    [
        # An empty one for val does not take train's away: labels and predictions are totals in both.
        (
            {"train": {"src": "x", "lin_ref": "f.npz"}, "val": {"src": "y", "lin_ref": None}},
            {"train": {"src": "x", "transforms": REFERENCES}, "val": {"src": "y"}},
        ),
        (
            [{"src": "x", "lin_ref": "f.npz"}, {"src": "y", "lin_ref": "f.npz"}, {"src": "z"}],
            [{"src": "x", "transforms": REFERENCES}, {"src": "y"}, {"src": "z"}],
        ),
        ({"src": "x", "lin_ref": "f.npz"}, {"src": "x", "transforms": REFERENCES}),
        # Evaluation without a train split.
        *(
            (
                {**train, split: {"src": "y", "lin_ref": "f.npz"}},
                {"train": {"transforms": REFERENCES}, split: {"src": "y"}},
            )
            for split in ("val", "test", "relax")
            for train in ({}, {"train": {}}, {"train": None})
        ),
    ],
)
def test_linear_references_of_any_split(dataset: Any, meant: Any) -> None:
    assert config.translate_authors_keys({}, dataset, LOSSES)[1] == meant


def test_linear_references_that_contradict_each_other() -> None:
    for split in ("val", "test", "relax"):
        dataset = {"train": {"src": "x", "lin_ref": "f"}, split: {"src": "y", "lin_ref": "g"}}
        message = rf"'dataset\.train\.lin_ref' is 'f' and 'dataset\.{split}\.lin_ref' is 'g'"
        with pytest.raises(ValueError, match=message):
            config.translate_authors_keys({}, dataset, LOSSES)
        for train in ({"src": "x"}, {"src": "x", "lin_ref": None}):
            message = rf"'dataset\.{split}\.lin_ref' is given and 'dataset\.train\.lin_ref' is not"
            with pytest.raises(ValueError, match=message):
                config.translate_authors_keys(
                    {}, {"train": train, split: {"src": "y", "lin_ref": "g"}}, LOSSES
                )
    with pytest.raises(
        ValueError, match=r"'dataset\.val\.lin_ref' is given and 'dataset\.train\.lin_ref' is not"
    ):
        config.translate_authors_keys({}, [{"src": "x"}, {"src": "y", "lin_ref": "g"}], LOSSES)
    dataset = {"train": {"transforms": REFERENCES}, "val": {"src": "y", "lin_ref": "g"}}
    with pytest.raises(ValueError, match=r"given twice, by 'dataset\.val\.lin_ref'"):
        config.translate_authors_keys({}, dataset, LOSSES)


def test_a_yaml_without_losses() -> None:
    for none in ({}, [], None):
        with pytest.raises(
            ValueError, match=r"'loss_functions' is missing or empty.*'loss_fns'.*rename them"
        ):
            config.require_losses(none, {"strict_load": True})
        # fairchem makes them from `optim` then.
        config.require_losses(none, {"dataset": "trajectory_lmdb"})
    config.require_losses(LOSSES, None)


def test_losses_named_a_second_time() -> None:
    optim = {"loss_energy": "mae", "loss_force": "l2mae", "lr_initial": 1}
    assert config.translate_authors_keys(optim, None, LOSSES)[0] == {"lr_initial": 1}
    assert set(optim) == {"loss_energy", "loss_force", "lr_initial"}
    for key, target in (("loss_energy", "energy"), ("loss_force", "forces"), ("loss_forces", "forces")):
        message = rf"'optim\.{key}' is 'mse' and 'loss_functions\.{target}\.fn' is '\w+'"
        with pytest.raises(ValueError, match=message):
            config.translate_authors_keys({key: "mse"}, None, LOSSES)
    # Alone they are fairchem's to read.
    assert config.translate_authors_keys({"loss_energy": "mse"}, None, {})[0] == {"loss_energy": "mse"}


def test_authors_keys_in_a_yaml_without_loss_functions() -> None:
    for none in ({}, [], None):
        with pytest.raises(
            ValueError, match=r"'optim\.use_denoising_pos' is on but there is no 'loss_functions'"
        ):
            config.translate_authors_keys(authors(), {"train": {"src": "x"}}, none)


# ------------------------------------------------------------------ the checks themselves


def test_small_checks() -> None:
    assert nearest("corupt_ratio", ["prob", "corrupt_ratio"]) == " (did you mean 'corrupt_ratio'?)"
    assert nearest("zzz", ["prob", "corrupt_ratio"]) == ""
    refuse_unknown_keys({"a": 1}, iter(["a", "b"]), "here")
    with pytest.raises(ValueError, match=r"Unknown setting 'here\.3'\. Known under 'here': a, b"):
        refuse_unknown_keys({3: 1}, ["b", "a"], "here")
    assert require_mapping(None, "here") == {}
    assert require_number(3, "here") == 3.0
    with pytest.raises(ValueError, match="'here' must be a number, found None"):
        require_number(None, "here")
