"""Any `torch.nn.Module` as a learner: one resident module whose parameters are one flat vector."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atoll.data.examples import Examples, Rows, Task
from atoll.data.federated import FederatedData
from atoll.errors import ConfigurationError, DataError, require
from atoll.keys import Key
from atoll.learners.base import GradientLearner
from atoll.learners.metrics import (
    Sums,
    add,
    classification_sums,
    regression_sums,
    token_sums,
)
from atoll.vectors import Array, Layout, Vectors

require("torch", "torch>=2.6,<2.14", "atoll.learners.TorchLearner")

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

Loss = Callable[[Tensor, Tensor], Tensor]
OptimizerFactory = Callable[..., torch.optim.Optimizer]


def _cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Labels [B] for outputs [B, K], or tokens [B, T] for outputs [B, T, V]."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _binary_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Labels 0 and 1 [B] for one logit each, [B] or [B, 1]."""
    return F.binary_cross_entropy_with_logits(outputs.flatten(), targets.flatten().float())


def _mean_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs.reshape(targets.shape), targets)


def _mean_absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.l1_loss(outputs.reshape(targets.shape), targets)


LOSSES: dict[str, Loss] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": _mean_squared_error,
    "l1": _mean_absolute_error,
}


@dataclass(frozen=True, eq=False)
class TorchLearner(GradientLearner):
    """Trains and evaluates a torch module, which is copied and never changed.

    Args:
        module: any module. Parameters that require gradients are trained and travel; persistent
            buffers are averaged; frozen parameters stay as they are and do not travel.
        loss: "cross_entropy" (labels or next tokens), "binary_cross_entropy" (one logit), "mse",
            "l1", or a callable (outputs, targets) -> mean loss.
        optimizer: None for plain SGD, or any `torch.optim` class or partial of one, called as
            `optimizer([flat], lr=lr)` afresh for every client and round: nothing is carried over.
        weights: "seeded" draws the initial parameters anew from the run's seed, through every
            submodule's `reset_parameters`; "given" starts from the module's own, as pretrained
            models must. Modules in eval mode look pretrained: for them it must be said.
    """

    module: nn.Module
    loss: str | Loss = "cross_entropy"
    optimizer: OptimizerFactory | None = None
    weights: Literal["seeded", "given", "auto"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise ConfigurationError(
                f"loss {self.loss!r} is not known; use {', '.join(LOSSES)} or a function of "
                "(outputs, targets)"
            )
        if self.optimizer is not None and not callable(self.optimizer):
            raise ConfigurationError(
                f"optimizer must be a torch.optim class or a partial of one, not {self.optimizer!r}"
            )
        if not isinstance(self.module, nn.Module):
            raise ConfigurationError(
                f"module must be a torch.nn.Module, not {type(self.module).__name__}"
            )
        if self.weights not in ("seeded", "given", "auto"):
            raise ConfigurationError(f"weights must be seeded or given, not {self.weights!r}")
        if self.weights == "auto" and not self.module.training:
            raise ConfigurationError(
                "the module is in eval mode, as pretrained ones are; say weights='given' to start "
                "from its own parameters or weights='seeded' to draw them from the run's seed"
            )
        if any(
            isinstance(p, nn.parameter.UninitializedParameter) for p in self.module.parameters()
        ):
            raise ConfigurationError(
                "the module has lazy layers, whose shapes are not known yet; call it once on an "
                "example first"
            )
        if not any(p.requires_grad for p in self.module.parameters()):
            raise ConfigurationError("the module has no parameter that requires a gradient")

    @property
    def plain_sgd(self) -> bool:  # type: ignore[override]
        return self.optimizer is None

    @cached_property
    def _resident(self) -> _Resident:
        return _Resident(self.module)

    @cached_property
    def _loss(self) -> Loss:
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    @property
    def layout(self) -> Layout:
        return self._resident.layout

    def init(self, key: Key) -> Vectors:
        if self.weights == "given":
            return _Resident(self.module).model()
        with _draws_from(key):
            return _Resident(redrawn(self.module)).model()

    def fixed(self) -> str:
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        if self.weights != "given":
            entries = {entry.name for entry in self.layout.entries}
            tensors = {name: t for name, t in tensors.items() if name not in entries}
        digest = sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest() if tensors else ""

    @cached_property
    def smallest_batch(self) -> int:
        """BatchNorm has no statistics of a single example."""
        norms = (nn.modules.batchnorm._BatchNorm,)
        return 2 if any(isinstance(part, norms) for part in self.module.modules()) else 1

    def check(self, data: FederatedData) -> None:
        """Run one example through loss and module, so that a misfit is said before any training."""
        super().check(data)
        regression = data.task == "regression"
        if self.loss in LOSSES and regression != (self.loss in ("mse", "l1")):
            raise DataError(f"{data.name} is a {data.task} set; loss {self.loss!r} does not fit it")
        if self.loss == "binary_cross_entropy" and data.classes != 2:
            raise DataError(
                f"loss 'binary_cross_entropy' is for two classes; {data.name} has {data.classes}"
            )
        outputs = self._try_out(data)
        if not isinstance(outputs, Tensor):
            raise DataError(
                f"the module gives {type(outputs).__name__}, not a tensor; wrap it so that it "
                "returns its outputs alone"
            )
        wanted = {1} if self.loss == "binary_cross_entropy" else {data.classes}
        wanted |= {1} if self.loss not in LOSSES and data.classes == 2 else set()
        if data.classes and outputs.shape[-1] not in wanted:
            raise DataError(
                f"{data.name} has {data.classes} classes, but the module gives "
                f"{outputs.shape[-1]} outputs"
            )

    def _try_out(self, data: FederatedData) -> Any:
        """The outputs for two examples, through module and loss."""
        module = copy.deepcopy(self.module).eval()
        x, y = data.all_train().take(np.arange(min(2, int(data.sizes().sum()))))
        try:
            with torch.no_grad(), _draws_from(Key(0)):
                outputs = module(torch.from_numpy(x))
                if isinstance(outputs, Tensor):
                    self._loss(outputs, torch.from_numpy(y)).item()
                return outputs
        except Exception as error:
            raise DataError(
                f"the module does not fit {data.name}, whose inputs have shape {list(data.shape)}: "
                f"{error}"
            ) from error

    @contextmanager
    def descend(self, model: Vectors, examples: Examples, key: Key) -> Iterator[_Descent]:
        resident = self._resident
        resident.load(model)
        resident.module.train()
        with _draws_from(key):
            yield _Descent(resident, self._loss, self.optimizer, examples)

    def norm(self, vector: Tensor) -> float:
        return float(torch.linalg.vector_norm(vector))

    def evaluate(self, model: Vectors, examples: Examples, task: Task, classes: int | None) -> Sums:
        resident = self._resident
        resident.load(model)
        resident.module.eval()
        parts = []
        size = 64 if task == "tokens" else 1024
        with torch.no_grad(), _draws_from(Key(0)):
            for start in range(0, len(examples), size):
                x, y = examples.take(slice(start, start + size))
                # A copy: the first layer of some modules writes into its inputs.
                outputs = resident.module(torch.tensor(x))
                loss = float(self._loss(outputs, torch.from_numpy(y)))
                parts.append(_sums(outputs, y, loss, task, classes))
        return add(parts)

    def asarray(self, vector: NDArray[Any]) -> Array:
        return torch.from_numpy(vector)

    def asnumpy(self, array: Array) -> NDArray[Any]:
        return array.detach().cpu().numpy()  # type: ignore[no-any-return]


def redrawn(module: nn.Module) -> nn.Module:
    """A copy whose trained parameters are drawn anew from torch's generator."""
    fresh = copy.deepcopy(module)
    trained = {name: p for name, p in fresh.named_parameters() if p.requires_grad}
    with torch.no_grad():
        # Whatever no `reset_parameters` reaches is still NaN afterwards.
        for parameter in trained.values():
            parameter.fill_(math.nan)
        for part in fresh.modules():
            renew = getattr(part, "reset_parameters", None) or getattr(
                part, "_reset_parameters", None
            )
            if callable(renew):
                renew()
    stuck = [name for name, p in trained.items() if bool(p.isnan().any())]
    if stuck:
        raise ConfigurationError(
            f"the initial value of {stuck[0]!r} cannot be drawn from the seed, because no "
            "reset_parameters() of its module sets it; give it one, or say weights='given' to "
            "start from the module's own parameters"
        )
    return fresh


class _Resident:
    """A copy of the module whose trainable parameters are views of one flat vector."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module)
        trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        persistent = set(self.module.state_dict(keep_vars=True))
        buffers = dict(self.module.named_buffers())
        self.buffers = {name: b for name, b in buffers.items() if name in persistent}
        # What does not travel must still not leak from one client to the next.
        self._private = {
            name: b.detach().clone() for name, b in buffers.items() if name not in persistent
        }
        self.layout = Layout.of(trained, self.buffers)
        self.flat = torch.empty(self.layout.size)
        self.gradients = torch.zeros(self.layout.size)
        for name, parameter in trained.items():
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
        return {"params": self.flat.numpy().copy(), **self.statistics()}

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


class _Descent:
    def __init__(
        self,
        resident: _Resident,
        loss: Loss,
        optimizer: OptimizerFactory | None,
        examples: Examples,
    ) -> None:
        self.params = resident.flat
        self._resident, self._loss = resident, loss
        self._x, self._y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
        self._optimizer: torch.optim.Optimizer | None = None
        if optimizer is not None:
            self._parameter = nn.Parameter(resident.flat)
            self._optimizer = optimizer([self._parameter], lr=1.0)

    def gather(self, rows: Rows | slice) -> None:
        if isinstance(rows, slice):
            self._inputs, self._targets = self._x[rows].clone(), self._y[rows]
        else:
            index = torch.from_numpy(rows)
            self._inputs = self._x.index_select(0, index)
            self._targets = self._y.index_select(0, index)

    def gradient(self, batch: slice) -> tuple[Tensor, Tensor]:
        self._resident.gradients.zero_()
        loss = self._loss(self._resident.module(self._inputs[batch]), self._targets[batch])
        torch.autograd.backward(loss)
        return self._resident.gradients, loss.detach()

    def step(self, direction: Tensor, lr: float) -> None:
        if self._optimizer is None:
            self.params.add_(direction, alpha=-lr)
            return
        self._parameter.grad = direction
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def result(self) -> tuple[Tensor, Vectors]:
        return self.params.clone(), self._resident.statistics()


@contextmanager
def _draws_from(key: Key) -> Iterator[None]:
    """Let dropout and initialisers draw from `key`; the caller's own stream is untouched."""
    # Not `torch.manual_seed`: it formats a stack trace for CUDA on every call, a millisecond each.
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(key.integer())
    try:
        yield
    finally:
        generator.set_state(state)


def _sums(outputs: Tensor, y: NDArray[Any], loss: float, task: Task, classes: int | None) -> Sums:
    values = outputs.float().numpy()
    if task == "regression":
        return regression_sums(values, y, loss * len(y))
    if task == "tokens":
        return token_sums(values, y, loss * y.size)
    return classification_sums(values, y, loss * len(y), classes or 0)
