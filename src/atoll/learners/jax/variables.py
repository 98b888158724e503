"""Variables: a model's trees of arrays on one side, the layout's flat vectors on the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atoll.core.random import Key
from atoll.core.vectors import Layout, Vectors
from atoll.errors import ConfigurationError
from atoll.learners.jax.models import Model, Tree


@dataclass(frozen=True, eq=False)
class Variables:
    """The layout of a model, and the way between its vectors and its trees."""

    layout: Layout
    params: Any
    state: Any
    #: Layout entries of the parameters, and of the state's leaves, in the order of the trees.
    names: tuple[tuple[str, ...], tuple[str, ...]]

    @staticmethod
    def of(model: Model) -> Variables:
        """The variables of a model, without computing any."""
        params, state = jax.eval_shape(model.init, jax.random.key(0))
        named = _named(params)
        if not named:
            raise ConfigurationError("the model has no parameters to train")
        for name, leaf in named.items():
            if leaf.dtype != np.float32:
                raise ConfigurationError(
                    f"parameter {name!r} is {leaf.dtype}; JaxLearner trains float32 parameters"
                )
        others = _others(named, state)
        layout = Layout.of(named, others)
        return Variables(
            layout, jax.tree.structure(params), jax.tree.structure(state),
            (tuple(named), tuple(others)),
        )  # fmt: skip

    def tree(self, flat: jax.Array) -> Tree:
        """The parameters [P] as the model's tree."""
        entries = [self.layout[name] for name in self.names[0]]
        return jax.tree.unflatten(self.params, [flat[e.slice].reshape(e.shape) for e in entries])

    def flat(self, tree: Tree) -> jax.Array:
        """A tree like the parameters' as a vector [P]."""
        return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])

    def state_of(self, model: Vectors) -> Tree:
        """Buffers and counters as the model's state."""
        leaves = []
        for name in self.names[1]:
            entry = self.layout[name]
            array = model[entry.section][entry.slice].reshape(entry.shape)
            leaves.append(jnp.asarray(array.astype(entry.dtype)))
        return jax.tree.unflatten(self.state, leaves)

    def statistics(self, state: Tree) -> Vectors:
        """A state as buffers and counters."""
        vectors = self.layout.zeros()
        vectors.pop("params", None)
        for name, leaf in zip(self.names[1], jax.tree.leaves(state), strict=True):
            entry = self.layout[name]
            vectors[entry.section][entry.slice] = np.asarray(leaf).reshape(-1)
        return vectors

    def init(self, model: Model, key: Key) -> Vectors:
        """The model's initial variables, drawn from `key`."""
        params, state = model.init(stream(key))
        leaves = [np.asarray(leaf, np.float32).reshape(-1) for leaf in jax.tree.leaves(params)]
        return {"params": np.concatenate(leaves), **self.statistics(state)}


def arrays_of(params: Tree, state: Tree) -> dict[str, Any]:
    """The leaves of a model's trees by the names that a layout has for them."""
    named = _named(params)
    return {**named, **_others(named, state)}


def _others(named: Mapping[str, Any], state: Tree) -> dict[str, Any]:
    """The leaves of a state by name, beside parameters that have theirs."""
    # A state may repeat the path of a parameter, as `mean` beside `scale` in Flax does not.
    return {
        name if name not in named else f"state.{name}": leaf for name, leaf in _named(state).items()
    }


def stream(key: Key) -> jax.Array:
    """A key of JAX's own from all 64 bits of one of ours."""
    word = key.integer() % 2**64
    low, high = word % 2**32, word >> 32
    return jax.random.fold_in(jax.random.key(low), high)


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their dotted paths."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_path(path): leaf for path, leaf in leaves}


def _path(path: Any) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator=".")
    return name.removesuffix(".value") or "params"
