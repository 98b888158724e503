"""The tensors of people's own modules, under the names that a learner's module has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


@runtime_checkable
class Wrapper(Protocol):
    """A module around something of people's own, which goes by other names inside."""

    def tensors_of(self, source: Any) -> dict[str, Tensor] | None:
        """The tensors of something like what is wrapped, or of its state; None if it is not."""


def tensors_of(module: nn.Module, source: Any) -> dict[str, Tensor] | None:
    """Tensors by the names of `module`: of a module like it, or arrays by name; None for others.

    They are the source's own, so that what is written into them is there.
    """
    found = module.tensors_of(source) if isinstance(module, Wrapper) else None
    if found is not None:
        return found
    if isinstance(source, nn.Module):
        return named(source)
    if isinstance(source, Mapping):
        return by_name(source)
    return None


def by_name(source: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays of any kind as tensors."""
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
        for name, value in source.items()
    }


def named(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, what is tied by each of its names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def array_of(tensor: Tensor) -> NDArray[Any]:
    """A tensor in NumPy, where there is no bfloat16."""
    found = tensor.detach().cpu()
    array: NDArray[Any] = (found.float() if found.is_floating_point() else found).numpy()
    return array


def what(source: Any) -> str:
    """What a sentence calls a source."""
    kind = "state" if isinstance(source, Mapping) else type(source).__name__
    return f"the given {kind}"
