"""Keyed random generators: every draw is a function of (seed, purpose, round, client).

A key is hashed with BLAKE2b over an unambiguous encoding of its parts and opens a Philox
counter generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
So a draw never depends on what was drawn before it, on worker count or on a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from operator import index

import numpy as np
from numpy.typing import NDArray

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

    def digest(self, size: int = 16, *more: Part) -> bytes:
        """`size` bytes that no other key has (up to collisions of BLAKE2b); of `fold(*more)`."""
        text = b"".join(map(_encoded, (self.seed, *self.path, *more)))
        return blake2b(text, digest_size=size, person=b"atoll-key").digest()

    def generator(self) -> np.random.Generator:
        """A fresh NumPy generator at the start of this key's stream."""
        words = int.from_bytes(self.digest(16), "little")
        return np.random.Generator(np.random.Philox(key=words))

    def integer(self, *more: Part) -> int:
        """A 63-bit integer of `fold(*more)`, for libraries that seed generators of their own."""
        return int.from_bytes(self.digest(8, *more), "little") >> 1


@lru_cache(maxsize=1 << 14, typed=True)
def _encoded(part: Part) -> bytes:
    """A part of an address such that no two addresses look alike."""
    text = b"s" + part.encode() if isinstance(part, str) else b"i%d" % index(part)
    return len(text).to_bytes(4, "little") + text


def permutations(words: Sequence[int], count: int, times: int) -> NDArray[np.int64]:
    """For each word `times` independent random permutations of range(count), [W, times, count].

    Random 64-bit numbers are sorted; they are SplitMix64's (Steele, Lea, Flood: "Fast splittable
    pseudorandom number generators", OOPSLA 2014, figure 17), which is a function of word and
    position alone: so a cohort is shuffled in one go, and each client as if it were alone.
    """
    counter = np.arange(1, times * count + 1, dtype=np.uint64).reshape(times, count)
    # A word is a `Key.integer()`: 63 random bits.
    state = np.array(words, np.uint64)[:, None, None] + counter * np.uint64(0x9E3779B97F4A7C15)
    state ^= state >> np.uint64(30)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(27)
    state *= np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    return np.argsort(state, axis=-1)
