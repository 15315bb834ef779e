"""Random numbers as pure functions of what they are for: nothing about them is saved to resume a run.

A stream is named by whole numbers (a seed, an epoch, a step, a rank) and, where it belongs to a structure, by
the bytes of its content. Streams with different names are independent; the same name gives the same numbers
in any process.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np


def _digest(words: Iterable[int], content: Iterable[bytes], size: int) -> bytes:
    pieces = [struct.pack("<q", word) for word in words]
    for piece in content:
        pieces += (struct.pack("<q", len(piece)), piece)
    return hashlib.blake2b(b"".join(pieces), digest_size=size, person=b"fairchem_dens").digest()


def generator(*words: int, content: Iterable[bytes] = ()) -> np.random.Generator:
    """Return the generator of the stream named by ``words`` and ``content``."""
    key = np.frombuffer(_digest(words, content, size=16), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


class _OfThread(threading.local):
    """A generator that is set to one stream after another, which takes a tenth of the time of making it."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=np.zeros(2, dtype=np.uint64))
        self.generator = np.random.Generator(self.philox)
        self.start: Any = self.philox.state


_of_thread = _OfThread()


def passing_generator(*words: int, content: Iterable[bytes] = ()) -> np.random.Generator:
    """Return `generator` of the same arguments, good until this thread asks for the next one."""
    _of_thread.start["state"]["key"] = np.frombuffer(_digest(words, content, size=16), dtype="<u8")
    _of_thread.philox.state = _of_thread.start
    return _of_thread.generator


def derived_seed(*words: int) -> int:
    """Return a 63-bit seed, for generators such as torch's that are seeded with one number."""
    return int.from_bytes(_digest(words, (), size=8), "little") >> 1
