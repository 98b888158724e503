"""Models as pure functions of their variables, whatever library they are written in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from atoll.errors import ConfigurationError, require

#: What Flax modules call the streams that they draw from, beside the one of parameters.
_STREAMS = ("dropout", "noise", "default", "sample", "random")
#: Nested dicts and lists of arrays.
Tree = Any


class Model(Protocol):
    """What `JaxLearner` asks of a model.

    `params` are trained; `state` is what a call may change besides (running means); both are trees
    of arrays. `key` is where dropout draws from. All functions must be traceable.
    """

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        """The initial (params, state)."""

    def apply(
        self, params: Tree, state: Tree, x: Tree, key: jax.Array, training: bool
    ) -> tuple[jax.Array, Tree]:
        """The outputs for inputs [B, ...], or a dict of them by name, and the new state."""


@runtime_checkable
class Owned(Protocol):
    """A model that knows the objects in which people keep its variables."""

    def variables_of(self, source: Any) -> tuple[Tree, Tree] | None:
        """The (params, state) of such an object; None if it is none."""

    def written(self, target: Any, params: Tree, state: Tree) -> Any:
        """Such an object with these variables: itself, or another where it cannot be written."""


@dataclass(frozen=True)
class pure:  # noqa: N801
    """A model of two functions.

    Args:
        initial: key -> params.
        forward: (params, x) -> outputs, or (params, x, key) -> outputs to draw while training; when
            it is evaluated, `key` is None.
    """

    initial: Callable[[jax.Array], Tree]
    forward: Callable[..., jax.Array]

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        # NumPy's arrays are of twice the width unless they are told otherwise.
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), self.initial(key)), {}

    def apply(
        self, params: Tree, state: Tree, x: Tree, key: jax.Array, training: bool
    ) -> tuple[jax.Array, Tree]:
        if self._draws:
            return self.forward(params, x, key if training else None), state
        return self.forward(params, x), state

    def variables_of(self, source: Any) -> tuple[Tree, Tree] | None:
        """A tree like the one that `initial` gives."""
        return source, {}

    def written(self, target: Any, params: Tree, state: Tree) -> Any:
        """Another tree: arrays of JAX are not written into."""
        return params

    @cached_property
    def _draws(self) -> bool:
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        given = inspect.signature(self.forward).parameters.values()
        return sum(p.kind in positional and p.default is p.empty for p in given) >= 3


@dataclass(frozen=True)
class linen:  # noqa: N801
    """A Flax Linen module, whose other collections (`batch_stats`) are averaged.

    Args:
        module: called as `module(x)`, with `train`, `training` or `deterministic` where it takes
            one of them.
        shape: of one input, without the batch; a dict of shapes where inputs have names.
        dtype: of inputs, or a dict of them.
    """

    module: Any
    shape: Sequence[int] | Mapping[str, Sequence[int]]
    dtype: str | Mapping[str, str] = "float32"

    def __post_init__(self) -> None:
        require("flax", "flax", "a Flax model")

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        example = self._example()
        variables = dict(self.module.init({"params": key}, example, **self._mode(False)))
        return variables.pop("params", {}), variables

    def apply(
        self, params: Tree, state: Tree, x: Tree, key: jax.Array, training: bool
    ) -> tuple[jax.Array, Tree]:
        variables = {"params": params, **state}
        if not training:
            return self.module.apply(variables, x, **self._mode(False)), state
        outputs, changed = self.module.apply(
            variables, x, rngs=dict.fromkeys(_STREAMS, key), mutable=list(state), **self._mode(True)
        )
        return outputs, {**state, **changed}

    def variables_of(self, source: Any) -> tuple[Tree, Tree] | None:
        """What `module.init` gives, or its "params" alone."""
        if not isinstance(source, Mapping):
            return None
        if "params" not in source:
            return source, {}
        return source["params"], {name: tree for name, tree in source.items() if name != "params"}

    def written(self, target: Any, params: Tree, state: Tree) -> Any:
        """Another tree: arrays of JAX are not written into."""
        return {**target, "params": params, **state} if "params" in target else params

    def _example(self) -> Tree:
        def dtype_of(name: str) -> str:
            given = self.dtype
            return given.get(name, "float32") if isinstance(given, Mapping) else given

        if not isinstance(self.shape, Mapping):
            return jnp.zeros((1, *self.shape), dtype_of(""))
        return {name: jnp.zeros((1, *shape), dtype_of(name)) for name, shape in self.shape.items()}

    def _mode(self, training: bool) -> dict[str, bool]:
        takes = inspect.signature(type(self.module).__call__).parameters
        for name in ("train", "training"):
            if name in takes:
                return {name: training}
        return {"deterministic": not training} if "deterministic" in takes else {}


@dataclass(frozen=True)
class nnx:  # noqa: N801
    """A Flax NNX module, made by a function of its `nnx.Rngs`: `nnx(lambda rngs: Net(rngs=rngs))`.

    Every `nnx.Param` is trained; other variables (`nnx.BatchStat`) are averaged.
    """

    make: Callable[[Any], Any]

    def __post_init__(self) -> None:
        require("flax.nnx", "flax", "a Flax model")
        if not callable(self.make):
            raise ConfigurationError(
                "a Flax NNX model is given by a function that makes it, so that its parameters "
                "can be drawn from the run's seed: nnx(lambda rngs: Net(rngs=rngs))"
            )

    @cached_property
    def _parts(self) -> tuple[Any, Any]:
        """What the module is besides its variables: its structure, and its streams of draws."""
        # Of a module that is made here and now, also when a trace asks first.
        with jax.ensure_compile_time_eval():
            structure, _, streams, _ = self._split(self._made(0))
        return structure, streams

    def __getstate__(self) -> dict[str, Any]:
        return {"make": self.make}

    def _made(self, key: Any) -> Any:
        from flax import nnx as flax

        return self.make(flax.Rngs(key))

    def _split(self, module: Any) -> tuple[Any, Any, Any, Any]:
        """Structure, parameters, streams of draws, and all other variables."""
        from flax import nnx as flax

        parts: Any = flax.split(module, flax.Param, flax.RngState, ...)
        return tuple(parts)

    def init(self, key: jax.Array) -> tuple[Tree, Tree]:
        _, params, _, rest = self._split(self._made(key))
        return params, rest

    def apply(
        self, params: Tree, state: Tree, x: Tree, key: jax.Array, training: bool
    ) -> tuple[jax.Array, Tree]:
        from flax import nnx as flax

        structure, streams = self._parts
        # Variables must be made anew where they may be written: inside the gradient's trace.
        state = jax.tree.map(lambda leaf: leaf, state)
        module = flax.merge(structure, params, _redrawn(streams, key), state)
        module.train() if training else module.eval()
        outputs = module(x)
        return outputs, self._split(module)[3]

    def variables_of(self, source: Any) -> tuple[Tree, Tree] | None:
        """The variables of a module."""
        from flax import nnx as flax

        if not isinstance(source, flax.Module):
            return None
        _, params, _, rest = self._split(source)
        return params, rest

    def written(self, target: Any, params: Tree, state: Tree) -> Any:
        """The module itself."""
        from flax import nnx as flax

        flax.update(target, params, state)
        return target


def _redrawn(streams: Tree, key: jax.Array) -> Tree:
    """The same streams of draws, begun from `key`."""
    leaves, shape = jax.tree.flatten(streams)
    fresh = [
        jax.random.fold_in(key, number)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros_like(leaf)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(shape, fresh)
