"""A Keras model as a torch module, on Keras's torch backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import keras  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

from atoll.learners.keras.model import OfEach, Weights, architecture, copied, redrawn
from atoll.learners.torch import TorchLearner


class OnTorch(nn.Module):
    """A module whose parameters and buffers are the Keras model's weights, by stable names."""

    keras: Any
    weights: Weights

    def __init__(self, model: Any) -> None:
        super().__init__()
        # Hidden from torch, which would find the weights a second time.
        self.__dict__["keras"] = model
        self.__dict__["weights"] = weights = Weights.of(model)
        for name, variable in {**weights.trained, **weights.frozen}.items():
            # As a parameter it would be trained whatever Keras says.
            variable.value.requires_grad_(name in weights.trained)
            self.register_parameter(name, variable.value)
        for name, variable in weights.averaged.items():
            self.register_buffer(name, variable.value.data)

    def __repr__(self) -> str:
        return f"keras {type(self.keras).__name__} {architecture(self.keras)}"

    def tensors_of(self, source: Any) -> dict[str, Tensor] | None:
        """The weights of a Keras model like this one."""
        return weights_of(source) if isinstance(source, keras.Model) else None

    def __deepcopy__(self, memo: object) -> OnTorch:
        return OnTorch(copied(self.keras)).train(self.training)

    def __reduce__(self) -> tuple[Any, ...]:
        return OnTorch, (self.keras,)

    def reset_parameters(self) -> None:
        """Draw the trained weights from torch's generator, by the model's own initialisers."""
        seed = int(torch.randint(2**31, ()))
        state = torch.get_rng_state()
        fresh = Weights.of(redrawn(self.keras, seed))
        torch.set_rng_state(state)
        with torch.no_grad():
            for name in self.weights.trained:
                getattr(self, name).copy_(fresh.trained[name].value)

    def forward(self, *single: Tensor, **named: Tensor) -> Tensor:
        for stream in self.weights.streams if self.training else ():
            stream.assign(torch.randint(2**31, stream.shape))
        return cast(Tensor, self.keras(single[0] if single else named, training=self.training))


def weights_of(model: Any) -> dict[str, Tensor]:
    """Every weight of a Keras model by its stable name."""
    found = Weights.of(model)
    return {
        name: variable.value
        for group in (found.trained, found.frozen, found.averaged)
        for name, variable in group.items()
    }


def learner_of(
    model: Any, loss: Any, weights: Literal["seeded", "given"], settings: Mapping[str, Any]
) -> TorchLearner:
    """The learner of a Keras model."""
    chosen = loss if isinstance(loss, str) else MeanOf(OfEach(loss))
    return TorchLearner(OnTorch(copied(model)), loss=chosen, weights=weights, **settings)


@dataclass(frozen=True)
class MeanOf:
    """The mean over a batch of a loss of each example."""

    each: OfEach

    @property
    def ignore_index(self) -> int | None:
        return self.each.ignore_index

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        each = cast(Tensor, self.each(outputs, targets))
        if self.ignore_index is None:
            return each.mean()
        weights = (targets != self.ignore_index).reshape(len(each), -1).sum(1)
        return (each * weights).sum() / weights.sum().clamp_min(1)
