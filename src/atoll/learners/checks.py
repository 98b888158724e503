"""Whether a loss and a model's outputs fit a data set, in the same sentences for each framework."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.federated import FederatedData
from atoll.errors import DataError
from atoll.learners.scoring import CLOSE, LossOf, ignored, takes_probabilities, weight

#: So many examples show what a loss makes of several.
TRIED = 4
#: So many classes are tried one by one.
CLASSES = 16


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


def tried(data: FederatedData) -> tuple[Any, NDArray[Any]]:
    """Inputs and targets of a few examples, of the first clients that have some."""
    for member in range(len(data)):
        few = data.train(member)
        if len(few) >= TRIED or (len(few) and member == len(data) - 1):
            break
    return few.take(np.arange(min(TRIED, len(few))))


def check_mean(
    loss: object, loss_of: LossOf, outputs: NDArray[Any], targets: NDArray[Any], data: FederatedData
) -> None:
    """Raise `DataError` unless the loss of a batch is the mean over those that count in it.

    `outputs` [B, ...] and `targets` [B, ...] are of a few examples.
    """
    if isinstance(loss, str) or getattr(loss, "of_batch", False):
        return
    rows = [slice(place, place + 1) for place in range(TRIED)]
    plain, outputs = targets, _varied(outputs)
    targets = _mixed(targets, data, ignored(loss))
    each = [loss_of(outputs[row], targets[row]) for row in rows]
    weights = [weight(loss, targets[row]) for row in rows]
    whole = loss_of(outputs, targets)
    mean = sum(a * b for a, b in zip(each, weights, strict=True)) / max(sum(weights), 1)
    uneven = _uneven(loss_of, outputs, plain, data, ignored(loss))
    if uneven is not None and uneven[2]:
        raise DataError(
            f"the loss leaves targets of class {uneven[0]} out, and does not say so: figures would "
            f"count them. Use a loss with an attribute ignore_index={uneven[0]}, as "
            "torch.nn.CrossEntropyLoss or a functools.partial has it"
        )
    if _near(whole, mean) and uneven is not None:
        raise DataError(
            f"the loss of a batch is no mean over its examples: class {uneven[0]} weighs more or "
            f"less than class {uneven[1]} there. Weigh classes with cross_entropy(..., weight=w, "
            "reduction='none').mean()"
        )
    if _near(whole, mean) or not np.isfinite(whole):
        return
    if _near(whole, sum(each)):
        reason = "is the sum over its examples: leave reduction='sum' out"
    elif outputs.shape != targets.shape and outputs.size == targets.size:
        reason = (
            f"sets outputs {list(outputs.shape)} against targets {list(targets.shape)}, each of "
            "one with each of the other: reshape the outputs to the targets' shape, or use the "
            "loss of that name ('mse', 'l1', 'binary_cross_entropy')"
        )
    else:
        reason = (
            "is no mean over its examples (nor over targets other than an ignore_index). Weigh "
            "classes with cross_entropy(..., weight=w, reduction='none').mean(); a loss of the "
            "batch as a whole, such as a contrastive one, is marked by "
            "atoll.learners.torch.OfBatch(loss)"
        )
    raise DataError(f"the loss of a batch {reason}")


def _uneven(
    loss_of: LossOf,
    outputs: NDArray[Any],
    targets: NDArray[Any],
    data: FederatedData,
    mark: int | None,
) -> tuple[int, int, bool] | None:
    """A class that a loss weighs unlike another, which, and whether it leaves it out altogether."""
    if not data.classes or targets.dtype.kind not in "iu":
        return None
    spread = np.linspace(0, data.classes - 1, min(data.classes, CLASSES)).astype(int)
    asked = [k for k in np.unique([*spread, *np.unique(targets)[:CLASSES]]).tolist() if k != mark]

    def of(*classes: tuple[int, int]) -> float:
        filled = [np.full_like(targets[:1], k) for _, k in classes]
        return loss_of(outputs[[row for row, _ in classes]], np.concatenate(filled))

    last = TRIED - 1
    known = {k: of((last, k)) for k in asked}
    beside = next((k for k in asked if np.isfinite(known[k]) and known[k] != 0), None)
    for each in asked:
        if beside is None or each == beside:
            continue
        alone, both = of((0, each)), of((0, each), (last, beside))
        if not _near(both, (alone + known[beside]) / 2):
            # One that weighs fifty times less is nearly unseen beside the other, but not alone.
            nothing = not np.isfinite(alone) or alone == 0
            return each, beside, nothing and _near(both, known[beside])
    return None


def check_scale(
    loss: object,
    loss_of: LossOf,
    outputs: NDArray[Any],
    targets: NDArray[Any],
    data: FederatedData,
    last: str,
) -> None:
    """Raise `DataError` if a loss takes logits, or their logs, and the model gives something else.

    `last` is the function that a model ends in, where that is "sigmoid" or "softmax".
    """
    if data.task.decides(outputs.shape[1:]):
        if isinstance(loss, str):
            wanted = loss == "binary_cross_entropy"
        else:
            wanted = not takes_probabilities(loss_of, outputs, targets)
    elif data.task.widths(loss, data.classes) is None:
        return
    else:
        targets = _mixed(targets, data, ignored(loss))
        outputs = np.resize(outputs, (len(targets), *outputs.shape[1:]))
        plain, moved = loss_of(outputs, targets), loss_of(outputs + np.float32(1), targets)
        wanted = _near(plain, moved)
        if _near(moved, plain - 1) and not _near(float(np.exp(outputs).sum(-1).mean()), 1.0):
            raise DataError(
                "the loss takes logarithms of probabilities, but the model's outputs are none: "
                "end it in log_softmax, or use loss='cross_entropy'"
            )
    if wanted and last in ("sigmoid", "softmax"):
        raise DataError(
            f"the model ends in a {last}, but the loss takes logits: leave the {last} out, or give "
            "a loss of probabilities"
        )


def _near(one: float, other: float) -> bool:
    return bool(np.isclose(one, other, rtol=10 * CLOSE, atol=CLOSE / 10))


def _varied(outputs: NDArray[Any]) -> NDArray[Any]:
    """As many outputs as are tried, no two alike; what is in [0, 1] stays there."""
    found = np.resize(outputs, (TRIED, *outputs.shape[1:])).astype(np.float32)
    noise = np.modf(np.arange(found.size) * 0.618034)[0].reshape(found.shape)
    return np.asarray(0.9 * found + 0.05 * noise, np.float32)


def _mixed(targets: NDArray[Any], data: FederatedData, mark: int | None) -> NDArray[Any]:
    """As many targets as are tried, of several classes where they are classes."""
    found = np.resize(targets, (TRIED, *targets.shape[1:]))
    if data.classes and found.dtype.kind in "iu":
        kept = found == mark
        found = np.arange(found.size).reshape(found.shape) % data.classes
        if mark is not None:
            found = np.where(kept, mark, np.where(found == mark, (mark + 1) % data.classes, found))
    return np.asarray(found, targets.dtype)


def flat_width(data: FederatedData, kind: str) -> int:
    """How many values one input has, for a learner that flattens it; refuses several by name."""
    shape = data.shape
    if isinstance(shape, dict):
        raise DataError(
            f"{data.name} has inputs by name ({', '.join(shape)}), but {kind} takes one array; "
            "put them side by side, or use a learner of a framework"
        )
    return prod(shape)
