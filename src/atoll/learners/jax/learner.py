"""Any model that JAX can differentiate as a learner."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from atoll.core.random import Key
from atoll.core.vectors import Array, Layout, Vector, Vectors
from atoll.data.examples import Examples, Rows, joined, length, of_each, picked, shape_text
from atoll.data.federated import FederatedData
from atoll.data.sums import Sums
from atoll.data.tasks import Task, task_of
from atoll.errors import ConfigurationError, DataError
from atoll.learners.base import (
    Ability,
    Assignment,
    At,
    Correction,
    GradientLearner,
    LocalResult,
    Objective,
)
from atoll.learners.checks import check_loss, check_outputs, check_scale, tried
from atoll.learners.evaluation import TOKENS_AT_ONCE, mean_over, pieces, sums_of_parts
from atoll.learners.jax.cohort import Loop, OptimizerFactory, rounded, train_cohort
from atoll.learners.jax.losses import LOSSES, Loss, last_function
from atoll.learners.jax.models import Model, Owned
from atoll.learners.jax.objectives import NOTHING, Shown
from atoll.learners.jax.variables import Variables, arrays_of, stream
from atoll.learners.rates import rate_at
from atoll.learners.scoring import ignored, weight
from atoll.learners.weights import copied, fits, is_vectors, packed


@dataclass(frozen=True, eq=False)
class JaxLearner(GradientLearner):
    """Trains and evaluates a model of pure functions, compiled by XLA.

    Clients are stacked by `vmap`; all local steps are one compiled loop. A model with a state that
    training changes (BatchNorm) takes one client at a time, in batches of exactly their size.
    Inputs by name come as one dict.

    Args:
        model: `learners.jax.pure(init, apply)`, `linen(module, shape)`, `nnx(make)`, or anything
            with their two methods (and `fixed`, a digest of what does not travel, if there is
            something).
        loss: "cross_entropy" (labels or next tokens), "binary_cross_entropy" (one logit, or one for
            each of several labels), "mse", "l1", or a callable (outputs, targets) -> the loss of
            each example [B]. It may have an `ignore_index`, a target that counts nowhere; an
            example's loss is then the mean over its targets that count.
        optimizer: None for plain SGD, or an optax optimiser or partial of one, called as
            `optimizer(lr)` afresh for every client and round: nothing is carried over.
    """

    model: Model
    loss: str | Loss = "cross_entropy"
    optimizer: OptimizerFactory | None = None

    abilities: ClassVar[frozenset[Ability]] = frozenset(  # type: ignore[misc]
        {"gradient", "at", "objective", "outputs"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise ConfigurationError(
                f"loss {self.loss!r} is not known; use {', '.join(LOSSES)} or a function of "
                "(outputs, targets) that gives the loss of each example"
            )
        if not (hasattr(self.model, "init") and hasattr(self.model, "apply")):
            raise ConfigurationError(
                f"model must be one of learners.jax.pure, linen or nnx, not {self.model!r}"
            )
        if self.optimizer is not None and not callable(self.optimizer):
            raise ConfigurationError(
                f"optimizer must be an optax optimiser such as optax.adam or a partial of one, "
                f"called with the learning rate, not {self.optimizer!r}"
            )

    @property
    def plain_sgd(self) -> bool:  # type: ignore[override]
        return self.optimizer is None

    @property
    def forks_safely(self) -> bool:
        return False

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of; what it has compiled stays here."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def _variables(self) -> Variables:
        return Variables.of(self.model)

    @cached_property
    def _loss(self) -> Loss:
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    @cached_property
    def _loop(self) -> Loop:
        return Loop(self.model, self._variables, self._loss, self.optimizer, self.max_gradient_norm)

    @property
    def layout(self) -> Layout:
        return self._variables.layout

    def init(self, key: Key) -> Vectors:
        return self._variables.init(self.model, key)

    def fixed(self) -> str:
        told = getattr(self.model, "fixed", None)
        return str(told()) if callable(told) else ""

    def frozen(self) -> str:
        told = getattr(self.model, "frozen", None)
        return str(told()) if callable(told) else ""

    @property
    def _stateful(self) -> bool:
        return bool(self._variables.names[1])

    def stacks(self, examples: Examples) -> str:
        if not self._stateful:
            return ""
        return (
            "the model keeps statistics of whole batches, which rows that fill a shape would blur"
        )

    def prefers_stacks(self, examples: Examples) -> bool:
        # Convolutions with each client's own kernels are slow on a processor.
        if self._stateful:
            return False
        return jax.default_backend() != "cpu" or "conv_general_dilated" not in self._primitives(
            examples
        )

    def activation_bytes(self, examples: Examples) -> int:
        batch = self.batch_size or len(examples)
        return sum(self._primitives(examples).values()) * batch

    def _primitives(self, examples: Examples) -> dict[str, int]:
        """The operations of a forward pass, and the bytes that each kind makes per example."""
        if "_found" not in self.__dict__:
            x, _ = examples.take(slice(0, 1))
            params, state = jax.eval_shape(self.model.init, jax.random.key(0))
            traced = jax.make_jaxpr(self.model.apply, static_argnums=4)(
                params, state, of_each(x, jnp.asarray), jax.random.key(0), True
            )
            found: dict[str, int] = {}
            _count(traced.jaxpr, found)
            self.__dict__["_found"] = found
        return self.__dict__["_found"]  # type: ignore[no-any-return]

    def threads_safely(self, examples: Examples) -> bool:
        return True

    def explain(self, examples: Examples) -> tuple[tuple[str, str, str], ...]:
        kind = type(self.model).__name__
        if self._stateful:
            return (("", kind, "compiled by XLA, step by step, one client at a time"),)
        return (("", kind, "compiled by XLA: all local steps in one loop, vmapped over clients"),)

    def train(
        self,
        model: Vectors,
        examples: Examples,
        assignment: Assignment,
        correction: Correction | At | None = None,
        objective: Objective | None = None,
    ) -> LocalResult:
        if self._stateful:
            return super().train(model, examples, assignment, correction, objective)
        return self._train(model, [examples], [assignment], correction, objective, single=True)

    def train_cohort(
        self,
        model: Vectors,
        examples: Sequence[Examples],
        assignments: Sequence[Assignment],
        correction: Correction | At | None = None,
        objective: Objective | None = None,
    ) -> LocalResult:
        if self._stateful:
            raise ConfigurationError(f"the model cannot be stacked: {self.stacks(examples[0])}")
        return self._train(model, examples, assignments, correction, objective, single=False)

    def _train(
        self,
        model: Vectors,
        examples: Sequence[Examples],
        assignments: Sequence[Assignment],
        correction: Correction | At | None,
        objective: Objective | None,
        *,
        single: bool,
    ) -> LocalResult:
        steps = self._asked(examples, assignments)
        lr = rate_at(self.lr, assignments[0].round)
        return train_cohort(
            self._loop, model, examples, assignments, steps, self._epoch, lr, correction,
            objective, single=single,
        )  # fmt: skip

    @contextmanager
    def descend(self, model: Vectors, examples: Examples, key: Key) -> Iterator[_Descent]:
        yield _Descent(self._loop, model, examples, key, exact=self._stateful)

    def norm(self, vector: Array) -> float:
        return float(jnp.linalg.norm(vector))

    def evaluate(self, model: Vectors, examples: Examples, task: Task, classes: int | None) -> Sums:
        return self.evaluate_each(model, [examples], task, classes)[0]

    def evaluate_each(
        self, model: Vectors, parts: Sequence[Examples], task: Task, classes: int | None
    ) -> list[Sums]:
        if any(vector.ndim > 1 for vector in model.values()):
            return super().evaluate_each(model, parts, task, classes)
        outputs_of, kind = self._outputs_of(model), task_of(task)

        def sums_of(outputs: NDArray[Any], y: NDArray[Any]) -> Sums:
            shown = outputs.astype(np.float32)
            return self.sums(shown, y, self.batch_loss(outputs, y), kind, classes)

        return sums_of_parts(parts, _at_once(parts), outputs_of, sums_of)

    def outputs(self, model: Vectors, examples: Examples) -> NDArray[Any]:
        outputs_of, most = self._outputs_of(model), _at_once([examples])
        found = [outputs_of(x) for x, _ in pieces(examples, most)]
        return np.concatenate(found).astype(np.float32)

    def mean_loss(self, model: Vectors, examples: Examples) -> float:
        outputs_of = self._outputs_of(model)
        return mean_over(
            examples,
            _at_once([examples]),
            lambda x, y: self.batch_loss(outputs_of(x), y),
            partial(weight, self.loss),
        )

    def _outputs_of(self, model: Vectors) -> Callable[[Any], NDArray[Any]]:
        """A function from inputs to the outputs of this model, as in evaluation."""
        params, state = jnp.asarray(model["params"]), self._variables.state_of(model)

        def outputs_of(x: Any) -> NDArray[Any]:
            count = length(x)
            filled = _padded(x, rounded(count))
            return np.asarray(self._forward(params, state, filled))[:count]

        return outputs_of

    def batch_loss(self, outputs: NDArray[Any], y: NDArray[Any]) -> float:
        # In one of a few shapes too: every client would be compiled for otherwise.
        size = rounded(len(y))
        losses = self._jitted_loss(_padded(outputs, size), _padded(y, size))
        each = np.asarray(losses)[: len(y)]
        if ignored(self.loss) is None:
            return float(each.mean())
        weights = np.asarray(self._loop.weights(jnp.asarray(y)))
        return float(each[weights > 0] @ weights[weights > 0] / max(weights.sum(), 1))

    @cached_property
    def _jitted_loss(self) -> Any:
        return jax.jit(self._loss)

    @cached_property
    def _forward(self) -> Any:
        def forward(flat: jax.Array, state: Any, x: Any) -> jax.Array:
            tree = self._variables.tree(flat)
            return self.model.apply(tree, state, x, jax.random.key(0), False)[0]

        return jax.jit(forward)

    def check(self, data: FederatedData) -> None:
        """Run one example through loss and model, so that a misfit is said before any training."""
        super().check(data)
        check_loss(self.loss, data)
        x, y = tried(data)
        model = self.init(Key(0))
        state = self._variables.state_of(model)
        try:
            outputs = self._forward(model["params"], state, x)
            losses = self._loss(outputs, jnp.asarray(y))
        except Exception as error:
            raise DataError(
                f"the model does not fit {data.name}, whose inputs have shape "
                f"{shape_text(data.shape)}: {error}"
            ) from error
        if losses.shape != (len(y),):
            raise DataError(
                f"the loss gives shape {list(losses.shape)} for {len(y)} examples; it must give "
                "the loss of each example, without a mean over them"
            )
        self._check_rows(data, model)
        check_outputs(self.loss, outputs.shape[1:], data)
        last = last_function(jax.make_jaxpr(self._forward)(model["params"], state, x).jaxpr)
        check_scale(self.loss, self.batch_loss, np.asarray(outputs, np.float32), y, data, last)

    def _check_rows(self, data: FederatedData, model: Vectors) -> None:
        """Raise unless what an example comes to is the same whatever stands beside it."""
        if self._stateful:
            return
        # Of the first clients: a population may be large, and be made as it is asked for.
        few = joined([data.train(member) for member in range(min(8, len(data)))])
        x, y = few.take(np.arange(min(8, len(few))))
        if len(y) < 2:
            return
        state = self._variables.state_of(model)
        losses = []
        for size in (len(y), len(y) // 2):
            outputs = self._forward(model["params"], state, picked(x, slice(size)))
            losses.append(np.asarray(self._loss(outputs, jnp.asarray(y[:size]))))
        whole, part = losses[0][: len(y) // 2], losses[1]
        if not np.allclose(whole, part, rtol=1e-3, atol=1e-5):
            raise DataError(
                "the loss of an example depends on what else is in its batch; JaxLearner fills "
                "batches up to a few shapes, so a model must treat rows one by one (a statistic of "
                "the batch belongs in its state, as BatchNorm's does)"
            )

    @cached_property
    def smallest_batch(self) -> int:
        """Statistics of a batch need two rows."""
        return 2 if self._stateful else 1

    def asarray(self, vector: NDArray[Any]) -> Array:
        return jnp.asarray(vector)

    def vectors_of(self, source: Any) -> Vectors:
        """As in `Learner`, also from what the model is kept in: a tree, a module, a Keras model."""
        if is_vectors(source):
            return copied(self.layout, source)
        trees = self._trees_of(source)
        if trees is None:
            return super().vectors_of(source)
        return packed(self.layout, arrays_of(*trees), f"the given {type(source).__name__}")

    def load_into(self, model: Vectors, target: Any) -> Any:
        """As in `Learner`; a tree of arrays cannot be written into, so another is returned."""
        trees = None if self._by_name(target) else self._trees_of(target)
        if trees is None or not isinstance(self.model, Owned):
            return super().load_into(model, target)
        variables, vectors = self._variables, copied(self.layout, model)
        fits(self.layout, arrays_of(*trees), f"the given {type(target).__name__}")
        params = variables.tree(jnp.asarray(vectors["params"]))
        return self.model.written(target, params, variables.state_of(vectors))

    def _trees_of(self, source: Any) -> tuple[Any, Any] | None:
        """The (params, state) of what people keep the model in; None if it is no such thing."""
        found = self.model.variables_of(source) if isinstance(self.model, Owned) else None
        return (source, {}) if found is None and isinstance(source, Mapping) else found

    def _by_name(self, target: Any) -> bool:
        """Whether this is a dict of arrays by dotted name, or one to be filled."""
        return isinstance(target, dict) and all("." in name for name in target)


class _Descent:
    """One client's training, step by step."""

    def __init__(
        self, loop: Loop, model: Vectors, examples: Examples, key: Key, *, exact: bool
    ) -> None:
        self.params: jax.Array = jnp.asarray(model["params"])
        self._loop, self._examples, self._exact = loop, examples, exact
        self._state = loop.variables.state_of(model)
        self._key, self._step = stream(key), 0
        self._memory: Any = None

    def gather(self, rows: Rows | slice) -> None:
        self._x, self._y = picked(self._examples.x, rows), self._examples.y[rows]

    def gradient(self, batch: slice, objective: Objective | None = None) -> tuple[jax.Array, Any]:
        gradient, loss, self._state = self._gradient(batch, self.params, self._state, objective)
        return gradient, loss

    def mark(self) -> None:
        self._marked = self._state

    def gradient_at(
        self, batch: slice, points: Array, objective: Objective | None = None
    ) -> jax.Array:
        return self._gradient(batch, jnp.asarray(points), self._marked, objective)[0]

    def _gradient(
        self, batch: slice, params: jax.Array, state: Any, objective: Objective | None
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Gradient and loss of a batch at these parameters, and the state after it."""
        x, y = picked(self._x, batch), self._y[batch]
        real = len(y)
        if not self._exact:
            x, y = (_padded(column, rounded(real)) for column in (x, y))
        key = jax.random.fold_in(self._key, self._step)
        own, shown = None, NOTHING
        if objective is not None:
            own, shown = objective.loss, Shown.of(objective, single=True).first()
        found: tuple[jax.Array, jax.Array, Any] = self._loop.jitted("gradient", own=own)(
            params, state, x, y, real, key, shown
        )
        return found

    def step(self, direction: Array, lr: float, again: object = None) -> None:
        if self._memory is None:
            self._memory = self._loop.begin(self.params, lr)
        change, self._memory = self._loop.jitted("step")(self.params, direction, self._memory, lr)
        self.params = self.params + change
        self._step += 1

    def result(self) -> tuple[Vector, Vectors]:
        return self.params, self._loop.variables.statistics(self._state)  # type: ignore[return-value]


def _at_once(parts: Sequence[Examples]) -> int:
    """Examples in a batch of an evaluation: less of those that have targets for each token."""
    y = parts[0].y
    most = TOKENS_AT_ONCE if y.ndim > 1 and y.dtype.kind in "iu" else 1024
    return min(sum(len(part) for part in parts), most)


def _padded(x: Any, size: int) -> Any:
    """Inputs or other columns of this size: what is lacking repeats the first row."""

    def filled(column: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([column, np.repeat(column[:1], size - len(column), axis=0)])

    return of_each(x, filled)


def _count(jaxpr: Any, found: dict[str, int]) -> None:
    """Add up what each kind of operation makes, in bytes, inner functions included."""
    for equation in jaxpr.eqns:
        inner = [p for p in equation.params.values() if hasattr(p, "jaxpr") or hasattr(p, "eqns")]
        for each in inner:
            _count(getattr(each, "jaxpr", each), found)
        if not inner:
            made = sum(math.prod(v.aval.shape) * 4 for v in equation.outvars)
            found[equation.primitive.name] = found.get(equation.primitive.name, 0) + made
