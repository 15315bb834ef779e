"""What the settings of a run may be, checked before anything is built from them.

fairchem-core 1.10.0 takes most settings as they come: a wrong one ends in an assertion, an ``AttributeError``
or a division by zero somewhere below, some only at the first evaluation, after hours. Here each is refused
at once, by its YAML key, with what was found and what is right. Settings of which nothing is known pass.
"""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import fairchem.core.modules.evaluator as fairchem_metrics
import torch
from fairchem.core.common.registry import registry
from fairchem.core.modules.evaluator import Evaluator
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import SGD

from fairchem_dens.keys import NOISE
from fairchem_dens.validation import nearest, refuse_unknown_keys, require_mapping, require_number

Rule = Callable[[Any, str], Any]
"""Takes a value and its YAML key, and raises a `ValueError` if the value is wrong."""

_SPLITS = ("train", "val", "test", "relax")
_REDUCTIONS = ("mean", "sum")
_LEVELS = ("system", "atom")
_COSINE = ("warmup_epochs", "warmup_factor", "lr_min_factor")
_MULTISTEP = ("warmup_epochs", "warmup_factor", "decay_epochs", "decay_rate")


# ------------------------------------------------------------------ rules for one value


def number(
    minimum: float = -math.inf, maximum: float = math.inf, *, whole: bool = False, above: bool = False
) -> Rule:
    """Return the rule for a finite number in a range, whole or not, the minimum itself being right or not."""
    kind = "a whole number" if whole else "a number"
    lower = f" {'above' if above else 'from'} {minimum:g}" if math.isfinite(minimum) else ""
    upper = f" to {maximum:g}" if math.isfinite(maximum) else ""

    def check(value: Any, where: str) -> None:
        found = math.nan if whole and type(value) is not int else require_number(value, where)
        if not math.isfinite(found) or not minimum <= found <= maximum or (above and found == minimum):
            raise ValueError(f"'{where}' must be {kind}{lower}{upper}, found {value!r}.")

    return check


def one_of(*values: Any) -> Rule:
    """Return the rule for some values."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(known) and value == known for known in values):
            said = ", ".join(map(repr, values))
            near = nearest(value, [v for v in values if isinstance(v, str)]) if isinstance(value, str) else ""
            raise ValueError(f"'{where}' must be one of {said}, found {value!r}{near}.")

    return check


def text(value: Any, where: str) -> None:
    """Refuse what is not text, or empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"'{where}' must be a text, found {value!r}.")


def or_null(rule: Rule) -> Rule:
    """Return the rule that lets None pass, too."""
    return lambda value, where: None if value is None else rule(value, where)


def list_of(rule: Rule) -> Rule:
    """Return the rule for a list."""

    def check(value: Any, where: str) -> None:
        if not isinstance(value, list | tuple):
            raise ValueError(f"'{where}' must be a list, found {value!r}.")
        for index, item in enumerate(value):
            rule(item, f"{where}[{index}]")

    return check


flag = one_of(True, False)
mapping: Rule = require_mapping


def section(value: Any, where: str) -> None:
    """Refuse what is no mapping, or is not there: an entry of a list, unlike a key, is never left out."""
    if value is None:
        raise ValueError(f"'{where}' is empty: fill it in, or remove it.")
    require_mapping(value, where)


def follow(settings: Any, rules: Mapping[str, Rule], where: str) -> Mapping[str, Any]:
    """Apply rules to those settings that are there; returns the settings, {} for None.

    Raises:
        ValueError: ``settings`` is no mapping, or one of them is wrong.
    """
    settings = require_mapping(settings, where)
    for key, rule in rules.items():
        if key in settings:
            rule(settings[key], f"{where}.{key}")
    return settings


def _named(value: Any, where: str, known: Iterable[str], kind: str) -> None:
    text(value, where)
    known = list(known)
    if value not in known:
        raise ValueError(f"'{where}' names '{value}', which is not a {kind}{nearest(value, known)}.")


# ------------------------------------------------------------------ a run


def check_run(given: Mapping[str, Any]) -> None:
    """Check the settings of a run, as fairchem hands them to a trainer.

    Args:
        given: arguments of a trainer, by name.

    Raises:
        ValueError: names the YAML key, what was found and what is right.
    """
    mapping(given.get("task"), "task")
    section(given["model"], "model")
    follow(given["model"], {"name": text}, "model")
    if "name" not in given["model"]:
        raise ValueError("'model.name' is missing: fairchem_dens.models.EquiformerV2DeNS, for example.")
    _check_logger(given.get("logger", "wandb"))
    _check_dataset(given.get("dataset"))
    if given.get("inference_only"):
        return  # such as a calculator, from whatever was written into a checkpoint
    outputs = _check_outputs(given.get("outputs"))
    _check_optim(given.get("optimizer"))
    _check_losses(given.get("loss_functions"))
    dataset = given.get("dataset") or {}
    evaluates = bool(dataset.get("val")) if isinstance(dataset, Mapping) else len(dataset) > 1
    _check_metrics(given.get("evaluation_metrics"), outputs, evaluates=evaluates)


def _check_logger(logger: Any) -> None:
    name = logger.get("name") if isinstance(logger, Mapping) else logger
    where = "logger.name" if isinstance(logger, Mapping) else "logger"
    _named(name, where, ["none", "wandb_singleton", *registry.mapping["logger_name_mapping"]], "logger")


# ------------------------------------------------------------------ optim

_MOST = 100_000
_MOST_LAYERS, _MOST_WORKERS, _LARGEST_RADIUS = 1000, 1000, 1000
"""What is larger is a slip: building it would never end, or take the machine with it."""

_OPTIM: Mapping[str, Rule] = {
    "batch_size": number(1, _MOST, whole=True),
    "eval_batch_size": number(1, _MOST, whole=True),
    "num_workers": number(0, _MOST_WORKERS, whole=True),
    "local_num_workers": number(0, _MOST_WORKERS, whole=True),
    "load_balancing": or_null(one_of("atoms", False)),
    "load_balancing_on_error": or_null(one_of("warn_and_balance", "warn_and_no_balance", "raise")),
    "lr_initial": number(0),
    "optimizer_params": mapping,
    "weight_decay": number(0),
    "scheduler_params": mapping,
    "max_epochs": number(1, 1_000_000, whole=True),
    "clip_grad_norm": or_null(number(0)),
    "ema_decay": or_null(number(0, 1)),
    "eval_every": number(1, whole=True),
    "load_datasets_and_model_then_exit": flag,
}
_SECTIONS = ("optimizer_params", "scheduler_params")
_IMPLEMENTATION = ("fused", "foreach", "capturable", "differentiable")
"""Arguments of optimizers that depend on the device and change no number."""
_OLD_SCHEDULE = ("warmup_steps", "warmup_factor", "lr_milestones", "lr_gamma")
_FLOATS = ("warmup_factor", "lr_min_factor", "decay_rate")
_SCHEDULE: Mapping[str, Rule] = {
    "lambda_type": one_of("cosine", "multistep"),
    "warmup_epochs": number(0),
    "warmup_factor": number(0),
    "lr_min_factor": number(0),
    "decay_epochs": list_of(number(0)),
    "decay_rate": number(0),
}


def _check_optim(settings: Any) -> None:
    optim = follow(settings, _OPTIM, "optim")
    for key in ("num_workers", "lr_initial", "max_epochs"):
        if key not in optim:
            raise ValueError(f"'optim.{key}' is missing{nearest(key, optim)}.")
    if "checkpoint_every" in optim and optim["checkpoint_every"] != -1:
        number(1, whole=True)(optim["checkpoint_every"], "optim.checkpoint_every")
    _check_optimizer(optim)
    _check_schedule(optim)


def _check_optimizer(optim: Mapping[str, Any]) -> None:
    known: dict[str, Callable[..., Any]] = {
        name: found
        for name, found in vars(torch.optim).items()
        if inspect.isclass(found) and issubclass(found, Optimizer)
    }
    name = optim.get("optimizer", "AdamW")
    _named(name, "optim.optimizer", known, "class of torch.optim")
    params = optim.get("optimizer_params") or {}
    arguments = [
        name for name in inspect.signature(known[name]).parameters if name not in ("self", "params", "lr")
    ]
    refuse_unknown_keys(params, arguments, "optim.optimizer_params")
    follow(params, {"weight_decay": number(0), "eps": number(0), "amsgrad": flag}, "optim.optimizer_params")
    mathematical = {key: value for key, value in params.items() if key not in _IMPLEMENTATION}
    try:
        known[name]([torch.nn.Parameter(torch.zeros(1))], lr=0.1, **mathematical)
    except Exception as error:
        raise ValueError(
            f"'optim.optimizer_params' are not those of torch.optim.{name}: {error}. Found {dict(params)!r}."
        ) from error


def _check_schedule(optim: Mapping[str, Any]) -> None:
    schedule, where = optim.get("scheduler"), "optim.scheduler_params"
    params = follow(optim.get("scheduler_params"), _SCHEDULE, where)
    if schedule is None:
        # fairchem's schedule of old, with its settings among those of `optim`.
        missing = [key for key in _OLD_SCHEDULE if key not in optim]
        if missing or "scheduler_params" in optim:
            raise ValueError(
                "'optim.scheduler' is missing: LambdaLR (with 'optim.scheduler_params.lambda_type'), another "
                "class of torch.optim.lr_scheduler, or Null."
            )
        return
    known: dict[str, Callable[..., Any]] = {
        name: found for name, found in vars(torch.optim.lr_scheduler).items() if inspect.isclass(found)
    }
    _named(schedule, "optim.scheduler", ["Null", *known], "class of torch.optim.lr_scheduler")
    if schedule == "LambdaLR":
        if "lambda_type" not in params:
            near = nearest("lambda_type", params)
            raise ValueError(f"'{where}.lambda_type' is missing: cosine or multistep{near}.")
        for key in _COSINE if params["lambda_type"] == "cosine" else _MULTISTEP:
            if key not in params:
                raise ValueError(f"'{where}.{key}' is missing{nearest(key, params)}.")
    elif schedule != "Null":
        given = params if "scheduler_params" in optim else optim
        arguments = list(inspect.signature(known[schedule]).parameters)[1:]
        chosen = {key: given[key] for key in arguments if key in given}
        try:
            known[schedule](SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), **chosen)
        except Exception as error:
            raise ValueError(
                f"'{where}' are not those of torch.optim.lr_scheduler.{schedule}: {error}. Found {chosen!r}."
            ) from error


def as_fairchem_reads(optim: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``optim`` without empty sections, and with floats where fairchem asserts that they are."""
    changed = {key: value for key, value in optim.items() if value is not None or key not in _SECTIONS}
    if "lr_initial" in optim:
        changed["lr_initial"] = float(optim["lr_initial"])
    if optim.get("scheduler_params"):
        changed["scheduler_params"] = {
            key: float(value) if key in _FLOATS else value for key, value in optim["scheduler_params"].items()
        }
    return changed


# ------------------------------------------------------------------ targets


def _check_outputs(outputs: Any) -> Mapping[str, Any]:
    rules: Mapping[str, Rule] = {
        "level": one_of(*_LEVELS),
        "train_on_free_atoms": flag,
        "eval_on_free_atoms": flag,
        "property": text,
    }
    outputs = require_mapping(outputs, "outputs")
    for target, settings in outputs.items():
        if settings is None:
            raise ValueError(f"'outputs.{target}' is empty: give it a 'level', system or atom.")
        settings = follow(settings, rules, f"outputs.{target}")
        for part, of_part in require_mapping(
            settings.get("decomposition"), f"outputs.{target}.decomposition"
        ).items():
            follow(of_part, rules, f"outputs.{target}.decomposition.{part}")
        if "level" not in settings:
            raise ValueError(
                f"'outputs.{target}.level' is missing: system or atom{nearest('level', settings)}."
            )
    return outputs


def _check_losses(losses: Any) -> None:
    where = "loss_functions"
    if not losses and losses is not False and losses != 0:
        return  # what is missing is said elsewhere, if it must be there
    list_of(section)(losses, where)
    for index, entry in enumerate(losses):
        for target, settings in require_mapping(entry, f"{where}[{index}]").items():
            if target == NOISE:
                continue  # see `objective.NoiseLoss`
            place = f"{where}[{index}].{target}"
            settings = follow(
                settings,
                {"coefficient": number(0), "reduction": or_null(one_of(*_REDUCTIONS))},
                place,
            )
            for key in ("fn", "coefficient"):
                if key not in settings:
                    raise ValueError(f"'{place}.{key}' is missing{nearest(key, settings)}.")
            _named(settings["fn"], f"{place}.fn", registry.mapping["loss_name_mapping"], "loss")
            refuse_unknown_keys(settings, ("fn", "coefficient", "reduction"), place)


def _check_metrics(settings: Any, outputs: Mapping[str, Any], *, evaluates: bool) -> None:
    where = "evaluation_metrics"
    settings = follow(settings, {"metrics": mapping, "primary_metric": or_null(text)}, where)
    refuse_unknown_keys(settings, ("metrics", "primary_metric"), where)
    known = _metric_names()
    wanted = require_mapping(settings.get("metrics"), f"{where}.metrics")
    targets = set(outputs)
    for of_target in outputs.values():
        targets |= set((of_target or {}).get("decomposition") or {})
    for target, names in wanted.items():
        place = f"{where}.metrics.{target}"
        if target != "misc":
            _named(target, place, targets, "target under 'outputs'")
        list_of(text)(names, place)
        for index, name in enumerate(names):
            _named(name, f"{place}[{index}]", known, "metric of fairchem")
    primary = settings.get("primary_metric")
    if primary is None:
        if not evaluates:
            return
        primary = Evaluator.task_primary_metric["s2ef"]  # as fairchem does
    made = {
        name if target in name or target == "misc" else f"{target}_{name}"
        for target, names in (wanted or Evaluator.task_metrics["s2ef"]).items()
        for name in names
    } | {"loss"}
    if primary not in made:
        raise ValueError(
            f"'{where}.primary_metric' is '{primary}', which '{where}.metrics' does not "
            f"measure{nearest(primary, made)}; it measures {', '.join(sorted(made))}."
        )


def _metric_names() -> list[str]:
    wrapped = vars(fairchem_metrics).items()
    return [name for name, found in wrapped if inspect.isfunction(found) and _takes_predictions(found)]


def _takes_predictions(function: Callable[..., Any]) -> bool:
    return list(inspect.signature(function).parameters)[:2] == ["prediction", "target"]


# ------------------------------------------------------------------ data


def _check_dataset(dataset: Any) -> None:
    if isinstance(dataset, list | tuple):
        if not dataset:
            raise ValueError("'dataset' is empty: give it 'train', with the 'src' of a data set.")
        splits = {f"dataset[{index}]": split for index, split in enumerate(dataset)}
    else:
        whole = require_mapping(dataset, "dataset")
        if any(name in whole for name in _SPLITS):
            splits = {f"dataset.{name}": whole[name] for name in _SPLITS if name in whole}
            refuse_unknown_keys(
                {
                    name: split
                    for name, split in whole.items()
                    if isinstance(split, Mapping) and "src" in split
                },
                _SPLITS,
                "dataset",
            )
        else:
            splits = {"dataset": whole}
    for where, split in splits.items():
        settings = follow(split, _SPLIT, where)
        if "format" in settings:
            _check_format(settings["format"], f"{where}.format")
        _check_key_mapping(settings.get("key_mapping"), f"{where}.key_mapping")
        transforms = require_mapping(settings.get("transforms"), f"{where}.transforms")
        _check_normalizers(transforms.get("normalizer"), f"{where}.transforms.normalizer")


def _check_format(value: Any, where: str) -> None:
    text(value, where)
    if "." not in value:
        _named(value, where, registry.mapping["dataset_name_mapping"], "format of data")


def _sources(value: Any, where: str) -> None:
    """``src``: a path, or a list of them for some formats; that it is there is seen where it is opened."""
    if isinstance(value, list | tuple):
        list_of(text)(value, where)
    elif value is not None and value != "":
        text(value, where)


_SPLIT: Mapping[str, Rule] = {
    "src": _sources,
    "format": text,
    "transforms": mapping,
    "key_mapping": mapping,
    "use_train_settings": flag,
    "max_atoms": or_null(number(1, whole=True)),
    "first_n": or_null(number(1, whole=True)),
    "sample_n": or_null(number(1, whole=True)),
    "no_shuffle": or_null(flag),
    "metadata_path": or_null(text),
    "shard": number(0, whole=True),
    "total_shards": number(1, whole=True),
    "seed": number(0, whole=True),
    "subset_to": lambda value, where: list_of(_subset)(value, where),
}


def _subset(value: Any, where: str) -> None:
    settings = follow(value, {"metadata_key": text, "op": one_of("abs_le", "in")}, where)
    for key in ("metadata_key", "op", "rhv"):
        if key not in settings:
            raise ValueError(f"'{where}.{key}' is missing{nearest(key, settings)}.")


def _check_key_mapping(settings: Any, where: str) -> None:
    for old, new in require_mapping(settings, where).items():
        if isinstance(new, list | tuple):
            list_of(text)(new, f"{where}.{old}")
        else:
            text(new, f"{where}.{old}")


def _check_normalizers(settings: Any, where: str) -> None:
    rules: Mapping[str, Rule] = {
        "mean": number(),
        "rmsd": number(0, above=True),
        "stdev": number(0, above=True),
        "file": text,
    }
    for target, entry in require_mapping(settings, where).items():
        if target in ("fit", "file"):
            continue
        place = f"{where}.{target}"
        entry = follow(entry, rules, place)
        refuse_unknown_keys(entry, rules, place)
        if "file" not in entry and not ("mean" in entry and ("rmsd" in entry or "stdev" in entry)):
            raise ValueError(f"'{place}' needs 'mean' and 'rmsd', or a 'file', found {dict(entry)!r}.")


# ------------------------------------------------------------------ models


def check_model_arguments(model: type, settings: Mapping[str, Any]) -> None:
    """Refuse values of another type than a model of ours says that its arguments have.

    Args:
        model: the class.
        settings: arguments by name, without the model's name; unknown ones pass.

    Raises:
        ValueError: names the YAML key, what was found and what is right.
    """
    hints = typing.get_type_hints(model.__init__)  # type: ignore[misc]  # a class, not an instance
    for name, value in settings.items():
        hint = hints.get(name)
        if hint is None or name == "unknown":
            continue
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if not any(_is_a(value, kind) for kind in kinds):
            said = " or ".join(_said(kind) for kind in kinds)
            raise ValueError(f"'model.{name}' must be {said}, found {value!r}.")
        if isinstance(value, int) and not isinstance(value, bool) and int in kinds:
            number(1, _MOST_LAYERS if name == "num_layers" else _MOST, whole=True)(value, f"model.{name}")
        elif name.endswith(("_drop", "_rate")):
            number(0, 1)(value, f"model.{name}")
        elif name == "max_radius":
            number(0, _LARGEST_RADIUS, above=True)(value, "model.max_radius")


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    origin = typing.get_origin(kind)
    if origin is list:
        (item,) = typing.get_args(kind)
        return isinstance(value, list | tuple) and all(_is_a(part, item) for part in value)
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if not inspect.isclass(kind):
        return True
    return isinstance(value, kind)


def _said(kind: Any) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        bool: "True or False",
        str: "a text",
        type(None): "null",
    }
    if typing.get_origin(kind) is list:
        return "a list of numbers"
    return words.get(kind, str(kind))
