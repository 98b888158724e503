"""Prediction: what a model says of inputs, as classes with probabilities or as amounts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.core.vectors import Vectors
from atoll.data.examples import Examples, Inputs, columns_of, length
from atoll.data.tasks import CLASSIFICATION, MULTILABEL, TOKENS, Task, task_of
from atoll.errors import ConfigurationError
from atoll.learners.base import Learner

#: Rows of noise that tell whether a model ends in probabilities.
PROBED = 32


@dataclass(frozen=True)
class Predictions:
    """What a model says of N inputs.

    Args:
        values: the likeliest class of each, int64 [N]; of several labels, which hold, [N, K] of 0
            and 1; of amounts, float32 [N] or [N, D].
        probabilities: float64 [N, K] of each class or label; None of amounts. They are as well
            calibrated as the model is.
        names: of the classes, where they have some.
    """

    values: NDArray[Any]
    probabilities: NDArray[np.float64] | None = None
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def labels(self) -> list[str]:
        """The likeliest class of each by its name, or its number where it has none.

        Of several labels those that hold, with commas between; amounts as they are.
        """
        if self.probabilities is None:
            return [str(each) for each in self.values.tolist()]
        names = self.names or tuple(map(str, range(self.probabilities.shape[1])))
        if self.values.ndim == 1:
            return [names[each] for each in self.values.tolist()]
        return [
            ", ".join(n for n, holds in zip(names, row, strict=True) if holds)
            for row in self.values
        ]


def predict(
    learner: Learner, model: Vectors, x: Inputs, task: Task | str, classes: int | None = None,
    names: tuple[str, ...] = (),
) -> Predictions:  # fmt: skip
    """What `model` says of inputs x [N, ...] or a dict of them; see `Predictions`.

    Raises ConfigurationError for tasks other than classes, labels and amounts.
    """
    kind = task_of(task)
    if kind == TOKENS or not _known(kind):
        raise ConfigurationError(
            f"there is no one way to read predictions of the task {kind.name!r}; see "
            "learner.outputs"
        )
    count = length(x)
    if count == 0:
        raise ConfigurationError("there are no inputs to say anything of")
    for name, column in columns_of(x):
        if column.dtype.kind == "f" and not np.isfinite(column).all():
            row = int(np.flatnonzero(~np.isfinite(column.reshape(count, -1)).all(axis=1))[0])
            noun = f"inputs {name!r}" if name else "inputs"
            raise ConfigurationError(f"the {noun} of row {row} are not finite")
    # Targets are not looked at; each kind has its shape.
    targets: NDArray[Any] = np.zeros(count, np.int64)
    if kind == MULTILABEL:
        targets = np.zeros((count, classes or 1), np.float32)
    outputs = learner.outputs(model, Examples(x, targets)).astype(np.float64)
    if kind not in (CLASSIFICATION, MULTILABEL):
        amounts = outputs.astype(np.float32)
        return Predictions(amounts[:, 0] if amounts.shape[1:] == (1,) else amounts)
    ready = learner.gives_probabilities(outputs.astype(np.float32), targets, kind)
    if kind.decides(outputs.shape[1:]):
        yes = np.clip(outputs, 0.0, 1.0) if ready else _sigmoid(outputs)
        if kind == MULTILABEL:
            return Predictions((yes > 0.5).astype(np.int64), yes, names)
        yes = yes.reshape(count)
        return Predictions((yes > 0.5).astype(np.int64), np.stack([1 - yes, yes], axis=1), names)
    shares = outputs if _gives_shares(learner, model, x) else _softmax(outputs)
    return Predictions(outputs.argmax(axis=1), shares, names)


def _gives_shares(learner: Learner, model: Vectors, x: Inputs) -> bool:
    """Whether a model ends in probabilities of its classes already: by what it says of noise.

    Of the inputs themselves it must not depend, or a row's probabilities would on its neighbours.
    """
    if not isinstance(x, np.ndarray) or x.dtype.kind != "f":
        return False
    noise = np.random.default_rng(0).normal(size=(PROBED, *x.shape[1:])).astype(np.float32)
    said = learner.outputs(model, Examples(noise, np.zeros(PROBED, np.int64)))
    return bool((said >= 0).all() and np.allclose(said.sum(axis=1), 1, atol=1e-4))


def _known(task: Task) -> bool:
    return task in (CLASSIFICATION, MULTILABEL) or not task.classed


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    # Of the side that does not overflow.
    small = np.exp(-np.abs(logits))
    return np.where(logits >= 0, 1 / (1 + small), small / (1 + small))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities [N, K]."""
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = raised / raised.sum(axis=1, keepdims=True)
    return shares
