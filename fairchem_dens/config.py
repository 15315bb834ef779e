"""From a YAML to settings: paths expanded, the authors' keys translated, contradictions refused.

The one place that knows how DeNS was configured elsewhere.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fairchem_dens.corruption import Corruption
from fairchem_dens.keys import NOISE
from fairchem_dens.objective import NoiseLoss
from fairchem_dens.training.settings import KEYS as STEP_KEYS
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
_LISTED_SPLITS = ("train", "val", "test")
_SPLITS = (*_LISTED_SPLITS, "relax")
_OPTIM_KEYS = (
    "batch_size",
    "eval_batch_size",
    "num_workers",
    "local_num_workers",
    "load_balancing",
    "load_balancing_on_error",
    "lr_initial",
    "optimizer",
    "optimizer_params",
    "weight_decay",
    "scheduler",
    "scheduler_params",
    "max_epochs",
    "clip_grad_norm",
    "ema_decay",
    "eval_every",
    "checkpoint_every",
    "load_datasets_and_model_then_exit",
    *STEP_KEYS,
    "cuda_graph",
)
"""What is read of ``optim`` where the schedule is under ``scheduler_params``."""
_LOSS_NAMES = {"loss_energy": "energy", "loss_force": "forces", "loss_forces": "forces"}
"""Where YAMLs from before ``loss_functions`` named the losses, and of which target."""
_VARIABLE = re.compile(r"\$\$|\$\{(?P<braced>\w+)(?::-(?P<default>[^}]*))?\}|\$(?P<plain>[A-Za-z_]\w*)")


def translate_authors_keys(
    optim: Mapping[str, Any] | None, dataset: Any, loss_functions: Any
) -> tuple[dict[str, Any], Any, Any]:
    """Return ``optim``, ``dataset`` and ``loss_functions`` with the paper's own keys replaced by ours.

    ``optim.use_denoising_pos``, ``optim.denoising_pos_params`` and ``optim.denoising_pos_coefficient`` become
    the transform ``dens`` with one coin per batch and the ``noise`` entry of the losses. A ``lin_ref`` of the
    data set, which fairchem-core 1.10.0 ignores, becomes ``element_references``. ``optim.loss_energy`` and
    ``optim.loss_force``, which nobody reads beside ``loss_functions``, are dropped where they agree with it.
    The arguments are not changed.

    Raises:
        ValueError: both styles at once, an unknown parameter, a parameter without its switch, references for
            some splits only, or a loss named twice and differently.
    """
    optim, dataset, loss_functions = dict(optim or {}), copy.deepcopy(dataset), copy.deepcopy(loss_functions)
    _drop_loss_names(optim, loss_functions)
    _move_linear_references(dataset)
    splits = _splits(dataset)
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
    if not loss_functions:
        raise ValueError(
            "'optim.use_denoising_pos' is on but there is no 'loss_functions': write the losses on energy "
            "and forces there. Their places before that ('loss_fns', 'optim.force_coefficient') are not read."
        )

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
    """Return the data settings with all paths expanded (`expanded`) and no null transforms.

    fairchem expands nothing, and stumbles over the latter. Every command of fairchem builds a trainer, which
    passes its data settings through here before it opens anything.

    Raises:
        ValueError: see `expanded`.
    """
    dataset = expanded(dataset, "dataset")
    for split in _splits(dataset).values():
        if "transforms" in split and split["transforms"] is None:
            split["transforms"] = {}
    return dataset


def expanded(settings: Any, where: str) -> Any:
    """Return a copy of settings in which each text has its variables and its leading ``~`` expanded.

    ``$NAME``, ``${NAME}`` and ``${NAME:-default}`` are those of the environment; the default, which may hold
    variables itself, also stands in for a variable that is set to nothing, as in a shell. ``$$`` is a dollar
    sign.

    Args:
        settings: any YAML value.
        where: its YAML path.

    Raises:
        ValueError: a variable without default is not set; names it and the YAML key.
    """
    if isinstance(settings, Mapping):
        return {key: expanded(value, f"{where}.{key}") for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [expanded(value, f"{where}[{index}]") for index, value in enumerate(settings)]
    if isinstance(settings, str):
        # Not a Path: other formats than LMDB take addresses here, which a Path would garble.
        return os.path.expanduser(_with_variables(settings, where))  # noqa: PTH111
    return settings


def _with_variables(text: str, where: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match["braced"] or match["plain"]
        if name is None:
            return "$"
        if os.environ.get(name):
            return os.environ[name]
        if match["default"] is not None:
            return _with_variables(match["default"], where)
        raise ValueError(
            f"'{where}' is '{text}', but the environment variable {name} is not set: export it, write "
            f"${{{name}:-DEFAULT}}, or write the path itself ('$$' for a dollar sign)."
        )

    return _VARIABLE.sub(value, text)


def with_relax_dataset(dataset: Any, task: Mapping[str, Any] | None) -> Any:
    """Return the data settings with the ``relax_dataset`` of ``task``, its place of old, as split ``relax``.

    fairchem-core 1.10.0 opens ``dataset.relax`` alone.

    Raises:
        ValueError: both are given, and differ.
    """
    moved = (task or {}).get("relax_dataset")
    if not isinstance(moved, Mapping) or not moved.get("src"):
        return dataset
    if isinstance(dataset, list):
        dataset = dict(zip(_LISTED_SPLITS, dataset, strict=False))
    elif not _has_splits(dataset):
        dataset = {"train": dataset}
    if dataset.get("relax") not in (None, {}, moved):
        raise ValueError(
            "The structures to relax are given twice, by 'task.relax_dataset' and by 'dataset.relax': remove "
            "the first."
        )
    return {**dataset, "relax": dict(moved)}


def _splits(dataset: Any) -> dict[str, dict[str, Any]]:
    """The settings of each split, whichever way fairchem accepts them; the dicts are those of ``dataset``."""
    if isinstance(dataset, list):
        named = dict(zip(_LISTED_SPLITS, dataset, strict=False))
    elif _has_splits(dataset):
        named = dataset
    else:
        named = {"train": dataset}
    return {name: split for name, split in named.items() if isinstance(split, dict)}


def _has_splits(dataset: Any) -> bool:
    return isinstance(dataset, dict) and any(split in dataset for split in _SPLITS)


def dens_name(transforms: Mapping[str, Any] | None) -> str | None:
    """Return the name that the transform ``dens`` has among these, None if it is not there."""
    return next((name for name in TRANSFORM_NAMES if name in (transforms or {})), None)


def _drop_loss_names(optim: dict[str, Any], loss_functions: Any) -> None:
    """Take out what names the losses a second time; alone, fairchem turns it into ``loss_functions``."""
    written = {target: settings for entry in loss_functions or [] for target, settings in entry.items()}
    for key, target in _LOSS_NAMES.items():
        if key not in optim or target not in written:
            continue
        fn = (written[target] or {}).get("fn")
        if optim[key] != fn:
            raise ValueError(
                f"'optim.{key}' is {optim[key]!r} and 'loss_functions.{target}.fn' is {fn!r}: the second is "
                "what counts, so remove the first."
            )
        del optim[key]


def _move_linear_references(dataset: Any) -> None:
    """Turn the ``lin_ref`` of the splits, in place, into ``element_references`` of the train split.

    That is where fairchem-core 1.10.0 looks, for whichever split; a split without data will do.
    """
    splits = _splits(dataset)
    given = {name: split.pop("lin_ref") for name, split in splits.items() if "lin_ref" in split}
    files = {name: file for name, file in given.items() if file}
    if not files:
        return
    first, file = next(iter(files.items()))
    for name, other in files.items():
        if other != file:
            raise ValueError(
                f"'dataset.{first}.lin_ref' is '{file}' and 'dataset.{name}.lin_ref' is '{other}': a run has "
                "one set of references, so name the same file in both."
            )
    if "src" in splits.get("train", {}) and "train" not in files:
        raise ValueError(
            f"'dataset.{first}.lin_ref' is given and 'dataset.train.lin_ref' is not: the model would be "
            f"trained on other energies than it is tested on. Set 'dataset.train.lin_ref: {file}', or remove "
            "both."
        )
    if "train" not in splits:
        splits["train"] = dataset["train"] = {}
    transforms = dict(splits["train"].get("transforms") or {})
    if "energy" in (transforms.get("element_references") or {}):
        raise ValueError(
            f"Linear references are given twice, by 'dataset.{first}.lin_ref' (the authors' key) and by "
            "'dataset.train.transforms.element_references': remove one of the two."
        )
    references = dict(transforms.get("element_references") or {})
    references["energy"] = {"file": file}
    splits["train"]["transforms"] = {**transforms, "element_references": references}


def unread_settings(optim: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each key of ``optim`` that neither fairchem nor this package reads.

    Without ``scheduler_params`` fairchem takes the schedule's settings from ``optim`` itself, by names that
    depend on the schedule; then nothing is said.
    """
    if "scheduler_params" not in optim:
        return []
    return [
        f"Nobody reads 'optim.{key}'{nearest(key, _OPTIM_KEYS)}: remove or correct it."
        for key in optim
        if key not in _OPTIM_KEYS
    ]


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


def require_losses(loss_functions: Any, task: Mapping[str, Any] | None) -> None:
    """Refuse settings without losses, unless they are of the style that fairchem derives them from.

    Raises:
        ValueError: there are none.
    """
    if not loss_functions and "dataset" not in (task or {}):
        raise ValueError(
            "'loss_functions' is missing or empty. YAMLs for early releases of OCP 2 call it 'loss_fns' (and "
            "'evaluation_metrics' 'eval_metrics'), which fairchem-core 1.10.0 does not read: rename them."
        )


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
    """Refuse folders and files that do not exist, before fairchem asserts something about them.

    Args:
        splits: settings by split; those without ``src`` are passed over.

    Raises:
        ValueError: ``src`` is there and empty.
        FileNotFoundError: names the path and the YAML key.
    """
    for name, settings in splits.items():
        where = f"dataset.{name}"
        for key, file in _files(settings, where):
            if not Path(file).is_file():
                raise FileNotFoundError(
                    f"'{key}' names '{file}', which is not a file (looked in {Path.cwd()})."
                )
        if "src" not in settings:
            continue
        src = settings["src"]
        if not src:
            raise ValueError(f"'{where}.src' is empty: set it to the path of your data.")
        if not isinstance(src, str) or settings.get("format", "lmdb") not in _LMDB_FORMATS:
            continue
        path = Path(src)
        if not path.exists():
            raise FileNotFoundError(
                f"'{where}.src' names '{src}', which does not exist (looked in {Path.cwd()}): set it "
                "to the folder with the LMDB files."
            )
        if path.is_dir() and not any(path.glob("*.lmdb")):
            raise FileNotFoundError(f"'{where}.src' names the folder '{src}', which holds no *.lmdb file.")


def _files(settings: Mapping[str, Any], where: str) -> Iterator[tuple[str, str]]:
    """Yield YAML key and path of each single file that a split names, other than its references."""
    normalizers = (settings.get("transforms") or {}).get("normalizer") or {}
    place = f"{where}.transforms.normalizer"
    require_mapping(normalizers, place)
    if isinstance(normalizers.get("file"), str):
        yield f"{place}.file", normalizers["file"]
    for target, entry in normalizers.items():
        if isinstance(entry, Mapping) and isinstance(entry.get("file"), str):
            yield f"{place}.{target}.file", entry["file"]
    if settings.get("metadata_path"):
        yield f"{where}.metadata_path", settings["metadata_path"]
    if settings.get("train_on_oc20_total_energies") and settings.get("oc20_ref"):
        yield f"{where}.oc20_ref", settings["oc20_ref"]
