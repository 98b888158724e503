"""Aggregation: what happens to updates between the clients and the server's step."""

from atoll.aggregation.clip import Clip
from atoll.aggregation.conversation import Ask, Conversation, Heard, Talk
from atoll.aggregation.gathered import Gathered
from atoll.aggregation.mean import Mean
from atoll.aggregation.per_layer import PerLayer
from atoll.aggregation.schema import Schema, Spec
from atoll.aggregation.stage import (
    Accumulator,
    Pipeline,
    Reducer,
    Rows,
    Sampling,
    Setting,
    Stage,
)

__all__ = [
    "Accumulator",
    "Ask",
    "Clip",
    "Conversation",
    "Gathered",
    "Heard",
    "Mean",
    "PerLayer",
    "Pipeline",
    "Reducer",
    "Rows",
    "Sampling",
    "Schema",
    "Setting",
    "Spec",
    "Stage",
    "Talk",
]
