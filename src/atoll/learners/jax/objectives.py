"""Objectives: what a loss of an algorithm's own is shown, and its loss of each example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from atoll.errors import ConfigurationError
from atoll.learners.base import Objective


class Shown(NamedTuple):
    """Parameters beside the trained ones, [P] or [C, P], and what clients are given, [C, ...].

    Inside `vmap`, and for one client's descent, both are of one client: [P] and [...].
    """

    beside: tuple[jax.Array, ...]
    given: dict[str, jax.Array]

    @staticmethod
    def of(objective: Objective, *, single: bool) -> Shown:
        """What an objective shows; with `single` its numbers get an axis for the one client."""
        given = {name: jnp.asarray(value) for name, value in objective.given.items()}
        if single:
            given = {name: value[None] for name, value in given.items()}
        return Shown(tuple(jnp.asarray(each) for each in objective.beside), given)

    @property
    def axes(self) -> Shown:
        """Where the clients are, for `vmap`."""
        beside: Any = tuple(0 if each.ndim == 2 else None for each in self.beside)
        return Shown(beside, 0)  # type: ignore[arg-type]

    def first(self) -> Shown:
        """What the first client is shown."""
        beside = tuple(each[0] if each.ndim == 2 else each for each in self.beside)
        return Shown(beside, {name: value[0] for name, value in self.given.items()})


NOTHING = Shown((), {})


def of_each(
    loss: Callable[..., jax.Array],
    outputs: jax.Array,
    targets: jax.Array,
    others: Sequence[jax.Array],
    given: Mapping[str, jax.Array],
) -> jax.Array:
    """The loss [B] of each example, taken as a batch of its own."""

    def alone(output: jax.Array, target: jax.Array, *beside: jax.Array) -> jax.Array:
        shown = [each[None] for each in beside]
        return jnp.reshape(loss(output[None], target[None], *shown, **given), ())

    return jax.vmap(alone)(outputs, targets, *others)


def check_alone(whole: Any, alone: Any) -> None:
    """Raise unless an objective's loss of a batch is the mean of its losses of each example."""
    if not np.allclose(whole, alone, rtol=1e-3, atol=1e-5):
        raise ConfigurationError(
            "the objective's loss is no mean over the examples of a batch; JaxLearner fills "
            "batches up to a few shapes, so the loss of an example must not depend on the others"
        )
