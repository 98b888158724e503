"""Losses of each example of a batch, so that rows which only fill a shape can be left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


#: What in a program moves numbers and changes none.
RESHAPING = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim", "convert_element_type"}


def last_function(jaxpr: Any) -> str:
    """ "sigmoid" or "softmax" if that makes the first of a program's results; else ""."""
    made = {id(variable): equation for equation in jaxpr.eqns for variable in equation.outvars}
    variable = jaxpr.outvars[0]
    while (equation := made.get(id(variable))) is not None:
        name = equation.primitive.name
        inner = equation.params.get("jaxpr") or equation.params.get("call_jaxpr")
        if inner is not None:
            return last_function(getattr(inner, "jaxpr", inner))
        if name == "logistic":
            return "sigmoid"
        if name == "div":
            above = made.get(id(equation.invars[0]))
            return "softmax" if above is not None and above.primitive.name == "exp" else ""
        if name not in RESHAPING:
            return ""
        variable = equation.invars[0]
    return ""


LOSSES: dict[str, Loss] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": _squared,
    "l1": _absolute,
}
