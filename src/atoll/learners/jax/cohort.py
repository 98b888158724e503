"""The local loop of one or more clients: vmapped over clients, compiled once for each shape.

All steps are one compiled loop, whose number of steps is an argument. Rows that only fill a
shape weigh nothing in the loss, and a client that has finished is no longer moved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from atoll.core.vectors import Vectors
from atoll.data.examples import Examples, joined
from atoll.learners.base import Affine, Assignment, Correction, LocalResult
from atoll.learners.batches import batches
from atoll.learners.jax.columns import on_device
from atoll.learners.jax.losses import Loss
from atoll.learners.jax.models import Model, Tree
from atoll.learners.jax.variables import Variables, stream

#: Makes an optax GradientTransformation for a learning rate.
OptimizerFactory = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Loop:
    """The compiled functions of one learner.

    All take one client; `vmap` gives them an axis of clients where they are used.
    """

    model: Model
    variables: Variables
    loss: Loss
    optimizer: OptimizerFactory | None
    max_norm: float | None
    compiled: dict[object, Any] = field(default_factory=dict)

    def gradient(
        self, flat: jax.Array, state: Tree, x: jax.Array, y: jax.Array, real: Any, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """Gradient [P] of the mean loss over the first `real` rows, that loss, the new state."""

        def objective(flat: jax.Array) -> tuple[jax.Array, Tree]:
            outputs, after = self.model.apply(self.variables.tree(flat), state, x, key, True)
            losses = self.loss(outputs, y)
            counted = jnp.where(jnp.arange(len(losses)) < real, losses, 0)
            return counted.sum() / jnp.maximum(real, 1), after

        (loss, after), gradient = jax.value_and_grad(objective, has_aux=True)(flat)
        return gradient, loss, after

    def clipped(self, gradient: jax.Array) -> jax.Array:
        """The gradient, scaled to the largest norm allowed."""
        if self.max_norm is None:
            return gradient
        norm = jnp.linalg.norm(gradient)
        return gradient * jnp.minimum(1.0, self.max_norm / jnp.maximum(norm, 1e-12))

    def begin(self, flat: jax.Array, lr: Any) -> Any:
        """The optimiser's state at the start of a client's work."""
        if self.optimizer is None:
            return ()
        return self.optimizer(lr).init(self.variables.tree(flat))

    def step(
        self, flat: jax.Array, direction: jax.Array, memory: Any, lr: Any
    ) -> tuple[jax.Array, Any]:
        """How far to move along minus `direction` [P], and the optimiser's new state."""
        if self.optimizer is None:
            return -lr * direction, memory
        # As the model's tree: optimisers may tell matrices from biases, or names from names.
        tree = self.variables.tree
        change, memory = self.optimizer(lr).update(tree(direction), memory, tree(flat))
        return self.variables.flat(change), memory

    def run(
        self,
        flat: jax.Array,
        state: Tree,
        rows: jax.Array,
        counts: jax.Array,
        key: jax.Array,
        scale: jax.Array,
        constant: jax.Array,
        x: jax.Array,
        y: jax.Array,
        steps: jax.Array,
        lr: jax.Array,
        *,
        corrected: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """Trained parameters [P] and the sum of losses, over `rows` [S, B] of the columns."""

        def body(step: Any, carry: Any) -> Any:
            flat, memory, total = carry
            real = counts[step]
            gradient, loss, _ = self.gradient(
                flat, state, x[rows[step]], y[rows[step]], real, jax.random.fold_in(key, step)
            )
            direction = self.clipped(gradient)
            if corrected:
                direction = direction + scale * flat + constant
            change, memory = self.step(flat, direction, memory, lr)
            going = real > 0
            return flat + jnp.where(going, change, 0), memory, total + jnp.where(going, loss, 0)

        start = flat, self.begin(flat, lr), jnp.zeros((), jnp.float32)
        flat, _, total = jax.lax.fori_loop(0, steps, body, start)
        return flat, total

    def cohort(self, params: int | None, constant: int | None, corrected: bool) -> Any:
        """`run` over clients; whether parameters and constants have an axis of them is said."""
        name = ("run", params, constant, corrected)
        if name not in self.compiled:
            axes = (params, None, 0, 0, 0, None, constant, None, None, None, None)
            whole = jax.vmap(partial(self.run, corrected=corrected), in_axes=axes)
            self.compiled[name] = jax.jit(whole)
        return self.compiled[name]

    def jitted(self, name: str, axes: Any = None) -> Any:
        """One of these functions, compiled; over clients if `axes` are given."""
        if (name, axes) not in self.compiled:
            function = getattr(self, name)
            self.compiled[name, axes] = jax.jit(
                function if axes is None else jax.vmap(function, in_axes=axes)
            )
        return self.compiled[name, axes]


def train_cohort(
    loop: Loop,
    model: Vectors,
    examples: Sequence[Examples],
    assignments: Sequence[Assignment],
    steps: Sequence[int],
    cut: Callable[[int], Sequence[slice]],
    lr: float,
    correction: Correction | None,
    *,
    single: bool,
) -> LocalResult:
    """Train every client from `model`; a `LocalResult` whose arrays have a leading axis of clients.

    With `single` there is one client and no leading axis.
    """
    words = [assignment.key.integer("batches") for assignment in assignments]
    plan = batches(words, [len(each) for each in examples], steps, cut)
    whole = joined(examples)
    starts = np.cumsum([0, *(len(each) for each in examples[:-1])])
    held = np.arange(len(whole)) if whole.rows is None else whole.rows
    rows = held[plan.positions + starts[:, None, None]]
    x, y = on_device(whole.x), on_device(whole.y)
    keys = jnp.stack([stream(a.key.fold("draws")) for a in assignments])
    flat = jnp.asarray(model["params"])
    state = loop.variables.state_of(model)
    if correction is None or isinstance(correction, Affine):
        affine = correction or Affine()
        given = 0.0 if affine.constant is None else affine.constant
        constant = jnp.asarray(given, jnp.float32)
        run = loop.cohort(
            0 if flat.ndim == 2 else None, 0 if constant.ndim == 2 else None,
            correction is not None,
        )  # fmt: skip
        filled, counts = _filled(rows, plan.counts)
        params, losses = run(
            flat, state, filled, counts, keys, jnp.float32(affine.scale), constant, x, y,
            max(steps), jnp.float32(lr),
        )  # fmt: skip
    else:
        params, losses = _stepwise(
            loop, flat, state, rows, plan.counts, keys, x, y, lr, correction, single=single
        )
    taken, seen = np.array(steps), plan.counts.sum(1)
    sizes, mean = np.array([len(each) for each in examples]), np.asarray(losses) / taken
    if single:
        return LocalResult(
            params[0], steps[0], steps[0] * lr, int(sizes[0]), int(seen[0]), float(mean[0])
        )
    path = jnp.asarray([[count * lr] for count in steps], jnp.float32)
    return LocalResult(params, taken, path, sizes, seen, mean)


def _stepwise(
    loop: Loop,
    flat: jax.Array,
    state: Tree,
    rows: NDArray[np.int64],
    counts: NDArray[np.int64],
    keys: jax.Array,
    x: jax.Array,
    y: jax.Array,
    lr: float,
    correction: Correction,
    *,
    single: bool,
) -> tuple[jax.Array, jax.Array]:
    """The same loop, step by step, for a correction that only Python can compute."""
    clients = len(rows)
    flat = jnp.broadcast_to(flat, (clients, flat.shape[-1]))
    gradient = loop.jitted("gradient", (0, None, 0, 0, 0, 0))
    clipped, step = loop.jitted("clipped", (0,)), loop.jitted("step", (0, 0, 0, None))
    memory = jax.vmap(loop.begin, in_axes=(0, None))(flat, lr)
    total = jnp.zeros(clients)
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    for number in range(rows.shape[1]):
        here, real = rows[:, number], jnp.asarray(counts[:, number])
        found, losses, _ = gradient(flat, state, x[here], y[here], real, fold(keys, number))
        found = clipped(found)
        if single:
            direction = jnp.asarray(correction(found[0], flat[0]))[None]
        else:
            direction = jnp.asarray(correction(found, flat))
        change, memory = step(flat, direction, memory, lr)
        going = real > 0
        flat = flat + jnp.where(going[:, None], change, 0)
        total = total + jnp.where(going, losses, 0)
    return flat, total


def _filled(
    rows: NDArray[np.int64], counts: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Rows [C, S, B] and counts [C, S] in one of a few shapes, so that few are compiled."""
    clients, steps, batch = rows.shape
    # Steps that are not taken cost nothing, so these may be rounded coarsely.
    filled = np.zeros((clients, max(16, 1 << (steps - 1).bit_length()), rounded(batch)), np.int32)
    # Rows that fill a batch are ones that the client has.
    filled[...] = rows[:, :1, :1]
    filled[:, :steps, :batch] = rows
    real = np.zeros(filled.shape[:2], np.int32)
    real[:, :steps] = counts
    return filled, real


def rounded(count: int) -> int:
    """`count` rounded up to one of eight sizes between a power of two and the next."""
    unit = max(1, 1 << max(0, count.bit_length() - 4))
    return -(-count // unit) * unit
