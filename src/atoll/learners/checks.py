"""Whether a loss and a model's outputs fit a data set, in the same sentences for each framework."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from atoll.data.federated import FederatedData
from atoll.errors import DataError


def check_loss(loss: object, data: FederatedData) -> None:
    """Raise `DataError` if a loss known by its name is for another task than the data's."""
    if not isinstance(loss, str):
        return
    task = data.task
    if task.losses and loss not in task.losses:
        raise DataError(f"{data.name} is a {task} set; loss {loss!r} does not fit it")
    if task.widths(loss, data.classes) == frozenset():
        raise DataError(f"loss {loss!r} is for two classes; {data.name} has {data.classes}")


def check_outputs(loss: object, shape: Sequence[int], data: FederatedData) -> None:
    """Raise `DataError` unless the model gives as many outputs as the task asks of it.

    `shape` is that of the outputs for one example; () is one output.
    """
    wanted = data.task.widths(loss, data.classes)
    outputs = shape[-1] if shape else 1
    if wanted is not None and outputs not in wanted:
        raise DataError(
            f"{data.name} has {data.classes} {data.task.noun}, but the model gives {outputs} "
            "outputs"
        )


def flat_width(data: FederatedData, kind: str) -> int:
    """How many values one input has, for a learner that flattens it; refuses several by name."""
    shape = data.shape
    if isinstance(shape, dict):
        raise DataError(
            f"{data.name} has inputs by name ({', '.join(shape)}), but {kind} takes one array; "
            "put them side by side, or use a learner of a framework"
        )
    return prod(shape)
