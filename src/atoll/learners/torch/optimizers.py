"""Local optimisers: over one flat vector where that is the same, over the parameters elsewhere.

An optimiser that treats every number alone gives the same steps on a flat vector, on which cohorts
are trained at once. One that looks at shapes, norms or a closure is given the parameters.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from atoll.errors import ConfigurationError

#: `factory(parameters, lr=lr)` makes an optimiser.
OptimizerFactory = Callable[..., torch.optim.Optimizer]

#: Optimisers that treat every number alone, so that a flat vector of a cohort serves them.
ELEMENTWISE = {
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
    torch.optim.Rprop,
    torch.optim.ASGD,
}
#: Those of them that have a fused kernel on every device.
FUSED = {torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad}
#: What a factory calls its first argument if it wants pairs of names and parameters.
NAMED = "named_parameters"


def over_vector(factory: OptimizerFactory, flat: Tensor, lr: float = 1.0) -> torch.optim.Optimizer:
    """The optimiser of a flat vector, with torch's fused kernel where it has one."""
    optimizer = factory([nn.Parameter(flat, requires_grad=True)], lr=lr)
    if type(optimizer) in FUSED and optimizer.param_groups[0].get("fused") is None:
        group = optimizer.param_groups[0]
        if not (group.get("foreach") or group.get("differentiable") or group.get("capturable")):
            group["fused"] = True
    return optimizer


def over_parameters(
    factory: OptimizerFactory, parameters: Mapping[str, nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """The optimiser of a module's parameters, with their names if it asks for those."""
    given = list(parameters.items()) if _takes_names(factory) else list(parameters.values())
    return factory(given, lr=lr)


def wants_parameters(factory: OptimizerFactory, parameters: Mapping[str, nn.Parameter]) -> str:
    """Why an optimiser must be given the parameters; empty if a flat vector serves it.

    Raises `ConfigurationError` if it cannot be made for these, or not take a step.
    """
    zeros = {name: nn.Parameter(torch.zeros_like(p)) for name, p in parameters.items()}
    try:
        optimizer = over_parameters(factory, zeros, 0.01)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"it gives {type(optimizer).__name__}, not a torch optimiser")
        kind = type(optimizer)
        if kind in ELEMENTWISE and _all_alike(optimizer, zeros):
            return ""
        for parameter in zeros.values():
            parameter.grad = torch.zeros_like(parameter)
        step(optimizer, lambda: torch.zeros(()))
    except Exception as error:
        name = getattr(getattr(factory, "func", factory), "__name__", repr(factory))
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigurationError(
            f"optimizer {name} cannot train this module: {text[0]}. A function of "
            f"({NAMED}, lr) may put parameters into groups, or choose an optimiser for them"
        ) from error
    if kind in ELEMENTWISE:
        return f"{kind.__name__} has the parameters in groups"
    return f"{kind.__name__} may treat a vector as a whole, so clients cannot share one"


def step(optimizer: torch.optim.Optimizer, again: Callable[[], Tensor]) -> None:
    """Take a step; `again` sets the gradients and gives the loss, for who asks for a closure."""
    if _takes_closure(optimizer):
        optimizer.step(again)  # type: ignore[arg-type]
    else:
        optimizer.step()


def _all_alike(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> bool:
    """Whether all parameters are in one group."""
    groups = optimizer.param_groups
    return len(groups) == 1 and len(groups[0]["params"]) == len(parameters)


def _takes_closure(optimizer: torch.optim.Optimizer) -> bool:
    # What is called for the instance is wrapped by hooks; its class has the signature.
    found = inspect.signature(type(optimizer).step).parameters.get("closure")
    return found is not None and found.default is inspect.Parameter.empty


def _takes_names(factory: OptimizerFactory) -> bool:
    given: Sequence[object] = factory.args if isinstance(factory, partial) else ()
    plain = factory.func if isinstance(factory, partial) else factory
    try:
        names = list(inspect.signature(plain).parameters)
    except (TypeError, ValueError):
        return False
    return NAMED in names[len(given) : len(given) + 1]
