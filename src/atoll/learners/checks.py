"""Whether a loss and a model's outputs fit a data set, in the same sentences for each framework."""

from __future__ import annotations

from collections.abc import Sequence

from atoll.data.federated import FederatedData
from atoll.errors import DataError


def check_loss(loss: object, data: FederatedData) -> None:
    """Raise `DataError` if a loss known by its name is for another task than the data's."""
    if not isinstance(loss, str):
        return
    if (data.task == "regression") != (loss in ("mse", "l1")):
        raise DataError(f"{data.name} is a {data.task} set; loss {loss!r} does not fit it")
    if loss == "binary_cross_entropy" and data.classes != 2:
        raise DataError(f"loss {loss!r} is for two classes; {data.name} has {data.classes}")


def check_outputs(loss: object, shape: Sequence[int], data: FederatedData) -> None:
    """Raise `DataError` unless the model gives one output for each class, or one logit for two.

    `shape` is that of the outputs for one example; () is one output.
    """
    if not data.classes:
        return
    outputs = shape[-1] if shape else 1
    wanted = {1} if loss == "binary_cross_entropy" else {data.classes}
    if not isinstance(loss, str) and data.classes == 2:
        wanted.add(1)  # a loss of people's own may take one logit
    if outputs not in wanted:
        raise DataError(
            f"{data.name} has {data.classes} classes, but the model gives {outputs} outputs"
        )
