"""Losses of each example of a batch, so that rows which only fill a shape can be left out."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

#: (outputs [B, ...], targets [B, ...]) -> the loss of each example [B].
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def _rows(values: jax.Array) -> jax.Array:
    """The mean over everything but the first axis."""
    return values.reshape(len(values), -1).mean(axis=1)


def _cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Labels [B] for outputs [B, K], or tokens [B, T] for outputs [B, T, V]."""
    logs = jax.nn.log_softmax(outputs)
    picked = jnp.take_along_axis(logs, targets[..., None].astype(jnp.int32), axis=-1)
    return -_rows(picked)


def _binary_cross_entropy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Labels 0 and 1, [B] or several [B, K], for as many logits, [B], [B, 1] or [B, K]."""
    logits = outputs.reshape(targets.shape)
    return _rows(jax.nn.softplus(logits) - targets * logits)


def _squared(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return _rows(jnp.square(outputs.reshape(targets.shape) - targets))


def _absolute(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    return _rows(jnp.abs(outputs.reshape(targets.shape) - targets))


LOSSES: dict[str, Loss] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": _squared,
    "l1": _absolute,
}
