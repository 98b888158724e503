"""A small tape: forward rules put their backward rules on it, for a whole cohort at once.

C clients with B rows each are merged into leading dimensions of C * B, client by client, so that
whatever treats rows alike needs to know nothing of clients. What has weights finds them as
[C, *shape] in `tape.weights` and hands the weights' gradient to `tape.rule` as soon as it is
known, factor by factor where it is a product, so that plain SGD never stores a gradient at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Rule(Protocol):
    """Takes the gradients of weights and steps; see `rules`."""

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """The gradient of `name` [C, M, N] is left [C, M, K] @ right [C, K, N]."""

    def add(self, name: str, gradient: Tensor) -> None:
        """The gradient of `name`, [C, *shape]."""

    def add_one(self, name: str, client: int, gradient: Tensor) -> None:
        """The gradient of one client's `name`; every client's follows before anything else."""


class Factors(Protocol):
    """Weights as a base and a correction of low rank; see `rules`."""

    base: Tensor

    def add(self, left: Tensor, right: Tensor) -> None: ...
    def correct_forward(self, out: Tensor, rows: Tensor) -> None: ...
    def correct_back(self, out: Tensor, gradient: Tensor) -> None: ...


class Value:
    """What flows along the tape: rows [C * B, ...] or, if `per_client`, one thing each [C, ...].

    `wanted` says whether anything upstream has weights; without that no gradient is made.
    """

    __slots__ = ("data", "grad", "per_client", "wanted")

    def __init__(self, data: Tensor, wanted: bool = True, per_client: bool = False) -> None:
        self.data, self.wanted, self.per_client = data, wanted, per_client
        self.grad: Tensor | None = None

    def give(self, gradient: Tensor) -> None:
        """Take in a share of the gradient; the tensor must not be changed afterwards."""
        if self.wanted:
            self.grad = gradient if self.grad is None else self.grad + gradient


class Tape:
    """One step of a cohort: its weights, its rule, and the backward rules of what has run.

    `factors` hold weights that are not multiplied out; `counts` are the real rows of each client
    where some of the B are padding; `streams` are the clients' generators for dropout; `made` is
    how many bytes of activations there are and `matrices` names the weights that were multiplied
    with exactly one row for each example. With `half`, products are of bfloat16 numbers.
    """

    def __init__(
        self,
        clients: int,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *,
        rule: Rule | None,
        factors: Mapping[str, Factors] | None = None,
        counts: Sequence[int] | None = None,
        streams: Sequence[torch.Generator] = (),
        half: bool = False,
    ) -> None:
        self.clients, self.weights, self.buffers = clients, weights, buffers
        self.rule, self.counts, self.streams = rule, counts, streams
        self.factors = factors or {}
        self.half = half
        self.matrices: set[str] = set()
        self.rows = self.made = 0
        self._backward: list[Callable[[], None]] = []

    @property
    def training(self) -> bool:
        return self.rule is not None

    def input(self, data: Tensor) -> Value:
        """The batch, [C * B, ...]."""
        self.rows = len(data) // self.clients
        return Value(data, wanted=False)

    def then(self, backward: Callable[[], None], *made: Value) -> None:
        """Remember what to do on the way back, for the values that were made on the way here."""
        if self.training:
            self._backward.append(backward)
            self.made += sum(value.data.nbytes for value in made)

    def back(self) -> None:
        """Run every backward rule, last first."""
        for backward in reversed(self._backward):
            backward()
        self._backward.clear()

    def spans(self, length: int) -> Iterator[slice]:
        """The real rows of each client in a leading dimension of this length."""
        each = length // self.clients
        for client in range(self.clients):
            start = client * each
            real = each if self.counts is None else each * self.counts[client] // self.rows
            yield slice(start, start + real)

    @contextmanager
    def drawing(self, client: int) -> Iterator[None]:
        """Let torch's own generator stand at this client's stream."""
        if not self.streams:
            yield
            return
        stream = self.streams[client]
        default = torch.default_generator
        if stream.device.type == "cuda":
            default = torch.cuda.default_generators[stream.device.index or 0]
        before = default.get_state()
        default.set_state(stream.get_state())
        try:
            yield
        finally:
            stream.set_state(default.get_state())
            default.set_state(before)


def local(
    tape: Tape, function: Callable[..., Any], arguments: Sequence[Any], options: dict[str, Any]
) -> Any:
    """Run a function without weights on the tape, with autograd for its own derivative only."""
    wanted: list[tuple[Value, Tensor]] = []

    def enter(argument: Any) -> Any:
        if isinstance(argument, Value):
            if not (argument.wanted and tape.training and argument.data.is_floating_point()):
                return argument.data
            leaf = argument.data.detach().requires_grad_()
            wanted.append((argument, leaf))
            return leaf
        return argument

    inside = [_changed(argument, enter) for argument in arguments]
    named = {name: _changed(argument, enter) for name, argument in options.items()}
    with torch.set_grad_enabled(bool(wanted)):
        results = function(*inside, **named)
    return keep(tape, results, wanted)


def keep(tape: Tape, results: Any, wanted: Sequence[tuple[Value, Tensor]]) -> Any:
    """Put results that autograd has followed from the `wanted` leaves on the tape."""
    outputs: list[tuple[Value, Tensor]] = []

    def leave(result: Any) -> Any:
        if isinstance(result, Tensor):
            value = Value(result.detach(), result.requires_grad)
            if result.requires_grad:
                outputs.append((value, result))
            return value
        return result

    values = _changed(results, leave)

    def backward() -> None:
        known = [(tensor, value.grad) for value, tensor in outputs if value.grad is not None]
        if known:
            tensors, gradients = zip(*known, strict=True)
            leaves = [leaf for _, leaf in wanted]
            with torch.enable_grad():
                seed = _Seed.apply(gradients, *tensors)  # type: ignore[no-untyped-call]
                found = torch.autograd.grad(seed, leaves, allow_unused=True)
            for (value, _), gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    value.give(gradient)

    if outputs:
        tape.then(backward, *(value for value, _ in outputs))
    return values


class _Seed(torch.autograd.Function):
    """A number whose gradients by some tensors are these.

    Given gradients instead, torch imports its symbolic shapes and with them sympy, which takes
    most of a second and fifty megabytes.
    """

    @staticmethod
    def forward(ctx: Any, gradients: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.gradients


def _changed(structure: Any, change: Callable[[Any], Any]) -> Any:
    """The lists and tuples of a structure with everything in them changed."""
    # Not within its users: functions that call themselves keep all they know until the next
    # collection of garbage, which here are the activations of a step.
    if isinstance(structure, list | tuple) and not isinstance(structure, torch.Size):
        parts = [_changed(part, change) for part in structure]
        return parts if isinstance(structure, list) else tuple(parts)
    return change(structure)
