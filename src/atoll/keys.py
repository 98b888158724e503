"""Keyed random generators: every draw is a function of (seed, purpose, round, client).

A key is hashed with BLAKE2b over an unambiguous encoding of its parts and opens a Philox
counter generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
So a draw never depends on what was drawn before it, on worker count or on a restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from operator import index

import numpy as np

Part = int | str


@dataclass(frozen=True, slots=True)
class Key:
    """The address of one stream of random numbers.

    >>> Key(7).fold("batches", 3, "hospital-a").generator().integers(10) < 10
    True
    """

    seed: int
    path: tuple[Part, ...] = ()

    def fold(self, *parts: Part) -> Key:
        """The key of a sub-stream: same seed, longer address."""
        return Key(self.seed, self.path + parts)

    def digest(self, size: int = 16) -> bytes:
        """`size` bytes that no other key has (up to collisions of BLAKE2b)."""
        state = blake2b(digest_size=size, person=b"atoll-key")
        for part in (self.seed, *self.path):
            text = b"s" + part.encode() if isinstance(part, str) else b"i%d" % index(part)
            state.update(len(text).to_bytes(4, "little") + text)
        return state.digest()

    def generator(self) -> np.random.Generator:
        """A fresh NumPy generator at the start of this key's stream."""
        words = int.from_bytes(self.digest(16), "little")
        return np.random.Generator(np.random.Philox(key=words))

    def integer(self) -> int:
        """A 63-bit integer for libraries that seed generators of their own."""
        return int.from_bytes(self.digest(8), "little") >> 1
