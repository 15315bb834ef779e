"""Batches of structures as fairchem's collater makes them, in a fraction of its time.

torch_geometric's general collating takes longer than reading the structures. What our readers give are plain
tensors, numbers and text under the same names; for these the batch, with everything that is needed to take it
apart again, is made here. All else goes to fairchem's collater.

Out of a loader worker such a batch travels as one piece. torch would send each of its tensors through shared
memory and a file descriptor of its own, which takes ten times as long as all the rest, and breaks where
shared memory is scarce.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from fairchem.core.datasets.lmdb_dataset import data_list_collater
from torch import Tensor
from torch.utils.data import get_worker_info
from torch_geometric.data import Batch, Data

from fairchem_dens import keys
from fairchem_dens.shallow import with_fields

_EMPTY = Batch(_base_cls=Data)
# Names that make torch_geometric concatenate otherwise, add offsets, or count atoms in another way.
_OTHERWISE = ("index", "batch", "node")
_OTHERWISE_WHOLE = ("face", "ptr", "x", "feat", "n_id", "tf")


class _Unusual(Exception):  # noqa: N818  # no error: fairchem takes over
    """Something that this module does not collate."""


def collate(structures: Sequence[Data], otf_graph: bool = False) -> Any:
    """Return what fairchem's ``data_list_collater`` returns; in a loader worker, something that becomes it.

    Args:
        structures: one ``Data`` or more.
        otf_graph: whether the model searches neighbours itself; if not, stored edges are counted.
    """
    if otf_graph:
        try:
            batch = _batch(structures)
            return batch if get_worker_info() is None else _Parcel(batch)
        except _Unusual:
            pass
    return data_list_collater(structures, otf_graph=otf_graph)


def _batch(structures: Sequence[Data]) -> Batch:
    if any(type(data) is not Data for data in structures):
        raise _Unusual
    stored = [data._store._mapping for data in structures]
    names = stored[0].keys()
    if any(fields.keys() != names for fields in stored[1:]) or not isinstance(
        stored[0].get(keys.POS), Tensor
    ):
        raise _Unusual
    count = len(structures)
    no_offsets = torch.zeros(count, dtype=torch.int64)
    one_each = torch.arange(count + 1)
    # Most fields have one row for each atom, or one for each structure, and share what says which is whose.
    boundaries = {(1,) * count: one_each}

    slices: dict[str, Tensor] = {}
    offsets: dict[str, Tensor | None] = {}
    collated: dict[str, Any] = {}
    for name in names:
        if name in _OTHERWISE_WHOLE or any(part in name for part in _OTHERWISE):
            raise _Unusual
        values = [fields[name] for fields in stored]
        kinds = set(map(type, values))
        if kinds == {Tensor}:
            collated[name], sizes = _concatenated(values)
            if sizes not in boundaries:
                boundaries[sizes] = torch.tensor([0, *accumulate(sizes)])
            slices[name], offsets[name] = boundaries[sizes], no_offsets
        elif kinds <= {int, float, bool}:
            collated[name] = torch.tensor(values)
            slices[name], offsets[name] = one_each, no_offsets
        elif kinds == {str}:
            collated[name] = values
            slices[name], offsets[name] = one_each, None
        else:
            raise _Unusual

    sizes = tuple(fields[keys.POS].shape[0] for fields in stored)
    collated[keys.BATCH] = torch.repeat_interleave(one_each[:-1], torch.tensor(sizes))
    collated["ptr"] = boundaries[sizes]
    return _assembled(collated, slices, offsets, count)


def _assembled(
    fields: Mapping[str, Any], slices: dict[str, Any], offsets: dict[str, Any], count: int
) -> Batch:
    batch = with_fields(_EMPTY, fields)
    batch._num_graphs, batch._slice_dict, batch._inc_dict = count, slices, offsets
    return batch


def _concatenated(values: list[Tensor]) -> tuple[Tensor, tuple[int, ...]]:
    """Return the rows of all tensors, and how many each has."""
    first = values[0]
    if first.dim() == 0 or first.device.type != "cpu":
        raise _Unusual
    for value in values:
        # numpy has no such type, and a batch travels as arrays.
        if (
            value.dtype == torch.bfloat16
            or value.dtype != first.dtype
            or value.layout != torch.strided
            or value.shape[1:] != first.shape[1:]
        ):
            raise _Unusual
    return torch.cat(values), tuple([value.shape[0] for value in values])


class _Parcel:
    """A batch on its way out of a worker: pickled as arrays, unpickled as the batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        batch = self.batch
        pack = _Once(lambda value: value.numpy() if isinstance(value, Tensor) else value)
        fields, slices, offsets = batch._store._mapping, batch._slice_dict, batch._inc_dict
        return _unpacked, (pack.each(fields), pack.each(slices), pack.each(offsets), batch.num_graphs)


def _unpacked(fields: dict[str, Any], slices: dict[str, Any], offsets: dict[str, Any], count: int) -> Batch:
    unpack = _Once(lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else value)
    return _assembled(unpack.each(fields), unpack.each(slices), unpack.each(offsets), count)


class _Once:
    """Converts the values of dictionaries, those that are one object only once."""

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self._convert = convert
        self._done: dict[int, Any] = {}

    def each(self, values: Mapping[str, Any]) -> dict[str, Any]:
        for value in values.values():
            if id(value) not in self._done:
                self._done[id(value)] = self._convert(value)
        return {name: self._done[id(value)] for name, value in values.items()}
