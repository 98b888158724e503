"""Steps: what the clients of a stack do in each local step, and the gradients they may ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.core.vectors import Section
from atoll.learners.base import At
from atoll.learners.torch.losses import NOTHING, cohort_loss
from atoll.learners.torch.stacking.aims import Aim, as_tensor
from atoll.learners.torch.stacking.columns import Columns
from atoll.learners.torch.stacking.program import Program
from atoll.learners.torch.stacking.rules import Factors, Gather, StackRule
from atoll.learners.torch.stacking.stack import Stack
from atoll.learners.torch.stacking.tape import Tape


@dataclass(frozen=True)
class _Batch:
    """The rows of one step, [A * B, ...], of which `counts` are real if not all are."""

    x: Tensor
    y: Tensor
    active: int
    counts: list[int] | None
    #: Outputs beside those of the step, as its objective is shown them.
    shown: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Loop:
    """What stays the same from step to step."""

    program: Program
    rule: StackRule
    params: Stack
    columns: Columns
    lr: float
    aim: Aim
    buffers: Mapping[Section, Stack] = field(default_factory=dict)
    streams: Sequence[torch.Generator] = ()
    factors: Mapping[str, Factors] = field(default_factory=dict)
    #: Whether products are of bfloat16 numbers.
    half: bool = False

    def step(self, rows: Tensor, counts: NDArray[np.int64]) -> Tensor:
        """One local step of the first clients, along rows [A, B]; their losses [A]."""
        batch = self._batch(rows, counts)
        at = self._elsewhere(batch) if self._asks else None
        self.rule.begin(batch.active)
        losses = self._backward(
            batch, self.rule, self.params, self._held(batch.active), self.factors
        )
        self.rule.finish(self.lr, at)
        return losses

    @property
    def _asks(self) -> bool:
        """Whether the correction may ask for gradients at other parameters."""
        return isinstance(self.rule, Gather) and isinstance(self.rule.correction, At)

    def _batch(self, rows: Tensor, counts: NDArray[np.int64]) -> _Batch:
        real = counts.tolist()
        longest = max(real)
        x, y = self.columns.take(rows[:, :longest])
        batch = _Batch(x, y, len(rows), None if min(real) == longest else real)
        if not self.aim.beside:
            return batch
        return replace(batch, shown=[self._outputs(batch, stack) for stack in self.aim.beside])

    def _held(self, active: int) -> dict[str, Tensor]:
        """Buffers and counters of the first clients, by name."""
        stacks = self.buffers.values()
        return {name: view for stack in stacks for name, view in stack.first(active).items()}

    def _tape(
        self, batch: _Batch, rule: StackRule | None, params: Stack, held: Mapping[str, Tensor],
        factors: Mapping[str, Factors] = NOTHING,
    ) -> Tape:  # fmt: skip
        return Tape(
            batch.active, params.first(batch.active), held, rule=rule, factors=factors,
            counts=batch.counts, streams=self.streams[: batch.active],
            half=self.half,
        )  # fmt: skip

    def _outputs(self, batch: _Batch, params: Stack) -> Tensor:
        """The outputs of other parameters, as in evaluation."""
        tape = self._tape(batch, None, params, self._held(batch.active))
        return self.program.run(tape, tape.input(batch.x.clone())).data

    def _backward(
        self, batch: _Batch, rule: StackRule, params: Stack, held: Mapping[str, Tensor],
        factors: Mapping[str, Factors] = NOTHING,
    ) -> Tensor:  # fmt: skip
        """Give the gradients at these parameters to a rule; the losses [A]."""
        tape = self._tape(batch, rule, params, held, factors)
        # A copy where it is needed again: the first layer of some modules writes into its inputs.
        outputs = self.program.run(tape, tape.input(batch.x.clone() if self._asks else batch.x))
        losses, outputs.grad = cohort_loss(
            self.aim.loss, outputs.data, batch.y, batch.active, batch.counts, batch.shown,
            self.aim.given,
        )  # fmt: skip
        tape.back()
        return losses

    def _elsewhere(self, batch: _Batch) -> Callable[[Tensor], Tensor]:
        """The gradient of a batch at other parameters, begun from where clients stand now."""
        before = {name: view.clone() for name, view in self._held(batch.active).items()}
        begun = [stream.get_state() for stream in self.streams]
        assert isinstance(self.rule, Gather)
        max_norm, single = self.rule.max_norm, self.rule.single

        def at(points: Tensor) -> Tensor:
            there = self.params.alike()
            there.load(as_tensor(points, there.flat.device))
            rule = Gather(there, None, None, max_norm, single)
            rule.begin(batch.active)
            held = {name: view.clone() for name, view in before.items()}
            with _replayed(self.streams, begun):
                self._backward(batch, rule, there, held)
            return rule.rows()

        return at


@contextmanager
def _replayed(streams: Sequence[torch.Generator], states: Sequence[Tensor]) -> Iterator[None]:
    """Let streams draw again from these states, and then go on from where they are."""
    now = [stream.get_state() for stream in streams]
    for stream, state in zip(streams, states, strict=True):
        stream.set_state(state)
    try:
        yield
    finally:
        for stream, state in zip(streams, now, strict=True):
            stream.set_state(state)
