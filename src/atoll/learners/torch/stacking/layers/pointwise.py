"""Layers without weights: activations, reshaping, pooling, dropout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.learners.torch.stacking.layers.rows import channels_last, laid_like
from atoll.learners.torch.stacking.tape import Tape, Value

aten = torch.ops.aten


def relu(tape: Tape, x: Value, in_place: bool) -> Value:
    """`in_place` where nobody else reads the input, not even its own backward rule."""
    out = x.data.relu_() if in_place else x.data.relu()
    y = Value(out, x.wanted)

    def backward() -> None:
        if y.grad is not None and x.wanted:
            x.give(aten.threshold_backward(laid_like(out, y.grad), out, 0))

    tape.then(backward, y)
    return y


def activation(tape: Tape, x: Value, kind: str, approximate: str = "none") -> Value:
    """tanh, sigmoid and gelu, by torch's own derivative kernels."""
    if kind == "gelu":
        out = F.gelu(x.data, approximate=approximate)
    else:
        out = getattr(torch, kind)(x.data)
    y = Value(out, x.wanted)

    def backward() -> None:
        if y.grad is None or not x.wanted:
            return
        if kind == "gelu":
            gradient = laid_like(x.data, y.grad)
            x.give(aten.gelu_backward(gradient, x.data, approximate=approximate))
        else:
            x.give(getattr(aten, f"{kind}_backward")(laid_like(out, y.grad), out))

    tape.then(backward, y)
    return y


def reshape(tape: Tape, x: Value, out: Tensor) -> Value:
    """`out` is a reshaped `x.data`."""
    y = Value(out, x.wanted, x.per_client)

    def backward() -> None:
        if y.grad is not None and x.wanted:
            x.give(y.grad.reshape(x.data.shape))

    tape.then(backward, y)
    return y


def max_pool(tape: Tape, x: Value, *settings: Any) -> Value:
    """Two-dimensional max pooling; `settings` are kernel, stride, padding, dilation, ceil_mode."""
    data = channels_last(x.data)
    out, index = aten.max_pool2d_with_indices(data, *settings)
    y = Value(out, x.wanted)

    def backward() -> None:
        if y.grad is not None and x.wanted:
            gradient = channels_last(y.grad)
            x.give(aten.max_pool2d_with_indices_backward(gradient, data, *settings, index))

    tape.then(backward, y)
    return y


def dropout(
    tape: Tape, x: Value, p: float, *, channels: bool = False, time_first: bool = False
) -> Value:
    """Each client's noise comes from its own stream, in the order in which torch would draw it.

    `channels` drops whole channels, as Dropout1d to 3d do; with `time_first` the noise is drawn
    for [T, B, ...], as torch does behind its attention, which works in that order.
    """
    if not tape.training or p == 0:
        return x
    data = x.data
    noise: Tensor
    if p == 1:
        noise = torch.zeros_like(data, memory_format=torch.contiguous_format)
    else:
        shape = data.shape[:2] + (1,) * (data.ndim - 2) if channels else data.shape
        noise = torch.zeros(shape, device=data.device)
        for span, stream in zip(tape.spans(len(data)), tape.streams, strict=True):
            if time_first:
                drawn = noise[span].transpose(0, 1).contiguous().bernoulli_(1 - p, generator=stream)
                noise[span] = drawn.transpose(0, 1)
            else:
                noise[span].bernoulli_(1 - p, generator=stream)
        noise.div_(1 - p)
    y = Value(data * noise, x.wanted)

    def backward() -> None:
        if y.grad is not None and x.wanted:
            x.give(y.grad * noise)

    tape.then(backward, y)
    return y
