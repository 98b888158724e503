"""What the rest of atoll asks of a learner, and the local loop that gradient learners share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from atoll.core.numbers import plain_numbers, positive, whole
from atoll.core.random import Key, permutations
from atoll.core.vectors import Array, Layout, Vectors
from atoll.data.examples import Examples, Rows
from atoll.data.federated import FederatedData
from atoll.data.tasks import Task, task_of
from atoll.errors import ConfigurationError, DataError
from atoll.learners.metrics import Metrics, Sums, check_metrics, figures, own_figures
from atoll.learners.rates import Rate, rate_at
from atoll.learners.scoring import ignored, scored, takes_probabilities, weight
from atoll.learners.weights import copied, fits, is_vectors, packed

#: Turns (gradient, params) into the direction to descend along; either may be [P] or [C, P].
Correction = Callable[[Array, Array], Array]
#: What a learner can do beyond fitting; what an algorithm `needs` of it.
Ability = Literal["gradient", "at", "objective", "outputs"]


@dataclass(frozen=True)
class Affine:
    """The correction `gradient + scale * params + constant`, which engines may fuse.

    `constant` is [P] or [C, P]; None stands for zero.
    """

    scale: float = 0.0
    constant: Array | None = None

    def __call__(self, gradient: Array, params: Array) -> Array:
        if self.scale:
            gradient += self.scale * params
        if self.constant is not None:
            gradient += self.constant
        return gradient


@dataclass(frozen=True)
class At:
    """A correction that may ask for the same batch's gradient elsewhere.

    `rule(gradient, params, at)` gives the direction; `at(points)` is the gradient of this step's
    batch at other parameters, [P] or [C, P]: with the same draws (dropout), from the same
    statistics, which it does not move, and within the same `max_gradient_norm`. What `at` gives is
    a new array; `gradient` and `params` are the loop's own, which the next step overwrites. In a
    stack every gradient is zero for clients that have finished, and their direction is left out.
    """

    rule: Callable[[Array, Array, Callable[[Array], Array]], Array]


@dataclass(frozen=True)
class Objective:
    """What to minimise instead of the learner's loss.

    `loss(outputs, targets, *beside, **given)` is the mean loss of one client's batch, in the
    learner's framework. `beside` are parameters ([P], or [C, P] for a stack) whose outputs on the
    same batch the loss is shown, as in evaluation and without a gradient; `given` are numbers of
    each client, [...] or [C, ...] for a stack. On JAX the loss must be a mean over examples, and it
    is compiled once for as long as it is the same function.
    """

    loss: Callable[..., Any]
    beside: tuple[Array, ...] = ()
    given: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalResult:
    """What a client's local training came to.

    `params` [P] are the trained parameters; `path` is the sum of the learning rates of its
    `steps`; `examples` is how many the client holds and `seen` how many it went over, with
    repetition; `loss` is the mean training loss per step. `statistics` are the new buffers and
    counters. For a stack of C clients `params` is [C, P], statistics are [C, ...] and every number
    is a column [C, 1], so that what is written with operators serves both.
    """

    params: Array
    steps: Any
    path: Any
    examples: Any
    seen: Any
    loss: Any
    statistics: Vectors = field(default_factory=dict)


def steps_of(planned: int, fraction: float) -> int:
    """A fraction of the planned steps: at least one."""
    # The small term undoes the rounding of a fraction that was computed as steps / planned.
    return max(1, math.ceil(fraction * planned - 1e-6))


@dataclass(frozen=True)
class Assignment:
    """The circumstances of one piece of local work: which round, how much of it, which draws.

    `fraction` is the share of the full local work that is asked for. `secret` keys what nobody else
    may know; None, in a simulation, takes that from `key` as well.
    """

    round: int
    key: Key
    fraction: float = 1.0
    secret: Key | None = field(default=None, repr=False)

    def steps(self, planned: int) -> int:
        """How many of the `planned` steps are asked for: at least one."""
        return steps_of(planned, self.fraction)


class Learner(ABC):
    """A model and how one client trains and evaluates it.

    A model is a dict of flat vectors as `layout` describes them. Arrays that go in and out of
    `train` are the learner's own kind (torch tensors, say); `asarray` and `asnumpy` convert. A
    learner needs `layout`, `init`, `train`, `evaluate` and `planned_steps`; the rest has defaults.
    """

    #: What it can do beyond fitting; black boxes can only fit.
    abilities: frozenset[Ability] = frozenset()
    #: Whether a local step is `params -= lr * direction` and nothing else.
    plain_sgd: bool = False
    #: Metrics beside the task's own, by name.
    metrics: Metrics | None = None

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Names, shapes and dtypes of the model's arrays."""

    @abstractmethod
    def init(self, key: Key) -> Vectors:
        """The initial model."""

    @abstractmethod
    def train(
        self,
        model: Vectors,
        examples: Examples,
        assignment: Assignment,
        correction: Correction | At | None = None,
        objective: Objective | None = None,
    ) -> LocalResult:
        """Train from `model` on `examples`; the given vectors are left as they are.

        `correction` needs the ability "gradient" (an `At` one "at"), `objective` "objective".
        """

    @abstractmethod
    def evaluate(self, model: Vectors, examples: Examples, task: Task, classes: int | None) -> Sums:
        """Sums of the metrics of `model` over `examples`: what `sums` counts of its batches."""

    @abstractmethod
    def planned_steps(self, examples: int) -> int:
        """How many local steps a client with this many examples takes in one round."""

    def evaluate_each(
        self, model: Vectors, parts: Sequence[Examples], task: Task, classes: int | None
    ) -> list[Sums]:
        """Sums over each of these C parts, none of them empty.

        Each section of `model` is one vector for all parts, or [C, ...]: one model for each.
        """
        return [
            self.evaluate(model_at(model, c), part, task, classes) for c, part in enumerate(parts)
        ]

    def gradient(self, model: Vectors, examples: Examples, key: Key) -> tuple[Array, Vectors]:
        """The gradient [P] of the mean loss over all `examples`, and the new statistics."""
        raise ConfigurationError(
            f"{type(self).__name__} can only fit: it gives no gradient, which this algorithm needs"
        )

    def outputs(self, model: Vectors, examples: Examples) -> NDArray[Any]:
        """What `model` says of these examples, as in evaluation: float32 [n, ...]."""
        raise ConfigurationError(
            f"{type(self).__name__} does not show its outputs, which this algorithm needs"
        )

    def mean_loss(self, model: Vectors, examples: Examples) -> float:
        """The mean loss of `model` over these examples, as in evaluation."""
        raise ConfigurationError(
            f"{type(self).__name__} does not show its loss, which this algorithm needs"
        )

    def sums(
        self,
        outputs: NDArray[Any],
        targets: NDArray[Any],
        loss: float,
        task: Task,
        classes: int | None,
    ) -> Sums:
        """What a batch counts of the task's metrics, and of `metrics`.

        `outputs` are float32; `loss` is the mean over those targets of the batch that count.
        """
        kind = task_of(task)
        return scored(
            getattr(self, "loss", None), loss, outputs, targets, kind, classes, self.metrics,
            probabilities=self.gives_probabilities(outputs, targets, kind),
        )  # fmt: skip

    def gives_probabilities(self, outputs: NDArray[Any], targets: NDArray[Any], task: Task) -> bool:
        """Whether outputs that each decide a yes or no are probabilities, and not logits."""
        return False

    def figures(self, sums: Sums, task: Task) -> dict[str, float]:
        """The metrics that people read, from sums that add over clients; names are open."""
        return {**figures(sums, task), **own_figures(self.metrics, sums)}

    def check(self, data: FederatedData) -> None:
        """Raise `DataError` if this learner cannot be trained on these data."""

    def check_asked(self, correction: Correction | At | None, objective: Objective | None) -> None:
        """Raise `ConfigurationError` if `train` is asked for what this learner cannot do."""
        name = type(self).__name__
        if correction is not None and "gradient" not in self.abilities:
            raise ConfigurationError(f"{name} can only fit: it takes no correction")
        if isinstance(correction, At) and "at" not in self.abilities:
            raise ConfigurationError(
                f"{name} does not give a batch's gradient at other parameters, which this "
                "algorithm needs"
            )
        if objective is not None and "objective" not in self.abilities:
            raise ConfigurationError(
                f"{name} minimises its own loss and no other; this algorithm brings one"
            )

    def fixed(self) -> str:
        """A digest of what shapes the results but does not travel; empty if there is nothing."""
        return ""

    def frozen(self) -> str:
        """A digest of the weights that are never trained, which a model of this learner needs."""
        return ""

    def vectors_of(self, source: Any) -> Vectors:
        """A model of this layout from what people have: named arrays, or the framework's own.

        Raises `ConfigurationError`, naming what is missing or of another shape.
        """
        if is_vectors(source):
            return copied(self.layout, source)
        if isinstance(source, Mapping):
            return packed(self.layout, source, "what is given")
        raise ConfigurationError(
            f"{type(self).__name__} cannot take weights from {type(source).__name__}; give a dict "
            "of arrays by name"
        )

    def load_into(self, model: Vectors, target: Any) -> Any:
        """Write a model into the framework's own kind of object, which is also returned.

        Every learner fills a dict with the model's arrays by name, in those that are there.
        """
        if isinstance(target, dict):
            arrays = self.layout.unpack(copied(self.layout, model))
            fits(self.layout, {**arrays, **target}, "the dict")
            for name, array in arrays.items():
                if isinstance(target.get(name), np.ndarray):
                    target[name][...] = array
                else:
                    target[name] = array.copy()
            return target
        raise ConfigurationError(
            f"{type(self).__name__} cannot load into {type(target).__name__}; use "
            "learner.layout.unpack(run.model), a dict of arrays by name"
        )

    def asarray(self, vector: NDArray[Any]) -> Array:
        """A NumPy vector as this learner's own kind of array, shared where possible."""
        return vector

    def asnumpy(self, array: Array) -> NDArray[Any]:
        """This learner's own kind of array as a NumPy vector, shared where possible."""
        return np.asarray(array)


class Stacking:
    """What engines ask of a learner beyond its training; a learner that inherits this may say more.

    The defaults are those of a learner that knows nothing of engines.
    """

    @property
    def forks_safely(self) -> bool:
        """Whether it can be used in a forked process."""
        return True

    @property
    def tolerance(self) -> float:
        """How far a stack of clients may lie from each alone, relatively, by rounding."""
        return 1e-3

    def stacks(self, examples: Examples) -> str:
        """Why `train_cohort` cannot be used on data like these; empty if it can."""
        return f"{type(self).__name__} trains one client at a time"

    def train_cohort(
        self,
        model: Vectors,
        examples: Sequence[Examples],
        assignments: Sequence[Assignment],
        correction: Correction | At | None = None,
        objective: Objective | None = None,
    ) -> LocalResult:
        """Train C clients side by side: as `train` of each, with a leading axis in what comes out.

        Each section of `model` is one vector for all or [C, ...]. All are of the same round.
        """
        raise ConfigurationError(self.stacks(examples[0]))

    def prefers_stacks(self, examples: Examples) -> bool:
        """Whether a stack is likely to be faster than one client at a time."""
        return False

    def activation_bytes(self, examples: Examples) -> int:
        """About how much one client's local step keeps for its way back; 0 if nobody knows."""
        return 0

    def threads_safely(self, examples: Examples) -> bool:
        """Whether `train` may run in several threads of this process at once."""
        return False

    def explain(self, examples: Examples) -> tuple[tuple[str, str, str], ...]:
        """(layer, kind, how it is run) of each part of the model, for people."""
        return (("", type(self).__name__, "whole, one client at a time"),)

    def use_threads(self, count: int) -> int:
        """Let one operation use so many threads, in the calling thread; returns what it was."""
        return 1

    def fold(self, rows: Array, scales: Sequence[float]) -> tuple[NDArray[Any], int] | None:
        """Sum of round(row * scale) over rows [C, P] as int64 [P], and a bound of its magnitude.

        For learners whose arrays are not in this process's memory; None leaves it to others.
        """
        return None


def stacking(learner: Learner) -> Stacking:
    """What engines may ask of a learner, also of one that knows nothing of engines."""
    return learner if isinstance(learner, Stacking) else _Plain(learner)


class _Plain(Stacking):
    """What engines may ask of a learner that knows nothing of them."""

    def __init__(self, learner: Learner) -> None:
        self._name = type(learner).__name__

    def stacks(self, examples: Examples) -> str:
        return f"{self._name} trains one client at a time"

    def explain(self, examples: Examples) -> tuple[tuple[str, str, str], ...]:
        return (("", self._name, "whole, one client at a time"),)


def model_at(model: Vectors, place: int) -> Vectors:
    """The model of one client of a stack: sections that are [C, ...] are read at its place."""
    return {name: vector[place] if vector.ndim > 1 else vector for name, vector in model.items()}


class Descent(Protocol):
    """One client's training in progress on resident buffers."""

    params: Array

    def gather(self, rows: Rows | slice) -> None:
        """Fetch these rows of the columns; `gradient` then takes slices of them."""

    def gradient(self, batch: slice, objective: Objective | None = None) -> tuple[Array, Any]:
        """Gradient [P] (a buffer that may be overwritten) and mean loss of a batch."""

    def mark(self) -> None:
        """Note the draws and the statistics that the coming `gradient` begins from."""

    def gradient_at(self, batch: slice, points: Array, objective: Objective | None = None) -> Array:
        """The gradient [P] at other parameters, begun from the mark; nothing else is changed.

        A new array each time. Only who has the ability "at" needs `mark` and this, and only who
        has "objective" is given one.
        """

    def step(
        self, direction: Array, lr: float, again: Callable[[], tuple[Array, Any]] | None = None
    ) -> None:
        """Move `params`, in place, along minus `direction`.

        `again` gives the direction and the loss of the same batch where `params` now are, for
        optimisers that look more than once.
        """

    def result(self) -> tuple[Array, Vectors]:
        """The trained parameters (copied) and the statistics."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GradientLearner(Learner, Stacking):
    """A learner that gives gradients; subclasses say how one descent is begun.

    Args:
        lr: local learning rate, or a `rates` schedule of the round.
        batch_size: examples per step; None takes all of a client's examples at once.
        drop_last: leave out the last batch of a pass where it is shorter than `batch_size`, unless
            a client has no other.
        epochs: passes over the client's examples per round.
        steps: if given, exactly so many local steps per round instead of `epochs`.
        max_gradient_norm: if given, each batch gradient is scaled to at most this L2 norm.
        metrics: beside those of the task, by name: `{"top5": Metric(...)}`.
    """

    lr: float | Rate = 0.1
    batch_size: int | None = 32
    drop_last: bool = False
    epochs: int = 1
    steps: int | None = None
    max_gradient_norm: float | None = None
    metrics: Metrics | None = None

    abilities: ClassVar[frozenset[Ability]] = frozenset({"gradient"})  # type: ignore[misc]

    @property
    def smallest_batch(self) -> int:
        """Fewer examples than this cannot be a batch; a shorter last one joins its neighbour."""
        return 1

    def __post_init__(self) -> None:
        plain_numbers(self)
        for name in ("batch_size", "epochs", "steps"):
            value = getattr(self, name)
            if value is not None:
                whole(name, value, 1)
        if not callable(self.lr):
            rate_at(self.lr, 1)
        if self.max_gradient_norm is not None:
            positive("max_gradient_norm", self.max_gradient_norm)
        check_metrics(self.metrics)

    @abstractmethod
    def descend(
        self, model: Vectors, examples: Examples, key: Key
    ) -> AbstractContextManager[Descent]:
        """Begin a descent from `model` over `examples`, with draws (dropout) from `key`."""

    @abstractmethod
    def norm(self, vector: Array) -> float:
        """L2 norm of one of this learner's arrays."""

    def planned_steps(self, examples: int) -> int:
        if self.steps is not None:
            return self.steps
        size = self.batch_size or examples
        full, rest = divmod(examples, size)
        short = rest > 0 and (full == 0 or (rest >= self.smallest_batch and not self.drop_last))
        return self.epochs * (full + short)

    def check(self, data: FederatedData) -> None:
        small = np.flatnonzero(data.sizes() < self.smallest_batch)
        if len(small):
            raise DataError(
                f"client {data.names[small[0]]!r} of {data.name} has fewer than "
                f"{self.smallest_batch} training examples, too few for a model with BatchNorm; "
                "partition with a larger minimum, or use GroupNorm"
            )
        if self.batch_size is not None and self.batch_size < self.smallest_batch:
            raise DataError(
                f"a model with BatchNorm needs batches of {self.smallest_batch} or more"
            )

    def _cut(self, count: int, size: int) -> list[slice]:
        """Batches of `size` examples; a last one that would be too small joins the one before."""
        starts = list(range(0, count, size))
        if len(starts) > 1 and count - starts[-1] < self.smallest_batch:
            starts.pop()
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], count], strict=True)]

    def batch_loss(self, outputs: NDArray[Any], targets: NDArray[Any]) -> float:
        """The mean loss of float32 outputs, where `loss` is a function of people's own."""
        raise NotImplementedError

    def gives_probabilities(self, outputs: NDArray[Any], targets: NDArray[Any], task: Task) -> bool:
        if not callable(getattr(self, "loss", None)) or not task.decides(outputs.shape[1:]):
            return False
        if "_probabilities" not in self.__dict__:
            found = takes_probabilities(self.batch_loss, outputs, targets)
            self.__dict__["_probabilities"] = found
        return bool(self.__dict__["_probabilities"])

    def _shares(self, examples: Examples, cut: Sequence[slice]) -> list[float]:
        """What share the mean loss of each batch has in that of all examples."""
        loss = getattr(self, "loss", None)
        if ignored(loss) is None:
            return [(batch.stop - batch.start) / len(examples) for batch in cut]
        counts = [weight(loss, examples.take(batch)[1]) for batch in cut]
        return [count / max(sum(counts), 1) for count in counts]

    def _epoch(self, count: int) -> list[slice]:
        """The batches of one pass over so many examples."""
        size = self.batch_size or count
        return self._cut(count - count % size if self.drop_last and count > size else count, size)

    def _smallest_to_come(self, data: FederatedData) -> int:
        """The fewest examples of any batch in training on these data."""
        sizes = np.unique(data.sizes())
        last = [self._epoch(int(size))[-1] for size in sizes if size]
        return min((batch.stop - batch.start for batch in last), default=1)

    def _asked(self, examples: Sequence[Examples], assignments: Sequence[Assignment]) -> list[int]:
        """The local steps that are asked of each client."""
        return [
            a.steps(self.planned_steps(len(e))) for e, a in zip(examples, assignments, strict=True)
        ]

    def train(
        self,
        model: Vectors,
        examples: Examples,
        assignment: Assignment,
        correction: Correction | At | None = None,
        objective: Objective | None = None,
    ) -> LocalResult:
        self.check_asked(correction, objective)
        lr = rate_at(self.lr, assignment.round)
        steps = assignment.steps(self.planned_steps(len(examples)))
        word = assignment.key.integer("batches")
        with self.descend(model, examples, assignment.key.fold("draws")) as descent:
            done = seen = 0
            losses: Any = 0.0
            for batch in self._batches(descent, examples, steps, word):
                again = partial(self._direction, descent, batch, correction, objective)
                direction, loss = again()
                descent.step(direction, lr, again)
                done, seen, losses = done + 1, seen + batch.stop - batch.start, losses + loss
            params, statistics = descent.result()
        return LocalResult(
            params, done, done * lr, len(examples), seen, float(losses) / done, statistics
        )

    def _direction(
        self,
        descent: Descent,
        batch: slice,
        correction: Correction | At | None,
        objective: Objective | None,
    ) -> tuple[Array, Any]:
        """Where a step goes, and the loss of its batch."""
        asked = () if objective is None else (objective,)
        if not isinstance(correction, At):
            gradient, loss = descent.gradient(batch, *asked)
            gradient = self._clipped(gradient)
            return gradient if correction is None else correction(gradient, descent.params), loss
        descent.mark()
        gradient, loss = descent.gradient(batch, *asked)

        def at(points: Array) -> Array:
            return self._clipped(descent.gradient_at(batch, points, *asked))

        return correction.rule(self._clipped(gradient), descent.params, at), loss

    def _clipped(self, gradient: Array) -> Array:
        """The gradient, scaled to the largest norm allowed; it may be overwritten."""
        if self.max_gradient_norm is not None:
            gradient *= min(1.0, self.max_gradient_norm / max(self.norm(gradient), 1e-12))
        return gradient

    def _batches(
        self, descent: Descent, examples: Examples, steps: int, word: int
    ) -> Iterator[slice]:
        """Slices of `steps` batches, over a new permutation of the examples in each epoch."""
        count = len(examples)
        cut = self._epoch(count)
        for order in permutations([word], count, -(-steps // len(cut)))[0]:
            descent.gather(examples.at(order))
            for batch in cut:
                yield batch
                steps -= 1
                if not steps:
                    return

    def gradient(
        self, model: Vectors, examples: Examples, key: Key, chunk: int = 1024
    ) -> tuple[Array, Vectors]:
        with self.descend(model, examples, key.fold("draws")) as descent:
            descent.gather(examples.at(slice(None)))
            cut = self._cut(len(examples), chunk)
            total: Any = 0.0
            for batch, share in zip(cut, self._shares(examples, cut), strict=True):
                gradient, _ = descent.gradient(batch)
                total = total + gradient * share
            _, statistics = descent.result()
        return total, statistics
