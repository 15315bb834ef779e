"""Which code each module runs on.

Modules hold fairchem's parameters and know two ways to use them: our operations, plain or as kernels, and
fairchem's own forward pass, which is what ours is compared with. The choice is made when a model is built.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any, Literal

from torch import nn

from fairchem_dens.ops.operations import PLAIN, Operations

FAIRCHEM: Literal["fairchem"] = "fairchem"
KERNELS = ("auto", "plain", "triton")
"""Values of the argument ``kernels``."""


class OnPath:
    """Mixed into modules that know more than one path.

    Attributes:
        path: `Operations`, or `FAIRCHEM`; typed so that modules need not say which at each use.
    """

    path: Any = PLAIN


def operations(kernels: str) -> Operations:
    """Return the operations that an argument ``kernels`` asks for.

    Args:
        kernels: one of `KERNELS`; ``auto`` takes the fused ones where they can be had.

    Raises:
        ValueError: ``triton`` is asked for and cannot be had.
    """
    if kernels == "plain":
        return PLAIN
    try:
        return import_module("fairchem_dens.ops.fused").operations()
    except (ImportError, RuntimeError) as error:
        if kernels == "triton":
            raise ValueError(f"'model.kernels: triton' cannot be had here: {error}.") from error
        return PLAIN


def choose(model: nn.Module, path: Operations | Literal["fairchem"]) -> None:
    """Put all modules of a model that know paths on one."""
    for module in model.modules():
        if isinstance(module, OnPath):
            module.path = path


def describe(model: nn.Module) -> None:
    """Say once which path each kind of module of a model takes."""
    taken: dict[str, str] = {}
    for module in model.modules():
        if isinstance(module, OnPath):
            taken[type(module).__name__] = module.path if module.path == FAIRCHEM else module.path.name
    names = ", ".join(f"{kind} {name}" for kind, name in taken.items())
    logging.info(f"Paths of EquiformerV2: {names}.")
