"""The door: an update that is not what its schema says is refused, with a sentence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll import Federation, algorithms, schedules
from atoll.aggregation import Clip, Mean, Schema, Spec, Stage
from atoll.aggregation.validate import validate
from atoll.core.updates import Update
from atoll.errors import ConfigurationError, UpdateRefused
from atoll.learners import NumpyLearner
from atoll.rounds.messages import pack, unpack

SIZE = 3
SCHEMA = Schema.of({"delta": SIZE})


def good():
    return Update({"delta": np.zeros(SIZE, np.float32)}, 1.0)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (Update({"delta": np.array([0, np.nan, np.inf], np.float32)}), "2 values that are NaN"),
        (Update({"delta": np.zeros(SIZE + 1, np.float32)}), r"float32 \[3\] was asked for"),
        (Update({"delta": np.zeros((SIZE, 1), np.float32)}), r"float32 \[3, 1\]"),
        (Update({"delta": np.zeros(SIZE)}), "is float64"),
        (Update({}), "vectors are none, but delta were asked for"),
        (Update({"delta": np.zeros(SIZE, np.float32)}, 0.0), "weight is 0.0"),
        (Update({"delta": np.zeros(SIZE, np.float32)}, float("nan")), "weight is nan"),
        (Update({"delta": np.zeros(SIZE, np.float32)}, 1e300), "weight is 1e"),
        (Update({"delta": np.zeros(SIZE, np.float32)}, 1e-8), "so scale them"),
        (
            Update({"delta": np.zeros(SIZE, np.float32)}, statistics={"buffers": np.zeros(1)}),
            "statistics are buffers",
        ),
        (
            Update({"delta": np.zeros(SIZE, np.float32)}, metrics={str(i): 0.0 for i in range(99)}),
            "reports a metric '0'; metrics are none",
        ),
    ],
)
def test_the_door_refuses_with_a_reason(update, message):
    validate(good(), SCHEMA)
    with pytest.raises(UpdateRefused, match=message):
        validate(update, SCHEMA)


OPTIONAL = Schema.of({"delta": SIZE, "head": Spec((2,), optional=True)})


def shared(share, *, head=True):
    vectors = {"delta": np.zeros(SIZE, np.float32)}
    if head:
        vectors["head"] = np.ones(2, np.float32)
    return Update(vectors, shares=share)


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (shared({}, head=False), "vectors are delta, but delta, head were asked for"),
        (shared({"head": 0.0}), "has share 0, and is there all the same"),
        (shared({"head": 0.5}, head=False), "vectors are delta"),
        (shared({"head": 1.5}), "is 1.5, which is not from 0 to 1"),
        (shared({"head": -0.5}), "not from 0 to 1"),
        (shared({"head": float("nan")}), "not from 0 to 1"),
        (shared({"delta": 0.5}), "'delta' may not be left out, or count for less"),
        (shared({"other": 1.0}), "'other' may not"),
    ],
)
def test_shares_are_of_what_may_be_left_out(update, message):
    for whole in (shared({}), shared({"head": 0.25}), shared({"head": 0.0}, head=False)):
        validate(whole, OPTIONAL)
    with pytest.raises(UpdateRefused, match=message):
        validate(update, OPTIONAL)


def plan(pipeline, **algorithm):
    return Federation(
        learner=NumpyLearner(layers=(2, 3)),
        algorithm=algorithms.FedAvg(**algorithm),
        schedule=schedules.Synchronous(rounds=1),
        pipeline=pipeline,
    )


CLIPPED = plan(Clip(1.0) >> Mean(), weighting="uniform")


def sent(length=1.0, weight=1.0, **metrics):
    """What an honest client sends to a federation that clips to 1, or a client that is not."""
    delta = np.zeros(9, np.float32)
    delta[4] = length
    plain = {"train_loss": 0.5, "steps": 3.0, "seen": 30.0, "update_norm": length, "clipped": 0.0}
    return Update({"delta": delta}, weight, metrics={**plain, **metrics})


def test_a_server_that_clips_takes_what_is_within_its_bound():
    found = CLIPPED.stages.decode(sent(), {})
    assert np.linalg.norm(found.vectors["delta"]) == 1 and found.weight == 1
    # Training that diverges says so in its loss; that is no reason to refuse it.
    assert CLIPPED.stages.decode(sent(train_loss=float("nan")), {}).weight == 1


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (sent(490.0), "has norm 490, but updates are clipped to 1"),
        (sent(1.001), "has norm 1.001"),
        (sent(float("inf")), "NaN or infinite"),
        (sent(weight=2.0**40), "but here every update has weight 1"),
        (sent(490.0, 2.0**40), "weight"),
        (sent(weight=1 / 2), "weight is 0.5"),
        (sent(clipped=2.0), "'clipped' is 2, which is not from 0 to 1"),
        (sent(steps=-1.0), "'steps' is -1"),
        (sent(update_norm=-3.0), "'update_norm' is -3"),
        (sent(age=61.0), "reports a metric 'age'"),
        (Update({"delta": np.zeros(9)}), "float64"),
        (Update({"delta": np.zeros(10, np.float32)}), r"float32 \[10\]"),
        (Update({"theta": np.zeros(9, np.float32)}), "vectors are theta, but delta were asked for"),
        (Update({"delta": np.zeros(9, np.float32), "more": np.zeros(9, np.float32)}), "more"),
        (Update({}), "vectors are none"),
        (Update({}, shares={"delta": 0.0}), "may not be left out"),
    ],
)
def test_a_server_that_clips_trusts_no_client(update, message):
    with pytest.raises(UpdateRefused, match=message):
        CLIPPED.stages.decode(update, {})


def test_the_heaviest_weight_can_be_said():
    weighted = plan(Mean(heaviest=100))
    weighted.stages.decode(Update({"delta": np.zeros(9, np.float32)}, 100.0), {})
    with pytest.raises(UpdateRefused, match="weight is 101.0, which is not a number from .* 100"):
        weighted.stages.decode(Update({"delta": np.zeros(9, np.float32)}, 101.0), {})
    with pytest.raises(ConfigurationError, match="these are uniform"):
        plan(Mean(heaviest=100), weighting="uniform")


class Fragile(Stage):
    """Fails where the first value says so, as a decoder may that reads offsets from a message."""

    def decode(self, update, schema):
        errors = [ValueError("a\nb"), IndexError(9), ZeroDivisionError(), KeyError("x"),
                  MemoryError(), OverflowError(), TypeError("t"), AssertionError(), StopIteration(),
                  RecursionError(), np.exceptions.AxisError(3, 1)]  # fmt: skip
        number = int(update.vectors["delta"][0])
        if number:
            raise errors[number - 1]
        return update


@pytest.mark.parametrize("number", range(1, 12))
def test_whatever_a_stage_raises_refuses_the_update(number):
    stages = plan(Fragile() >> Mean()).stages
    stages.decode(Update({"delta": np.zeros(9, np.float32)}), {})
    with pytest.raises(UpdateRefused, match="^Fragile cannot read it") as refusal:
        stages.decode(Update({"delta": np.full(9, number, np.float32)}), {})
    assert "\n" not in str(refusal.value)


class Reshaping(Stage):
    """Gives back another shape than it was given."""

    def decode(self, update, schema):
        return Update({"delta": update.vectors["delta"][1:]}, update.weight)


def test_what_stages_make_of_a_message_is_looked_at_again():
    stages = plan(Reshaping() >> Mean()).stages
    with pytest.raises(UpdateRefused, match=r"float32 \[8\], but float32 \[9\] was asked for"):
        stages.decode(Update({"delta": np.zeros(9, np.float32)}), {})


HONEST = b"".join(pack(sent()))


@given(st.lists(st.tuples(st.integers(0, len(HONEST) - 1), st.integers(0, 255)), max_size=4))
def test_bytes_from_strangers_are_read_or_refused(changes):
    damaged = bytearray(HONEST)
    for place, value in changes:
        damaged[place] = value
    for data in (bytes(damaged), bytes(damaged[: changes[0][0]] if changes else damaged)):
        try:
            update = CLIPPED.stages.decode(unpack(data), {})
        except UpdateRefused:
            continue
        assert update.weight == 1
        assert np.linalg.norm(update.vectors["delta"].astype(float)) <= 1
