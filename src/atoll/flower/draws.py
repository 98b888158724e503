"""Draws: the global random streams that apps use, begun from a key and given back afterwards."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from atoll.core.random import Key


def import_torch_for(folder: Path) -> None:
    """Import torch if the code below a folder names it, so that its first draw is seeded too.

    An app may import it within a client; torch takes a second, which others need not wait.
    """
    if not find_spec("torch"):
        return
    for path in folder.rglob("*.py"):
        if "torch" in path.read_text(encoding="utf-8", errors="ignore"):
            import_module("torch")
            return


def at_import(seed: int) -> Key:
    """Where an app draws from while it is imported: the same in every process of a run."""
    return Key(seed).fold("flower", "import")


@contextmanager
def seeded(key: Key) -> Iterator[None]:
    """Let `random`, NumPy and torch draw from `key`; what they drew from before goes on after.

    TensorFlow and MLX, where they are imported, are begun from it too, and not put back.

    An app that seeds them itself gets what it asks for, until it returns.
    """
    torch: Any = sys.modules.get("torch")
    before = random.getstate(), np.random.get_state()
    kept = torch.random.get_rng_state() if torch else None
    word = key.integer()
    random.seed(word)
    np.random.seed(word % 2**32)
    if torch:
        torch.manual_seed(word)
    for name, seed in (("tensorflow", "random.set_seed"), ("mlx.core", "random.seed")):
        if name in sys.modules:
            attrgetter(seed)(sys.modules[name])(word % 2**31)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        if torch and kept is not None:
            torch.random.set_rng_state(kept)
