"""Columns: the examples of a cohort as tensors, on the device that trains on them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atoll.data.examples import Examples, joined
from atoll.learners.batches import Batches


class Columns:
    """The examples of a cohort as tensors: rows of shared columns, or of joined ones."""

    def __init__(self, examples: Sequence[Examples], device: torch.device) -> None:
        whole = joined(examples)
        #: Whether these are the population's own columns, which stay where they are.
        self.shared = whole.x is examples[0].x
        assert not isinstance(whole.x, dict)
        self.x, self.y = on_device(whole.x, device), on_device(whole.y, device)
        self._starts = np.cumsum([0, *(len(each) for each in examples[:-1])])
        self._rows = whole.rows

    def index(self, plan: Batches, order: Sequence[int]) -> Tensor:
        """Rows [S, C, B] of the clients in this order."""
        places = (plan.positions + self._starts[:, None, None])[order].transpose(1, 0, 2)
        rows = places if self._rows is None else self._rows[places]
        return torch.from_numpy(np.ascontiguousarray(rows)).to(self.x.device)

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these rows."""
        flat = rows.reshape(-1)
        return self.x.index_select(0, flat), self.y.index_select(0, flat)


_resident: dict[tuple[int, str], Tensor] = {}


def on_device(column: NDArray[Any], device: torch.device) -> Tensor:
    """A column as a tensor; on an accelerator it stays there for as long as the column lives."""
    if device.type == "cpu":
        return torch.from_numpy(column)
    key = (id(column), str(device))
    if key not in _resident:
        _resident[key] = torch.from_numpy(column).to(device)
        weakref.finalize(column, _resident.pop, key, None)
    return _resident[key]
