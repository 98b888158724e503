"""Descriptions: plain, the same in every process, and different where meanings differ."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from atoll import algorithms, schedules
from atoll.aggregation import Clip, Mean
from atoll.algorithms import Algorithm
from atoll.data.examples import Examples
from atoll.learners import rates
from atoll.rounds.describe import describe, plan_digest


def test_descriptions_are_plain_and_stable(federation):
    plain = describe(
        {
            "rate": rates.Cosine(0.1, 10),
            "function": np.mean,
            "partial": partial(sorted, key=len),
            "array": np.arange(3),
            "set": {"b", "a"},
            "object": object(),
            "float": np.float64(2.5),
        }
    )
    assert json.loads(json.dumps(plain)) == plain
    assert plain["rate"] == {
        "kind": "atoll.learners.rates.Cosine", "initial": 0.1, "rounds": 10, "final": 0.0,
    }  # fmt: skip
    assert plain["set"] == ["a", "b"]
    assert "0x" not in str(plain)
    assert federation.describe()["learner"]["layout"]["params"] == 9


def test_functions_of_one_name_are_told_apart():
    assert describe(lambda a: 5 * a) != describe(lambda a: 6 * a)

    def scaled(by):
        return lambda a: by * a

    assert describe(scaled(2)) == describe(scaled(2)) != describe(scaled(3))


@pytest.mark.parametrize(
    "other",
    [
        {"private": ("0.bias",)},
        {"download": Clip(1.0)},
        {"public": Examples(np.zeros((3, 2), np.float32), np.zeros(3, np.int64))},
        {"pipeline": Clip(1.0) >> Mean()},
        {"algorithm": algorithms.FedAvg(weighting="uniform")},
    ],
)
def test_the_plans_digest_is_of_all_that_clients_must_agree_on(federation, other):
    assert plan_digest(federation) != plan_digest(replace(federation, **other))


def test_the_plans_digest_leaves_the_servers_own_affairs_out(federation):
    longer = replace(federation, schedule=schedules.Synchronous(rounds=60))
    assert plan_digest(longer) == plan_digest(federation)


def test_parts_of_a_plan_that_are_no_dataclasses_have_their_kind():
    class Bare(Algorithm):
        def init(self, start):
            return {}

        def work(self, client, got, mine):
            return None

        def step(self, state, mean, server):
            return state

    assert describe(Bare())["kind"].endswith("Bare")
