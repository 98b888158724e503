"""Layers for a cohort: how each kind runs forward, and what it leaves on the tape for later."""

from atoll.learners.torch.stacking.layers.attention import attention
from atoll.learners.torch.stacking.layers.convolution import convolution
from atoll.learners.torch.stacking.layers.dense import WIDE, linear
from atoll.learners.torch.stacking.layers.lookup import arithmetic, embedding, parameter
from atoll.learners.torch.stacking.layers.norms import batch_norm, normalize
from atoll.learners.torch.stacking.layers.opaque import Apart, module_for_each
from atoll.learners.torch.stacking.layers.pointwise import (
    activation,
    dropout,
    max_pool,
    relu,
    reshape,
)

__all__ = [
    "WIDE",
    "Apart",
    "activation",
    "arithmetic",
    "attention",
    "batch_norm",
    "convolution",
    "dropout",
    "embedding",
    "linear",
    "max_pool",
    "module_for_each",
    "normalize",
    "parameter",
    "relu",
    "reshape",
]
