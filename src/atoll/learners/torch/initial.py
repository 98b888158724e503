"""Initial weights: whether a module's layers have just drawn them, and drawing them anew."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import nn

from atoll.errors import ConfigurationError
from atoll.learners.weights import sampled, unlike

#: So many draws of a parameter tell what its initialiser gives.
DRAWS = 4


def redrawn(module: nn.Module) -> nn.Module:
    """A copy whose trained parameters are drawn anew from torch's generator; the rest stays."""
    fresh = copy.deepcopy(module)
    _draw(fresh)
    return fresh


def not_fresh(module: nn.Module) -> str:
    """Why a module's weights cannot be ones that its layers have just drawn; empty if they can.

    Uses torch's generator. Raises `ConfigurationError` if its layers cannot draw them.
    """
    for name, buffer in module.named_buffers():
        if name.endswith("num_batches_tracked") and bool(buffer.any()):
            return f"{name} has counted {int(buffer.sum())} batches"
    other = copy.deepcopy(module)
    own = trained(module)
    before = {name: p._version for name, p in trained(other).items()}
    draws = []
    for number in range(DRAWS):
        _draw(other)
        now = trained(other)
        if number == 0:
            writes = {name: now[name]._version - version for name, version in before.items()}
        draws.append({name: sampled(p.detach().cpu().numpy()) for name, p in now.items()})
    for name, parameter in own.items():
        # One write of these is the mark of what nothing has drawn.
        if parameter._version > writes[name] - 1:
            return f"{name} was written after its layer had drawn it"
        given = sampled(parameter.detach().cpu().numpy())
        reason = unlike(given, [each[name] for each in draws])
        if reason:
            return f"{name} {reason}"
    return ""


def still(module: nn.Module) -> set[str]:
    """The parts that stay in eval mode in training.

    They are those in eval mode of a module that is not; and of one that is, as pretrained ones are,
    those whose parameters are all frozen.
    """
    return {
        name
        for name, part in module.named_modules()
        if name and not part.training and (module.training or _frozen(part))
    }


def _frozen(part: nn.Module) -> bool:
    """Whether it has parameters, none of which is trained."""
    parameters = list(part.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _draw(module: nn.Module) -> None:
    """Draw the trained parameters; a part that is frozen keeps its buffers too."""
    drawn, frozen = trained(module), [p for p in module.parameters() if not p.requires_grad]
    kept = [p.detach().clone() for p in frozen]
    resting = still(module)
    with torch.no_grad():
        # Whatever no `reset_parameters` reaches is still NaN afterwards.
        for parameter in drawn.values():
            parameter.fill_(math.nan)
        for name, part in _inner_first(module):
            renew = getattr(part, "reset_parameters", None) or getattr(
                part, "_reset_parameters", None
            )
            if callable(renew) and name not in resting and not _frozen(part):
                renew()
        for parameter, value in zip(frozen, kept, strict=True):
            parameter.copy_(value)
    stuck = [name for name, p in drawn.items() if bool(p.isnan().any())]
    if stuck:
        raise ConfigurationError(
            f"the initial value of {stuck[0]!r} cannot be drawn from the seed, because no "
            "reset_parameters() of its module sets it; give it one, or say weights='given' to "
            "start from the module's own parameters"
        )


def _inner_first(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every part after those it is made of, as constructors draw: the outer has the last word."""
    for name, part in module.named_children():
        yield from _inner_first(part, f"{prefix}{name}.")
    yield prefix.removesuffix("."), module
