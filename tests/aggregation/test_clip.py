"""Clip: its bound holds after rounding, and what it clips is said."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from atoll import algorithms, schedules
from atoll.aggregation import Clip, Mean, Sampling, Schema, Spec, Stage
from atoll.aggregation.pipeline import bind
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import Layout
from atoll.errors import ConfigurationError
from atoll.learners import NumpyLearner
from atoll.simulation import Sequential


def test_clipping_several_vectors_must_be_said(federation):
    federation = replace(federation, algorithm=algorithms.Scaffold())
    with pytest.raises(ConfigurationError, match=r"delta and control; say which"):
        replace(federation, pipeline=Clip(1.0) >> Mean())
    with pytest.raises(ConfigurationError, match="no 'deltas' to clip"):
        replace(federation, pipeline=Clip(1.0, only=("deltas",)) >> Mean())
    replace(federation, pipeline=Clip(1.0, only=("delta", "control")) >> Mean())


@dataclass(frozen=True)
class Seen(Stage):
    """Lets every update pass, and keeps the change that passed."""

    passed: list

    def encode(self, update, told, memory, key):
        self.passed.append(update.vectors["delta"].astype(np.float64))
        return update, memory


@pytest.mark.parametrize("norm", [1.0, 0.3, 1e-3])
def test_clipped_norms_are_never_above_the_bound(blobs, federation, norm):
    """Not by a rounding either: a scale in float32 alone would leave some of them above."""
    passed = []
    run = replace(
        federation,
        learner=NumpyLearner(layers=(2, 3), lr=2.0, batch_size=5, epochs=3),
        pipeline=Clip(norm) >> Seen(passed) >> Mean(),
        schedule=schedules.Synchronous(rounds=50, cohort=8),
    ).simulate(blobs, engine=Sequential(workers=1))
    norms = np.array([np.linalg.norm(change) for change in passed])
    assert len(norms) >= 400
    assert norms.max() <= norm
    clipped = np.mean([record.measurements["clipped"] for record in run.history])
    assert clipped > 0.2
    # Those that were clipped come within six digits of the bound, and no others do.
    assert (norms > norm * (1 - 1e-6)).sum() == pytest.approx(clipped * 400, abs=0.5)


vectors = hnp.arrays(np.float32, 3, elements=st.floats(-1e4, 1e4, width=32))


@given(vectors, vectors, st.floats(0.01, 100))
def test_clip_bounds_the_norm_over_all_vectors_and_keeps_the_direction(one, other, norm):
    schema = Schema.of({"delta": 3, "control": 3})
    schema = replace(schema, statistics={"buffers": Spec((3,))})
    shared = Layout.of({"weight": np.zeros(3, np.float32)})
    pipeline = bind(Clip(norm, only=("delta", "control")) >> Mean(), schema, shared, Sampling())
    update = Update({"delta": one, "control": other}, statistics={"buffers": one * 100})
    clipped, _ = pipeline.encode(update, {}, {}, Key(0), Key(1))
    flat = np.concatenate([clipped.vectors["delta"], clipped.vectors["control"]]).astype(float)
    whole = np.concatenate([one, other]).astype(float)
    assert np.linalg.norm(flat) <= norm
    scale = min(1.0, norm / max(np.linalg.norm(whole), 1e-30))
    np.testing.assert_allclose(flat, scale * whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(clipped.statistics["buffers"], one * 100)
    assert clipped.metrics["clipped"] == (np.linalg.norm(whole) > norm)
    # An honest client is never refused.
    taken = pipeline.decode(clipped, {})
    assert taken.vectors["delta"].tobytes() == clipped.vectors["delta"].tobytes()


def test_clip_sees_rows_of_a_cohort_one_by_one():
    rows = np.full((2, 4), 3.0, np.float32)
    with pytest.raises(ConfigurationError, match="must be positive"):
        Clip(0.0)
    shared = Layout.of({"weight": np.zeros(4, np.float32)})
    pipeline = bind(Clip(1.0) >> Mean(), Schema.of({"delta": 4}), shared, Sampling())
    clipped = [
        pipeline.encode(Update({"delta": row}), {}, {}, Key(0), Key(1))[0].vectors["delta"]
        for row in rows
    ]
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=1), 1, rtol=1e-6)


def test_clipping_after_the_mean_is_refused(federation):
    with pytest.raises(ConfigurationError, match="stands before the reducer"):
        replace(federation, pipeline=Mean() >> Clip(1.0))
