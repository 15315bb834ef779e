"""The layouts that checkpoints have, told by the names of their weights, and the way to ours.

Ours is the authors' flat model. fairchem's is a backbone with heads; for EquiformerV2 with DeNS and without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fairchem_dens.checkpoints.weights import Weights
from fairchem_dens.models.state import is_constant

BACKBONE, HEADS = "backbone.", "output_heads."

ENERGY_BLOCK, FORCE_BLOCK, NOISE_BLOCK = "energy_block", "force_block", "denoising_pos_block"
_BLOCKS = {
    "energy_block": ENERGY_BLOCK,
    "scalar_block": ENERGY_BLOCK,
    "force_block": FORCE_BLOCK,
    "vector_block": FORCE_BLOCK,
    "denoising_pos_block": NOISE_BLOCK,
}
"""Networks in fairchem's heads, and what they are called in the flat layout."""
_CONDITIONING = ("force_embedding.", "noise_schedule_sigma_embedding.", "force_embed.")
_NOISE_HEADS = (f"{NOISE_BLOCK}.", "denoising_pos_head.")
_FAMILIES = {
    "equiformer_v2": ("edge_degree_embedding.", "blocks.0.ga."),
    "escn": ("sphere_points", "layer_blocks.0."),
    "equiformer": ("edge_deg_embed.", "blocks.0."),
}
"""Each family of models, and how names of its weights begin that no other has together."""


@dataclass(frozen=True)
class Layout:
    """How the weights of a checkpoint are named.

    Attributes:
        family: ``equiformer_v2``, ``escn`` or ``equiformer``; None for any other model.
        is_hydra: whether there are a backbone and heads; else the layout is flat.
        has_dens: whether there are a force embedding and a noise head.
    """

    family: str | None
    is_hydra: bool
    has_dens: bool

    def __str__(self) -> str:
        shape = "hydra (backbone and heads)" if self.is_hydra else "flat"
        model = self.family or "of an unknown model"
        return f"{shape}, {model}, {'with' if self.has_dens else 'without'} DeNS"


def recognised(names: Iterable[str]) -> Layout:
    """Return the layout of weights with these names, which have no wrappers' prefixes."""
    names = list(names)
    is_hydra = any(name.startswith(BACKBONE) for name in names)
    bare = [_flat_name(name) or name for name in names] if is_hydra else names
    family = next(
        (
            family
            for family, marks in _FAMILIES.items()
            if all(any(name.startswith(mark) for name in bare) for mark in marks)
        ),
        None,
    )
    learned = [name for name in bare if not is_constant(name)]
    has_dens = all(any(name.startswith(part) for name in learned) for part in (_CONDITIONING, _NOISE_HEADS))
    return Layout(family, is_hydra, has_dens)


def is_dens(name: str) -> bool:
    """Whether a weight of the flat layout belongs to DeNS and to no plain model."""
    return name.startswith((*_CONDITIONING, *_NOISE_HEADS))


def _flat_name(name: str) -> str | None:
    """Return the flat name of a weight of backbone and heads; None for what our models have no place for."""
    if name.startswith(BACKBONE):
        return name.removeprefix(BACKBONE)
    _, _, rest = name.removeprefix(HEADS).partition(".")
    block, _, inside = rest.partition(".")
    return f"{_BLOCKS[block]}.{inside}" if block in _BLOCKS else None


def flattened(weights: Mapping[str, Tensor]) -> tuple[Weights, dict[str, int]]:
    """Turn the weights of backbone and heads into those of the flat layout.

    Args:
        weights: by name, without wrappers' prefixes.

    Returns:
        The flat weights; and for each head that has no place there, such as one for stress, the number of its
        parameters.

    Raises:
        ValueError: two heads predict the same.
    """
    flat: Weights = {}
    left_out: dict[str, int] = {}
    owners: dict[str, str] = {}
    for name, value in weights.items():
        head = name.removeprefix(HEADS).partition(".")[0] if name.startswith(HEADS) else ""
        flat_name = _flat_name(name)
        if flat_name is None:
            left_out[head] = left_out.get(head, 0) + (0 if is_constant(name) else value.numel())
            continue
        block = flat_name.partition(".")[0] if head else ""
        if head and owners.setdefault(block, head) != head:
            raise ValueError(
                f"The heads '{owners[block]}' and '{head}' predict the same, by a '{block}' each: our models "
                "have one head for energies and one for forces."
            )
        flat[flat_name] = value
    return flat, left_out


def with_heads(weights: Mapping[str, Tensor], blocks: Mapping[str, str]) -> Weights:
    """Turn flat weights into those of backbone and heads.

    Args:
        weights: of the flat layout.
        blocks: for each flat block that moves into a head, its name there, such as ``energy.scalar_block``.
    """
    moved = {}
    for name, value in weights.items():
        block, _, inside = name.partition(".")
        moved[f"{HEADS}{blocks[block]}.{inside}" if block in blocks else f"{BACKBONE}{name}"] = value
    return moved


def flat_settings(model: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Return the name of a model and the arguments of its flat form.

    Args:
        model: ``config.model`` of a checkpoint, of either layout.

    Raises:
        ValueError: the backbone or a head does something that our models do not.
    """
    settings = dict(model)
    name = settings.pop("name", None)
    if "backbone" not in settings and name != "hydra":
        return name, {key: value for key, value in settings.items() if key not in _WITHOUT_EFFECT}
    backbone = dict(settings.get("backbone") or {})
    if not backbone:
        raise ValueError(
            "The checkpoint's 'config.model' names no backbone: it was fine-tuned from another checkpoint "
            f"({(settings.get('finetune_config') or {}).get('starting_checkpoint')!r}), which knows it. Give "
            "the backbone's settings with --config-yml."
        )
    name = backbone.pop("model", None)
    flat = {key: value for key, value in backbone.items() if key not in _WITHOUT_EFFECT}
    for head, given in (settings.get("heads") or {}).items():
        if given.get("reduce", "sum") != "sum":
            raise ValueError(
                f"The head '{head}' has 'reduce: {given['reduce']}', and our models sum energies over atoms."
            )
        if given.get("use_denoising") is False and "scalar" in str(given.get("module")):
            flat["use_denoising_energy"] = False
    return name, flat


_WITHOUT_EFFECT = ("use_pbc_single", "activation_checkpoint", "finetune_config")
"""Arguments of fairchem's models that change how, and not what, they compute."""
