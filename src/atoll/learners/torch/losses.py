"""Losses: of one batch, for autograd, and of a cohort's batches at once, with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.learners.scoring import ignored

#: Fewer classes than this are a short dimension.
SHORT = 32

#: What in a graph moves numbers and changes none.
RESHAPING = ("View", "UnsafeView", "Squeeze", "Unsqueeze", "Reshape", "Flatten", "Clone", "Alias")

Loss = Callable[[Tensor, Tensor], Tensor]
NOTHING: Mapping[str, Any] = MappingProxyType({})


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Labels [B] for outputs [B, K], or tokens [B, T] for outputs [B, T, V]."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Labels 0 and 1, [B] or several [B, K], for as many logits, [B], [B, 1] or [B, K]."""
    return F.binary_cross_entropy_with_logits(
        outputs.flatten(), targets.flatten().to(outputs.dtype)
    )


def _mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs.reshape(targets.shape), targets)


def _mean_absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.l1_loss(outputs.reshape(targets.shape), targets)


@dataclass(frozen=True)
class NextTokens:
    """The mean cross-entropy over tokens [B, T] that are not padding; 0 where all of them are.

    Its `ignore_index` says which targets do not count, in figures as in training.
    """

    pad: int

    @property
    def ignore_index(self) -> int:
        return self.pad

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        total = F.cross_entropy(
            outputs.flatten(0, -2), targets.flatten(), ignore_index=self.pad, reduction="sum"
        )
        return total / (targets != self.pad).sum().clamp_min(1)


@dataclass(frozen=True)
class OfBatch:
    """A loss that is no mean over examples but of a batch as a whole, as contrastive ones are.

    Nothing checks then that it is a mean; what is reported of it is the mean over batches, each
    weighted by its examples, so that it depends on how examples are batched.
    """

    loss: Loss
    of_batch = True

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(outputs, targets)


@dataclass(frozen=True)
class _OverCounted:
    """A loss with an `ignore_index`, 0 instead of NaN where no target counts."""

    loss: Loss
    ignore_index: int

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if (targets == self.ignore_index).all():
            return (outputs * 0).sum()
        return self.loss(outputs, targets)


def loss_of(given: str | Loss) -> Loss:
    """The loss of this name, or the given one, without NaN where no target counts."""
    if isinstance(given, str):
        return LOSSES[given]
    mark = ignored(given)
    if mark is None or isinstance(given, NextTokens):
        return given
    return _OverCounted(given, mark)


def last_function(outputs: Tensor) -> str:
    """ "sigmoid" or "softmax" if that made these outputs, as their graph says; else ""."""
    node = outputs.grad_fn
    while node is not None:
        name = type(node).__name__
        for found in ("Sigmoid", "Softmax"):
            if name.startswith(found):
                return found.lower()
        if not name.startswith(RESHAPING):
            return ""
        node = node.next_functions[0][0]
    return ""


LOSSES: dict[str, Loss] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": _mean_squared_error,
    "l1": _mean_absolute_error,
}


def cohort_loss(
    loss: Callable[..., Tensor],
    outputs: Tensor,
    targets: Tensor,
    clients: int,
    counts: Sequence[int] | None,
    beside: Sequence[Tensor] = (),
    given: Mapping[str, Tensor] = NOTHING,
) -> tuple[Tensor, Tensor]:
    """Each client's mean loss [C], and the gradient of their sum by the outputs.

    `outputs` and `targets` are [C * B, ...]; of each client's B rows the first `counts[c]` are
    real, or all of them. An objective's loss is also shown the outputs `beside` these and what each
    client is `given`, [C or more, ...].
    """
    if loss is _cross_entropy and not beside and not given:
        return _cohort_cross_entropy(outputs, targets, clients, counts)
    leaf = outputs.detach().requires_grad_()
    each = len(outputs) // clients
    starts = range(0, len(outputs), each)
    spans = [
        slice(start, start + real)
        for start, real in zip(starts, counts or [each] * clients, strict=True)
    ]
    with torch.enable_grad():
        losses = torch.stack(
            [
                loss(
                    leaf[span], targets[span], *(other[span] for other in beside),
                    **{name: numbers[c] for name, numbers in given.items()},
                ).reshape(())
                for c, span in enumerate(spans)
            ]
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), gradient


def _cohort_cross_entropy(
    outputs: Tensor, targets: Tensor, clients: int, counts: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    logits, labels = outputs.flatten(0, -2), targets.reshape(-1, 1)
    # torch's log_softmax is slow along a short last dimension and fast along a first one.
    turned = not logits.is_cuda and logits.shape[1] < SHORT
    axis = 0 if turned else 1
    if turned:
        logits, labels = logits.t().contiguous(), labels.t()
    logs = F.log_softmax(logits, axis)
    picked = logs.gather(axis, labels).view(clients, -1)
    gradient = logs.exp_()
    gradient.scatter_add_(axis, labels, logs.new_full((1, 1), -1.0).expand_as(labels))
    rows = picked.shape[1]
    if counts is None:
        gradient /= rows
        losses = picked.mean(1).neg_()
    else:
        share = torch.tensor(counts, dtype=logs.dtype, device=logs.device) * (clients * rows)
        share = (share / len(outputs)).unsqueeze(1)
        weights = (torch.arange(rows, device=logs.device) < share).to(logs.dtype) / share
        gradient *= weights.view((1, -1) if turned else (-1, 1))
        losses = -(picked * weights).sum(1)
    if turned:
        gradient = gradient.t().contiguous()
    return losses, gradient.view(outputs.shape)
