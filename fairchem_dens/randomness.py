"""Random numbers as pure functions of what they are for: nothing about them is saved to resume a run.

A stream is named by whole numbers (a seed, an epoch, a step, a rank) and, where it belongs to a structure, by
the bytes of its content. Streams with different names are independent; the same name gives the same numbers
in any process.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable

import numpy as np


def _digest(words: Iterable[int], content: Iterable[bytes], size: int) -> bytes:
    hasher = hashlib.blake2b(digest_size=size, person=b"fairchem_dens")
    for word in words:
        hasher.update(struct.pack("<q", word))
    for piece in content:
        hasher.update(struct.pack("<q", len(piece)))
        hasher.update(piece)
    return hasher.digest()


def generator(*words: int, content: Iterable[bytes] = ()) -> np.random.Generator:
    """Return the generator of the stream named by ``words`` and ``content``."""
    key = np.frombuffer(_digest(words, content, size=16), dtype="<u8")
    return np.random.Generator(np.random.Philox(key=key))


def derived_seed(*words: int) -> int:
    """Return a 63-bit seed, for generators such as torch's that are seeded with one number."""
    return int.from_bytes(_digest(words, (), size=8), "little") >> 1
