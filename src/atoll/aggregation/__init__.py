"""Aggregation: what happens to updates between the clients and the server's step."""

from atoll.aggregation.clip import Clip
from atoll.aggregation.mean import Mean
from atoll.aggregation.pipeline import Pipeline
from atoll.aggregation.stage import Accumulator, Reducer, Schema, Stage

__all__ = ["Accumulator", "Clip", "Mean", "Pipeline", "Reducer", "Schema", "Stage"]
