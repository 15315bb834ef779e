"""What is in a checkpoint, and what it is good for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fairchem_dens.checkpoints.fine_tuning import WHERE
from fairchem_dens.checkpoints.fit import lmax_of
from fairchem_dens.checkpoints.layouts import HEADS, Layout, flat_settings, flattened, recognised
from fairchem_dens.checkpoints.references import IN_MODEL
from fairchem_dens.checkpoints.versions import MARK, upgraded, version_of
from fairchem_dens.checkpoints.weights import Weights, weights_of
from fairchem_dens.models.state import is_constant

_SHOWN_SETTINGS = ("num_layers", "sphere_channels", "max_num_elements")
_IMPORT = "after `fairchem-dens checkpoint import`"


def describe(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Describe a checkpoint of any version and layout in plain values, as JSON has them.

    Args:
        checkpoint: as it was written.
    """
    current = upgraded(dict(checkpoint))
    config = current["config"]
    written = (checkpoint.get("config") or {}).get(MARK) or {}
    weights = weights_of(current)
    layout = recognised(weights)
    learned = {name: value for name, value in weights.items() if not is_constant(name)}
    model = config.get("model") or {}
    average = current.get("ema")
    return {
        "version": version_of(checkpoint),
        "written_by": f"fairchem_dens {written['version']}" if written.get("version") else None,
        "layout": str(layout),
        "heads": sorted({name.split(".")[1] for name in weights if name.startswith(HEADS)}),
        "model": model.get("name"),
        "trainer": config.get("trainer"),
        **_degrees(weights, layout, model),
        "parameters": sum(value.numel() for value in learned.values()),
        "constants": len(weights) - len(learned),
        "step": current.get("step"),
        "epoch": current.get("epoch"),
        "best_val_metric": current.get("best_val_metric"),
        "primary_metric": current.get("primary_metric"),
        "normalizers": {
            target: {name: value.flatten().tolist() for name, value in state.items()}
            for target, state in current["normalizers"].items()
        },
        "element_references": {
            target: int((state["element_references"] != 0).sum())
            for target, state in current["elementrefs"].items()
        },
        "references_in_model": any(name.split(".")[-1] == IN_MODEL for name in weights),
        "moving_average": None if average is None else {"decay": average.get("decay")},
        "optimizer": "optimizer" in current,
        "scheduler": current.get("scheduler") is not None,
        "fine_tuned_from": written.get("fine_tuned_from"),
        "starts": _starts(current, layout, is_ours=bool(written), has_settings=bool(model)),
    }


def _degrees(weights: Weights, layout: Layout, model: Mapping[str, Any]) -> dict[str, Any]:
    """The degrees of the features, lmax from the weights themselves, and the size of the network."""
    try:
        settings = flat_settings(model)[1]
        flat = flattened(weights)[0] if layout.is_hydra else weights
    except ValueError:
        settings, flat = {}, weights
    found = lmax_of(flat)
    (mmax,) = settings.get("mmax_list") or (None,)
    return {
        "lmax": found,
        "mmax": mmax,
        **{name: settings[name] for name in _SHOWN_SETTINGS if name in settings},
    }


def _starts(
    checkpoint: Mapping[str, Any], layout: Layout, *, is_ours: bool, has_settings: bool
) -> dict[str, str]:
    """For each way to start from a checkpoint, how, or why not."""
    if layout.family is None:
        is_usable = "yes, with the model and trainer that wrote it" if is_ours else None
        why = is_usable or "no: the model is none that this package knows"
        return {
            "resume": "yes" if is_ours and "optimizer" in checkpoint else "no: nothing of ours to resume",
            "fine-tune": why,
            "inference": why,
        }
    if not layout.has_dens:
        fine_tune = f"{_IMPORT[:-1]} --new-dens`, which adds DeNS untrained"
        inference = "yes, with fairchem's own trainer"
    elif layout.is_hydra:
        fine_tune, inference = _IMPORT, f"yes, with fairchem's own trainer; with ours {_IMPORT}"
    elif not is_ours:
        fine_tune = inference = _IMPORT if has_settings else f"{_IMPORT[:-1]} --config-yml RUN.yml`"
    else:
        fine_tune, inference = f"yes: '{WHERE}' in the YAML", "yes"
    if is_ours and "optimizer" in checkpoint:
        resume = "yes: fairchem --mode train --checkpoint"
    else:
        resume = "no: " + ("it holds no optimizer" if is_ours else "another program wrote it")
    return {"resume": resume, "fine-tune": fine_tune, "inference": inference}


def text(file: str, found: Mapping[str, Any]) -> str:
    """Return a description as the lines that a person reads."""
    size = ", ".join(
        f"{name} {found[name]}" for name in ("lmax", "mmax", *_SHOWN_SETTINGS) if found.get(name) is not None
    )
    average = found["moving_average"]
    rows = {
        "version": f"{found['version']}{_in_brackets(found['written_by'])}",
        "layout": found["layout"] + (f"; heads: {', '.join(found['heads'])}" if found["heads"] else ""),
        "model": f"{found['model'] or 'not named'}{_in_brackets(size)}",
        "trainer": found["trainer"] or "not named",
        "parameters": f"{found['parameters']:,}{_in_brackets(_constants(found['constants']))}",
        "trained": _trained(found),
        "normalisers": _listed(
            f"{target}: {', '.join(f'{name} {_numbers(values)}' for name, values in state.items())}"
            for target, state in found["normalizers"].items()
        ),
        "references": _listed(
            [
                *(f"{target}: {count} elements" for target, count in found["element_references"].items()),
                *(["in the model (energy_lin_ref)"] if found["references_in_model"] else []),
            ]
        ),
        "moving average": "none" if average is None else f"yes, decay {average['decay']}",
        "optimizer": _yes(found["optimizer"]) + (", schedule" if found["scheduler"] else ""),
        **{f"  to {way}" if way != "inference" else "  for inference": how
           for way, how in found["starts"].items()},
    }  # fmt: skip
    if found["fine_tuned_from"]:
        start = found["fine_tuned_from"]
        rows["fine-tuned from"] = f"{start['starting_checkpoint']} (normalisers: {start['normalizers']})"
    width = max(map(len, rows)) + 2
    return "\n".join([file, *(f"  {name:<{width}}{value}" for name, value in rows.items())])


def _in_brackets(words: str | None) -> str:
    return f" ({words})" if words else ""


def _constants(count: int) -> str:
    return f"and {count} constant buffers" if count else ""


def _trained(found: Mapping[str, Any]) -> str:
    if found["step"] is None:
        return "not said"
    best = found["best_val_metric"]
    metric = f", best {found['primary_metric']} {best:.4g}" if best is not None else ""
    return f"step {found['step']}, epoch {float(found['epoch'] or 0):.4g}{metric}"


def _listed(items: Any) -> str:
    return "; ".join(items) or "none"


def _numbers(values: list[float]) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def _yes(is_there: bool) -> str:
    return "yes" if is_there else "none"
