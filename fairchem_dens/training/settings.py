"""Settings of ``optim`` that are this package's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SHORT = {"fp16": "float16", "half": "float16", "bf16": "bfloat16"}

KEYS = ("amp_dtype", "max_bad_steps_in_a_row")
"""What is read of ``optim``."""


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step is computed, and when sick ones end the run.

    Attributes:
        amp_dtype: what ``--amp`` computes in: ``float16`` with a gradient scaler, as fairchem means it, on a
            GPU only; or ``bfloat16``, which needs none, on a GPU and on the CPU.
        max_bad_steps_in_a_row: so many steps without a finite loss and gradient, one after the other, stop
            the run. A scaler that starts at 65536 may well need 16 to find its scale.

    Raises:
        ValueError: a value is impossible; names its YAML key.
    """

    amp_dtype: str = "float16"
    max_bad_steps_in_a_row: int = 20

    def __post_init__(self) -> None:
        if self.amp_dtype not in tuple(_DTYPES):  # a list, which no dict can be asked for, is refused too
            raise ValueError(
                f"'optim.amp_dtype' must be 'float16' or 'bfloat16', found {self.amp_dtype!r}. It says what "
                "--amp computes in."
            )
        count = self.max_bad_steps_in_a_row
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"'optim.max_bad_steps_in_a_row' must be a whole number from 1, found {count!r}."
            )

    @classmethod
    def from_config(cls, optim: Mapping[str, Any]) -> StepSettings:
        """Read the keys of ``optim`` that are ours.

        Raises:
            ValueError: see the class.
        """
        given = {key: optim[key] for key in KEYS if optim.get(key) is not None}
        if isinstance(given.get("amp_dtype"), str):
            given["amp_dtype"] = _SHORT.get(given["amp_dtype"], given["amp_dtype"])
        return cls(**given)

    @property
    def dtype(self) -> torch.dtype:
        """`amp_dtype` as torch has it."""
        return _DTYPES[self.amp_dtype]
