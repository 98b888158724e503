"""Embeddings, and parameters that a model uses by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.learners.torch.stacking.layers.rows import by_client, unversioned
from atoll.learners.torch.stacking.tape import Tape, Value, local

aten = torch.ops.aten


def embedding(tape: Tape, x: Value | Tensor, weight: str, padding: int | None) -> Value:
    """Rows of each client's own table; plain indices, the same for all, give one thing a client."""
    w = tape.weights[weight]
    clients, words = w.shape[:2]
    shared = not isinstance(x, Value)
    index = x.data.reshape(clients, -1) if isinstance(x, Value) else x.expand(clients, *x.shape)
    shift = torch.arange(clients, device=w.device).view(-1, *[1] * (index.ndim - 1)) * words
    places = index if clients == 1 else index + shift
    out = F.embedding(places, w.view(clients * words, -1))
    if isinstance(x, Value):
        out = out.view(*x.data.shape, -1)
    y = Value(out, per_client=shared)

    def backward() -> None:
        if y.grad is None:
            return
        flat = aten.embedding_dense_backward(
            y.grad.reshape(*places.shape, -1).contiguous(), places, clients * words, -1, False
        )
        gradient = flat.view(w.shape)
        if padding is not None:
            gradient[:, padding] = 0
        assert tape.rule is not None
        tape.rule.add(weight, gradient)

    tape.then(backward, y)
    return y


def parameter(tape: Tape, name: str) -> Value:
    """A parameter that the model uses by itself, [C, *shape]."""
    y = Value(unversioned(tape.weights[name]), per_client=True)

    def backward() -> None:
        if y.grad is not None:
            assert tape.rule is not None
            tape.rule.add(name, y.grad)

    tape.then(backward, y)
    return y


def arithmetic(tape: Tape, function: Any, left: Any, right: Any) -> Any:
    """An elementwise function of two operands, one of which may be per client."""
    pair = [left, right]
    rows = [v for v in pair if isinstance(v, Value) and not v.per_client]
    own = [v for v in pair if isinstance(v, Value) and v.per_client]
    if not (rows and own):
        result = local(tape, function, pair, {})
        result.per_client = bool(own)
        return result

    def spread(a: Tensor, b: Tensor) -> Tensor:
        shape = rows[0].data.shape

        def widen(value: Any, tensor: Tensor) -> Tensor:
            if not value.per_client:
                return by_client(tensor, tape.clients)
            missing = len(shape) - tensor.ndim
            return tensor.view(tape.clients, *[1] * (missing + 1), *tensor.shape[1:])

        result: Tensor = function(widen(left, a), widen(right, b)).flatten(0, 1)
        return result

    return local(tape, spread, pair, {})
