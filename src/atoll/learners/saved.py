"""A saved model as a learner uses it: what the file says of itself is checked first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from atoll.core.model_file import ModelFile
from atoll.core.vectors import Vectors
from atoll.data.encoding.encoding import Encoding
from atoll.data.examples import Inputs, of_each
from atoll.data.tasks import TASKS
from atoll.errors import AtollError, ConfigurationError
from atoll.learners.base import Learner
from atoll.learners.prediction import Predictions, predict

#: Classes that a file may speak of.
MOST_CLASSES = 1 << 20


@dataclass(frozen=True)
class SavedModel:
    """A learner's model from a file.

    Args:
        learner: how it is used.
        model: its vectors.
        task: what it predicts, by name.
        classes, names: how many there are of them, and what they are called.
        encoding: how its inputs come from a table, where that is known.
        shape: of one input, or of each by name, where that is known.
    """

    learner: Learner
    model: Vectors
    task: str
    classes: int | None
    names: tuple[str, ...]
    encoding: Encoding | None
    shape: Any

    @staticmethod
    def of(learner: Learner, kept: ModelFile) -> SavedModel:
        """Raises ConfigurationError for another federation's model, or a file of no sense."""
        about = kept.about
        if about.get("frozen", "") != learner.frozen():
            raise ConfigurationError(
                "this model was trained beside other frozen weights than the federation's file "
                "has: load the same pretrained weights as then"
            )
        try:
            model = learner.vectors_of(kept.arrays)
        except ConfigurationError as error:
            private = (
                "; parts that are private stay with each site" if _lacks(learner, kept) else ""
            )
            raise ConfigurationError(f"{error}{private}") from None
        encoding = about.get("encoding")
        read = None if encoding is None else Encoding.read(encoding, "the model's encoding")
        task, classes = about.get("task", "regression"), about.get("classes")
        names, shape = about.get("class_names") or [], about.get("input_shape")
        texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
        counted = classes is None or (isinstance(classes, int) and 0 < classes <= MOST_CLASSES)
        if task not in TASKS or not texts or not counted or (names and len(names) != classes):
            raise ConfigurationError("the file does not say what its model predicts")
        return SavedModel(learner, model, str(task), classes, tuple(names), read, shape)

    def predict(self, x: Inputs) -> Predictions:
        """What it says of inputs, whose shape is checked."""
        given = of_each(x, lambda column: list(np.shape(column)[1:]))
        if self.shape is not None and given != self.shape:
            raise ConfigurationError(f"inputs have shape {self.shape} each, and not {given}")
        try:
            return predict(self.learner, self.model, x, self.task, self.classes, self.names)
        except AtollError:
            raise
        except Exception as error:
            # People's own modules say what they will of inputs that they cannot take.
            raise ConfigurationError(f"the model cannot take these inputs: {error}") from error


def _lacks(learner: Learner, kept: ModelFile) -> bool:
    """Whether a file has some of a model's arrays and nothing else."""
    known = {entry.name for entry in learner.layout.entries}
    return set(kept.arrays) < known
