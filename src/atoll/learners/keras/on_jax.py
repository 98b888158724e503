"""A Keras model as pure functions, on Keras's JAX backend."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import keras  # type: ignore[import-untyped]
import numpy as np

from atoll.learners.jax.models import Tree
from atoll.learners.keras.model import Weights, architecture, copied, redrawn


class OnJax:
    """What `JaxLearner` asks of a model."""

    def __init__(self, model: Any, weights: str) -> None:
        self._model, self._start = copied(model), weights
        self._weights = Weights.of(self._model)
        self._names = {
            id(variable): (group, name)
            for group, named in (("p", self._weights.trained), ("s", self._weights.averaged))
            for name, variable in named.items()
        }

    def __repr__(self) -> str:
        return f"keras {type(self._model).__name__} {architecture(self._model)} {self._start}"

    def __reduce__(self) -> tuple[Any, ...]:
        return OnJax, (self._model, self._start)

    def fixed(self) -> str:
        """Digest of the frozen weights, and of the first ones where they are given."""
        return self._weights.fixed(everything=self._start == "given")

    def frozen(self) -> str:
        """Digest of the frozen weights."""
        return self._weights.fixed(everything=False)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        source = self._weights
        if self._start == "seeded" and not isinstance(key, jax.core.Tracer):
            word = int(jax.random.bits(key, dtype=jnp.uint32)) % 2**31
            source = Weights.of(redrawn(self._model, word))
        trained = {name: jnp.asarray(source.trained[name].value) for name in self._weights.trained}
        # Not drawn anew: what a layer was adapted to, or learned before it was frozen, is given.
        averaged = {name: jnp.asarray(v.value) for name, v in self._weights.averaged.items()}
        return trained, averaged

    def apply(
        self, params: Tree, state: Tree, x: Tree, key: jax.Array, training: bool
    ) -> tuple[jax.Array, Tree]:
        streams = iter(range(len(self._weights.streams)))
        groups = {"p": params, "s": state}

        def value(variable: Any) -> Any:
            if id(variable) in self._names:
                group, name = self._names[id(variable)]
                return groups[group][name]
            if any(variable is each for each in self._weights.streams):
                number = jax.random.fold_in(key, next(streams))
                return jax.random.bits(number, variable.shape, jnp.uint32)
            return jnp.asarray(np.asarray(variable.value))

        model = self._model
        others = model.non_trainable_variables
        outputs, after = model.stateless_call(
            [value(v) for v in model.trainable_variables], [value(v) for v in others], x,
            training=training,
        )  # fmt: skip
        changed = {
            self._names[id(variable)][1]: array
            for variable, array in zip(others, after, strict=True)
            if id(variable) in self._names
        }
        return outputs, changed

    def variables_of(self, source: Any) -> tuple[Tree, Tree] | None:
        """The weights of a Keras model like this one."""
        if not isinstance(source, keras.Model):
            return None
        found = Weights.of(source)
        groups = (found.trained, found.averaged)
        trained, averaged = ({n: v.value for n, v in group.items()} for group in groups)
        return trained, averaged

    def written(self, target: Any, params: Tree, state: Tree) -> Any:
        """The model itself."""
        found = Weights.of(target)
        for name, array in {**params, **state}.items():
            {**found.trained, **found.averaged}[name].assign(array)
        return target
