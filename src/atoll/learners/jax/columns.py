"""Columns on JAX's device, where they stay for as long as the column itself lives."""

from __future__ import annotations

import weakref
from typing import Any

import jax
import jax.numpy as jnp
from numpy.typing import NDArray

_resident: dict[int, jax.Array] = {}


def on_device(column: NDArray[Any]) -> jax.Array:
    """A column as an array of JAX's; whole numbers become int32, as JAX has them."""
    key = id(column)
    if key not in _resident:
        _resident[key] = jnp.asarray(column)
        weakref.finalize(column, _resident.pop, key, None)
    return _resident[key]
