"""Normalisation: by layer and group over each row, by batch over each client's rows.

Images are made contiguous first: torch's channels-last kernels sum in float32, squares too, and
lose three digits where the mean is large against the deviation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from atoll.learners.torch.stacking.layers.rows import by_client
from atoll.learners.torch.stacking.tape import Tape, Value, local

aten = torch.ops.aten


def normalize(
    tape: Tape,
    x: Value,
    kind: Literal["layer", "group"],
    shape: tuple[int, ...],
    groups: int,
    eps: float,
    weight: str | None,
    bias: str | None,
) -> Value:
    """LayerNorm over the last dimensions `shape`, or GroupNorm; each row has its own statistics."""

    def plain(data: Tensor) -> Tensor:
        if kind == "layer":
            return F.layer_norm(data, shape, eps=eps)
        return F.group_norm(data.contiguous(), groups, eps=eps)

    normal = local(tape, plain, [x], {})
    if weight is None:
        return normal  # type: ignore[no-any-return]
    w = tape.weights[weight]
    b = None if bias is None else tape.weights[bias]
    clients = len(w)
    data = by_client(normal.data, clients)
    # The dimensions of one client's rows over which weights repeat.
    if kind == "layer":
        repeated = tuple(range(1, data.ndim - len(shape)))
        form = (clients, *[1] * len(repeated), *shape)
    else:
        repeated = (1, *range(3, data.ndim))
        form = (clients, 1, -1, *[1] * (data.ndim - 3))
    out = data * w.view(form)
    if b is not None:
        out += b.view(form)
    y = Value(out.flatten(0, 1))

    def backward() -> None:
        if y.grad is None:
            return
        gradient = by_client(y.grad, clients)
        if normal.wanted:
            normal.give((gradient * w.view(form)).flatten(0, 1))
        assert tape.rule is not None
        tape.rule.add(weight, (gradient * data).sum(repeated).view(w.shape))
        if b is not None:
            assert bias is not None
            tape.rule.add(bias, gradient.sum(repeated).view(b.shape))

    tape.then(backward, y)
    return y


def batch_norm(
    tape: Tape, x: Value, module: nn.modules.batchnorm._BatchNorm, names: Mapping[str, str]
) -> Value:
    """Each client by its own batch statistics, which also move its own running ones."""
    weight = tape.weights[names["weight"]] if "weight" in names else None
    bias = tape.weights[names["bias"]] if "bias" in names else None
    mean = tape.buffers[names["running_mean"]] if "running_mean" in names else None
    var = tape.buffers[names["running_var"]] if "running_var" in names else None
    by_batch = tape.training or mean is None
    momentum = module.momentum
    if tape.training and mean is not None:
        count = tape.buffers[names["num_batches_tracked"]]
        count += 1
        if momentum is None:
            momentum = 1.0 / float(count.reshape(-1)[0])
    data = x.data.contiguous()
    out = torch.zeros_like(data)
    saved = []
    for c, span in enumerate(tape.spans(len(data))):
        piece = data[span]
        own = [None if t is None else t[c] for t in (weight, bias, mean, var)]
        normal, *statistics = aten.native_batch_norm(
            piece, *own, by_batch, momentum or 0.0, module.eps
        )
        out[span] = normal
        saved.append((span, piece, own, statistics))
    y = Value(out)

    def backward() -> None:
        if y.grad is None:
            return
        assert tape.rule is not None
        given = torch.zeros_like(data) if x.wanted else None
        for c, (span, piece, own, statistics) in enumerate(saved):
            gx, gw, gb = aten.native_batch_norm_backward(
                y.grad[span].contiguous(), piece, own[0], own[2], own[3], *statistics, by_batch,
                module.eps, [x.wanted, weight is not None, bias is not None],
            )  # fmt: skip
            if given is not None:
                given[span] = gx
            if weight is not None:
                tape.rule.add_one(names["weight"], c, gw)
            if bias is not None:
                tape.rule.add_one(names["bias"], c, gb)
        if given is not None:
            x.give(given)

    tape.then(backward, y)
    return y
