"""Any `torch.nn.Module` as a learner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from atoll.core.random import Key
from atoll.core.vectors import Array, Layout, Vectors
from atoll.data.examples import Examples, joined, of_each, shape_text
from atoll.data.federated import FederatedData
from atoll.data.sums import Sums
from atoll.data.tasks import Task, task_of
from atoll.errors import ConfigurationError, DataError
from atoll.learners.base import (
    Ability,
    Assignment,
    At,
    Correction,
    GradientLearner,
    LocalResult,
    Objective,
)
from atoll.learners.checks import check_loss, check_mean, check_outputs, check_scale, tried
from atoll.learners.evaluation import TOKENS_AT_ONCE, mean_over, pieces, sums_of_parts
from atoll.learners.scoring import ignored, weight
from atoll.learners.torch.initial import not_fresh, redrawn, still, trained
from atoll.learners.torch.losses import LOSSES, Loss, last_function, loss_of
from atoll.learners.torch.optimizers import OptimizerFactory, wants_parameters
from atoll.learners.torch.resident import (
    PROCESS,
    Resident,
    ResidentDescent,
    called,
    draws_from,
)
from atoll.learners.torch.stacking.aims import as_tensor, numbers
from atoll.learners.torch.stacking.checking import checked
from atoll.learners.torch.stacking.cohort import (
    Precision,
    Settings,
    fold,
    gradient_of,
    train_cohort,
    weights_of,
)
from atoll.learners.torch.stacking.program import Program
from atoll.learners.torch.stacking.tape import Tape
from atoll.learners.torch.weights import array_of, named, tensors_of, what
from atoll.learners.weights import copied, fits, is_vectors, packed


@dataclass(frozen=True)
class Lowering:
    """How a module is run: as a program for cohorts, for one client, or by autograd; and why."""

    together: Program | None
    alone: Program | None
    reason: str


@dataclass(frozen=True, eq=False)
class TorchLearner(GradientLearner):
    """Trains and evaluates a torch module, which is copied and never changed.

    Inputs by name are its keyword arguments: `module(image=..., age=...)`.

    Args:
        module: any module. Parameters that require gradients are trained and travel; persistent
            buffers are averaged; frozen parameters stay as they are and do not travel. Parts that
            are in eval mode stay in it, if the module is not or their parameters are all frozen.
        loss: "cross_entropy" (labels or next tokens), "binary_cross_entropy" (one logit, or one for
            each of several labels), "mse", "l1", or a callable (outputs, targets) -> mean loss,
            which may have an `ignore_index`: a target that counts nowhere. `OfBatch(...)` marks
            one that is no mean over examples.
        optimizer: None for plain SGD, or any `torch.optim` class, partial of one, or function that
            makes one, called as `optimizer(parameters, lr=lr)` afresh for every client and round:
            nothing is carried over. Parameters are one flat vector for what treats each number
            alone (SGD, Adam, ...), and the module's for what does not (LBFGS, Adafactor, ...) or
            makes groups of them; a function whose first argument is called `named_parameters` gets
            them with their names.
        weights: "seeded" draws the initial parameters anew from the run's seed, through every
            submodule's `reset_parameters`; "given" starts from the module's own, as pretrained
            models must. It must be said for a module in eval mode, or with weights that its layers
            would not draw: loaded or trained ones, or an initialisation of one's own.
        device: where models are trained and evaluated, e.g. "cuda"; the data go there once.
        precision: of products: "float32", "tf32" on devices that have it, or "bfloat16", with
            weights and everything else in float32.
    """

    module: nn.Module
    loss: str | Loss = "cross_entropy"
    optimizer: OptimizerFactory | None = None
    weights: Literal["seeded", "given", "auto"] = "auto"
    device: str = "cpu"
    precision: Precision = "float32"

    abilities: ClassVar[frozenset[Ability]] = frozenset({"gradient", "at", "objective", "outputs"})  # type: ignore[misc]

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
        if self.precision not in ("float32", "tf32", "bfloat16"):
            raise ConfigurationError(
                f"precision must be float32, tf32 or bfloat16, not {self.precision!r}"
            )
        self._check_device()
        if self.weights not in ("seeded", "given", "auto"):
            raise ConfigurationError(f"weights must be seeded or given, not {self.weights!r}")
        if any(
            isinstance(p, nn.parameter.UninitializedParameter) for p in self.module.parameters()
        ):
            raise ConfigurationError(
                "the module has lazy layers, whose shapes are not known yet; call it once on an "
                "example first"
            )
        if not any(p.requires_grad for p in self.module.parameters()):
            raise ConfigurationError("the module has no parameter that requires a gradient")
        if self.weights == "auto":
            self._check_fresh()
        # Refused here rather than in the middle of a round.
        _ = self._whole

    @cached_property
    def _whole(self) -> str:
        """Why the optimiser is given the parameters and not one flat vector; empty if it is not."""
        if self.optimizer is None:
            return ""
        with draws_from(Key(0)):
            return wants_parameters(self.optimizer, trained(self.module))

    def _check_fresh(self) -> None:
        """Raise where drawing the weights from the seed would throw away those that are there."""
        if not self.module.training:
            reason = "the module is in eval mode, as pretrained ones are"
        else:
            with draws_from(Key(0)):
                reason = not_fresh(self.module)
            reason = reason and f"the module has weights that its layers do not draw: {reason}"
        if reason:
            raise ConfigurationError(
                f"{reason}; say weights='given' to start from its own parameters, or "
                "weights='seeded' to draw them from the run's seed, by each layer's "
                "reset_parameters()"
            )

    def _check_device(self) -> None:
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigurationError(
                f"device {self.device!r} cannot be used here: {reason}"
            ) from error

    @property
    def plain_sgd(self) -> bool:  # type: ignore[override]
        return self.optimizer is None

    def __getstate__(self) -> dict[str, Any]:
        """What it was made of; what it has found out or keeps at hand stays here."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def forks_safely(self) -> bool:
        return self.device == "cpu"

    @property
    def tolerance(self) -> float:
        return 1e-3 if self.precision == "float32" else 0.1

    @cached_property
    def _resident(self) -> Resident:
        return Resident(self.module, torch.device(self.device))

    @cached_property
    def _loss(self) -> Loss:
        return loss_of(self.loss)

    @property
    def layout(self) -> Layout:
        return self._resident.layout

    @cached_property
    def _settings(self) -> Settings:
        device = torch.device(self.device)
        return Settings(
            self._loss, self.lr, self.optimizer, self.max_gradient_norm, device, self.precision,
            graphs=device.type == "cuda" and ignored(self._loss) is None,
        )  # fmt: skip

    def lowering(self, examples: Examples) -> Lowering:
        """How the module is run, found out once, on a few of these examples."""
        if "_lowering" not in self.__dict__:
            with PROCESS:
                self.__dict__.setdefault("_lowering", self._lower(examples))
        return self.__dict__["_lowering"]  # type: ignore[no-any-return]

    def _lower(self, examples: Examples) -> Lowering:
        if self._whole:
            return Lowering(None, None, self._whole)
        resting = sorted(still(self.module))
        if resting:
            return Lowering(None, None, f"{resting[0]} stays in eval mode while others train")
        if isinstance(examples.x, dict):
            return Lowering(
                None, None, f"the inputs have names ({', '.join(examples.x)}), and a program of "
                "layers takes one"
            )  # fmt: skip
        together, alone, reason = checked(self.module, self.layout, self._loss, examples)
        return Lowering(together, alone, reason)

    def stacks(self, examples: Examples) -> str:
        lowering = self.lowering(examples)
        return "" if lowering.together is not None else lowering.reason

    def prefers_stacks(self, examples: Examples) -> bool:
        together = self.lowering(examples).together
        # Small kernels are what an accelerator waits for, whatever the layers.
        return together is not None and (together.dense or self.device != "cpu")

    def activation_bytes(self, examples: Examples) -> int:
        together = self.lowering(examples).together
        batch = self.batch_size or len(examples)
        return 0 if together is None else together.bytes_per_row * batch

    def threads_safely(self, examples: Examples) -> bool:
        lowering = self.lowering(examples)
        return lowering.alone is not None and not lowering.alone.draws and self.device == "cpu"

    def use_threads(self, count: int) -> int:
        before = torch.get_num_threads()
        if before != count:
            torch.set_num_threads(count)
        return before

    def explain(self, examples: Examples) -> tuple[tuple[str, str, str], ...]:
        lowering = self.lowering(examples)
        program = lowering.together or lowering.alone
        if program is not None:
            return tuple((row.layer, row.kind, row.how) for row in program.rows)
        kind = type(self.module).__name__
        return (("", kind, f"whole, by autograd, one client at a time: {lowering.reason}"),)

    def train(
        self,
        model: Vectors,
        examples: Examples,
        assignment: Assignment,
        correction: Correction | At | None = None,
        objective: Objective | None = None,
    ) -> LocalResult:
        program = self.lowering(examples).alone
        if program is None:
            return super().train(model, examples, assignment, correction, self._ours(objective))
        return self._train(
            program, model, [examples], [assignment], correction, objective, single=True
        )

    def _ours(self, objective: Objective | None) -> Objective | None:
        """The objective with tensors of this learner's device."""
        if objective is None:
            return None
        device = torch.device(self.device)
        return Objective(
            objective.loss,
            tuple(as_tensor(vector, device) for vector in objective.beside),
            {name: numbers(value, device) for name, value in objective.given.items()},
        )

    def gradient(
        self, model: Vectors, examples: Examples, key: Key, chunk: int = 1024
    ) -> tuple[Array, Vectors]:
        program = self.lowering(examples).alone
        if program is None:
            return super().gradient(model, examples, key, chunk)
        cut = self._cut(len(examples), chunk)
        shares = self._shares(examples, cut)
        return gradient_of(program, self.layout, self._settings, model, examples, key, cut, shares)

    def train_cohort(
        self,
        model: Vectors,
        examples: Sequence[Examples],
        assignments: Sequence[Assignment],
        correction: Correction | At | None = None,
        objective: Objective | None = None,
    ) -> LocalResult:
        program = self.lowering(examples[0]).together
        if program is None:
            raise ConfigurationError(f"the module cannot be stacked: {self.stacks(examples[0])}")
        return self._train(
            program, model, examples, assignments, correction, objective, single=False
        )

    def _train(
        self,
        program: Program,
        model: Vectors,
        examples: Sequence[Examples],
        assignments: Sequence[Assignment],
        correction: Correction | At | None,
        objective: Objective | None,
        *,
        single: bool,
    ) -> LocalResult:
        steps = self._asked(examples, assignments)
        return train_cohort(
            program, self.layout, self._settings, model, examples, assignments, steps, self._epoch,
            correction, objective, single=single,
        )  # fmt: skip

    def init(self, key: Key) -> Vectors:
        if self.weights == "given":
            return Resident(self.module).model()
        with draws_from(key):
            return Resident(redrawn(self.module)).model()

    def fixed(self) -> str:
        return self._digest(everything=self.weights == "given")

    def frozen(self) -> str:
        return self._digest(everything=False)

    def _digest(self, *, everything: bool) -> str:
        """Digest of the module's weights, or of those alone that do not travel."""
        tensors = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        if not everything:
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
        check_loss(self.loss, data)
        x, y = tried(data)
        outputs = self._try_out(data, x, y)
        if not isinstance(outputs, Tensor):
            raise DataError(
                f"the module gives {type(outputs).__name__}, not a tensor; wrap it so that it "
                "returns its outputs alone"
            )
        given = outputs.shape[0] if outputs.ndim else 1
        if given != len(y):
            raise DataError(
                f"the module gives {given} rows of outputs for {len(y)} examples; it must give one "
                "for each, e.g. [B, T, V] for tokens and not [B * T, V]"
            )
        check_outputs(self.loss, outputs.shape[1:], data)
        self._try_smallest(data, x, y)
        shown = outputs.detach().float().numpy()
        check_mean(self.loss, self.batch_loss, shown, y, data)
        check_scale(self.loss, self.batch_loss, shown, y, data, last_function(outputs))

    def _try_out(self, data: FederatedData, x: Any, y: NDArray[Any]) -> Any:
        """The outputs for a few examples, through module and loss."""
        module = copy.deepcopy(self.module).eval()
        try:
            with draws_from(Key(0)):
                outputs = called(module, of_each(x, torch.from_numpy))
            if isinstance(outputs, Tensor) and (outputs.ndim == 0 or len(outputs) == len(y)):
                loss = self._loss(outputs.detach(), torch.from_numpy(y))
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    raise DataError(
                        f"the loss gives {list(getattr(loss, 'shape', []))} for {len(y)} examples; "
                        "it must be one number, their mean: leave reduction='none' out"
                    )
            return outputs
        except DataError:
            raise
        except Exception as error:
            whole = isinstance(data.x, np.ndarray) and "torch.FloatTensor instead" in str(error)
            advice = (
                ". Inputs of one array are float32: begin the module with x.long(), or give whole "
                "numbers as an input by name, which stay int64"
            )
            raise DataError(
                f"the module does not fit {data.name}, whose inputs have shape "
                f"{shape_text(data.shape)}: {error}{advice if whole else ''}"
            ) from error

    def _try_smallest(self, data: FederatedData, x: Any, y: NDArray[Any]) -> None:
        """Raise `DataError` if the module cannot train on the shortest batch that will come."""
        size = self._smallest_to_come(data)
        if size >= len(y):
            return
        module = Resident(self.module).module
        few = of_each(x, lambda column: torch.tensor(column[:size]))
        try:
            with draws_from(Key(0)):
                outputs = called(module, few)
                loss = self._loss(outputs, torch.from_numpy(y[:size]))
            if loss.numel() != 1:
                raise ValueError(f"the loss has shape {list(loss.shape)}")
        except Exception as error:
            raise DataError(
                f"some clients' last batch has {size} of batch_size={self.batch_size} examples, "
                f"and the module cannot train on so few: {error}. Leave it out with "
                "drop_last=True, choose another batch_size, or mend the module (squeeze(-1) "
                "instead of squeeze(), a recurrent state of the batch's own size)"
            ) from error

    @contextmanager
    def descend(self, model: Vectors, examples: Examples, key: Key) -> Iterator[ResidentDescent]:
        resident = self._resident
        with draws_from(key):
            resident.load(model)
            resident.train()
            yield ResidentDescent(
                resident, self._loss, self.optimizer, examples, whole=bool(self._whole)
            )

    def norm(self, vector: Tensor) -> float:
        return float(torch.linalg.vector_norm(vector))

    def evaluate(self, model: Vectors, examples: Examples, task: Task, classes: int | None) -> Sums:
        return self.evaluate_each(model, [examples], task, classes)[0]

    def evaluate_each(
        self, model: Vectors, parts: Sequence[Examples], task: Task, classes: int | None
    ) -> list[Sums]:
        if any(vector.ndim > 1 for vector in model.values()):
            return super().evaluate_each(model, parts, task, classes)
        if len(parts) > 1 and self._mixes_when_evaluated:
            return [self.evaluate(model, part, task, classes) for part in parts]
        whole, kind = joined(parts), task_of(task)
        with self._outputs(model, whole) as outputs_of:

            def sums_of(outputs: Tensor, y: NDArray[Any]) -> Sums:
                shown = outputs.cpu().float().numpy()
                return self.sums(shown, y, self._loss_of(outputs, y), kind, classes)

            return sums_of_parts(parts, self._evaluated_at_once(whole), outputs_of, sums_of)

    def outputs(self, model: Vectors, examples: Examples) -> NDArray[Any]:
        with self._outputs(model, examples) as outputs_of:
            parts = pieces(examples, self._evaluated_at_once(examples))
            return np.concatenate([outputs_of(x).cpu().float().numpy() for x, _ in parts])

    def mean_loss(self, model: Vectors, examples: Examples) -> float:
        with self._outputs(model, examples) as outputs_of:
            return mean_over(
                examples,
                self._evaluated_at_once(examples),
                lambda x, y: self._loss_of(outputs_of(x), y),
                partial(weight, self.loss),
            )

    def batch_loss(self, outputs: NDArray[Any], y: NDArray[Any]) -> float:
        with torch.no_grad():
            return float(self._loss(torch.from_numpy(outputs), torch.from_numpy(y)))

    def _loss_of(self, outputs: Tensor, y: NDArray[Any]) -> float:
        return float(self._loss(outputs, torch.from_numpy(y).to(outputs.device)))

    @cached_property
    def _mixes_when_evaluated(self) -> bool:
        """Whether outputs depend on what else is evaluated: batch statistics without a memory."""
        norms = (nn.modules.batchnorm._NormBase,)
        return any(
            isinstance(part, norms) and part.running_mean is None for part in self.module.modules()
        )

    def _evaluated_at_once(self, examples: Examples) -> int:
        """Examples in a batch of an evaluation, so that activations stay within the caches."""
        if examples.y.ndim > 1 and examples.y.dtype.kind in "iu":
            return TOKENS_AT_ONCE
        convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in self.module.modules())
        return 128 if convolves else 1024

    @contextmanager
    def _outputs(self, model: Vectors, examples: Examples) -> Iterator[Callable[[Any], Tensor]]:
        """A function from inputs to the outputs of this model, as in evaluation."""

        def outputs_of(x: Any) -> Tensor:
            # A copy: the first layer of some modules writes into its inputs.
            outputs = run(of_each(x, lambda column: torch.tensor(column, device=self.device)))
            # A module that squeezes, on one example.
            return outputs.unsqueeze(0) if outputs.ndim == 0 else outputs

        with torch.no_grad(), draws_from(Key(0)):
            run = self._run(model, examples)
            yield outputs_of

    def _run(self, model: Vectors, examples: Examples) -> Callable[[Any], Tensor]:
        """The module or its program with the weights of this model."""
        program = self.lowering(examples).alone
        if program is None:
            self._resident.load(model)
            return partial(called, self._resident.module.eval())
        held = weights_of(self.layout, model, self._settings.device)

        def run(x: Tensor) -> Tensor:
            tape = Tape(1, held, held, rule=None)
            return program.run(tape, tape.input(x)).data

        return run

    def vectors_of(self, source: Any) -> Vectors:
        """As in `Learner`, also from a module like the learner's and from its state dict."""
        if is_vectors(source):
            return copied(self.layout, source)
        tensors = tensors_of(self.module, source)
        if tensors is None:
            return super().vectors_of(source)
        own = {entry.name for entry in self.layout.entries}
        arrays = {n: array_of(value) if n in own else value for n, value in tensors.items()}
        return packed(self.layout, arrays, what(source), set(named(self.module)))

    def load_into(self, model: Vectors, target: Any) -> Any:
        """As in `Learner`, also into a module like the learner's: what is frozen stays."""
        tensors = None if isinstance(target, dict) else tensors_of(self.module, target)
        if tensors is None:
            return super().load_into(model, target)
        fits(self.layout, tensors, what(target), set(named(self.module)))
        with torch.no_grad():
            for name, array in self.layout.unpack(copied(self.layout, model)).items():
                tensors[name].copy_(torch.from_numpy(array))
        return target

    def export_onnx(self, model: Vectors, path: Path, shape: tuple[int, ...]) -> None:
        """Write a model with its program; see `atoll.learners.torch.onnx`."""
        from atoll.learners.torch.onnx import export_onnx

        arrays = self.layout.unpack(copied(self.layout, model))
        export_onnx(self.module, arrays, path, shape)

    def asarray(self, vector: NDArray[Any]) -> Array:
        return torch.from_numpy(vector).to(self.device)

    def fold(self, rows: Array, scales: Sequence[float]) -> tuple[NDArray[Any], int] | None:
        return fold(rows, scales)

    def asnumpy(self, array: Array) -> NDArray[Any]:
        if isinstance(array, np.ndarray):
            return array
        return array.detach().cpu().numpy()  # type: ignore[no-any-return]
