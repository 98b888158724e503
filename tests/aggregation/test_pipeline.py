"""The pipeline: client halves forward, server halves back, states and memories apart."""

import numpy as np
import pytest

from atoll.aggregation import Clip, Mean, Sampling, Schema, Stage
from atoll.aggregation.pipeline import bind
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import Layout
from atoll.errors import ConfigurationError

SCHEMA = Schema.of({"delta": 3})
SHARED = Layout.of({"weight": np.zeros(3, np.float32)})


def bound(pipeline, schema=SCHEMA):
    return bind(pipeline, schema, SHARED, Sampling())


class Doubling(Stage):
    """Doubles on the client, halves on the server, counts at both."""

    def init(self, schema):
        return {"rounds": np.zeros(1, np.int64)}

    def broadcast(self, state):
        return {"factor": np.array([2.0], np.float32)}

    def remember(self, schema):
        return {"turns": np.zeros(1, np.int64)}

    def encode(self, update, told, memory, key):
        doubled = {name: told["factor"] * v for name, v in update.vectors.items()}
        return Update(doubled, update.weight), {"turns": memory["turns"] + 1}

    def decode(self, update, schema):
        return Update({name: v / 2 for name, v in update.vectors.items()}, update.weight)

    def release(self, aggregate, state, key):
        return aggregate, {"rounds": state["rounds"] + 1}


def test_stages_run_forward_on_the_client_and_back_on_the_server():
    pipeline = bound(Clip(1.0) >> Doubling() >> Doubling() >> Mean())
    state, memory = pipeline.init(), pipeline.remember()
    told = pipeline.broadcast(state)
    update = Update({"delta": np.array([3.0, 0, 4.0], np.float32)})
    message, memory = pipeline.encode(update, told, memory, Key(0), Key(1))
    np.testing.assert_allclose(message.vectors["delta"], [2.4, 0, 3.2], rtol=1e-6)
    assert memory == {"1": {"turns": [1]}, "2": {"turns": [1]}}
    decoded = pipeline.decode(message, told)
    np.testing.assert_allclose(decoded.vectors["delta"], [0.6, 0, 0.8], rtol=1e-6)
    accumulator = pipeline.open()
    accumulator.add(decoded, ("a", 1))
    aggregate = pipeline.close(accumulator, 1, state, Key(0))
    np.testing.assert_allclose(aggregate["delta"], [0.6, 0, 0.8], rtol=1e-6)
    _, state = pipeline.release(aggregate, state, Key(0), Key(1))
    assert state == {"1": {"rounds": [1]}, "2": {"rounds": [1]}}


def test_pipelines_need_exactly_one_reducer():
    with pytest.raises(ConfigurationError, match="exactly one stage"):
        bound(Clip(1.0))
    with pytest.raises(ConfigurationError, match="has 2"):
        bound(Mean() >> Mean())


class Hiding(Stage):
    hides_metrics = True


class Told(Stage):
    """Says, at the server, which of what clients were told its verify is given."""

    def __init__(self):
        self.heard = []

    def broadcast(self, state):
        return {"bound": np.array([3.0], np.float32)}

    def verify(self, update, told):
        self.heard.append(float(told["bound"][0]))
        return update


def test_servers_verify_by_what_clients_were_told():
    stage = Told()
    pipeline = bound(Doubling() >> stage >> Mean())
    told = pipeline.broadcast(pipeline.init())
    pipeline.decode(Update({"delta": np.zeros(3, np.float32)}), told)
    assert stage.heard == [3.0]


@pytest.mark.parametrize(
    "pipeline", [Hiding() >> Clip(1.0) >> Mean(), Clip(1.0) >> Mean() >> Hiding()]
)
def test_no_figure_leaves_a_client_beside_a_stage_that_hides_them(pipeline):
    metrics = {"train_loss": (0.0, 9.0)}
    hidden = bound(pipeline, Schema.of({"delta": 3}, metrics=metrics))
    update = Update({"delta": np.ones(3, np.float32)}, metrics={"train_loss": 0.7})
    message, _ = hidden.encode(update, {}, {}, Key(0), Key(1))
    assert message.metrics == {}
    assert hidden.message.metrics == hidden.gathers.metrics == {}
    seen = bound(Clip(1.0) >> Mean(), Schema.of({"delta": 3}, metrics=metrics))
    assert set(seen.encode(update, {}, {}, Key(0), Key(1))[0].metrics) == {
        "train_loss", "update_norm", "clipped"
    }  # fmt: skip
