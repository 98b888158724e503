"""Sums: what is counted of a batch, adding up whatever the batches and whoever holds them.

A `Sums` maps names to float64 arrays that add elementwise. Nothing here is a mean until a task's
`figures` divides, so totals do not depend on how examples were split over clients or batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Sums = dict[str, NDArray[np.float64]]

#: AUC counts pairs over a histogram of scores whose bins are relative, 1/256 of a power of two
#: wide, from 2^-16 to 2^16 on both sides of zero; ties count half. So its scale does not matter.
SCORE_BINS, OCTAVES, STEPS = 16_384, 32, 256
#: Beyond this many classes the confusion matrix, and with it macro F1, is left out.
CONFUSION_LIMIT = 1000
#: Beyond this many labels their histograms, and with them the AUC, are left out.
HISTOGRAM_LIMIT = 100


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


def multilabel_sums(
    logits: NDArray[np.floating], targets: NDArray[np.floating], loss_sum: float
) -> Sums:
    """Sums of a batch: one logit for each label [B, K], and which labels are true, 0 or 1 [B, K].

    `hits`, `alarms`, `misses` and `rests` are the true and false positives, the false and true
    negatives of each label, [K].
    """
    true = targets > 0.5
    scores = logits.reshape(true.shape)
    said = scores > 0
    sums = _scalars(count=len(true), loss=loss_sum, exact=(said == true).all(axis=1).sum())
    for name, found in (
        ("hits", said & true), ("alarms", said & ~true),
        ("misses", ~said & true), ("rests", ~said & ~true),
    ):  # fmt: skip
        sums[name] = found.sum(axis=0).astype(np.float64)
    labels = true.shape[1]
    if labels <= HISTOGRAM_LIMIT:
        places = (2 * np.arange(labels) + true) * SCORE_BINS + _bins(scores)
        histogram = np.bincount(places.ravel(), minlength=2 * labels * SCORE_BINS)
        sums["scores"] = histogram.reshape(labels, 2, SCORE_BINS).astype(np.float64)
    return sums


def f1(hits: NDArray[np.float64], support: NDArray[np.float64]) -> float:
    """Mean F1 over what occurs or was predicted; `support` counts both. NaN if nothing does."""
    seen = support > 0
    return float((2 * hits[seen] / support[seen]).mean()) if seen.any() else math.nan


def auc(scores: NDArray[np.float64]) -> float:
    """Probability that a positive outranks a negative, ties counting half (Mann-Whitney)."""
    negatives, positives = scores
    pairs = negatives.sum() * positives.sum()
    if not pairs:
        return math.nan
    below = np.cumsum(negatives) - negatives
    return float((positives * (below + negatives / 2)).sum() / pairs)


def _bins(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """The bin of each score: monotone, with a relative width of at most 1/256."""
    fraction, exponent = np.frexp(np.abs(np.nan_to_num(scores.astype(np.float64))))
    step = (exponent + OCTAVES // 2) * STEPS + np.floor((2 * fraction - 1) * STEPS)
    rank = np.clip(np.where(fraction == 0, 0, step), 0, SCORE_BINS // 2 - 1).astype(np.int64)
    return np.where(scores < 0, SCORE_BINS // 2 - 1 - rank, SCORE_BINS // 2 + rank)


def _scalars(**values: float) -> Sums:
    return {name: np.array(value, np.float64) for name, value in values.items()}
