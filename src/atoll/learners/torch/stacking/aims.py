"""Aims: what a cohort's steps minimise, and what the loss of each step is shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atoll.core.vectors import Entry
from atoll.learners.base import Objective
from atoll.learners.torch.losses import Loss
from atoll.learners.torch.stacking.stack import Stack


@dataclass(frozen=True)
class Aim:
    """A loss, other parameters whose outputs it is shown, and what clients are given, [C, ...]."""

    loss: Callable[..., Tensor]
    beside: Sequence[Stack] = ()
    given: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        loss: Loss,
        objective: Objective | None,
        entries: Sequence[Entry],
        order: Sequence[int],
        device: torch.device,
        *,
        single: bool,
    ) -> Aim:
        """The learner's loss, or the objective for clients in this order."""
        if objective is None:
            return Aim(loss)
        beside = []
        for vector in objective.beside:
            stack = Stack(entries, len(order), device=device)
            stack.load(in_order(as_tensor(vector, device), order))
            beside.append(stack)
        given = {name: numbers(value, device) for name, value in objective.given.items()}
        if single:
            given = {name: value.unsqueeze(0) for name, value in given.items()}
        else:
            given = {name: value[list(order)] for name, value in given.items()}
        return Aim(objective.loss, beside, given)


def in_order(rows: Tensor, order: Sequence[int]) -> Tensor:
    """Rows [C, P] of clients in this order; a vector [P] is all of theirs."""
    return rows[list(order)] if rows.ndim == 2 else rows


def numbers(value: Any, device: torch.device) -> Tensor:
    """A copy of what an objective is given, as float32 where it is not whole."""
    found = as_tensor(value, device).clone()
    return found.float() if found.is_floating_point() else found


def as_tensor(value: Any, device: torch.device) -> Tensor:
    """Anyone's array or number as a tensor there."""
    # A copy of other people's: torch warns of arrays that are not to be written.
    found = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
    return found.to(device)
