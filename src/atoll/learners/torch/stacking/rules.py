"""Rules: what is done with the gradients of a step, fused into their computation where possible.

A direction `gradient + a * w + c` under plain SGD is
`w <- (1 - lr * a) * w - lr * gradient - lr * c`, so the product that makes a dense layer's gradient
can go straight into the weights. Heavy-ball momentum takes it into the velocity. Anything else gets
the gradient itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from atoll.learners.base import Affine, At, Correction
from atoll.learners.torch.optimizers import OptimizerFactory, over_vector
from atoll.learners.torch.stacking.stack import Stack

#: The gradient of a step's batch at other parameters, as an `At` is given it.
Elsewhere = Callable[[Tensor], Tensor]


class Factors:
    """One client's dense weights under plain SGD as base - lr * left^T right, not multiplied out.

    Where few rows meet many weights this saves writing all weights in every step: products with
    them go through the shared base and the few factors, and they are made once, at the end.
    """

    def __init__(self, base: Tensor, rows: int, lr: float) -> None:
        outputs, inputs = base.shape
        self.base, self.lr, self.count = base, lr, 0
        self.left, self.right = base.new_empty(rows, outputs), base.new_empty(rows, inputs)

    def add(self, left: Tensor, right: Tensor) -> None:
        """Step along left^T right; `left` is [B, O], `right` [B, I]."""
        end = self.count + len(left)
        self.left[self.count : end], self.right[self.count : end] = left, right
        self.count = end

    def correct_forward(self, out: Tensor, rows: Tensor) -> None:
        """From rows @ base^T to rows @ weights^T."""
        if self.count:
            shares = rows @ self.right[: self.count].t()
            out.addmm_(shares, self.left[: self.count], alpha=-self.lr)

    def correct_back(self, out: Tensor, gradient: Tensor) -> None:
        """From gradient @ base to gradient @ weights."""
        if self.count:
            shares = gradient @ self.left[: self.count].t()
            out.addmm_(shares, self.right[: self.count], alpha=-self.lr)

    def settle(self, weights: Tensor) -> None:
        """Write the weights out."""
        left, right = self.left[: self.count], self.right[: self.count]
        torch.addmm(self.base, left.t(), right, alpha=-self.lr, out=weights)


class StackRule(ABC):
    """A step over a stack of parameters whose first `active` clients are still at work."""

    #: Where gradients go, and the factors of what was there and of the gradient.
    into: Stack
    beta: float
    alpha: float

    def __init__(self, params: Stack) -> None:
        self.params = params
        self._seen: set[str] = set()
        self._betas: dict[str, float] = {}

    def begin(self, active: int) -> None:
        """Before a step of the first `active` clients."""
        self.active = active
        self._views = self.into.first(active)
        self._seen.clear()

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        target, beta = self._views[name], self._beta(name)
        if len(target) == 1:
            target[0].addmm_(left[0], right[0], beta=beta, alpha=self.alpha)
        else:
            target.baddbmm_(left, right, beta=beta, alpha=self.alpha)

    def add(self, name: str, gradient: Tensor) -> None:
        self._into(self._views[name], gradient, self._beta(name))

    def add_one(self, name: str, client: int, gradient: Tensor) -> None:
        if client == 0:
            self._betas[name] = self._beta(name)
        self._into(self._views[name][client], gradient, self._betas[name])

    def _into(self, target: Tensor, gradient: Tensor, beta: float) -> None:
        if beta == 0:
            target.copy_(gradient).mul_(self.alpha)
        elif beta == 1:
            target.add_(gradient, alpha=self.alpha)
        else:
            target.mul_(beta).add_(gradient, alpha=self.alpha)

    def _beta(self, name: str) -> float:
        """The factor for the first gradient of an entry; later ones (tied weights) only add."""
        if name in self._seen:
            return 1.0
        self._seen.add(name)
        return self.beta

    @abstractmethod
    def finish(self, lr: float, at: Elsewhere | None = None) -> None:
        """After the backward pass: complete the step; `at` is there for a correction that asks."""


class Descend(StackRule):
    """Plain SGD along an affine direction: products go into the weights themselves."""

    def __init__(self, params: Stack, scale: float, constant: Stack | None, lr: float) -> None:
        super().__init__(params)
        self.into, self.alpha, self.beta = params, -lr, 1 - lr * scale
        self.constant = constant

    @property
    def plain(self) -> bool:
        """Whether the direction is the gradient alone."""
        return self.beta == 1 and self.constant is None

    def finish(self, lr: float, at: Elsewhere | None = None) -> None:
        if self.constant is not None:
            self.params.flat.add_(self.constant.flat, alpha=-lr)


class HeavyBall(StackRule):
    """SGD with momentum: v <- m * v + direction, w <- w - lr * v."""

    def __init__(
        self, params: Stack, momentum: float, scale: float, constant: Stack | None
    ) -> None:
        super().__init__(params)
        self.into, self.alpha, self.beta = params.alike(), 1.0, momentum
        self.into.flat.zero_()
        self.scale, self.constant = scale, constant

    def finish(self, lr: float, at: Elsewhere | None = None) -> None:
        velocity = self.into.flat
        if self.scale:
            velocity.add_(self.params.flat, alpha=self.scale)
        if self.constant is not None:
            velocity.add_(self.constant.flat)
        self.params.flat.add_(velocity, alpha=-lr)


class Gather(StackRule):
    """Any rule: the gradient is written out, corrected, and handed to the optimiser."""

    def __init__(
        self,
        params: Stack,
        optimizer: torch.optim.Optimizer | None,
        correction: Correction | At | None,
        max_norm: float | None,
        single: bool,
    ) -> None:
        super().__init__(params)
        self.into, self.alpha, self.beta = params.alike(), 1.0, 0.0
        self.optimizer, self.max_norm, self.single = optimizer, max_norm, single
        self.correction = correction
        self._constant = None
        if isinstance(correction, Affine) and correction.constant is not None:
            self._constant = constant_stack(params, correction.constant)

    def gradient(self) -> Tensor:
        """The gradient of the step, in the order of the stack; zero where none was made."""
        for name, view in self._views.items():
            if name not in self._seen:
                view.zero_()
        return self.into.flat

    def rows(self) -> Tensor:
        """The gradient within the largest norm, [P] or [C, P]; zero for who has finished."""
        self.gradient()
        if self.max_norm is not None:
            self._clip(self.max_norm)
        self._still()
        return self._own(self.into)

    def _own(self, stack: Stack) -> Tensor:
        """A stack as corrections see it."""
        rows = stack.rows()
        return rows[0] if self.single else rows

    def _still(self) -> None:
        """Let nothing move the clients that have finished."""
        if self.active < self.into.clients:
            for view in self.into.views.values():
                view[self.active :] = 0

    def finish(self, lr: float, at: Elsewhere | None = None) -> None:
        if self.correction is None or isinstance(self.correction, Affine):
            self._affine(self.correction or Affine())
        else:
            self._correct(self.correction, at)
        if self.optimizer is None:
            self.params.flat.add_(self.into.flat, alpha=-lr)
            return
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = self.into.flat
        self.optimizer.step()

    def _affine(self, correction: Affine) -> None:
        self.gradient()
        if self.max_norm is not None:
            self._clip(self.max_norm)
        if correction.scale:
            self.into.flat.add_(self.params.flat, alpha=correction.scale)
        if self._constant is not None:
            self.into.flat.add_(self._constant.flat)

    def _correct(self, correction: Correction | At, at: Elsewhere | None) -> None:
        gradient, params = self.rows(), self._own(self.params)
        if isinstance(correction, At):
            assert at is not None
            direction = correction.rule(gradient, params, at)
        else:
            direction = correction(gradient, params)
        self.into.load(direction)
        self._still()

    def _clip(self, limit: float) -> None:
        squares = torch.stack(
            [view.reshape(len(view), -1).square().sum(1) for view in self.into.views.values()]
        )
        scale = (limit / squares.sum(0).sqrt().clamp_min(1e-12)).clamp_max(1.0)
        for view in self.into.views.values():
            view.mul_(scale.view(-1, *[1] * (view.ndim - 1)))


def constant_stack(params: Stack, constant: Tensor) -> Stack:
    """A correction's constant, [P] or [C, P], in the order of the stack."""
    stack = params.alike()
    stack.load(constant)
    return stack


def rule_for(
    params: Stack,
    factory: OptimizerFactory | None,
    correction: Correction | At | None,
    max_norm: float | None,
    lr: float,
    *,
    single: bool,
    complete: bool,
) -> StackRule:
    """The cheapest rule that is right.

    `complete` says that every entry gets exactly one gradient in each step, which fused rules
    stand on; `single` that corrections see vectors [P] rather than [C, P].
    """
    scale, constant = 0.0, None
    affine = correction is None or isinstance(correction, Affine)
    if isinstance(correction, Affine):
        scale, constant = correction.scale, correction.constant
    optimizer = None if factory is None else over_vector(factory, params.flat, lr)
    if affine and complete and max_norm is None:
        if optimizer is None:
            held = None if constant is None else constant_stack(params, constant)
            return Descend(params, scale, held, lr)
        group = optimizer.param_groups[0]
        plain = type(optimizer) is torch.optim.SGD and not (
            group["nesterov"] or group["dampening"] or group["maximize"]
        )
        if plain:
            held = None if constant is None else constant_stack(params, constant)
            scale += group["weight_decay"]
            if group["momentum"]:
                return HeavyBall(params, group["momentum"], scale, held)
            return Descend(params, scale, held, lr)
    return Gather(params, optimizer, correction, max_norm, single)
