"""scikit-learn estimators as black-box learners: they fit, and their coefficients travel."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from atoll.core.random import Key
from atoll.core.vectors import Layout, Vectors
from atoll.data.examples import Examples
from atoll.data.federated import FederatedData
from atoll.data.sums import Sums, add
from atoll.data.tasks import Task
from atoll.errors import ConfigurationError, DataError, require
from atoll.learners.base import Ability, Assignment, At, Correction, Learner, LocalResult, Objective
from atoll.learners.checks import flat_width
from atoll.learners.evaluation import mean_over, pieces
from atoll.learners.metrics import Metrics, check_metrics
from atoll.learners.weights import copied, fits, packed

require("sklearn", "scikit-learn", "atoll.learners.SklearnLearner")

from sklearn.base import (  # type: ignore[import-untyped]  # noqa: E402
    BaseEstimator,
    clone,
    is_regressor,
)

#: Examples in a batch of an evaluation.
EVALUATED_AT_ONCE = 4096


#: What decides between classes that are equally probable; no figure shows it.
TIE = 1e-5


@dataclass(frozen=True, eq=False)
class SklearnLearner(Learner):
    """Fits a scikit-learn estimator from the received coefficients.

    Works with estimators that keep `coef_`/`intercept_` or `coefs_`/`intercepts_` and can go on
    from them: those with `partial_fit` (SGDClassifier, SGDRegressor, MLPClassifier, MLPRegressor,
    Perceptron, ...) and those with `warm_start` (LogisticRegression).

    Args:
        estimator: an unfitted estimator, cloned and never changed.
        features: values per input; inputs of more dimensions are flattened.
        classes: number of classes, or None for a regressor.
        epochs: passes of `partial_fit`, or `max_iter` of a warm-started `fit`, per round.
        metrics: beside those of the task, by name.
    """

    estimator: BaseEstimator
    features: int
    classes: int | None = None
    epochs: int = 1
    metrics: Metrics | None = None

    abilities: ClassVar[frozenset[Ability]] = frozenset({"outputs"})  # type: ignore[misc]

    def __post_init__(self) -> None:
        if (self.classes is None) != is_regressor(self.estimator):
            raise ConfigurationError(
                "give classes=... for a classifier, and leave it out for a regressor"
            )
        if self.epochs < 1:
            raise ConfigurationError(f"epochs must be at least 1, not {self.epochs}")
        if not hasattr(self.estimator, "partial_fit") and not hasattr(self.estimator, "warm_start"):
            raise ConfigurationError(
                f"{type(self.estimator).__name__} has neither partial_fit nor warm_start, so it "
                "cannot go on from the parameters it receives"
            )
        if isinstance(self.estimator.get_params().get("class_weight"), str):
            # Of each client's own labels: another loss at each, and none where there is one class.
            raise ConfigurationError(
                "class_weight='balanced' would weigh classes otherwise at every client, and not at "
                "all where one class is missing; agree on numbers, class_weight={0: 1.0, 1: 3.0}"
            )
        check_metrics(self.metrics)
        self._check_start()

    @cached_property
    def _blank(self) -> Any:
        """A fitted estimator of the right shapes; `_with` overwrites copies of it."""
        return self._begin(0)

    @cached_property
    def layout(self) -> Layout:
        return Layout.of(_coefficients(self._blank))

    def init(self, key: Key) -> Vectors:
        """What the estimator starts from: zeros for linear models, random layers for MLPs."""
        fresh = self._begin(key.integer() % 2**32)
        arrays = _coefficients(fresh)
        if hasattr(fresh, "coef_"):
            arrays = {name: np.zeros_like(array) for name, array in arrays.items()}
        return self.layout.pack(arrays)

    def planned_steps(self, examples: int) -> int:
        return self.epochs

    def check(self, data: FederatedData) -> None:
        width = flat_width(data, "SklearnLearner")
        if width != self.features:
            raise DataError(
                f"inputs of {data.name} have {width} values, but features={self.features}"
            )
        if data.y.ndim > 1:
            raise DataError(
                f"{data.name} is a {data.task} set with several targets per example, which it "
                "cannot fit"
            )
        if data.classes != self.classes:
            raise DataError(f"{data.name} has {data.classes} classes, but classes={self.classes}")

    def train(
        self,
        model: Vectors,
        examples: Examples,
        assignment: Assignment,
        correction: Correction | At | None = None,
        objective: Objective | None = None,
    ) -> LocalResult:
        self.check_asked(correction, objective)
        seed = assignment.key.integer("batches") % 2**32
        estimator = self._with(model, seed)
        passes = assignment.steps(self.epochs)
        x, y = examples.all()
        x = x.reshape(len(x), -1)
        if hasattr(estimator, "partial_fit"):
            order = assignment.key.fold("order").generator()
            for _ in range(passes):
                rows = order.permutation(len(x))
                estimator.partial_fit(x[rows], y[rows])
        else:
            self._warm_fit(estimator, x, y, passes)
        params = self.layout.pack(_coefficients(estimator))["params"]
        return LocalResult(params, passes, math.nan, len(x), passes * len(x), math.nan)

    def evaluate(self, model: Vectors, examples: Examples, task: Task, classes: int | None) -> Sums:
        estimator = self._with(model, 0)
        parts = []
        for x, y in pieces(examples, EVALUATED_AT_ONCE):
            outputs = self._outputs(estimator, x)
            parts.append(self.sums(outputs, y, self._loss(outputs, y) / len(y), task, classes))
        return add(parts)

    def outputs(self, model: Vectors, examples: Examples) -> NDArray[Any]:
        """Predictions of a regressor; of a classifier log-probabilities or decision values."""
        estimator = self._with(model, 0)
        found = [self._outputs(estimator, x) for x, _ in pieces(examples, EVALUATED_AT_ONCE)]
        return np.concatenate(found).astype(np.float32)

    def mean_loss(self, model: Vectors, examples: Examples) -> float:
        estimator = self._with(model, 0)

        def loss_of(x: NDArray[Any], y: NDArray[Any]) -> float:
            return self._loss(self._outputs(estimator, x), y) / len(y)

        return mean_over(examples, EVALUATED_AT_ONCE, loss_of)

    def _outputs(self, estimator: Any, x: NDArray[Any]) -> NDArray[Any]:
        """[B], or [B, K] for more than two classes."""
        x = x.reshape(len(x), -1)
        if self.classes is None:
            return np.asarray(estimator.predict(x))
        return _scores(estimator, x)

    def _loss(self, outputs: NDArray[Any], y: NDArray[Any]) -> float:
        """The sum of the losses: half the squared error, or minus the log-likelihood."""
        if self.classes is None:
            return float(np.square(outputs - y.reshape(outputs.shape)).sum() / 2)
        return _log_loss(outputs, y)

    def vectors_of(self, source: Any) -> Vectors:
        """As in `Learner`, also from a fitted estimator."""
        if not isinstance(source, BaseEstimator):
            return super().vectors_of(source)
        return packed(self.layout, _fitted(source), f"the given {type(source).__name__}")

    def load_into(self, model: Vectors, target: Any) -> Any:
        """As in `Learner`, also into an estimator: one like the learner's, or any that is fitted.

        Classes of one that is not fitted are numbers from 0; a fitted one keeps its own.
        """
        if not isinstance(target, BaseEstimator):
            return super().load_into(model, target)
        name = type(target).__name__
        vectors = copied(self.layout, model)
        if not _is_fitted(target):
            if type(target) is not type(self.estimator):
                raise ConfigurationError(
                    f"the given {name} is not fitted and no {type(self.estimator).__name__}, so "
                    "it has no arrays of this model's shapes"
                )
            learned = {n: v for n, v in vars(self._with(model, 0)).items() if n not in vars(target)}
            vars(target).update(learned)
        fits(self.layout, _fitted(target), f"the given {name}")
        _set_coefficients(target, self.layout.unpack(vectors))
        return target

    def _begin(self, seed: int) -> Any:
        """A clone that has seen one all-zero example of each class and nothing else."""
        estimator = clone(self.estimator)
        if "random_state" in estimator.get_params():
            estimator.set_params(random_state=seed)
        x = np.zeros((self.classes or 1, self.features), np.float32)
        y: NDArray[Any] = np.zeros(1) if self.classes is None else np.arange(self.classes)
        if not hasattr(estimator, "partial_fit"):
            estimator.set_params(warm_start=True)
            estimator.fit(x, y)
        elif self.classes is None:
            estimator.partial_fit(x, y)
        else:
            estimator.partial_fit(x, y, classes=np.arange(self.classes))
        return estimator

    def _with(self, model: Vectors, seed: int) -> Any:
        """An estimator that stands at the received parameters and knows nothing else."""
        estimator = copy.deepcopy(self._blank)
        if "random_state" in estimator.get_params():
            estimator.set_params(random_state=seed)
        # What the blank example left behind: the step counter and the optimiser's moments.
        if hasattr(estimator, "_optimizer"):
            del estimator._optimizer
            estimator.t_ = 0
            estimator._random_state = np.random.RandomState(seed)
        elif hasattr(estimator, "t_"):
            estimator.t_ = 1.0
        _set_coefficients(estimator, self.layout.unpack(model))
        return estimator

    def _check_start(self) -> None:
        """Refuse estimators whose training does not depend on where it starts."""
        zeros = self.layout.zeros()
        there = {"params": zeros["params"] + np.float32(0.5)}
        rng = Key(0).fold("try").generator()
        x = rng.normal(size=(4 * (self.classes or 2), self.features)).astype(np.float32)
        y: NDArray[Any] = np.arange(len(x)) % (self.classes or 2)
        examples = Examples(x, y if self.classes else y.astype(np.float32))
        assignment = Assignment(1, Key(0))
        ends = [self.train(model, examples, assignment).params for model in (zeros, there)]
        if np.array_equal(*ends):
            raise ConfigurationError(
                f"{self.estimator!r} learns the same from whatever parameters it is given, so it "
                "cannot take part in rounds; choose another solver, or leave out averaging"
            )

    def _warm_fit(self, estimator: Any, x: NDArray[Any], y: NDArray[Any], passes: int) -> None:
        """Go on from the coefficients; classes a client lacks are kept by weightless examples."""
        import warnings

        from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]

        estimator.set_params(max_iter=passes)
        weight = np.ones(len(x))
        if self.classes is not None:
            blank = np.zeros((self.classes, x.shape[1]), x.dtype)
            x, y = np.concatenate([x, blank]), np.concatenate([y, np.arange(self.classes)])
            weight = np.concatenate([weight, np.zeros(self.classes)])
        with warnings.catch_warnings():
            # A few iterations per round are the point here, not a failure to converge.
            warnings.simplefilter("ignore", ConvergenceWarning)
            estimator.fit(x, y, sample_weight=weight)


def _is_fitted(estimator: Any) -> bool:
    return hasattr(estimator, "coef_") or hasattr(estimator, "coefs_")


def _fitted(estimator: Any) -> dict[str, NDArray[Any]]:
    """The arrays of people's own estimator."""
    if not _is_fitted(estimator):
        raise ConfigurationError(
            f"the given {type(estimator).__name__} has no coef_ or coefs_: fit it first"
        )
    return _coefficients(estimator)


def _coefficients(estimator: Any) -> dict[str, NDArray[Any]]:
    """The arrays that travel, as they lie in the estimator."""
    if hasattr(estimator, "coefs_"):
        pairs = zip(estimator.coefs_, estimator.intercepts_, strict=True)
        return {
            f"{kind}.{number}": array
            for number, pair in enumerate(pairs)
            for kind, array in zip(("coefs_", "intercepts_"), pair, strict=True)
        }
    if not hasattr(estimator, "coef_"):
        raise ConfigurationError(
            f"{type(estimator).__name__} keeps no coef_ or coefs_, so nothing of it can travel"
        )
    return {
        "coef_": np.asarray(estimator.coef_),
        "intercept_": np.atleast_1d(np.asarray(estimator.intercept_)),
    }


def _set_coefficients(estimator: Any, arrays: Mapping[str, NDArray[Any]]) -> None:
    if hasattr(estimator, "coefs_"):
        for number, (coef, intercept) in enumerate(
            zip(estimator.coefs_, estimator.intercepts_, strict=True)
        ):
            coef[...] = arrays[f"coefs_.{number}"]
            intercept[...] = arrays[f"intercepts_.{number}"]
        return
    for name in ("coef_", "intercept_"):
        present = np.asarray(getattr(estimator, name))
        value = arrays[name].astype(present.dtype).reshape(present.shape)
        setattr(estimator, name, value if present.ndim else value.item())


def _scores(estimator: Any, x: NDArray[Any]) -> NDArray[np.float64]:
    """Log-probabilities [B, K] where the estimator has them, decision values otherwise."""
    if hasattr(estimator, "predict_proba"):
        scores = np.asarray(np.log(np.clip(estimator.predict_proba(x), 1e-12, None)))
        if scores.shape[1] > 2 and hasattr(estimator, "decision_function"):
            # Probabilities that round to one tie; the estimator itself decides by these.
            order = np.asarray(estimator.decision_function(x)).argsort(axis=1).argsort(axis=1)
            scores = scores + TIE * order / scores.shape[1]
        return scores
    return np.asarray(estimator.decision_function(x), np.float64)


def _log_loss(scores: NDArray[np.float64], y: NDArray[np.int64]) -> float:
    if scores.ndim == 1:
        return float(np.logaddexp(0, np.where(y == 1, -scores, scores)).sum())
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_probability = shifted[np.arange(len(y)), y] - np.log(np.exp(shifted).sum(axis=1))
    return float(-log_probability.sum())
