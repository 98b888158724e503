"""Learners: local training and evaluation. A framework is imported when its learner is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from atoll.learners import rates
from atoll.learners.base import (
    Affine,
    Assignment,
    At,
    Correction,
    GradientLearner,
    Learner,
    LocalResult,
    Objective,
    Stacking,
)
from atoll.learners.metrics import Metric
from atoll.learners.numpy import NumpyLearner

if TYPE_CHECKING:
    from atoll.learners.huggingface import HuggingFaceLearner
    from atoll.learners.jax import JaxLearner
    from atoll.learners.keras import KerasLearner
    from atoll.learners.sklearn import SklearnLearner
    from atoll.learners.torch import TorchLearner

__all__ = [
    "Affine",
    "Assignment",
    "At",
    "Correction",
    "GradientLearner",
    "HuggingFaceLearner",
    "JaxLearner",
    "KerasLearner",
    "Learner",
    "LocalResult",
    "Metric",
    "NumpyLearner",
    "Objective",
    "SklearnLearner",
    "Stacking",
    "TorchLearner",
    "rates",
]


#: Learners of frameworks, and the modules that import them.
_FRAMEWORKS = {
    "HuggingFaceLearner": "atoll.learners.huggingface",
    "JaxLearner": "atoll.learners.jax",
    "KerasLearner": "atoll.learners.keras",
    "SklearnLearner": "atoll.learners.sklearn",
    "TorchLearner": "atoll.learners.torch",
}


def __getattr__(name: str) -> Any:
    if name in _FRAMEWORKS:
        return getattr(import_module(_FRAMEWORKS[name]), name)
    raise AttributeError(f"module 'atoll.learners' has no attribute {name!r}")
