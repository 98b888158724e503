"""Learners in NumPy alone: linear and softmax regression and the multilayer perceptron."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from atoll.core.random import Key
from atoll.core.vectors import Layout, Vector, Vectors
from atoll.data.examples import Examples, Rows, picked
from atoll.data.federated import FederatedData
from atoll.data.sums import Sums, add
from atoll.data.tasks import Task
from atoll.errors import ConfigurationError, DataError
from atoll.learners.base import Ability, GradientLearner, Objective
from atoll.learners.checks import check_loss, check_outputs, flat_width
from atoll.learners.evaluation import mean_over, pieces

Matrix = NDArray[np.float32]

LOSSES = ("cross_entropy", "binary_cross_entropy", "squared")
#: Examples in a batch of an evaluation.
EVALUATED_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class NumpyLearner(GradientLearner):
    """A multilayer perceptron with ReLU between its layers.

    `layers` are the widths from input to output: (64, 10) is softmax regression, (64, 32, 10) has
    one hidden layer, (8, 1) with loss "squared" is linear regression. Inputs of more dimensions
    are flattened.

    Args:
        layers: widths, input first.
        loss: "cross_entropy" (labels), "binary_cross_entropy" (one logit for each of several
            labels, or one for two classes) or "squared" (half the squared error, as in textbooks).
        momentum: heavy-ball momentum of the local optimiser, fresh in every round.
        zero_init: start at zero instead of He et al. (ICCV 2015), for convex models.
    """

    layers: tuple[int, ...]
    loss: Literal["cross_entropy", "binary_cross_entropy", "squared"] = "cross_entropy"
    momentum: float = 0.0
    zero_init: bool = False

    abilities: ClassVar[frozenset[Ability]] = frozenset({"gradient", "at", "outputs"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.layers) < 2 or min(self.layers) < 1:
            raise ConfigurationError(
                f"layers must be two or more positive widths, input first, not {self.layers}"
            )
        if self.loss not in LOSSES:
            raise ConfigurationError(f"loss must be {' or '.join(LOSSES)}, not {self.loss!r}")
        if not 0 <= self.momentum < 1:
            raise ConfigurationError(f"momentum must be in [0, 1), not {self.momentum}")

    @property
    def plain_sgd(self) -> bool:  # type: ignore[override]
        return self.momentum == 0

    @cached_property
    def layout(self) -> Layout:
        shapes: dict[str, NDArray[np.float32]] = {}
        for number, (inputs, outputs) in enumerate(
            zip(self.layers[:-1], self.layers[1:], strict=True)
        ):
            shapes[f"{number}.weight"] = np.empty((inputs, outputs), np.float32)
            shapes[f"{number}.bias"] = np.empty(outputs, np.float32)
        return Layout.of(shapes)

    def init(self, key: Key) -> Vectors:
        model = self.layout.zeros()
        if not self.zero_init:
            rng = key.generator()
            for entry in self.layout.entries:
                if entry.name.endswith("weight"):
                    gain = 1.0 if entry.shape[1] == self.layers[-1] else 2.0
                    deviation = np.float32(np.sqrt(gain / entry.shape[0]))
                    model["params"][entry.slice] = deviation * rng.standard_normal(
                        entry.size, dtype=np.float32
                    )
        return model

    def check(self, data: FederatedData) -> None:
        super().check(data)
        width = flat_width(data, "NumpyLearner")
        if width != self.layers[0]:
            raise DataError(
                f"inputs of {data.name} have {width} values, but the first layer takes "
                f"{self.layers[0]}; use layers=({width}, ...)"
            )
        check_loss(self.loss, data)
        if self.loss == "cross_entropy":
            if data.y.ndim > 1:
                raise DataError(
                    f"{data.name} is a {data.task} set, with targets of shape "
                    f"{list(data.y.shape[1:])}; loss {self.loss!r} does not fit it"
                )
            check_outputs(self.loss, self.layers[-1:], data)
            return
        values = int(np.prod(data.y.shape[1:]))
        if values != self.layers[-1]:
            raise DataError(
                f"targets of {data.name} have {values} values, but the last layer gives "
                f"{self.layers[-1]}"
            )

    @contextmanager
    def descend(self, model: Vectors, examples: Examples, key: Key) -> Iterator[_Descent]:
        yield _Descent(self, model["params"], examples)

    def norm(self, vector: Vector) -> float:
        return float(np.sqrt(np.dot(vector, vector)))

    def evaluate(self, model: Vectors, examples: Examples, task: Task, classes: int | None) -> Sums:
        weights = _layers(self.layout, model["params"])
        parts = []
        for x, y in pieces(examples, EVALUATED_AT_ONCE):
            outputs = _forward(weights, x.reshape(len(x), -1))[-1]
            _, losses = _loss(self.loss, outputs, y)
            parts.append(self.sums(outputs, y, float(losses.mean()), task, classes))
        return add(parts)

    def outputs(self, model: Vectors, examples: Examples) -> NDArray[Any]:
        weights = _layers(self.layout, model["params"])
        parts = pieces(examples, EVALUATED_AT_ONCE)
        return np.concatenate([_forward(weights, x.reshape(len(x), -1))[-1] for x, _ in parts])

    def mean_loss(self, model: Vectors, examples: Examples) -> float:
        weights = _layers(self.layout, model["params"])

        def loss_of(x: Matrix, y: NDArray[Any]) -> float:
            outputs = _forward(weights, x.reshape(len(x), -1))[-1]
            return float(_loss(self.loss, outputs, y)[1].mean())

        return mean_over(examples, EVALUATED_AT_ONCE, loss_of)


class _Descent:
    """Weights and their gradients as views of two flat vectors."""

    def __init__(self, learner: NumpyLearner, params: Vector, examples: Examples) -> None:
        self.params = params.copy()
        self._learner = learner
        self._weights = _layers(learner.layout, self.params)
        self._gradient = np.empty_like(self.params)
        self._gradients = _layers(learner.layout, self._gradient)
        self._velocity = np.zeros_like(self.params) if learner.momentum else None
        self._examples = examples

    def gather(self, rows: Rows | slice) -> None:
        x = picked(self._examples.x, rows)
        self._x, self._y = x.reshape(len(x), -1), self._examples.y[rows]

    def gradient(self, batch: slice, objective: Objective | None = None) -> tuple[Vector, Any]:
        return self._gradient, self._backward(batch, self._weights, self._gradients)

    def mark(self) -> None:
        """Nothing is drawn, and there are no statistics."""

    def gradient_at(
        self, batch: slice, points: Vector, objective: Objective | None = None
    ) -> Vector:
        layout = self._learner.layout
        found = np.empty_like(self._gradient)
        self._backward(batch, _layers(layout, np.asarray(points)), _layers(layout, found))
        return found

    def _backward(
        self,
        batch: slice,
        weights: list[tuple[Matrix, Vector]],
        gradients: list[tuple[Matrix, Vector]],
    ) -> Any:
        """Write the batch's gradient by these weights; its mean loss."""
        y = self._y[batch]
        activations = _forward(weights, self._x[batch])
        error, losses = _loss(self._learner.loss, activations[-1], y)
        error /= np.float32(len(y))
        for number in range(len(weights) - 1, -1, -1):
            weight_gradient, bias_gradient = gradients[number]
            np.matmul(activations[number].T, error, out=weight_gradient)
            error.sum(axis=0, out=bias_gradient)
            if number:
                error = error @ weights[number][0].T
                error *= activations[number] > 0
        return losses.mean()

    def step(self, direction: Vector, lr: float, again: object = None) -> None:
        if self._velocity is not None:
            self._velocity *= np.float32(self._learner.momentum)
            self._velocity += direction
            direction = self._velocity
        self.params -= np.float32(lr) * direction

    def result(self) -> tuple[Vector, Vectors]:
        return self.params, {}


def _layers(layout: Layout, params: Vector) -> list[tuple[Matrix, Vector]]:
    views = list(layout.unpack({"params": params}).values())
    return list(zip(views[::2], views[1::2], strict=True))


def _forward(weights: list[tuple[Matrix, Vector]], x: Matrix) -> list[Matrix]:
    """Activations of every layer: the input first, the outputs (no ReLU) last."""
    activations = [x]
    for number, (weight, bias) in enumerate(weights):
        z = activations[-1] @ weight
        z += bias
        if number < len(weights) - 1:
            np.maximum(z, 0, out=z)
        activations.append(z)
    return activations


def _loss(loss: str, outputs: Matrix, y: NDArray[Any]) -> tuple[Matrix, NDArray[np.float32]]:
    """Derivative of each example's loss by its outputs [B, K], and the losses [B]."""
    if loss == "squared":
        error = outputs - y.reshape(outputs.shape)
        return error, np.square(error).sum(axis=1) / 2
    if loss == "binary_cross_entropy":
        true = y.reshape(outputs.shape).astype(np.float32)
        # The logistic function without an overflow.
        said = (1 + np.tanh(outputs / 2)) / 2
        losses = (np.logaddexp(0, outputs) - true * outputs).mean(axis=1)
        slope = np.asarray((said - true) / outputs.shape[1], np.float32)
        return slope, losses
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1, keepdims=True)
    rows = np.arange(len(y))
    losses = np.log(totals[:, 0]) - shifted[rows, y]
    exponentials /= totals
    exponentials[rows, y] -= 1
    return exponentials, losses
