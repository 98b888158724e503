"""One resident module whose parameters are views of one flat vector, for training by autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from atoll.core.random import Key
from atoll.core.vectors import Array, Layout, Vectors
from atoll.data.examples import Examples, Rows, of_each, picked
from atoll.errors import ConfigurationError
from atoll.learners.base import Objective
from atoll.learners.torch.initial import still, trained
from atoll.learners.torch.losses import Loss
from atoll.learners.torch.optimizers import (
    OptimizerFactory,
    over_parameters,
    over_vector,
    step,
)
from atoll.learners.torch.stacking.columns import on_device


def called(module: nn.Module, x: Any) -> Any:
    """What a module says of inputs; those with names are its keyword arguments."""
    return module(**x) if isinstance(x, dict) else module(x)


class Resident:
    """A copy of the module whose trainable parameters are views of one flat vector."""

    def __init__(self, module: nn.Module, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.module = copy.deepcopy(module).to(self.device)
        self._resting = still(module)
        own = trained(self.module)
        persistent = set(self.module.state_dict(keep_vars=True))
        buffers = dict(self.module.named_buffers())
        self.buffers = {name: b for name, b in buffers.items() if name in persistent}
        for name, buffer in self.buffers.items():
            if buffer.dtype == torch.float64:
                raise ConfigurationError(
                    f"buffer {name!r} is {buffer.dtype}, and would travel as float32: call "
                    "module.float(), or register it with persistent=False to keep it at home"
                )
        # What does not travel must still not leak from one client to the next.
        self._private = {
            name: b.detach().clone() for name, b in buffers.items() if name not in persistent
        }
        self.layout = Layout.of(own, self.buffers)
        self.trained = tuple(own)
        self.flat = torch.empty(self.layout.size, device=self.device)
        self.gradients = torch.zeros(self.layout.size, device=self.device)
        for name, parameter in own.items():
            entry = self.layout[name]
            if parameter.dtype != torch.float32:
                raise ConfigurationError(
                    f"parameter {name!r} is {parameter.dtype}; TorchLearner trains float32 "
                    "parameters: call module.float()"
                )
            view = self.flat[entry.slice].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.gradients[entry.slice].view(parameter.shape)

    def model(self) -> Vectors:
        """The module's present state, copied."""
        return {"params": self.flat.cpu().numpy().copy(), **self.statistics()}

    def statistics(self) -> Vectors:
        """Buffers and counters, copied."""
        vectors = self.layout.zeros()
        vectors.pop("params")
        # Looked up by name each time: a module may have put a new tensor in a buffer's place.
        present = dict(self.module.named_buffers())
        for name in self.buffers:
            entry = self.layout[name]
            target = torch.from_numpy(vectors[entry.section][entry.slice])
            target.copy_(present[name].detach().reshape(-1))
        return vectors

    def load(self, model: Vectors) -> None:
        """Put a model into the module."""
        with torch.no_grad():
            self.flat.copy_(torch.from_numpy(model["params"]))
            present = dict(self.module.named_buffers())
            for name in self.buffers:
                entry = self.layout[name]
                source = torch.from_numpy(model[entry.section][entry.slice])
                present[name].copy_(source.view(present[name].shape))
            for name, value in self._private.items():
                present[name].copy_(value)

    def train(self) -> None:
        """Set the module to training, but for the parts that rest."""
        self.module.train()
        for name in self._resting:
            # Not `eval()`: what is inside rests by itself.
            self.module.get_submodule(name).training = False

    def buffered(self) -> dict[str, Tensor]:
        """Every buffer, copied."""
        return {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}

    @contextmanager
    def standing_at(self, params: Tensor) -> Iterator[None]:
        """Let the module have other parameters [P]; it comes back to its own and its buffers."""
        mine, buffers = self.flat.clone(), self.buffered()
        self.flat.copy_(params)
        try:
            yield
        finally:
            self.flat.copy_(mine)
            self.restore(buffers)

    def restore(self, buffers: Mapping[str, Tensor]) -> None:
        """Put back what `buffered` gave."""
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(buffers[name])


class ResidentDescent:
    def __init__(
        self,
        resident: Resident,
        loss: Loss,
        optimizer: OptimizerFactory | None,
        examples: Examples,
        *,
        whole: bool,
    ) -> None:
        """`whole` says that the optimiser is given the parameters, and not one flat vector."""
        self.params = resident.flat
        self._resident, self._loss = resident, loss
        self._x = of_each(examples.x, lambda column: on_device(column, resident.device))
        self._y = on_device(examples.y, resident.device)
        self._marked = False
        self._factory, self._whole = optimizer, whole
        self._optimizer: torch.optim.Optimizer | None = None

    def gather(self, rows: Rows | slice) -> None:
        if isinstance(rows, slice):
            self._inputs, self._targets = _copy(picked(self._x, rows)), self._y[rows]
        else:
            index = torch.from_numpy(rows).to(self._y.device)
            self._inputs = of_each(self._x, lambda column: column.index_select(0, index))
            self._targets = self._y.index_select(0, index)

    def gradient(self, batch: slice, objective: Objective | None = None) -> tuple[Tensor, Tensor]:
        loss = self._loss_of(batch, objective)
        self._resident.gradients.zero_()
        torch.autograd.backward(loss)
        return self._resident.gradients, loss.detach()

    def mark(self) -> None:
        self._marked = True
        self._drawn, self._buffers = draws(), self._resident.buffered()

    def gradient_at(
        self, batch: slice, points: Tensor, objective: Objective | None = None
    ) -> Tensor:
        resident = self._resident
        kept, now = resident.gradients.clone(), draws()
        with resident.standing_at(points):
            resident.restore(self._buffers)
            draw_again(self._drawn)
            self.gradient(batch, objective)
        draw_again(now)
        found = resident.gradients.clone()
        resident.gradients.copy_(kept)
        return found

    def _loss_of(self, batch: slice, objective: Objective | None) -> Tensor:
        """The mean loss of a batch, with a graph behind it."""
        module, y = self._resident.module, self._targets[batch]
        x = picked(self._inputs, batch)
        if self._marked or objective is not None:
            # A copy where it is needed again: the first layer of some modules writes into it.
            x = _copy(x)
        if objective is None:
            return self._loss(called(module, x), y)
        shown = [self._outputs(params, _copy(x)) for params in objective.beside]
        found: Tensor = objective.loss(called(module, x), y, *shown, **objective.given)
        return found

    def _outputs(self, params: Tensor, x: Any) -> Tensor:
        """What other parameters say of these inputs, as in evaluation."""
        module, now = self._resident.module, draws()
        with self._resident.standing_at(params), torch.no_grad():
            module.eval()
            found: Tensor = called(module, x)
            self._resident.train()
        draw_again(now)
        return found

    def step(
        self, direction: Tensor, lr: float, again: Callable[[], tuple[Array, Any]] | None = None
    ) -> None:
        if self._factory is None:
            self.params.add_(direction, alpha=-lr)
            return
        if self._optimizer is None:
            self._optimizer = self._begun(self._factory, lr)
        self._descend_along(direction)

        def closure() -> Tensor:
            assert again is not None
            with torch.enable_grad():
                direction, loss = again()
            self._descend_along(direction)
            return torch.as_tensor(loss)

        step(self._optimizer, closure)

    def _begun(self, factory: OptimizerFactory, lr: float) -> torch.optim.Optimizer:
        """The optimiser of this descent, whose gradients are views of the flat one."""
        resident = self._resident
        if not self._whole:
            optimizer = over_vector(factory, resident.flat, lr)
            (parameter,) = optimizer.param_groups[0]["params"]
            parameter.grad = resident.gradients
            return optimizer
        named = dict(resident.module.named_parameters())
        return over_parameters(factory, {name: named[name] for name in resident.trained}, lr)

    def _descend_along(self, direction: Tensor) -> None:
        """Let the parameters' gradients be this direction."""
        gradients = self._resident.gradients
        if direction is not gradients:
            # Some optimisers write into it, and a correction may give what is not the loop's own.
            gradients.copy_(direction)

    def result(self) -> tuple[Tensor, Vectors]:
        return self.params.clone(), self._resident.statistics()


def _copy(x: Any) -> Any:
    """A copy of inputs, into which the first layer of some modules writes."""
    return of_each(x, torch.clone)


#: torch has one generator for the whole process, and its tracer changes how every module is called:
#: one thread at a time may use either, or the modules themselves.
PROCESS = RLock()


@contextmanager
def draws_from(key: Key) -> Iterator[None]:
    """Let dropout and initialisers draw from `key`; the caller's own stream is untouched."""
    with PROCESS:
        # Not `torch.manual_seed`: it formats a stack trace for CUDA on every call, a millisecond.
        before = draws()
        for generator in _generators():
            generator.manual_seed(key.integer())
        try:
            yield
        finally:
            draw_again(before)


def draws() -> list[Tensor]:
    """Where torch's generators stand."""
    return [generator.get_state() for generator in _generators()]


def draw_again(states: Sequence[Tensor]) -> None:
    """Put torch's generators back to where they stood."""
    for generator, state in zip(_generators(), states, strict=False):
        generator.set_state(state)


def _generators() -> list[torch.Generator]:
    return [torch.default_generator, *_accelerators()]


def _accelerators() -> tuple[torch.Generator, ...]:
    """The generators of CUDA devices, if a program has begun to use them."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return ()
    return tuple(torch.cuda.default_generators)
