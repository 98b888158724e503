"""The check of a program: its gradients against autograd on the module itself."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from atoll.core.vectors import SECTIONS, Layout
from atoll.data.examples import Examples
from atoll.learners.torch.losses import Loss, cohort_loss
from atoll.learners.torch.stacking.kinds import RECURRENT
from atoll.learners.torch.stacking.lowering import lower
from atoll.learners.torch.stacking.program import Program, Refused
from atoll.learners.torch.stacking.rules import Gather
from atoll.learners.torch.stacking.stack import Stack
from atoll.learners.torch.stacking.tape import Tape

#: Clients of the check have this many examples; different ones, so that padding is checked too.
COUNTS = (3, 2)
#: What a program is compared in, and how closely. Batch statistics of two rows magnify rounding a
#: thousandfold, so float64 judges, and float32 only where a module runs in nothing else.
JUDGES = ((torch.float64, 1e-6), (torch.float32, 2e-3))
#: Recurrent layers have a fused kernel for float32 only, and take many times the memory without;
#: they are spared the judges if they come as close as this.
BY_SIGHT = (torch.float32, 2e-5)


def checked(
    module: nn.Module, layout: Layout, loss: Loss, examples: Examples
) -> tuple[Program | None, Program | None, str]:
    """The programs of a module for a cohort and for one client; None, and why, where there is none.

    They differ where layers cannot be stacked as they are used: then a cohort takes the module
    whole, and one client still goes layer by layer.
    """
    names = [entry.name for entry in layout.entries if entry.section == "params"]
    together = alone = None
    reasons = []
    for whole in (False, True):
        try:
            # A copy: layers without a rule are switched between training and evaluation.
            program = lower(copy.deepcopy(module), names, whole=whole)
        except Refused as refusal:
            reasons.append(str(refusal))
            break
        if program.layered and alone is None:
            alone = _passing(program, module, layout, loss, examples, COUNTS[:1], reasons)
        if together is None:
            together = _passing(program, module, layout, loss, examples, COUNTS, reasons)
        if together is not None or not program.layered:
            break
    return together, alone, "; ".join(dict.fromkeys(reasons))


def _passing(
    program: Program,
    module: nn.Module,
    layout: Layout,
    loss: Loss,
    examples: Examples,
    counts: tuple[int, ...],
    reasons: list[str],
) -> Program | None:
    recurrent = any(isinstance(part, RECURRENT) for part in module.modules())
    given = (program, module, layout, loss, examples)
    why = ""
    for dtype, tolerance in (BY_SIGHT, *JUDGES) if recurrent else JUDGES:
        try:
            made, matrices = _check(*given, counts, dtype, tolerance)
            if not program.mixes:
                _check(*given, (1,) * len(counts), dtype, tolerance)
        except Refused as refusal:
            why = str(refusal)
            if dtype is torch.float64:
                break
        except Exception as error:
            # In float64 it may say no more than that the module has float32 tensors of its own.
            if dtype is torch.float32:
                text = str(error).strip().splitlines()
                why = f"{type(error).__name__}: {text[0][:200] if text else ''}"
        else:
            rows = len(counts) * max(counts) * (dtype.itemsize // 4)
            return replace(program, bytes_per_row=made // rows, linears=program.linears & matrices)
    reasons.append(why)
    return None


def _check(
    program: Program,
    module: nn.Module,
    layout: Layout,
    loss: Loss,
    examples: Examples,
    counts: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
) -> tuple[int, set[str]]:
    """Raise `Refused` unless gradients, statistics and outputs agree, client by client.

    Returns what the tape of the step in training says has been `made`, and its `matrices`.
    """
    clients, longest = len(counts), max(counts)
    generator = torch.Generator().manual_seed(7)
    rows = torch.randint(len(examples), (clients, longest), generator=generator).numpy()
    batches = [examples.take(rows[c]) for c in range(clients)]
    x = torch.cat([torch.from_numpy(x) for x, _ in batches])
    y = torch.cat([torch.from_numpy(y) for _, y in batches])
    x = x.to(dtype) if x.is_floating_point() else x
    y = y.to(dtype) if y.is_floating_point() else y
    copies = [_disturbed(module, generator).to(dtype) for _ in counts]
    sections = {s: [e for e in layout.entries if e.section == s] for s in SECTIONS}
    params = Stack(sections["params"], clients, dtype=dtype)
    statistics = [
        Stack(sections["buffers"], clients, dtype=dtype),
        Stack(sections["counters"], clients, dtype=torch.int64),
    ]
    for stack in (params, *statistics):
        for name, view in stack.views.items():
            for c, each in enumerate(copies):
                view[c].copy_(
                    each.get_parameter(name) if stack is params else each.get_buffer(name)
                )
    held = {name: view for stack in statistics for name, view in stack.views.items()}
    rule = Gather(params, None, None, None, False)
    rule.begin(clients)
    ragged = None if len(set(counts)) == 1 else counts
    with torch.no_grad():
        for training in (False, True):
            tape = Tape(
                clients, params.views, held, rule=rule if training else None, counts=ragged,
                streams=[torch.Generator().manual_seed(c) for c in range(clients)],
            )  # fmt: skip
            outputs = program.run(tape, tape.input(x.clone()))
            expected = []
            for c, (each, real) in enumerate(zip(copies, counts, strict=True)):
                own = slice(c * longest, c * longest + real)
                expected.append(_reference(each, loss, x[own].clone(), y[own], c, training))
                span = len(outputs.data) // clients
                got = outputs.data[c * span : c * span + real * span // longest]
                _compare("outputs", got, expected[c], tolerance)
        _, outputs.grad = cohort_loss(loss, outputs.data, y, clients, ragged)
        tape.back()
        rule.gradient()
    for c, each in enumerate(copies):
        norm = sum(float(p.grad.square().sum()) for p in each.parameters() if p.grad is not None)
        for name, parameter in each.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            _compare(
                f"the gradient of {name}", rule.into.views[name][c], wanted, tolerance, norm**0.5
            )
        for name, buffer in each.named_buffers():
            if name in held:
                _compare(name, held[name][c].to(dtype), buffer.to(dtype), tolerance, 1.0)
    return tape.made, tape.matrices


def _reference(
    module: nn.Module, loss: Loss, x: Tensor, y: Tensor, seed: int, training: bool
) -> Tensor:
    """Outputs of the module itself; in training it is left with its gradients."""
    module.train(training)
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        with torch.set_grad_enabled(training):
            outputs = module(x)
            if training:
                torch.autograd.backward(loss(outputs, y))
    finally:
        generator.set_state(state)
    return outputs.detach()  # type: ignore[no-any-return]


def _disturbed(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A copy with other parameters, so that no client can be mistaken for another."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = None
            parameter.add_(noise, alpha=0.05 * float(parameter.abs().mean()) + 1e-3)
    return other


def _compare(what: str, got: Tensor, wanted: Tensor, tolerance: float, scale: float = 0.0) -> None:
    if got.shape != wanted.shape:
        raise Refused(f"{what} came out as {list(got.shape)}, not {list(wanted.shape)}")
    error = float((got - wanted).abs().max()) if got.numel() else 0.0
    size = max(float(wanted.abs().max()) if got.numel() else 0.0, scale * 1e-2, 1e-6)
    if not error <= tolerance * size:
        raise Refused(f"{what} came out otherwise than by autograd")
