"""Training of a cohort: the local loops of several clients, side by side on one tape."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.core.random import Key
from atoll.core.vectors import SECTIONS, Entry, Layout, Section, Vectors
from atoll.data.examples import Examples
from atoll.learners.base import Affine, Assignment, At, Correction, LocalResult, Objective
from atoll.learners.batches import Batches, batches
from atoll.learners.rates import Rate, rate_at
from atoll.learners.torch.cuda_graphs import Workspace, record
from atoll.learners.torch.losses import Loss, cohort_loss
from atoll.learners.torch.optimizers import OptimizerFactory
from atoll.learners.torch.stacking import layers
from atoll.learners.torch.stacking.aims import Aim, in_order
from atoll.learners.torch.stacking.columns import Columns
from atoll.learners.torch.stacking.program import Program
from atoll.learners.torch.stacking.rules import (
    Descend,
    Factors,
    Gather,
    StackRule,
    rule_for,
)
from atoll.learners.torch.stacking.stack import Stack
from atoll.learners.torch.stacking.steps import Loop
from atoll.learners.torch.stacking.tape import Tape

#: Recorded steps to keep: rates that change and cohorts that vary make new ones.
WORKSPACES = 8
#: Sums of whole numbers with magnitudes below these are exact as float64, and as int64.
FLOAT_LIMIT, FOLD_LIMIT = float(1 << 53), float(1 << 60)
#: How many values of [C, P] rows are summed at a time, in float64: on a CPU what its caches hold.
FOLD_TILE, FOLD_TILE_ON_DEVICE = 1 << 20, 1 << 26

#: Of products on an accelerator: exact float32, TF32, or bfloat16 with float32 weights.
Precision = Literal["float32", "tf32", "bfloat16"]


@dataclass(frozen=True)
class Settings:
    """What a learner says of local training."""

    loss: Loss
    lr: float | Rate
    optimizer: OptimizerFactory | None
    max_norm: float | None
    device: torch.device
    precision: Precision = "float32"
    graphs: bool = False
    #: Recorded steps by what they were recorded for.
    workspaces: dict[object, Workspace] = field(default_factory=dict)

    @property
    def half(self) -> bool:
        """Whether products are of bfloat16 numbers."""
        return self.precision == "bfloat16"

    @contextmanager
    def products(self) -> Iterator[None]:
        """Let products of float32 use the device's faster format, if that was asked for."""
        if self.precision != "tf32":
            yield
            return
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def train_cohort(
    program: Program,
    layout: Layout,
    settings: Settings,
    model: Vectors,
    examples: Sequence[Examples],
    assignments: Sequence[Assignment],
    steps: Sequence[int],
    cut: object,
    correction: Correction | At | None,
    objective: Objective | None,
    *,
    single: bool,
) -> LocalResult:
    """Train every client from `model`; a `LocalResult` whose arrays have a leading axis of clients.

    Clients are sorted by their steps and leave the stack when they have finished. With `single`
    there is one client and no leading axis.
    """
    device = settings.device
    lr = rate_at(settings.lr, assignments[0].round)
    sizes = [len(each) for each in examples]
    words = [a.key.integer("batches") for a in assignments]
    plan = batches(words, sizes, steps, cut)  # type: ignore[arg-type]
    order = np.argsort([-s for s in steps], kind="stable").tolist()
    columns = Columns(examples, device)
    index = columns.index(plan, order)
    clients = len(order)
    entries = {section: [e for e in layout.entries if e.section == section] for section in SECTIONS}
    received = in_order(torch.as_tensor(model["params"]).to(device), order)
    buffers = _buffers(entries, clients, model, device)
    correction = _ordered(correction, order)
    recorded = None
    usual = correction is None and objective is None and settings.optimizer is None
    if settings.graphs and usual and not buffers:
        recorded = _recorded(program, settings, entries["params"], columns, plan, lr)
    if recorded is None:
        params = Stack(entries["params"], clients, device=device)
        rule = rule_for(
            params, settings.optimizer, correction, settings.max_norm, lr,
            single=single, complete=program.complete,
        )  # fmt: skip
    else:
        params, rule = recorded.params, recorded.rule
    plain = recorded is None and settings.precision == "float32"
    factors = _factors(program, layout, rule, received, plan, lr) if plain else {}
    params.load(received, without=factors)
    drawing = order if program.streams or program.draws else ()
    streams = [_stream(assignments[c].key.fold("draws"), device) for c in drawing]
    results = _Results(order, params, buffers, copy=recorded is not None)
    aim = Aim.of(settings.loss, objective, entries["params"], order, device, single=single)
    loop = Loop(program, rule, params, columns, lr, aim, buffers, streams, factors, settings.half)
    losses, active = torch.zeros(clients, device=device), clients
    sorted_steps = [steps[c] for c in order]
    counts = plan.counts[order]
    full = (counts == plan.positions.shape[2]).all(axis=0)
    with torch.no_grad(), settings.products():
        for step in range(sorted_steps[0]):
            if sorted_steps[active - 1] <= step:
                staying = sum(own > step for own in sorted_steps)
                results.keep(staying, active)
                active = staying
            if recorded is not None and full[step]:
                recorded.rows.copy_(index[step])
                recorded.replay()
                losses += recorded.losses
                continue
            losses[:active] += loop.step(index[step, :active], counts[:active, step])
        for name, held in factors.items():
            held.settle(params.views[name][0])
        results.keep(0, active)
    total = np.empty(clients)
    total[order] = losses.cpu().numpy()
    return _local(results, steps, lr, sizes, plan.counts.sum(1), total, single=single)


def _local(
    results: _Results,
    steps: Sequence[int],
    lr: float,
    sizes: Sequence[int],
    seen: NDArray[np.int64],
    losses: NDArray[np.float64],
    *,
    single: bool,
) -> LocalResult:
    """What the training came to; `losses` are sums over the steps."""
    trained, taken = results.params, np.array(steps)
    statistics = {s: rows.cpu().numpy() for s, rows in results.statistics.items()}
    if single:
        return LocalResult(
            trained[0], steps[0], steps[0] * lr, sizes[0], int(seen[0]),
            float(losses[0]) / steps[0], {s: rows[0] for s, rows in statistics.items()},
        )  # fmt: skip
    columns = np.stack(
        [taken, taken * lr, np.array(sizes), seen, losses / taken], dtype=np.float32
    )[..., None]
    done, path, held, gone, mean = torch.from_numpy(columns).to(trained.device)
    return LocalResult(trained, done, path, held, gone, mean, statistics)


def fold(rows: Tensor, scales: Sequence[float]) -> tuple[np.ndarray, int] | None:
    """Sum of round(row * scale) over rows [C, P] as int64 [P] and a bound of its magnitude.

    Where the rows are, so that one vector leaves the device and not C. None if a value is not
    finite or too large for that, or the rows are not float32, as updates are.
    """
    rows = rows.detach()
    if not rows.numel() or rows.dtype != torch.float32:
        return None
    factors = torch.tensor(scales, dtype=torch.float64, device=rows.device).unsqueeze(1)
    size = FOLD_TILE if rows.device.type == "cpu" else FOLD_TILE_ON_DEVICE
    tiles = torch.split(rows, max(1, size // len(rows)), 1)
    peaks = torch.stack([tile.abs().amax(1) for tile in tiles]).amax(0)
    bound = float(factors[:, 0] @ peaks.double()) + len(rows)
    if not bound < FOLD_LIMIT:
        return None
    total = torch.empty(rows.shape[1], dtype=torch.int64, device=rows.device)
    scratch = factors.new_empty(tiles[0].shape)
    for tile, sums in zip(tiles, torch.split(total, tiles[0].shape[1]), strict=True):
        # Copied first: an operation on two dtypes is twice as slow as one on each.
        units = scratch[:, : tile.shape[1]].copy_(tile).mul_(factors).round_()
        sums.copy_((units if bound < FLOAT_LIMIT else units.long()).sum(0))
    return total.cpu().numpy(), int(bound)


def weights_of(layout: Layout, model: Vectors, device: torch.device) -> dict[str, Tensor]:
    """A model's arrays by name, for a tape of one client."""
    # Copies: some layers write into their weights.
    vectors = {name: torch.tensor(vector, device=device) for name, vector in model.items()}
    return {name: array.unsqueeze(0) for name, array in layout.unpack(vectors).items()}


def gradient_of(
    program: Program,
    layout: Layout,
    settings: Settings,
    model: Vectors,
    examples: Examples,
    key: Key,
    cut: Sequence[slice],
    shares: Sequence[float],
) -> tuple[Tensor, Vectors]:
    """The gradient [P] of one client's mean loss over all its examples, and the new statistics.

    `shares` are those of each batch's mean loss in that of all.
    """
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
        for part, share in zip(cut, shares, strict=True):
            rows = examples.at(np.arange(part.start, part.stop))
            x, y = columns.take(torch.from_numpy(np.asarray(rows)).to(device))
            rule.begin(1)
            tape = Tape(1, params.views, held, rule=rule, streams=streams)
            outputs = program.run(tape, tape.input(x))
            _, outputs.grad = cohort_loss(settings.loss, outputs.data, y, 1, None)
            tape.back()
            total.add_(rule.gradient(), alpha=share)
    return total, {s: stack.flat.cpu().numpy() for s, stack in buffers.items()}


def _recorded(
    program: Program,
    settings: Settings,
    entries: Sequence[Entry],
    columns: Columns,
    plan: Batches,
    lr: float,
) -> Workspace | None:
    """The recorded step of such a cohort; None if its steps are not all alike."""
    if program.streams or program.draws or program.mixes or not columns.shared:
        return None
    clients, _, batch = plan.positions.shape
    key = (threading.get_ident(), clients, batch, lr, columns.x.data_ptr(), columns.y.data_ptr())
    if key not in settings.workspaces:
        if len(settings.workspaces) >= WORKSPACES:
            settings.workspaces.clear()
        device = settings.device
        params = Stack(entries, clients, device=device)
        params.flat.zero_()
        rule = rule_for(
            params, None, None, settings.max_norm, lr, single=False, complete=program.complete
        )
        rows = torch.zeros(clients, batch, dtype=torch.int64, device=device)
        losses = torch.zeros(clients, device=device)
        counts = np.full(clients, batch)
        loop = Loop(program, rule, params, columns, lr, Aim(settings.loss), half=settings.half)

        def step() -> None:
            losses.copy_(loop.step(rows, counts))

        with torch.no_grad(), settings.products():
            replay = record(step, device)
        settings.workspaces[key] = Workspace(params, rule, rows, losses, replay)
    return settings.workspaces[key]


def _factors(
    program: Program, layout: Layout, rule: StackRule, received: Tensor, plan: Batches, lr: float
) -> dict[str, Factors]:
    """Dense weights that are better not multiplied out: one client's few rows meet many of them."""
    if not (isinstance(rule, Descend) and rule.plain and rule.params.clients == 1):
        return {}
    base, rows = received.view(-1), int(plan.counts.sum())
    return {
        name: Factors(base[entry.slice].view(entry.shape), rows, lr)
        for name, entry in ((name, layout[name]) for name in sorted(program.linears))
        if entry.size >= layers.WIDE and 2 * rows <= min(entry.shape)
    }


class _Results:
    """What the clients of a stack came to, in the order in which they were given."""

    def __init__(
        self,
        order: Sequence[int],
        params: Stack,
        buffers: Mapping[Section, Stack],
        *,
        copy: bool,
    ) -> None:
        self._order, self._copy = list(order), copy
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
                self._rows[name] = rows.clone() if self._copy else rows
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


def _ordered(correction: Correction | At | None, order: Sequence[int]) -> Correction | At | None:
    """The correction for clients in another order."""
    if correction is None or list(order) == list(range(len(order))):
        return correction
    if isinstance(correction, Affine):
        constant = correction.constant
        return Affine(correction.scale, None if constant is None else in_order(constant, order))
    back = np.argsort(order).tolist()
    if isinstance(correction, At):
        rule = correction.rule

        def reordered(gradient: Tensor, params: Tensor, at: Callable[[Tensor], Tensor]) -> Tensor:
            def there(points: Tensor) -> Tensor:
                return at(in_order(points, order))[back]

            return in_order(rule(gradient[back], params[back], there), order)

        return At(reordered)
    plain = correction
    return lambda gradient, params: in_order(plain(gradient[back], params[back]), order)


def _stream(key: Key, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    generator.manual_seed(key.integer())
    return generator
