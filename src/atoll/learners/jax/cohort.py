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
from atoll.data.examples import Examples, joined, picked
from atoll.data.examples import of_each as each_input
from atoll.learners.base import Affine, Assignment, At, Correction, LocalResult, Objective
from atoll.learners.batches import batches
from atoll.learners.jax.columns import on_device
from atoll.learners.jax.losses import Loss
from atoll.learners.jax.models import Model, Tree
from atoll.learners.jax.objectives import NOTHING, Shown, check_alone, of_each
from atoll.learners.jax.variables import Variables, stream
from atoll.learners.scoring import ignored

#: So many rows show whether an objective is a mean over them.
TRIED = 4
#: Compiled functions to keep: objectives that vary make new ones.
COMPILED = 64
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
        self,
        flat: jax.Array,
        state: Tree,
        x: Tree,
        y: jax.Array,
        real: Any,
        key: jax.Array,
        shown: Shown = NOTHING,
        *,
        own: Callable[..., jax.Array] | None = None,
    ) -> tuple[jax.Array, jax.Array, Tree]:
        """Gradient [P] of the mean loss over the first `real` rows, that loss, the new state.

        `own` is an objective's loss, and `shown` what it is shown of this client.
        """
        others = [self.outputs(params, state, x, key) for params in shown.beside]

        def objective(flat: jax.Array) -> tuple[jax.Array, Tree]:
            outputs, after = self.model.apply(self.variables.tree(flat), state, x, key, True)
            if own is None:
                losses = self.loss(outputs, y)
            elif self.variables.names[1]:
                # With a state, batches are of exactly their size.
                losses = jnp.full(len(outputs), own(outputs, y, *others, **shown.given))
            else:
                losses = of_each(own, outputs, y, others, shown.given)
            weights = jnp.where(jnp.arange(len(losses)) < real, self.weights(y), 0)
            counted = jnp.where(weights > 0, losses * weights, 0)
            return counted.sum() / jnp.maximum(weights.sum(), 1), after

        (loss, after), gradient = jax.value_and_grad(objective, has_aux=True)(flat)
        return gradient, loss, after

    def weights(self, y: jax.Array) -> jax.Array:
        """How many of each example's targets count, where the loss says so; else 1."""
        mark = ignored(self.loss)
        if mark is None:
            return jnp.ones(len(y), jnp.float32)
        return (y != mark).reshape(len(y), -1).sum(1).astype(jnp.float32)

    def outputs(self, flat: jax.Array, state: Tree, x: Tree, key: jax.Array) -> jax.Array:
        """The outputs of parameters [P], as in evaluation."""
        return self.model.apply(self.variables.tree(flat), state, x, key, False)[0]

    def apart(
        self,
        flat: jax.Array,
        state: Tree,
        x: Tree,
        y: jax.Array,
        shown: Shown,
        *,
        own: Callable[..., jax.Array],
    ) -> tuple[jax.Array, jax.Array]:
        """An objective's loss of a few rows, and the mean of its losses of each of them alone."""
        key = jax.random.key(0)
        found = [self.outputs(params, state, x, key) for params in (flat, *shown.beside)]
        # Otherwise models may agree too much for a term between rows to show.
        outputs, *others = [
            each + jax.random.normal(jax.random.fold_in(key, number), each.shape)
            for number, each in enumerate(found)
        ]
        alone = of_each(own, outputs, y, others, shown.given)
        return own(outputs, y, *others, **shown.given), alone.mean()

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
        x: Tree,
        y: jax.Array,
        steps: jax.Array,
        lr: jax.Array,
        shown: Shown,
        *,
        corrected: bool,
        own: Callable[..., jax.Array] | None,
    ) -> tuple[jax.Array, jax.Array]:
        """Trained parameters [P] and the sum of losses, over `rows` [S, B] of the columns."""

        def body(step: Any, carry: Any) -> Any:
            flat, memory, total = carry
            real = counts[step]
            gradient, loss, _ = self.gradient(
                flat, state, picked(x, rows[step]), y[rows[step]], real,
                jax.random.fold_in(key, step), shown, own=own,
            )  # fmt: skip
            direction = self.clipped(gradient)
            if corrected:
                direction = direction + scale * flat + constant
            change, memory = self.step(flat, direction, memory, lr)
            going = real > 0
            return flat + jnp.where(going, change, 0), memory, total + jnp.where(going, loss, 0)

        start = flat, self.begin(flat, lr), jnp.zeros((), jnp.float32)
        flat, _, total = jax.lax.fori_loop(0, steps, body, start)
        return flat, total

    def cohort(
        self, params: int | None, constant: int | None, corrected: bool, shown: Shown,
        own: Callable[..., jax.Array] | None,
    ) -> Any:  # fmt: skip
        """`run` over clients; whether parameters and constants have an axis of them is said."""
        axes = (
            params, None, 0, 0, 0, None, constant, None, None, None, None, shown.axes
        )  # fmt: skip
        whole = partial(self.run, corrected=corrected, own=own)
        return self._compiled(("run", axes, corrected, own), whole, axes)

    def jitted(
        self, name: str, axes: Any = None, own: Callable[..., jax.Array] | None = None
    ) -> Any:
        """One of these functions, compiled; over clients if `axes` are given."""
        function = getattr(self, name)
        return self._compiled(
            (name, axes, own), function if own is None else partial(function, own=own), axes
        )

    def _compiled(self, key: object, function: Callable[..., Any], axes: Any) -> Any:
        found = self.compiled.get(key)
        if found is None:
            if len(self.compiled) >= COMPILED:
                self.compiled.clear()
            found = jax.jit(function if axes is None else jax.vmap(function, in_axes=axes))
            self.compiled[key] = found
        return found


def train_cohort(
    loop: Loop,
    model: Vectors,
    examples: Sequence[Examples],
    assignments: Sequence[Assignment],
    steps: Sequence[int],
    cut: Callable[[int], Sequence[slice]],
    lr: float,
    correction: Correction | At | None,
    objective: Objective | None,
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
    x, y = each_input(whole.x, on_device), on_device(whole.y)
    keys = jnp.stack([stream(a.key.fold("draws")) for a in assignments])
    flat = jnp.asarray(model["params"])
    state = loop.variables.state_of(model)
    own, shown = None, NOTHING
    if objective is not None:
        own, shown = objective.loss, Shown.of(objective, single=single)
        few = examples[0].take(np.arange(TRIED) % len(examples[0]))
        first = flat[0] if flat.ndim == 2 else flat
        check_alone(*loop.jitted("apart", own=own)(first, state, *few, shown.first()))
    if correction is None or isinstance(correction, Affine):
        affine = correction or Affine()
        given = 0.0 if affine.constant is None else affine.constant
        constant = jnp.asarray(given, jnp.float32)
        run = loop.cohort(
            0 if flat.ndim == 2 else None, 0 if constant.ndim == 2 else None,
            correction is not None, shown, own,
        )  # fmt: skip
        filled, counts = _filled(rows, plan.counts)
        params, losses = run(
            flat, state, filled, counts, keys, jnp.float32(affine.scale), constant, x, y,
            max(steps), jnp.float32(lr), shown,
        )  # fmt: skip
    else:
        params, losses = _stepwise(
            loop, flat, state, rows, plan.counts, keys, x, y, lr, correction, shown, own,
            single=single,
        )  # fmt: skip
    taken, seen = np.array(steps), plan.counts.sum(1)
    sizes, mean = np.array([len(each) for each in examples]), np.asarray(losses) / taken
    if single:
        return LocalResult(
            params[0], steps[0], steps[0] * lr, int(sizes[0]), int(seen[0]), float(mean[0])
        )
    columns = np.stack([taken, taken * lr, sizes, seen, mean], dtype=np.float32)[..., None]
    done, path, held, gone, loss = jnp.asarray(columns)
    return LocalResult(params, done, path, held, gone, loss)


def _stepwise(
    loop: Loop,
    flat: jax.Array,
    state: Tree,
    rows: NDArray[np.int64],
    counts: NDArray[np.int64],
    keys: jax.Array,
    x: Tree,
    y: jax.Array,
    lr: float,
    correction: Correction | At,
    shown: Shown,
    own: Callable[..., jax.Array] | None,
    *,
    single: bool,
) -> tuple[jax.Array, jax.Array]:
    """The same loop, step by step, for a correction that only Python can compute."""
    clients = len(rows)
    flat = jnp.broadcast_to(flat, (clients, flat.shape[-1]))
    gradient = loop.jitted("gradient", (0, None, 0, 0, 0, 0, shown.axes), own)
    clipped, step = loop.jitted("clipped", (0,)), loop.jitted("step", (0, 0, 0, None))
    memory = jax.vmap(loop.begin, in_axes=(0, None))(flat, lr)
    total = jnp.zeros(clients)
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))

    def corrected(found: jax.Array, flat: jax.Array, batch: tuple[Any, ...]) -> jax.Array:
        """The direction [C, P] that the correction makes of a gradient."""

        def at(points: jax.Array) -> jax.Array:
            there = jnp.broadcast_to(points, flat.shape)
            elsewhere: jax.Array = clipped(gradient(there, state, *batch, shown)[0])
            return elsewhere[0] if single else elsewhere

        given = (found[0], flat[0]) if single else (found, flat)
        if isinstance(correction, At):
            direction = correction.rule(*given, at)
        else:
            direction = correction(*given)
        return jnp.broadcast_to(jnp.asarray(direction), flat.shape)

    for number in range(rows.shape[1]):
        here, real = rows[:, number], jnp.asarray(counts[:, number])
        batch = picked(x, here), y[here], real, fold(keys, number)
        found, losses, _ = gradient(flat, state, *batch, shown)
        change, memory = step(flat, corrected(clipped(found), flat, batch), memory, lr)
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
