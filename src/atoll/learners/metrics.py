"""Metrics as sums: what a client reports adds up to what the population would report.

A `Sums` maps names to float64 arrays that add elementwise. Nothing here is a mean until
`figures` divides, so totals do not depend on how examples were split over clients or batches.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from atoll.data.examples import Task

Sums = dict[str, NDArray[np.float64]]

#: AUC counts pairs over a histogram of scores whose bins are relative, 1/256 of a power of two
#: wide, from 2^-16 to 2^16 on both sides of zero; ties count half. So its scale does not matter.
SCORE_BINS, OCTAVES, STEPS = 16_384, 32, 256
#: Beyond this many classes the confusion matrix, and with it macro F1, is left out.
CONFUSION_LIMIT = 1000

HIGHER_IS_BETTER = {"accuracy", "macro_f1", "auc", "r2"}


def add(parts: Iterable[Sums]) -> Sums:
    """The sums of disjoint examples taken together."""
    total: Sums = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def classification_sums(
    logits: NDArray[np.floating], labels: NDArray[np.int64], loss_sum: float, classes: int
) -> Sums:
    """Sums of a batch: `logits` [B, K] (or [B] or [B, 1] for two classes), `labels` [B]."""
    two_sided = logits.ndim == 2 and logits.shape[1] > 1
    scores = logits if two_sided else logits.reshape(-1)
    predicted = scores.argmax(axis=1) if two_sided else (scores > 0).astype(np.int64)
    sums = _scalars(count=len(labels), loss=loss_sum, correct=(predicted == labels).sum())
    if classes <= CONFUSION_LIMIT:
        pairs = np.bincount(labels * classes + predicted, minlength=classes * classes)
        sums["confusion"] = pairs.reshape(classes, classes).astype(np.float64)
    if classes == 2:
        margin = (scores[:, 1] - scores[:, 0]) if two_sided else scores
        histogram = np.bincount(labels * SCORE_BINS + _bins(margin), minlength=2 * SCORE_BINS)
        sums["scores"] = histogram.reshape(2, SCORE_BINS).astype(np.float64)
    return sums


def token_sums(logits: NDArray[np.floating], tokens: NDArray[np.int64], loss_sum: float) -> Sums:
    """Sums over every token of a batch: `logits` [B, T, V], `tokens` [B, T]."""
    correct = (logits.argmax(axis=-1) == tokens).sum()
    return _scalars(count=tokens.size, loss=loss_sum, correct=correct)


def regression_sums(
    outputs: NDArray[np.floating], targets: NDArray[np.float32], loss_sum: float
) -> Sums:
    """Sums over every target value of a batch: `outputs` and `targets` [B] or [B, D]."""
    wanted = targets.astype(np.float64)
    error = outputs.reshape(wanted.shape).astype(np.float64) - wanted
    return _scalars(
        count=wanted.size,
        examples=len(wanted),
        loss=loss_sum,
        absolute=np.abs(error).sum(),
        squared=np.square(error).sum(),
        target=wanted.sum(),
        target_squared=np.square(wanted).sum(),
    )


def figures(sums: Sums, task: Task) -> dict[str, float]:
    """The metrics that people read, from sums; an undefined one is NaN."""
    count = float(sums.get("count", 0.0))
    if not count:
        return {}
    metrics = {"loss": float(sums["loss"]) / count}
    if task == "regression":
        metrics["loss"] = float(sums["loss"]) / float(sums["examples"])
        metrics["mae"] = float(sums["absolute"]) / count
        metrics["rmse"] = math.sqrt(float(sums["squared"]) / count)
        spread = float(sums["target_squared"]) - float(sums["target"]) ** 2 / count
        metrics["r2"] = 1 - float(sums["squared"]) / spread if spread > 0 else math.nan
        return metrics
    metrics["accuracy"] = float(sums["correct"]) / count
    if task == "tokens":
        metrics["perplexity"] = math.exp(min(metrics["loss"], 700.0))
        return metrics
    if "confusion" in sums:
        metrics["macro_f1"] = _macro_f1(sums["confusion"])
    if "scores" in sums:
        metrics["auc"] = _auc(sums["scores"])
    return metrics


def main_metric(metrics: Container[str]) -> str:
    """The metric to show first; clients' own, where there is no one model that has metrics."""
    for name in ("accuracy", "loss", "accuracy_client_mean", "loss_client_mean"):
        if name in metrics:
            return name
    return "loss"


def more_is_better(metric: str) -> bool:
    """Whether more of a metric is better, also of its spread over clients."""
    return metric.split("_client_", maxsplit=1)[0] in HIGHER_IS_BETTER


def spread(values: Sequence[float], metric: str) -> dict[str, float]:
    """How a metric is distributed over clients: mean, standard deviation, worst tenth.

    `worst` is the mean over the worst ceil(N / 10) clients; NaN values are left out.
    """
    known = np.array([value for value in values if not math.isnan(value)], np.float64)
    if not len(known):
        return {}
    ordered = np.sort(known) if metric in HIGHER_IS_BETTER else -np.sort(-known)
    tail = ordered[: math.ceil(len(ordered) / 10)]
    return {
        f"{metric}_client_mean": float(known.mean()),
        f"{metric}_client_std": float(known.std()),
        f"{metric}_client_worst": float(tail.mean()),
    }


def _bins(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """The bin of each score: monotone, with a relative width of at most 1/256."""
    fraction, exponent = np.frexp(np.abs(np.nan_to_num(scores.astype(np.float64))))
    step = (exponent + OCTAVES // 2) * STEPS + np.floor((2 * fraction - 1) * STEPS)
    rank = np.clip(np.where(fraction == 0, 0, step), 0, SCORE_BINS // 2 - 1).astype(np.int64)
    return np.where(scores < 0, SCORE_BINS // 2 - 1 - rank, SCORE_BINS // 2 + rank)


def _scalars(**values: float) -> Sums:
    return {name: np.array(value, np.float64) for name, value in values.items()}


def _macro_f1(confusion: NDArray[np.float64]) -> float:
    """Mean F1 over the classes that occur or were predicted (rows: truth, columns: predicted)."""
    hit = np.diag(confusion)
    support = confusion.sum(axis=0) + confusion.sum(axis=1)
    seen = support > 0
    return float((2 * hit[seen] / support[seen]).mean())


def _auc(scores: NDArray[np.float64]) -> float:
    """Probability that a positive outranks a negative, ties counting half (Mann-Whitney)."""
    negatives, positives = scores
    pairs = negatives.sum() * positives.sum()
    if not pairs:
        return math.nan
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs)
