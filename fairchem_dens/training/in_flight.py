"""A batch on its way to the device, and what stays behind on the host so that nobody has to ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fairchem_dens import keys


@dataclass(frozen=True)
class InFlight:
    """A batch and its facts on the host.

    Attributes:
        batch: the batch, wherever it is.
        natoms: (B,) int64, on the host.
        num_atoms: their sum.
        sids: system ids, as the batch has them: a tensor on the host, a list or None.
        fids: ids of frames likewise.
    """

    batch: Any
    natoms: Tensor
    num_atoms: int
    sids: Any = None
    fids: Any = None

    @classmethod
    def of(cls, batch: Any) -> InFlight:
        """Look at a batch: without waiting if it is still on the host, as it is in training."""
        natoms = torch.as_tensor(batch[keys.NATOMS]).reshape(-1).cpu()

        def on_host(name: str) -> Any:
            value = batch[name] if name in batch else None  # noqa: SIM401  # Data.get is new
            return value if not isinstance(value, Tensor) or value.device.type == "cpu" else None

        return cls(batch, natoms, int(natoms.sum()), on_host(keys.SID), on_host(keys.FID))

    @property
    def names(self) -> list[str]:
        """What each structure is called, such as ``sid 12 fid 3``."""
        named = []
        for index in range(len(self.natoms)):
            parts = [
                f"{word} {_plain(values[index])}"
                for word, values in ((keys.SID, self.sids), (keys.FID, self.fids))
                if values is not None and index < len(values)
            ]
            named.append(" ".join(parts) or f"number {index} of its batch")
        return named

    @property
    def sized(self) -> HostSizes:
        """The batch with its sizes on the host."""
        return HostSizes(self.batch, self.natoms)


class HostSizes:
    """A batch whose ``natoms`` are on the host, for code that makes shapes of them; all else is the batch's.

    Args:
        batch: the batch, on the device.
        natoms: (B,) int64, on the host.
    """

    def __init__(self, batch: Any, natoms: Tensor) -> None:
        self._batch = batch
        self.natoms = natoms

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batch itself, for the model."""
        return self._batch.to(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_batch":
            raise AttributeError(name)
        return getattr(self._batch, name)

    def __getitem__(self, name: str) -> Any:
        return self.natoms if name == keys.NATOMS else self._batch[name]

    def __contains__(self, name: str) -> bool:
        return name in self._batch


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
