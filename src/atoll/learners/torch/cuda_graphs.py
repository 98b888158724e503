"""Graphs: a local step recorded once on a CUDA device and replayed, without Python in between.

A step of a full cohort with full batches always has the same shape, so its kernels can be recorded
into a CUDA graph over tensors that stay where they are. What does not fit (ragged ends, dropout,
batch statistics, corrections of one round only) is run as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.learners.torch.stacking.rules import StackRule
from atoll.learners.torch.stacking.stack import Stack

#: Steps before recording, so that lazily made handles and kernels are there.
WARMING = 3


@dataclass
class Workspace:
    """Tensors that a recorded step reads and writes: parameters, rows to take, losses [C]."""

    params: Stack
    rule: StackRule
    rows: Tensor
    losses: Tensor
    replay: Callable[[], None]


def record(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The step as a CUDA graph; on another device the step itself.

    The step is run a few times first, so what it writes must be set again before it counts.
    """
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARMING):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
