"""Clip: its bound holds after rounding, and what it clips is said."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from atoll import algorithms, schedules
from atoll.aggregation import Clip, Mean
from atoll.aggregation.stage import Stage
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
    assert clipped > 0.3
    # Those that were clipped come within six digits of the bound, and no others do.
    assert (norms > norm * (1 - 1e-6)).sum() == pytest.approx(clipped * 400, abs=0.5)
