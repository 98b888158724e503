"""Convolutions: client by client on a CPU, as groups on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atoll.learners.torch.stacking.layers.rows import channels_last
from atoll.learners.torch.stacking.tape import Tape, Value

aten = torch.ops.aten


def convolution(
    tape: Tape,
    x: Value,
    weight: str,
    bias: str | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Value:
    """[C * B, I, ...] -> [C * B, O, ...]: client by client on a CPU, as groups on a GPU."""
    w = tape.weights[weight]
    b = None if bias is None else tape.weights[bias]
    clients = len(w)
    data = channels_last(x.data)
    if tape.half:
        data, w = data.bfloat16(), w.bfloat16()
        b = None if b is None else b.bfloat16()
    settings: tuple[Any, ...] = (stride, padding, dilation, False, (0,) * len(stride))
    if clients > 1 and data.is_cuda:
        return _grouped(tape, x, data, (weight, w), (bias, b), settings, groups)
    pieces = data.chunk(clients)
    outs = [
        aten.convolution(piece, w[c], None if b is None else b[c], *settings, groups)
        for c, piece in enumerate(pieces)
    ]
    y = Value((outs[0] if clients == 1 else torch.cat(outs)).to(x.data.dtype))

    def backward() -> None:
        if y.grad is None:
            return
        assert tape.rule is not None
        given, channels = [], [w.shape[1]]
        mask = [x.wanted, True, bias is not None]
        for c, gradient in enumerate(channels_last(y.grad).to(data.dtype).chunk(clients)):
            gx, gw, gb = aten.convolution_backward(
                gradient, pieces[c], w[c], channels, *settings, groups, mask
            )
            given.append(gx)
            tape.rule.add_one(weight, c, gw)
            if bias is not None:
                tape.rule.add_one(bias, c, gb)
        if x.wanted:
            x.give((given[0] if clients == 1 else torch.cat(given)).to(x.data.dtype))

    tape.then(backward, y)
    return y


def _grouped(
    tape: Tape,
    x: Value,
    data: Tensor,
    weight: tuple[str, Tensor],
    bias: tuple[str | None, Tensor | None],
    settings: tuple[Any, ...],
    groups: int,
) -> Value:
    """A cohort's convolutions as one of C * groups groups: clients side by side as channels."""
    (name, w), (bias_name, b) = weight, bias
    clients = len(w)

    def beside(rows: Tensor) -> Tensor:
        parts = rows.reshape(clients, -1, *rows.shape[1:])
        return parts.transpose(0, 1).flatten(1, 2).contiguous()

    def below(channels: Tensor) -> Tensor:
        parts = channels.reshape(len(channels), clients, -1, *channels.shape[2:])
        return parts.transpose(0, 1).flatten(0, 1)

    rows, kernel = beside(data), w.flatten(0, 1)
    flat_bias = None if b is None else b.flatten()
    total = clients * groups
    y = Value(below(aten.convolution(rows, kernel, flat_bias, *settings, total)).to(x.data.dtype))

    def backward() -> None:
        if y.grad is None:
            return
        assert tape.rule is not None
        gx, gw, gb = aten.convolution_backward(
            beside(y.grad).to(rows.dtype), rows, kernel, [len(kernel)], *settings, total,
            [x.wanted, True, b is not None],
        )  # fmt: skip
        tape.rule.add(name, gw.view(w.shape))
        if b is not None and bias_name is not None:
            tape.rule.add(bias_name, gb.view(b.shape))
        if x.wanted:
            x.give(below(gx).to(x.data.dtype))

    tape.then(backward, y)
    return y
