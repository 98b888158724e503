"""Losses: of one batch, for autograd, and of a cohort's batches at once, with their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Fewer classes than this are a short dimension.
SHORT = 32

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
