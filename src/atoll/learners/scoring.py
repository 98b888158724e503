"""What a loss says of its arguments: which targets count, and whether outputs are probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atoll.data.sums import Sums
from atoll.data.tasks import Task
from atoll.learners.metrics import Metrics, own_sums

#: (outputs [B, ...], targets [B, ...]) -> the mean loss over those of the targets that count.
LossOf = Callable[[NDArray[Any], NDArray[Any]], float]
#: Where a probe sees whether a loss takes any number, and how close two losses are the same.
FAR, CLOSE = 3.0, 1e-4


def ignored(loss: object) -> int | None:
    """The target that does not count: the `ignore_index` of a loss, as torch calls it.

    Also that of a `functools.partial`. None where there is none, or a negative one, which no target
    is.
    """
    keywords = getattr(loss, "keywords", None)
    said = keywords.get("ignore_index") if isinstance(keywords, dict) else None
    found = getattr(loss, "ignore_index", None) if said is None else said
    return int(found) if isinstance(found, int | np.integer) and found >= 0 else None


def counting(loss: object, targets: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Which targets count; None if all of them do."""
    mark = ignored(loss)
    return None if mark is None or targets.dtype.kind not in "iu" else targets != mark


def weight(loss: object, targets: NDArray[Any]) -> int:
    """How much the mean loss of these targets weighs among others: how many of them count."""
    real = counting(loss, targets)
    return len(targets) if real is None else int(real.sum())


def scored(
    loss: object,
    mean: float,
    outputs: NDArray[Any],
    targets: NDArray[Any],
    task: Task,
    classes: int | None,
    metrics: Metrics | None,
    *,
    probabilities: bool,
) -> Sums:
    """What a batch counts of the task's metrics, and of people's own, from its `mean` loss.

    A task is shown the rows that count; of targets with several places, those places as rows.
    People's own metrics are shown the whole batch, as the model gives it.
    """
    real = counting(loss, targets)
    shown, wanted = (outputs, targets) if real is None else (outputs[real], targets[real])
    total = mean * task.terms(wanted) if len(wanted) else 0.0
    counted = task.sums(logits(shown) if probabilities else shown, wanted, total, classes)
    return {**counted, **own_sums(metrics, outputs, targets)}


def takes_probabilities(loss_of: LossOf, outputs: NDArray[Any], targets: NDArray[Any]) -> bool:
    """Whether a loss of yes-or-no targets takes probabilities, and not logits.

    It does if it has no value for other numbers, or one value for all of them, as where it is cut
    off at 0 and 1; or if it is as great for yes as for no at a half and not at zero. One row of
    outputs and targets shows the shapes.
    """

    def loss(output: float, target: int) -> float:
        try:
            return loss_of(np.full_like(outputs[:1], output), np.full_like(targets[:1], target))
        except Exception:
            return float("nan")

    def even(output: float) -> bool:
        return bool(np.isclose(loss(output, 1), loss(output, 0), rtol=CLOSE, atol=CLOSE))

    def same(one: float, other: float) -> bool:
        pairs = [(loss(one, target), loss(other, target)) for target in (0, 1)]
        return all(np.isclose(a, b, rtol=CLOSE, atol=CLOSE) for a, b in pairs)

    if not (np.isfinite(loss(-FAR, 1)) and np.isfinite(loss(FAR, 1))):
        return True
    if same(1.5, FAR) and same(-0.5, -FAR):
        return True
    return even(0.5) and not even(0.0)


def logits(probabilities: NDArray[Any]) -> NDArray[Any]:
    """Probabilities as logits: ordered alike, and positive above a half.

    What lies beyond 0 and 1, as a model of amounts may give, stays in order too.
    """
    inside = np.clip(probabilities.astype(np.float64), 1e-12, 1 - 1e-12)
    beyond = probabilities - np.clip(probabilities, 0.0, 1.0)
    return np.asarray(np.log(inside) - np.log1p(-inside) + beyond, np.float64)
