"""From a YAML to settings: the authors' keys translated, contradictions refused.

The one place that knows how DeNS was configured elsewhere.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fairchem_dens.corruption import Corruption
from fairchem_dens.keys import NOISE
from fairchem_dens.objective import NoiseLoss
from fairchem_dens.validation import nearest, refuse_unknown_keys, require_mapping, require_number

TRANSFORM_NAMES = ("dens", "fairchem_dens.transforms.dens")
"""What the transform may be called under ``dataset.train.transforms``."""

_AUTHORS_KEYS = ("use_denoising_pos", "denoising_pos_params", "denoising_pos_coefficient")
_AUTHORS_PARAMS = (
    "prob",
    "fixed_noise_std",
    "std",
    "num_steps",
    "std_low",
    "std_high",
    "corrupt_ratio",
    "all_atoms",
)
_NOT_TRANSFORMS = ("normalizer", "element_references")
_LMDB_FORMATS = ("lmdb", "single_point_lmdb", "trajectory_lmdb", "oc22_lmdb", "dens_lmdb")


def translate_authors_keys(
    optim: Mapping[str, Any] | None, dataset: Any, loss_functions: Any
) -> tuple[dict[str, Any], Any, Any]:
    """Return ``optim``, ``dataset`` and ``loss_functions`` with the paper's own keys replaced by ours.

    ``optim.use_denoising_pos``, ``optim.denoising_pos_params`` and ``optim.denoising_pos_coefficient`` become
    the transform ``dens`` with one coin per batch and the ``noise`` entry of the losses. A ``lin_ref`` of the
    data set, which fairchem-core 1.10.0 ignores, becomes ``element_references``. The arguments are not
    changed.

    Raises:
        ValueError: both styles at once, an unknown parameter, or a parameter without its switch.
    """
    optim, dataset, loss_functions = dict(optim or {}), copy.deepcopy(dataset), copy.deepcopy(loss_functions)
    splits = _splits(dataset)
    _move_linear_references(splits)
    theirs = {key: optim.pop(key) for key in _AUTHORS_KEYS if key in optim}
    if not theirs:
        return optim, dataset, loss_functions

    train = splits.get("train", {})
    ours = dens_name(train.get("transforms"))
    if ours is not None or any(NOISE in entry for entry in loss_functions or []):
        place = f"dataset.train.transforms.{ours}" if ours is not None else f"loss_functions.{NOISE}"
        raise ValueError(
            f"DeNS is configured twice, by 'optim.{next(iter(theirs))}' (the authors' keys) and by "
            f"'{place}': remove one of the two."
        )
    if "use_denoising_pos" not in theirs:
        raise ValueError(
            f"'optim.{next(iter(theirs))}' is given without 'optim.use_denoising_pos: True', which switches "
            "DeNS on."
        )
    if not theirs["use_denoising_pos"]:
        return optim, dataset, loss_functions
    for key in _AUTHORS_KEYS:
        if theirs.get(key) is None:
            raise ValueError(f"'optim.use_denoising_pos' is on but 'optim.{key}' is missing.")

    params = require_mapping(theirs["denoising_pos_params"], "optim.denoising_pos_params")
    refuse_unknown_keys(params, _AUTHORS_PARAMS, "optim.denoising_pos_params")
    levels = ("std",) if params.get("fixed_noise_std", False) else ("std_low", "std_high", "num_steps")
    wanted = ("prob", *levels, "corrupt_ratio", "all_atoms")
    dens = {key: params[key] for key in wanted if params.get(key) is not None} | {"switch": "batch"}
    # What is wrong is said under the name that its user wrote.
    Corruption.from_config(dens, where="optim.denoising_pos_params")
    if train:
        train["transforms"] = {**(train.get("transforms") or {}), "dens": dens}
    coefficient = require_number(theirs["denoising_pos_coefficient"], "optim.denoising_pos_coefficient")
    noise = {"fn": "l2mae", "coefficient": coefficient}
    return optim, dataset, [*(loss_functions or []), {NOISE: noise}]


def tidied(dataset: Any) -> Any:
    """Return the data settings with ``$VARIABLE`` and ``~`` expanded in each ``src``, and no null transforms.

    fairchem expands nothing, and stumbles over the latter.
    """
    dataset = copy.deepcopy(dataset)
    for split in _splits(dataset).values():
        if "transforms" in split and split["transforms"] is None:
            split["transforms"] = {}
        if isinstance(split.get("src"), str):
            # Not a Path: other formats than LMDB take addresses here, which a Path would garble.
            split["src"] = os.path.expanduser(os.path.expandvars(split["src"]))  # noqa: PTH111
    return dataset


def _splits(dataset: Any) -> dict[str, dict[str, Any]]:
    """The settings of each split, whichever way fairchem accepts them; the dicts are those of ``dataset``."""
    if isinstance(dataset, list):
        named = dict(zip(("train", "val", "test"), dataset, strict=False))
    elif isinstance(dataset, dict) and any(split in dataset for split in ("train", "val", "test", "relax")):
        named = dataset
    else:
        named = {"train": dataset}
    return {name: split for name, split in named.items() if isinstance(split, dict)}


def dens_name(transforms: Mapping[str, Any] | None) -> str | None:
    """Return the name that the transform ``dens`` has among these, None if it is not there."""
    return next((name for name in TRANSFORM_NAMES if name in (transforms or {})), None)


def _move_linear_references(splits: Mapping[str, dict[str, Any]]) -> None:
    files = {name: split.pop("lin_ref") for name, split in splits.items() if "lin_ref" in split}
    file = files.get("train") or next((file for file in files.values() if file), None)
    if not file or "train" not in splits:
        return
    transforms = dict(splits["train"].get("transforms") or {})
    if "energy" in (transforms.get("element_references") or {}):
        raise ValueError(
            "Linear references are given twice, by 'dataset.train.lin_ref' (the authors' key) and by "
            "'dataset.train.transforms.element_references': remove one of the two."
        )
    references = dict(transforms.get("element_references") or {})
    references["energy"] = {"file": file}
    splits["train"]["transforms"] = {**transforms, "element_references": references}


def take_noise_loss(loss_functions: Any) -> tuple[NoiseLoss | None, list[dict[str, Any]]]:
    """Split ``loss_functions`` into the entry on the noise, which fairchem does not know, and the others.

    Raises:
        ValueError: the entry is not valid, or there are several.
    """
    noise, others = None, []
    for index, entry in enumerate(loss_functions or []):
        if NOISE in entry:
            if noise is not None:
                raise ValueError(f"'loss_functions' has several entries '{NOISE}': keep one.")
            noise = NoiseLoss.from_config(entry[NOISE], where=f"loss_functions[{index}].{NOISE}")
        rest = {target: settings for target, settings in entry.items() if target != NOISE}
        if rest:
            others.append(rest)
    return noise, others


def check_targets(loss_functions: Iterable[Mapping[str, Any]], outputs: Mapping[str, Any]) -> None:
    """Refuse a loss on something that is not an output, and ``noise`` as an output.

    Raises:
        ValueError: names the target and the nearest known one.
    """
    if NOISE in outputs:
        raise ValueError(
            f"'outputs.{NOISE}' is not an output of its own: remove it. The noise follows the settings of "
            "'outputs.forces'."
        )
    known = set(outputs)
    for settings in outputs.values():
        known.update((settings or {}).get("decomposition", {}))
    for entry in loss_functions:
        for target in entry:
            if target not in known:
                raise ValueError(
                    f"'loss_functions' names '{target}', which is not under "
                    f"'outputs'{nearest(target, [*known, NOISE])}."
                )


def check_transforms(transforms: Mapping[str, Any] | None, available: Iterable[str], where: str) -> None:
    """Refuse a transform that does not exist.

    Args:
        transforms: the YAML mapping.
        available: names that fairchem can resolve.
        where: YAML path of the mapping.

    Raises:
        ValueError: names the key and the nearest known one.
    """
    known = [*TRANSFORM_NAMES, *_NOT_TRANSFORMS]
    for name in require_mapping(transforms, where):
        if name not in known and name.split(".")[0] not in available:
            raise ValueError(f"'{where}.{name}' is not a transform{nearest(name, known)}.")


def check_sources(splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse LMDB folders that do not exist or are empty, before fairchem asserts something about them.

    Args:
        splits: settings by split; those without ``src`` are passed over.

    Raises:
        FileNotFoundError: names the path and the YAML key.
    """
    for name, settings in splits.items():
        src = settings.get("src")
        if not isinstance(src, str) or settings.get("format", "lmdb") not in _LMDB_FORMATS:
            continue
        path = Path(src)
        if not path.exists():
            raise FileNotFoundError(
                f"'dataset.{name}.src' names '{src}', which does not exist (looked in {Path.cwd()}): set it "
                "to the folder with the LMDB files."
            )
        if path.is_dir() and not any(path.glob("*.lmdb")):
            raise FileNotFoundError(
                f"'dataset.{name}.src' names the folder '{src}', which holds no *.lmdb file."
            )
