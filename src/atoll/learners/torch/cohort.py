"""Training of a cohort: the local loops of several clients, side by side on one tape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from atoll.data.examples import Examples, joined
from atoll.keys import Key
from atoll.learners.base import Affine, Assignment, Correction, Local
from atoll.learners.batches import Batches, batches
from atoll.learners.rates import Rate, rate_at
from atoll.learners.torch import layers
from atoll.learners.torch.losses import Loss, cohort_loss
from atoll.learners.torch.lowering import Program
from atoll.learners.torch.rules import (
    Descend,
    Factors,
    Gather,
    OptimizerFactory,
    StackRule,
    rule_for,
)
from atoll.learners.torch.stack import Stack
from atoll.learners.torch.tape import Tape
from atoll.vectors import SECTIONS, Entry, Layout, Section, Vectors


@dataclass(frozen=True)
class Settings:
    """What a learner says of local training."""

    loss: Loss
    lr: float | Rate
    optimizer: OptimizerFactory | None
    max_norm: float | None
    device: torch.device


class Columns:
    """The examples of a cohort as tensors: rows of shared columns, or of joined ones."""

    def __init__(self, examples: Sequence[Examples], device: torch.device) -> None:
        whole = joined(examples)
        self.x, self.y = on_device(whole.x, device), on_device(whole.y, device)
        starts = np.cumsum([0, *(len(each) for each in examples[:-1])])
        rows = np.arange(len(whole)) if whole.rows is None else whole.rows
        self._rows = [rows[s : s + len(e)] for s, e in zip(starts, examples, strict=True)]

    def index(self, plan: Batches, order: Sequence[int]) -> Tensor:
        """Rows [S, C, B] of the clients in this order."""
        places = plan.positions[list(order)]
        for place, client in zip(places, order, strict=True):
            place[...] = self._rows[client][place]
        return torch.from_numpy(places.transpose(1, 0, 2).copy()).to(self.x.device)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these rows."""
        flat = rows.reshape(-1)
        return self.x.index_select(0, flat), self.y.index_select(0, flat)


_resident: dict[tuple[int, str], tuple[object, Tensor]] = {}


def on_device(column: np.ndarray, device: torch.device) -> Tensor:
    """A column as a tensor; on an accelerator it is kept there for the next call."""
    if device.type == "cpu":
        return torch.from_numpy(column)
    key = (id(column), str(device))
    if key not in _resident:
        # Holding the column keeps its id from being given to another.
        _resident[key] = (column, torch.from_numpy(column).to(device))
    return _resident[key][1]


def train_cohort(
    program: Program,
    layout: Layout,
    settings: Settings,
    model: Vectors,
    examples: Sequence[Examples],
    assignments: Sequence[Assignment],
    steps: Sequence[int],
    cut: object,
    correction: Correction | None,
    *,
    single: bool,
) -> Local:
    """Train every client from `model`; a `Local` whose arrays have a leading axis of clients.

    Clients are sorted by their steps and leave the stack when they have finished. With `single`
    there is one client and no leading axis.
    """
    device = settings.device
    lr = rate_at(settings.lr, assignments[0].round)
    sizes = [len(each) for each in examples]
    words = [a.key.fold("batches").integer() for a in assignments]
    plan = batches(words, sizes, steps, cut)  # type: ignore[arg-type]
    order = np.argsort([-s for s in steps], kind="stable").tolist()
    columns = Columns(examples, device)
    index = columns.index(plan, order)
    clients = len(order)
    entries = {section: [e for e in layout.entries if e.section == section] for section in SECTIONS}
    params = Stack(entries["params"], clients, device=device)
    received = torch.as_tensor(model["params"]).to(device)
    if received.ndim == 2:
        received = received[order]
    buffers = _buffers(entries, clients, model, device)
    rule = rule_for(
        params, settings.optimizer, _ordered(correction, order), settings.max_norm, lr,
        single=single, complete=program.complete,
    )  # fmt: skip
    seen = plan.counts.sum(1)
    factors = _factors(program, layout, rule, received, int(seen.max()), lr)
    params.load(received, without=factors)
    streams = []
    if program.streams or program.draws:
        streams = [_stream(assignments[c].key.fold("draws"), device) for c in order]
    results = _Results(order, params, buffers)
    losses = torch.zeros(clients, device=device)
    active = clients
    sorted_steps = [steps[c] for c in order]
    counts = plan.counts[order]
    with torch.no_grad():
        for step in range(sorted_steps[0]):
            if sorted_steps[active - 1] <= step:
                staying = sum(own > step for own in sorted_steps)
                results.keep(staying, active)
                active = staying
            losses[:active] += _step(
                program, settings, rule, params, buffers, streams[:active], columns,
                index[step, :active], counts[:active, step], lr, factors,
            )  # fmt: skip
        for name, held in factors.items():
            held.settle(params.views[name][0])
        results.keep(0, active)
    total = np.empty(clients)
    total[order] = losses.cpu().numpy()
    taken = np.array(steps)
    trained = results.params
    statistics = {s: rows.cpu().numpy() for s, rows in results.statistics.items()}
    if single:
        return Local(
            trained[0], steps[0], steps[0] * lr, sizes[0], int(seen[0]), float(total[0]) / steps[0],
            {s: rows[0] for s, rows in statistics.items()},
        )  # fmt: skip
    path = torch.tensor([[s * lr] for s in steps], dtype=torch.float32, device=device)
    return Local(trained, taken, path, np.array(sizes), seen, total / taken, statistics)


def weights_of(layout: Layout, model: Vectors, device: torch.device) -> dict[str, Tensor]:
    """A model's arrays by name, for a tape of one client."""
    vectors = {name: torch.from_numpy(vector).to(device) for name, vector in model.items()}
    return {name: array.unsqueeze(0) for name, array in layout.unpack(vectors).items()}


def gradient_of(
    program: Program,
    layout: Layout,
    settings: Settings,
    model: Vectors,
    examples: Examples,
    key: Key,
    cut: Sequence[slice],
) -> tuple[Tensor, Vectors]:
    """The gradient [P] of one client's mean loss over all its examples, and the new statistics."""
    device = settings.device
    entries = {section: [e for e in layout.entries if e.section == section] for section in SECTIONS}
    params = Stack(entries["params"], 1, device=device)
    params.load(torch.as_tensor(model["params"]).to(device))
    buffers = _buffers(entries, 1, model, device)
    held = {name: view for stack in buffers.values() for name, view in stack.views.items()}
    rule = Gather(params, None, None, None, single=True)
    streams = [_stream(key.fold("draws"), device)]
    columns = Columns([examples], device)
    total = torch.zeros_like(params.flat)
    with torch.no_grad():
        for part in cut:
            rows = examples.at(np.arange(part.start, part.stop))
            x, y = columns.take(torch.from_numpy(np.asarray(rows)).to(device))
            rule.begin(1)
            tape = Tape(1, params.views, held, rule=rule, streams=streams)
            outputs = program.run(tape, tape.input(x))
            _, outputs.grad = cohort_loss(settings.loss, outputs.data, y, 1, None)
            tape.back()
            total.add_(rule.gradient(), alpha=(part.stop - part.start) / len(examples))
    return total, {s: stack.flat.cpu().numpy() for s, stack in buffers.items()}


def _step(
    program: Program,
    settings: Settings,
    rule: StackRule,
    params: Stack,
    buffers: dict[Section, Stack],
    streams: Sequence[torch.Generator],
    columns: Columns,
    rows: Tensor,
    counts: np.ndarray,
    lr: float,
    factors: Mapping[str, Factors],
) -> Tensor:
    """One local step of the active clients; their losses [A]."""
    active = len(rows)
    real = counts.tolist()
    longest = max(real)
    x, y = columns.take(rows[:, :longest])
    ragged = None if min(real) == longest else real
    rule.begin(active)
    held = {name: view for stack in buffers.values() for name, view in stack.first(active).items()}
    tape = Tape(
        active, params.first(active), held, rule=rule, factors=factors, counts=ragged,
        streams=streams,
    )  # fmt: skip
    outputs = program.run(tape, tape.input(x))
    losses, outputs.grad = cohort_loss(settings.loss, outputs.data, y, active, ragged)
    tape.back()
    rule.finish(lr)
    return losses


def _factors(
    program: Program, layout: Layout, rule: StackRule, received: Tensor, rows: int, lr: float
) -> dict[str, Factors]:
    """Dense weights that are better not multiplied out while one client walks over `rows` rows."""
    if not (isinstance(rule, Descend) and rule.plain and rule.params.clients == 1):
        return {}
    base = received.view(-1)
    return {
        name: Factors(base[entry.slice].view(entry.shape), rows, lr)
        for name, entry in ((name, layout[name]) for name in sorted(program.linears))
        if entry.size >= layers.WIDE and 2 * rows <= min(entry.shape)
    }


class _Results:
    """What the clients of a stack came to, in the order in which they were given."""

    def __init__(
        self, order: Sequence[int], params: Stack, buffers: Mapping[Section, Stack]
    ) -> None:
        self._order = list(order)
        self._stacks = {"params": params, **{str(name): b for name, b in buffers.items()}}
        self._rows: dict[str, Tensor] = {}

    @property
    def params(self) -> Tensor:
        return self._rows["params"]

    @property
    def statistics(self) -> dict[str, Tensor]:
        return {name: rows for name, rows in self._rows.items() if name != "params"}

    def keep(self, start: int, stop: int) -> None:
        """Copy what the clients in these places of the stack have come to."""
        clients = self._order[start:stop]
        for name, stack in self._stacks.items():
            rows = stack.rows(start, stop)
            if clients == list(range(len(self._order))):
                self._rows[name] = rows
                continue
            if name not in self._rows:
                self._rows[name] = rows.new_empty(len(self._order), stack.size)
            self._rows[name][clients] = rows


def _buffers(
    entries: Mapping[Section, list[Entry]], clients: int, model: Vectors, device: torch.device
) -> dict[Section, Stack]:
    stacks: dict[Section, Stack] = {}
    for section, dtype in (("buffers", torch.float32), ("counters", torch.int64)):
        if section in model:
            stack = Stack(entries[section], clients, dtype=dtype, device=device)  # type: ignore[index]
            stack.load(torch.from_numpy(model[section]).to(device))
            stacks[section] = stack  # type: ignore[index]
    return stacks


def _ordered(correction: Correction | None, order: Sequence[int]) -> Correction | None:
    """The correction for clients in another order."""
    if correction is None or list(order) == list(range(len(order))):
        return correction
    if isinstance(correction, Affine):
        constant = correction.constant
        if constant is not None and constant.ndim == 2:
            constant = constant[list(order)]
        return Affine(correction.scale, constant)
    back = np.argsort(order).tolist()
    plain = correction
    return lambda gradient, params: plain(gradient[back], params[back])[list(order)]


def _stream(key: Key, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    generator.manual_seed(key.integer())
    return generator
