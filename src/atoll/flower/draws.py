"""Draws: the global random streams that apps use, begun from a key and given back afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from atoll.keys import Key


@contextmanager
def seeded(key: Key) -> Iterator[None]:
    """Let `random`, NumPy and torch draw from `key`; what they drew from before goes on after.

    An app that seeds them itself gets what it asks for, until it returns.
    """
    # Also where a client is yet to import it: its first draw is one of these.
    torch: Any = import_module("torch") if find_spec("torch") else None
    before = random.getstate(), np.random.get_state()
    kept = torch.random.get_rng_state() if torch else None
    word = key.integer()
    random.seed(word)
    np.random.seed(word % 2**32)
    if torch:
        torch.manual_seed(word)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        if torch and kept is not None:
            torch.random.set_rng_state(kept)
