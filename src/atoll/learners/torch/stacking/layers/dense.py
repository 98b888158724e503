"""Dense layers: one product for each client, batched; by factors where they are wide."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.learners.torch.stacking.tape import Tape, Value

#: Products with so many weights or more are left to oneDNN, whose kernels are faster on them.
WIDE = 1 << 19
_onednn = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    else None
)


def linear(tape: Tape, x: Value, weight: str, bias: str | None) -> Value:
    """[C * B, ..., I] -> [C * B, ..., O]: one product for each client, batched."""
    w = tape.weights[weight]
    clients, width = w.shape[:2]
    b = None if bias is None else tape.weights[bias]
    inputs = x.data.reshape(clients, -1, w.shape[2])
    if x.data.ndim == 2 and inputs.shape[1] == tape.rows:
        tape.matrices.add(weight)
    if tape.half:
        return _linear_in_half(tape, x, inputs, weight, bias)
    factors = tape.factors.get(weight)
    if factors is not None:
        out = _times(inputs[0], factors.base, None if b is None else b[0])
        factors.correct_forward(out, inputs[0])
    elif clients == 1:
        out = _times(inputs[0], w[0], None if b is None else b[0])
    elif b is None:
        out = torch.bmm(inputs, w.transpose(1, 2))
    else:
        out = torch.baddbmm(b.unsqueeze(1), inputs, w.transpose(1, 2))
    y = Value(out.view(*x.data.shape[:-1], width))

    def backward() -> None:
        if y.grad is None:
            return
        gradient = y.grad.reshape(clients, -1, width)
        assert tape.rule is not None
        if bias is not None:
            tape.rule.add(bias, gradient.sum(1))
        if factors is not None:
            if x.wanted:
                given = _times(gradient[0], factors.base.t(), None)
                factors.correct_back(given, gradient[0])
                x.give(given.view(x.data.shape))
            factors.add(gradient[0], inputs[0])
            return
        if x.wanted:
            if clients == 1:
                x.give(_times(gradient[0], w[0].t(), None).view(x.data.shape))
            else:
                x.give(torch.bmm(gradient, w).view(x.data.shape))
        tape.rule.product(weight, gradient.transpose(1, 2), inputs)

    tape.then(backward, y)
    return y


def _linear_in_half(tape: Tape, x: Value, inputs: Tensor, weight: str, bias: str | None) -> Value:
    """The same with factors in bfloat16; weights, sums of products and the rest are float32."""
    w, rows = tape.weights[weight].bfloat16(), inputs.bfloat16()
    out = torch.bmm(rows, w.transpose(1, 2)).float()
    if bias is not None:
        out += tape.weights[bias].unsqueeze(1)
    y = Value(out.view(*x.data.shape[:-1], w.shape[1]))

    def backward() -> None:
        if y.grad is None:
            return
        gradient = y.grad.reshape(len(w), -1, w.shape[1])
        narrow = gradient.bfloat16()
        assert tape.rule is not None
        if x.wanted:
            x.give(torch.bmm(narrow, w).float().view(x.data.shape))
        tape.rule.add(weight, torch.bmm(narrow.transpose(1, 2), rows).float())
        if bias is not None:
            tape.rule.add(bias, gradient.sum(1))

    tape.then(backward, y)
    return y


def _times(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows [R, I] @ weight [O, I]^T + bias, by the faster of torch's two libraries."""
    if _onednn is not None and weight.numel() >= WIDE and not rows.is_cuda:
        return _onednn(rows, weight, bias, "none", [], "")  # type: ignore[no-any-return]
    return F.linear(rows, weight, bias)
