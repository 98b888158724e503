"""Learners: local training and evaluation. A framework is imported when its learner is used."""

from typing import TYPE_CHECKING, Any

from atoll.learners import rates
from atoll.learners.base import Affine, Assignment, Correction, GradientLearner, Learner, Local
from atoll.learners.numpy import NumpyLearner

if TYPE_CHECKING:
    from atoll.learners.sklearn import SklearnLearner
    from atoll.learners.torch import TorchLearner

__all__ = [
    "Affine",
    "Assignment",
    "Correction",
    "GradientLearner",
    "Learner",
    "Local",
    "NumpyLearner",
    "SklearnLearner",
    "TorchLearner",
    "rates",
]


def __getattr__(name: str) -> Any:
    if name == "TorchLearner":
        from atoll.learners.torch import TorchLearner

        return TorchLearner
    if name == "SklearnLearner":
        from atoll.learners.sklearn import SklearnLearner

        return SklearnLearner
    raise AttributeError(f"module 'atoll.learners' has no attribute {name!r}")
