"""Records of LMDBs as dictionaries, several times faster than unpickling them does it, and equal to that.

A pickled torch_geometric ``Data`` holds each tensor in a pickle of its own, in torch's oldest file format; it
takes torch longer to open these than to read the rest. `fields` reads the one form that this format has for
ordinary tensors on the CPU by itself, and leaves whatever looks different to pickle and torch.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Data

_HEAD = b"".join(
    pickle.dumps(part, protocol=2)
    for part in (
        torch.serialization.MAGIC_NUMBER,
        torch.serialization.PROTOCOL_VERSION,
        {
            "protocol_version": torch.serialization.PROTOCOL_VERSION,
            "little_endian": True,
            "type_sizes": {"short": 2, "int": 4, "long": 4},
        },
    )
)
# After the head: a reference to one storage (its type, key, device, number of elements, no view), the list of
# the keys, and for each key the number of elements, in 8 bytes, and the elements.
_ONE_STORAGE = re.compile(
    re.escape(_HEAD)
    + rb"\x80\x02\(X\x07\0\0\0storageq\0ctorch\n(\w{1,16})Storage\nq\x01X(.\0\0\0)(\d{1,32})q\x02"
    + rb"X\x03\0\0\0cpuq\x03(?:K.|M..|J....)Ntq\x04Q\.\x80\x02\]q\0X\2\3q\x01a\.",
    re.DOTALL,
)
_DTYPES: dict[bytes, np.dtype[Any]] = {
    b"Float": np.dtype("<f4"),
    b"Double": np.dtype("<f8"),
    b"Half": np.dtype("<f2"),
    b"Long": np.dtype("<i8"),
    b"Int": np.dtype("<i4"),
    b"Short": np.dtype("<i2"),
    b"Char": np.dtype("<i1"),
    b"Byte": np.dtype("<u1"),
    b"Bool": np.dtype("?"),
}
_PLAIN = (Tensor, int, float, str, bool, type(None), np.generic, np.ndarray)


class _Unexpected(Exception):  # noqa: N818  # no error: pickle takes over
    """Something that this module does not read."""


class _Storage:
    """Stands for a storage until the tensor is made; whatever else is done with it fails."""

    __slots__ = ("numbers",)

    def __init__(self, blob: bytes) -> None:
        head = _ONE_STORAGE.match(blob)
        dtype = _DTYPES.get(head[1]) if head is not None else None
        if head is None or dtype is None:
            raise _Unexpected
        start = head.end() + 8
        count = int.from_bytes(blob[start - 8 : start], "little")
        if len(blob) != start + count * dtype.itemsize or count == 0:
            raise _Unexpected
        # A copy: tensors are written to, the bytes of a pickle are not.
        self.numbers = np.frombuffer(blob, dtype, count, start).copy()


def _tensor(
    storage: _Storage,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    metadata: Any = None,
) -> Tensor:
    """In place of ``torch._utils._rebuild_tensor_v2``."""
    if requires_grad or hooks or metadata:
        raise _Unexpected
    numbers = storage.numbers
    if offset == 0 and math.prod(size) == len(numbers) and stride == _contiguous(size):
        return torch.from_numpy(numbers.reshape(size))
    return torch.from_numpy(numbers).as_strided(size, stride, offset)


def _contiguous(size: tuple[int, ...]) -> tuple[int, ...]:
    if len(size) == 1:
        return (1,)
    if len(size) == 2:
        return (size[1], 1)
    return tuple(math.prod(size[place + 1 :]) for place in range(len(size)))


class _Object:
    """Stands for a ``Data`` or its storage, to be looked into instead of being built."""

    __slots__ = ("state",)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    _found: dict[tuple[str, str], Any] = {  # noqa: RUF012  # what names stand for is the same for all
        ("torch.storage", "_load_from_bytes"): _Storage,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch_geometric.data.data", "Data"): _Object,
        ("torch_geometric.data.storage", "GlobalStorage"): _Object,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._found[module, name]
        except KeyError:
            found = self._found[module, name] = super().find_class(module, name)
            return found


def fields(record: bytes) -> dict[str, Any]:
    """Return the fields of a pickled torch_geometric ``Data`` of any version.

    A record is code: read only files whose origin you trust. Fields that are None count as absent.

    Raises:
        ValueError: the record is another object.
        Exception: whatever unpickling raises.
    """
    try:
        found = _quickly(record)
    except Exception:
        found = _as_pickle_does(record)
    return {name: value for name, value in found.items() if value is not None}


def _quickly(record: bytes) -> dict[str, Any]:
    data = _Unpickler(io.BytesIO(record)).load()
    if type(data) is not _Object:
        raise _Unexpected
    state, data.state = data.state, {}  # the parts of a pickled Data refer to each other
    store = state.get("_store")
    found: dict[str, Any] = _of_version_1(state) if store is None else store.state["_mapping"]
    for value in found.values():
        if not isinstance(value, _PLAIN):
            raise _Unexpected
    return found


def _as_pickle_does(record: bytes) -> dict[str, Any]:
    data = pickle.loads(record)
    if not isinstance(data, Data):
        raise ValueError(f"it is a {type(data).__module__}.{type(data).__qualname__}")
    return data.to_dict() if "_store" in data.__dict__ else _of_version_1(data.__dict__)


def _of_version_1(state: dict[str, Any]) -> dict[str, Any]:
    """torch_geometric below 2.0 kept fields as attributes, and what is its own under ``__names__``."""
    return {name: value for name, value in state.items() if not name.startswith("__")}
