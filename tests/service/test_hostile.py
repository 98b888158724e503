"""A hostile site over HTTP: whatever the plan forbids is refused, and the others go on without it.

Each update is refused with a sentence, counted and audited; the round closes with the mean of the
other two, which is worked out here by hand.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from attacker import Inner, error_of
from masks import Asking, Fragile, Masked, numbers

from atoll import Federation, algorithms, schedules
from atoll.aggregation import Clip, Mean, Spec, Stage
from atoll.core import safetensors
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.learners import NumpyLearner
from atoll.rounds.messages import pack

FOLDER = Path(__file__).parents[2] / "examples" / "what_falls_out"
NAMES = ("eve", "ann", "bob")


def plan_of(pipeline, algorithm=None, **more):
    return Federation(
        learner=NumpyLearner(layers=(4, 3), lr=0.1, batch_size=8),
        algorithm=algorithm or algorithms.FedAvg(weighting="uniform"),
        schedule=schedules.Synchronous(rounds=1, minimum=2, attempts=3, pause=0.0),
        pipeline=pipeline,
        **more,
    )


SIZE = NumpyLearner(layers=(4, 3)).layout.size


def filled(value, size=SIZE, dtype=np.float32):
    return np.full(size, value, dtype)


def raw(vectors, **about):
    """A message of these arrays under "vectors/", with any figures."""
    arrays = {f"vectors/{name}": vector for name, vector in vectors.items()}
    return b"".join(map(bytes, safetensors.encode(arrays, {"weight": "1.0", **about})))


def message(update):
    return b"".join(bytes(piece) for piece in pack(update))


@pytest.fixture
def serving(tmp_path):
    """Makes servers in this process, with their sites."""
    made = []

    def serve(plan, names=NAMES):
        served = Inner(tmp_path / str(len(made)), plan, sites=len(names))
        made.append(served)
        sites = {name: served.insider(name).open() for name in names}
        for site in sites.values():
            site.order()
        return served, sites

    yield serve
    for served in made:
        served.close()


def until_closed(served, rounds=1):
    end = time.monotonic() + 20
    while len(served.rows("versions")) <= rounds:
        assert time.monotonic() < end, "the round does not close"
        time.sleep(0.02)


def params(served):
    return served.model()["params"]


def first(plan):
    return plan.learner.init(Key(0).fold("init"))["params"]


def refused(served, site, order, data, word, exchange=0):
    """The answer is refused with this word, counted, and in the log."""
    before = served.refusals().get("malformed", 0)
    answer = site.upload(order["assignment"], data, exchange)
    assert answer.status == 422, (answer.status, answer.data)
    verdict = json.loads(answer.data)
    assert verdict["verdict"] == "malformed"
    assert word in verdict["reason"], verdict["reason"]
    assert served.refusals()["malformed"] == before + 1
    (line,) = [
        each for each in served.audit()
        if each["event"].endswith("malformed") and each["assignment"] == order["assignment"]
    ]  # fmt: skip
    assert line["actor"] == site.name and word in line["reason"]
    assert line["reason"].isprintable()
    # There is no second try.
    assert site.upload(order["assignment"], data, exchange).status == 410


def the_others_close(served, sites, own, expected):
    """The two others deliver; the model is what that comes to, and nothing stumbled."""
    for name, update in own.items():
        order = sites[name].assignment()
        assert sites[name].upload(order["assignment"], message(update)).status == 200
    until_closed(served)
    assert served.failed is None
    assert served.answered(500) == 0
    assert params(served).tobytes() == expected.tobytes()


def metric(name, value):
    return {f"metric/{name}": format(value, "+24.16e")}


def shares(**values):
    return {f"share/{name}": format(value, "+24.16e") for name, value in values.items()}


GOOD = filled(0.25)
#: Pipeline, what eve sends, and a word of the refusal. Ann sends 0.25 everywhere, and Bob 0.5 at
#: one place less, both within Clip(1.0): their norms are 0.25 * sqrt(15) = 0.968 and 0.935.
CLIPPED = {
    "norm 490": (raw({"delta": filled(490 / SIZE**0.5)}), "norm 490"),
    "norm 1.001": (raw({"delta": filled(1.001 / SIZE**0.5)}), "clipped to 1"),
    "weight 2^40": (raw({"delta": GOOD}, weight=str(2.0**40)), "every update has weight 1"),
    "weight 2": (raw({"delta": GOOD}, weight="2"), "every update has weight 1"),
    "weight 0.5": (raw({"delta": GOOD}, weight="0.5"), "every update has weight 1"),
    "weight inf": (raw({"delta": GOOD}, weight="inf"), "every update has weight 1"),
    "clipped beyond 1": (raw({"delta": GOOD}, **metric("clipped", 1.5)), "from 0 to 1"),
    "negative norm": (raw({"delta": GOOD}, **metric("update_norm", -1.0)), "from 0 to inf"),
    "negative steps": (raw({"delta": GOOD}, **metric("steps", -3.0)), "not from 0"),
    "unknown metric": (raw({"delta": GOOD}, **metric("patients", 12.0)), "'patients'"),
    "metric of no name": (raw({"delta": GOOD}, **metric("", 12.0)), "metrics are"),
    "float64": (raw({"delta": GOOD.astype(np.float64)}), "float64"),
    "int64": (raw({"delta": GOOD.astype(np.int64)}), "int64"),
    "longer": (raw({"delta": filled(0.1, SIZE + 1)}), "asked for"),
    "shorter": (raw({"delta": filled(0.1, SIZE - 1)}), "asked for"),
    "empty": (raw({"delta": filled(0.1, 0)}), "asked for"),
    "matrix": (raw({"delta": filled(0.1, (SIZE, 1))}), "asked for"),
    "other name": (raw({"params": GOOD}), "asked for"),
    "no array": (raw({}), "asked for"),
    "one array more": (raw({"delta": GOOD, "more": GOOD}), "asked for"),
    "a share": (raw({"delta": GOOD}, **shares(delta=0.5)), "may not be left out"),
    "left out": (raw({}, **shares(delta=0.0)), "may not be left out"),
    "a share of nothing": (raw({"delta": GOOD}, **shares(other=1.0)), "may not be left out"),
    "statistics": (
        b"".join(map(bytes, safetensors.encode(
            {"vectors/delta": GOOD, "statistics/buffers": GOOD}, {"weight": "1.0"}
        ))), "statistics",
    ),
    "not finite": (raw({"delta": filled(np.nan)}), "NaN"),
}  # fmt: skip


def mean_of(plan, *rows):
    """The first model and the mean of these, in float32."""
    mean = (sum(row.astype(np.float64) for row in rows) / len(rows)).astype(np.float32)
    return first(plan) + mean


def everything_refused(serving, plan, cases, own, expected):
    """A hostile site for each case, all in one round; it closes with what the others sent."""
    hostile = {f"eve {n:02}": case for n, case in enumerate(cases.values())}
    served, sites = serving(plan, (*hostile, "ann", "bob"))
    for name, (data, word) in hostile.items():
        refused(served, sites[name], sites[name].assignment(), data, word)
    the_others_close(served, sites, own, expected)
    store = served.rows("assignments")
    assert {row["site"] for row in store if row["state"] == "accepted"} == {"ann", "bob"}
    assert {row["site"] for row in store if row["state"] == "refused"} == set(hostile)


def test_what_clip_and_uniform_weights_forbid(serving):
    plan = plan_of(Clip(1.0) >> Mean())
    other = filled(0.25)
    other[0] = 0.0
    own = {"ann": Update({"delta": GOOD}), "bob": Update({"delta": other})}
    everything_refused(serving, plan, CLIPPED, own, mean_of(plan, GOOD, other))


def test_an_honest_update_at_the_bound_is_taken(serving):
    """Rounding may leave it a hair above."""
    plan = plan_of(Clip(1.0) >> Mean())
    served, sites = serving(plan)
    rows = {name: filled((1.0 + n * 1e-6) / SIZE**0.5) for n, name in enumerate(NAMES)}
    for name, row in rows.items():
        order, sent = sites[name].assignment(), message(Update({"delta": row}))
        assert sites[name].upload(order["assignment"], sent).status == 200
    until_closed(served)
    np.testing.assert_allclose(params(served), mean_of(plan, *rows.values()), atol=1e-6)


def test_nobody_is_heavier_than_the_heaviest(serving):
    plan = plan_of(Mean(heaviest=1000.0), algorithms.FedAvg())
    weights = [1000.5, 2.0**40, 0.0, -1.0, np.nan, np.inf, 2.0**-30]
    cases = {
        f"eve {n}": (raw({"delta": GOOD}, weight=str(weight)), "weight")
        for n, weight in enumerate(weights)
    }
    rows = {"ann": (filled(0.5), 1000.0), "bob": (filled(-0.25), 500.0)}
    own = {name: Update({"delta": row}, weight) for name, (row, weight) in rows.items()}
    # (1000 * 0.5 - 500 * 0.25) / 1500 = 0.25
    everything_refused(serving, plan, cases, own, first(plan) + filled(0.25))


def example(name):
    """A class of an example, without the example's own federation."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location(f"falls_out_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def places(*at):
    return np.array(at, np.uint32)


TOPK = {
    "beyond the end": (places(0, SIZE), "its places"),
    "far beyond": (places(0, 2**32 - 1), "its places"),
    "twice": (places(3, 3), "its places"),
    "backwards": (places(4, 2), "its places"),
    "signed": (np.array([0, 1], np.int32), "asked for"),
    "more": (places(0, 1, 2), "asked for"),
    "none": (places(), "asked for"),
}


def test_nonsense_for_topk_is_refused(serving):
    plan = plan_of(example("topk").TopK(2) >> Mean())
    cases = {
        name: (raw({"delta": filled(1.0, 2), "places": at}), word)
        for name, (at, word) in TOPK.items()
    }
    own = {
        "ann": Update({"delta": np.float32([1, 2]), "places": places(0, 14)}),
        "bob": Update({"delta": np.float32([-2, 4]), "places": places(0, 7)}),
    }
    expected = filled(0.0)
    expected[[0, 7, 14]] = -0.5, 2.0, 1.0
    everything_refused(serving, plan, cases, own, first(plan) + expected)


HUGE = np.finfo(np.float32).max
LEVELS = np.full(SIZE, 255, np.uint8)
QUANTIZED = {
    "not finite": ({"delta": LEVELS, "ends": np.float32([[0.0, np.inf]])}, "infinite"),
    "too many ends": ({"delta": LEVELS, "ends": np.zeros((2, 2), np.float32)}, "asked for"),
    "no ends": ({"delta": LEVELS}, "asked for"),
    "as they are": ({"delta": GOOD}, "asked for"),
}


def test_nonsense_for_quantize_is_refused(serving):
    plan = plan_of(example("quantize").Quantize() >> Mean())
    cases = {name: (raw(sent), word) for name, (sent, word) in QUANTIZED.items()}
    low = np.float32([[0.0, 0.5]])
    own = {
        name: Update({"delta": np.full(SIZE, each, np.uint8), "ends": low})
        for name, each in (("ann", 255), ("bob", 0))
    }
    everything_refused(serving, plan, cases, own, first(plan) + filled(0.25))


@pytest.mark.parametrize("ends", [[-HUGE, HUGE], [0.0, 490.0], [-3.0, -2.0]])
def test_no_ends_of_quantize_move_the_model_beyond_the_clip(serving, ends):
    plan = plan_of(Clip(1.0) >> example("quantize").Quantize() >> Mean())
    served, sites = serving(plan)
    for name in NAMES:
        order = sites[name].assignment()
        own = ends if name == "eve" else [0.0, 0.0]
        sent = {"delta": np.full(SIZE, 255, np.uint8), "ends": np.array([own], np.float32)}
        answer = sites[name].upload(order["assignment"], raw(sent))
        assert answer.status == 200 or (name == "eve" and answer.status == 422), answer.data
    until_closed(served)
    moved = np.linalg.norm((params(served) - first(plan)).astype(float))
    assert moved <= 1.0 / 3 * (1 + 1e-5)


class Breaking(Stage):
    """Its server half fails at what it does not expect."""

    def __repr__(self):
        return "Breaking()"

    def decode(self, update, schema):
        value = update.vectors["delta"][0]
        if value == 7:
            raise MemoryError("that much is not there")
        if value == 8:
            raise KeyError("\x1b[2J\nround 3 closed")
        if value == 9:
            raise RecursionError
        return update


def test_a_stage_that_breaks_refuses_the_update(serving, caplog):
    plan = plan_of(Breaking() >> Mean())
    words = {7: "MemoryError", 8: "KeyError", 9: "RecursionError"}
    cases = {f"eve {n}": (raw({"delta": filled(n)}), word) for n, word in words.items()}
    own = {name: Update({"delta": GOOD}) for name in ("ann", "bob")}
    everything_refused(serving, plan, cases, own, first(plan) + GOOD)
    assert not any("\x1b" in record.getMessage() for record in caplog.records)


def test_what_cannot_be_summed_costs_an_attempt_and_no_more(serving):
    """It is of its schema, and breaks what the reducer gathers in."""
    plan = plan_of(Fragile(questions=0))
    served, sites = serving(plan)
    order = sites["eve"].assignment()
    assert sites["eve"].upload(order["assignment"], raw({"delta": filled(1000)})).status == 200
    for name in ("ann", "bob"):
        mine = sites[name].assignment()
        sites[name].upload(mine["assignment"], message(Update({"delta": GOOD})))
    for name in NAMES:
        again = sites[name].assignment(f"1.0.{sorted(NAMES).index(name)}")
        sent = message(Update({"delta": GOOD}))
        assert sites[name].upload(again["assignment"], sent).status == 200
    until_closed(served)
    assert params(served).tobytes() == (first(plan) + GOOD).tobytes()
    (line,) = [each for each in served.audit() if each["event"] == "round abandoned"]
    assert "the answer of eve could not be summed (IndexError" in line["reason"]


# Rounds of several questions.


def echo(number, place):
    return message(Update({"echo": np.array([number, place])}))


def asked(serving, names):
    """A server that has had everybody's update, and asks on; the sites and their orders."""
    served, sites = serving(plan_of(Asking(questions=2)), names)
    for site in sites.values():
        order = site.assignment()
        assert site.upload(order["assignment"], message(Update({"delta": GOOD}))).status == 200
    return served, sites, {name: next_order(site, 1) for name, site in sites.items()}


@pytest.fixture
def asking(serving):
    return asked(serving, NAMES)


def next_order(site, exchange):
    end = time.monotonic() + 20
    while time.monotonic() < end:
        order = site.order(0.2)
        if order["kind"] == "train" and order["exchange"] == exchange:
            return order
    raise AssertionError(f"{site.name} was not asked question {exchange}: {order}")


def the_rest(served, sites, orders, names):
    """These answer what is left to be asked; whoever is asked, of those who are to be."""
    for exchange in (1, 2):
        among = sorted(orders) if exchange == 1 else sorted(names)
        for name in names:
            order = next_order(sites[name], exchange)
            sent = echo(exchange - 1, among.index(name))
            assert sites[name].upload(order["assignment"], sent, exchange).status == 200
    until_closed(served)
    assert served.failed is None and served.answered(500) == 0
    expected = first(served.plan) + GOOD
    assert params(served).tobytes() == expected.tobytes()


BAD_ANSWERS = {
    "an update": (message(Update({"delta": GOOD})), "asked for"),
    "floats": (raw({"echo": filled(1.0, 2)}), "asked for"),
    "more": (raw({"echo": np.array([0, 0, 0])}), "asked for"),
    "a metric": (raw({"echo": np.array([0, 0])}, **metric("loss", 1.0)), "metric"),
    "one more": (raw({"echo": np.array([0, 0]), "x": filled(1.0)}), "asked for"),
    "weight": (raw({"echo": np.array([0, 0])}, weight="nan"), "weight"),
    "garbage": (b"\0" * 100, "message"),
    "nothing": (raw({}), "asked for"),
}


def test_an_answer_of_another_schema_is_refused(serving):
    served, sites, orders = asked(serving, (*BAD_ANSWERS, "ann", "bob"))
    for name, (data, word) in BAD_ANSWERS.items():
        refused(served, sites[name], orders[name], data, word, 1)
    the_rest(served, sites, orders, ["ann", "bob"])
    # Their updates were taken before, and stay in the mean.
    assert {row["state"] for row in served.rows("assignments")} == {"accepted"}


@pytest.mark.parametrize("exchange", [0, 2, 3, 10**6, 2**48])
def test_an_answer_to_another_question_is_not_taken(asking, exchange):
    served, sites, orders = asking
    answer = sites["eve"].upload(orders["eve"]["assignment"], echo(0, 1), exchange)
    assert answer.status == 200 if exchange == 0 else answer.status == 410, answer.data
    verdict = json.loads(answer.data)
    assert verdict["verdict"] == ("duplicate" if exchange == 0 else "no longer needed")
    the_rest(served, sites, orders, NAMES)


def test_an_offer_of_an_exchange_that_is_none_is_refused(asking):
    served, sites, orders = asking
    for exchange in (-1, "1", 1.5, 2**49):
        body = {
            "assignment": orders["eve"]["assignment"], "size": 10, "sha256": "0" * 64,
            "exchange": exchange,
        }  # fmt: skip
        assert sites["eve"].ask("POST", "/v1/uploads", body).status == 400
    the_rest(served, sites, orders, NAMES)


def test_an_answer_that_was_begun_for_the_last_question_is_not_taken_for_this(asking):
    """It is offered for question 1, and its last byte comes when question 2 is open."""
    served, sites, orders = asking
    data = echo(0, 2)
    assignment, digest = orders["eve"]["assignment"], sha256(data).hexdigest()
    offered = sites["eve"].offer(assignment, len(data), digest, 1)
    target = offered.headers["Location"]
    assert sites["eve"].patch(target, 0, data[:-1]).status == 204
    for name, place in (("ann", 0), ("bob", 1)):
        sent = echo(0, place)
        assert sites[name].upload(orders[name]["assignment"], sent, 1).status == 200
    # Eve is waited for: she answers, now for good, and all go on.
    assert sites["eve"].patch(target, len(data) - 1, data[-1:]).status == 200
    again = sites["eve"].patch(target, len(data) - 1, data[-1:])
    assert again.status == 410
    for name in NAMES:
        order = next_order(sites[name], 2)
        sent = echo(1, sorted(NAMES).index(name))
        assert sites[name].upload(order["assignment"], sent, 2).status == 200
    until_closed(served)


def test_a_huge_answer_to_a_small_question_is_not_waited_for(asking):
    served, sites, orders = asking
    with served.refusing("upload", "eve"):
        answer = sites["eve"].offer(orders["eve"]["assignment"], 50_000_000, "0" * 64, 1)
    assert answer.status == 413
    the_rest(served, sites, orders, NAMES)


def test_nobody_reads_anothers_mail(asking):
    served, sites, orders = asking
    digests = {name: orders[name]["mail"] for name in NAMES}
    assert len(set(digests.values())) == 3
    for name in NAMES:
        for other, digest in digests.items():
            answer = sites[name].ask("GET", f"/v1/blobs/{digest}")
            assert answer.status == (200 if other == name else 404), (name, other)
            assert other == name or "no model" in error_of(answer)
    analyst, admin = served.insider("ana", "analyst").open(), served.insider("rut", "admin").open()
    for digest in (*digests.values(), orders["eve"]["told"]):
        assert analyst.ask("GET", f"/v1/blobs/{digest}").status == 404
        assert admin.ask("GET", f"/v1/blobs/{digest}").status == 404
    the_rest(served, sites, orders, NAMES)
    # When all is over, so is this.
    for name in NAMES:
        assert sites[name].ask("GET", f"/v1/blobs/{digests[name]}").status == 404


def test_who_is_not_asked_is_not_told(asking):
    """Eve has left the round; what the others are told next is not for her eyes."""
    served, sites, orders = asking
    failed = sites["eve"].ask(
        "POST", f"/v1/assignments/{orders['eve']['assignment']}/fail", {"reason": "no"}
    )
    assert failed.status == 204
    for name, place in (("ann", 0), ("bob", 1)):
        answer = sites[name].upload(orders[name]["assignment"], echo(0, place), 1)
        assert answer.status == 200
    order = next_order(sites["ann"], 2)
    assert sites["ann"].ask("GET", f"/v1/blobs/{order['told']}").status == 200
    assert sites["eve"].ask("GET", f"/v1/blobs/{order['told']}").status == 404
    for name, place in (("ann", 0), ("bob", 1)):
        mine = next_order(sites[name], 2)
        assert sites[name].upload(mine["assignment"], echo(1, place), 2).status == 200
    until_closed(served)
    assert params(served).tobytes() == (first(served.plan) + GOOD).tobytes()
    assert {row["state"] for row in served.rows("assignments")} == {"accepted"}


def test_nobody_answers_for_another(asking):
    served, sites, orders = asking
    with served.refusing("upload", "eve"):
        answer = sites["eve"].upload(orders["bob"]["assignment"], echo(0, 1), 1)
    assert answer.status == 403
    the_rest(served, sites, orders, NAMES)


def test_masks_and_a_liar(serving):
    """Who lies about masks spoils the sum, which whoever checks nothing cannot know; no crash."""
    plan = plan_of(Masked())
    served, sites = serving(plan)
    for exchange, size in ((0, None), (1, 3)):
        for name in NAMES:
            order = next_order(sites[name], exchange)
            key = {"key": np.array([5])} if size is None else {"sealed": np.arange(size)}
            sent = message(Update(key))
            assert sites[name].upload(order["assignment"], sent, exchange).status == 200
    for name in NAMES:
        order = next_order(sites[name], 2)
        least = np.full(SIZE, np.iinfo(np.int64).min)
        masked = {"masked": least if name == "eve" else np.zeros(SIZE, np.int64)}
        assert sites[name].upload(order["assignment"], message(Update(masked)), 2).status == 200
    for name in NAMES:
        order = next_order(sites[name], 3)
        told = {"given": np.full(3, -1), "got": np.full(3, -1)}
        assert sites[name].upload(order["assignment"], message(Update(told)), 3).status == 200
    until_closed(served)
    assert served.failed is None and served.answered(500) == 0


def test_numbers_are_whole():
    assert numbers(x=3).vectors["x"] == Spec((3,), "int64")
