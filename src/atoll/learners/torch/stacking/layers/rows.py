"""Rows: how a cohort's rows are looked at, by client or as images."""

from __future__ import annotations

import torch
from torch import Tensor


def by_client(rows: Tensor, clients: int) -> Tensor:
    """[C * B, ...] as [C, B, ...]."""
    return rows.reshape(clients, -1, *rows.shape[1:])


def channels_last(data: Tensor) -> Tensor:
    """Images as [N, H, W, C] in memory, which is what convolutions and pooling are fastest on."""
    if data.ndim != 4:
        return data
    if data.shape[1] == 1 and data.is_contiguous():
        # One channel lies the same both ways; only strides tell torch which it is.
        height, width = data.shape[2:]
        return data.as_strided(data.shape, (height * width, 1, width, 1))
    return data.contiguous(memory_format=torch.channels_last)


def laid_like(data: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the order of `data` in memory: two orders in one operation are slow."""
    if data.ndim == 4 and data.is_contiguous(memory_format=torch.channels_last):
        return gradient.contiguous(memory_format=torch.channels_last)
    return gradient


def unversioned(weight: Tensor) -> Tensor:
    """The weights for autograd, which must not mind that others in the same flat vector change.

    A fused step changes these too, but only after their own gradient is known.
    """
    alias: Tensor = weight.data
    return alias
