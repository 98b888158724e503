"""Any other layer: by `vmap` over clients, or client by client, with autograd inside."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from atoll.learners.torch.stacking.layers.rows import by_client, unversioned
from atoll.learners.torch.stacking.tape import Tape, Value, keep


class Apart:
    """A module of which every thread has a copy, because weights are put into it while it runs."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._mine = module, threading.local()

    def here(self) -> nn.Module:
        """This thread's copy."""
        if not hasattr(self._mine, "module"):
            self._mine.module = copy.deepcopy(self._module)
        found: nn.Module = self._mine.module
        return found


def module_for_each(
    tape: Tape, apart: Apart, names: Mapping[str, str], arguments: list[Any],
    options: dict[str, Any], *, vectorized: bool, draws: bool,
) -> Any:  # fmt: skip
    """Any module: by `vmap` over clients, or client by client, with autograd inside."""
    module = apart.here()
    weights = {inner: tape.weights[outer] for inner, outer in names.items()}
    values = [a for a in arguments if isinstance(a, Value)]
    follow = tape.training
    if module.training != follow:
        module.train(follow)
    held = {
        inner: unversioned(w).requires_grad_() if follow else w.detach()
        for inner, w in weights.items()
    }
    leaves = [
        (v, v.data.detach().requires_grad_())
        for v in values
        if v.wanted and follow and v.data.is_floating_point()
    ]
    entered = {id(v): leaf for v, leaf in leaves}

    def swap(results: Any) -> Any:
        """Hidden states as rows and back: recurrent layers keep them as [layers, B, H]."""
        if not isinstance(module, nn.RNNBase):
            return results
        return results[0], _map(lambda t: t.transpose(0, 1), results[1])

    def call(own: dict[str, Tensor], *mine: Any) -> Any:
        return swap(torch.func.functional_call(module, own, mine, options))

    with torch.set_grad_enabled(follow):
        inputs = [
            by_client(entered.get(id(a), a.data), tape.clients) if isinstance(a, Value) else a
            for a in arguments
        ]
        # Neither noise nor anything that counts rows may see padding.
        if vectorized and tape.clients > 1 and tape.counts is None:
            where = tuple(0 if isinstance(a, Value) else None for a in arguments)
            results = torch.func.vmap(call, in_dims=(0, *where), randomness="error")(held, *inputs)
            results = _map(lambda t: t.flatten(0, 1), results)
        else:
            each = []
            for c in range(tape.clients):
                own = {inner: w[c] for inner, w in held.items()}
                real = tape.rows if tape.counts is None else tape.counts[c]
                mine = [
                    x[c][: x.shape[1] * real // tape.rows] if isinstance(a, Value) else x
                    for a, x in zip(arguments, inputs, strict=True)
                ]
                with tape.drawing(c) if draws and follow else nullcontext():
                    result = call(own, *mine)
                each.append(_map(lambda t, r=real: _padded(t, len(t) * tape.rows // r), result))
            results = each[0] if tape.clients == 1 else _join(each)
        results = swap(results)
    outs = [Value(w) for w in held.values()] if follow else []

    def into_weights() -> None:
        assert tape.rule is not None
        for outer, value in zip(names.values(), outs, strict=True):
            if value.grad is not None:
                tape.rule.add(outer, value.grad)

    tape.then(into_weights)
    pairs = [*leaves, *zip(outs, held.values(), strict=bool(outs))] if follow else []
    return keep(tape, results, pairs)


def _map(function: Any, results: Any) -> Any:
    if isinstance(results, Tensor):
        return function(results)
    if isinstance(results, list | tuple):
        return tuple(_map(function, each) for each in results)
    raise TypeError(f"a layer gives {type(results).__name__}, which cannot be split by client")


def _padded(rows: Tensor, length: int) -> Tensor:
    """The rows, and zeros up to this length."""
    missing = length - len(rows)
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


def _join(each: list[Any]) -> Any:
    if isinstance(each[0], Tensor):
        return torch.cat(each)
    if isinstance(each[0], list | tuple):
        return tuple(_join([one[i] for one in each]) for i in range(len(each[0])))
    raise TypeError(f"a layer gives {type(each[0]).__name__}, which cannot be joined over clients")
