"""PerLayer: what the stage would do to each slice by itself, and nothing else."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from atoll import algorithms
from atoll.aggregation import Clip, Mean, PerLayer, Sampling, Schema, Spec, Stage
from atoll.aggregation.pipeline import bind
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.core.vectors import Layout
from atoll.errors import ConfigurationError, UpdateRefused

SHAPES = {"body.weight": (4, 3), "body.bias": (3,), "head.weight": (3, 2), "head.bias": (2,)}
SHARED = Layout.of({name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()})
#: Where each array lies, by hand: 12 + 3 + 6 + 2 values.
WHERE = {"body": np.arange(15), "head": np.arange(15, 23), "bias": np.r_[12:15, 21:23]}


def bound(pipeline, **vectors):
    schema = Schema.of({"delta": 23, **vectors})
    return bind(pipeline, schema, SHARED, Sampling())


def delta(seed=0):
    return np.random.default_rng(seed).normal(size=23).astype(np.float32)


def there_and_back(pipeline, update, memory=None):
    told = pipeline.broadcast(pipeline.init())
    memory = pipeline.remember() if memory is None else memory
    message, memory = pipeline.encode(update, told, memory, Key(0), Key(1))
    return pipeline.decode(message, told), message, memory


@dataclass(frozen=True)
class Rounding(Stage):
    """Sends whole multiples of `unit` as int8 and remembers what that left out."""

    unit: float

    def sends(self, schema):
        return replace(
            schema, vectors={name: Spec(s.shape, "int8") for name, s in schema.vectors.items()}
        )

    def remember(self, schema):
        return {name: spec.zeros() for name, spec in schema.vectors.items()}

    def encode(self, update, told, memory, key):
        whole = {name: vector + memory[name] for name, vector in update.vectors.items()}
        sent = {name: np.rint(v / self.unit).astype(np.int8) for name, v in whole.items()}
        left = {name: v - np.float32(self.unit) * sent[name] for name, v in whole.items()}
        return replace(update, vectors=sent), left

    def decode(self, update, schema):
        return replace(
            update,
            vectors={n: np.float32(self.unit) * v for n, v in update.vectors.items()},
        )


def test_each_layer_is_sent_as_by_its_own_stage():
    """Three rounds of rounding with error feedback, each slice against the same by hand."""
    pipeline = bound(PerLayer(("*.bias", Rounding(0.5)), ("body.*", Rounding(0.25))) >> Mean())
    # The first pattern that matches decides: biases of the body are biases.
    slices = {0.5: WHERE["bias"], 0.25: np.arange(12)}
    kept = {unit: np.zeros(len(at), np.float32) for unit, at in slices.items()}
    memory = pipeline.remember()
    for seed in range(3):
        given = delta(seed)
        expected = given.copy()
        for unit, at in slices.items():
            whole = given[at] + kept[unit]
            expected[at] = unit * np.rint(whole / unit)
            kept[unit] = whole - expected[at]
        found, message, memory = there_and_back(pipeline, Update({"delta": given}), memory)
        np.testing.assert_array_equal(found.vectors["delta"], expected)
        assert found.vectors["delta"].dtype == np.float32
        kinds = sorted((v.dtype.name, v.size) for v in message.vectors.values())
        assert kinds == [("float32", 6), ("int8", 5), ("int8", 12)]


def test_clipping_by_layer_is_clipping_each_slice():
    pipeline = bound(PerLayer(("body.*", Clip(1.0)), ("head.*", Clip(0.1))) >> Mean())
    given = 3 * delta()
    found, message, _ = there_and_back(pipeline, Update({"delta": given}))
    for name, norm in (("body", 1.0), ("head", 0.1)):
        piece = given[WHERE[name]].astype(float)
        np.testing.assert_allclose(
            found.vectors["delta"][WHERE[name]], norm * piece / np.linalg.norm(piece), rtol=1e-6
        )
    # A server refuses what no honest client sends, layer by layer.
    for name in message.vectors:
        wild = {**message.vectors, name: 2 * message.vectors[name]}
        with pytest.raises(UpdateRefused, match="updates are clipped to"):
            pipeline.decode(replace(message, vectors=wild), {})


def test_other_vectors_go_on_as_they_are():
    pipeline = bound(PerLayer(("*", Rounding(0.5))) >> Mean(), counts=Spec((5,), "int64"))
    counts = np.arange(5)
    found, message, _ = there_and_back(pipeline, Update({"delta": delta(), "counts": counts}))
    np.testing.assert_array_equal(found.vectors["counts"], counts)
    assert message.vectors["counts"].dtype == np.int64
    np.testing.assert_array_equal(found.vectors["delta"], 0.5 * np.rint(delta() / 0.5))


def test_all_vectors_of_the_models_length_are_cut():
    pipeline = bound(PerLayer(("head.*", Rounding(0.5))) >> Mean(), control=23)
    given = {"delta": delta(1), "control": delta(2)}
    found, _, _ = there_and_back(pipeline, Update(given))
    for name, vector in given.items():
        expected = vector.copy()
        expected[WHERE["head"]] = 0.5 * np.rint(vector[WHERE["head"]] / 0.5)
        np.testing.assert_array_equal(found.vectors[name], expected)


def test_a_federation_with_per_layer_stages_is_one_with_the_same_slices(blobs, federation):
    """Clipping every layer to more than it has changes no byte; to less, it does."""
    names = [entry.name for entry in federation.learner.layout.entries]
    plain = federation.simulate(blobs, engine="sequential")
    wide, narrow = (
        replace(
            federation, pipeline=PerLayer(*[(name, Clip(norm)) for name in names]) >> Mean()
        ).simulate(blobs, engine="sequential")
        for norm in (1e6, 1e-3)
    )
    assert wide.model["params"].tobytes() == plain.model["params"].tobytes()
    assert np.abs(narrow.model["params"] - plain.model["params"]).max() > 1e-3
    # Six rounds of at most 1e-3 a layer.
    first = federation.learner.init(Key(0).fold("init"))["params"]
    for entry in federation.learner.layout.entries:
        moved = (narrow.model["params"] - first)[entry.slice].astype(float)
        assert np.linalg.norm(moved) <= 6e-3 * (1 + 1e-6)


def test_what_cannot_be_cut_is_refused(federation):
    for make, message in (
        (lambda: PerLayer(("*", Mean())), "stands by itself"),
        (lambda: PerLayer(Clip(1.0)), "pairs of a pattern and a stage"),
        (lambda: replace(federation, pipeline=PerLayer(("conv*", Clip(1.0))) >> Mean()), "conv"),
        (
            lambda: replace(
                federation,
                algorithm=algorithms.Scaffold(),
                pipeline=PerLayer(("*", Clip(1.0))) >> Mean(),
            ),
            "say which",
        ),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make()


class Counted(Stage):
    """Counts its rounds at the server, and tells clients."""

    def init(self, schema):
        return {"rounds": np.zeros(1, np.int64)}

    def broadcast(self, state):
        return dict(state)

    def release(self, aggregate, state, key):
        return aggregate, {"rounds": state["rounds"] + 1}


def test_server_halves_run_by_layer_too():
    pipeline = bound(PerLayer(("body.*", Counted())) >> Mean())
    state = pipeline.init()
    for _ in range(2):
        accumulator = pipeline.open()
        accumulator.add(Update({"delta": delta()}), ("a", 1))
        aggregate = pipeline.close(accumulator, 1, state, Key(0))
        aggregate, state = pipeline.release(aggregate, state, Key(0), Key(1))
    assert [int(v[0]) for tree in state.values() for v in tree.values()] == [2]


class Hiding(Stage):
    hides_metrics = True


def test_a_stage_that_hides_figures_hides_them_by_layer_too():
    schema = Schema.of({"delta": 23}, metrics={"train_loss": (0.0, 9.0)})
    pipeline = bind(PerLayer(("body.*", Hiding())) >> Mean(), schema, SHARED, Sampling())
    update = Update({"delta": delta()}, metrics={"train_loss": 0.7})
    assert pipeline.encode(update, {}, {}, Key(0), Key(1))[0].metrics == {}


def test_a_vector_that_is_left_out_may_be_cut():
    pipeline = bound(
        PerLayer(("body.*", Rounding(0.5))) >> Mean(), control=Spec((23,), optional=True)
    )
    update = Update({"delta": delta()}, shares={"control": 0.0})
    found, _, _ = there_and_back(pipeline, update)
    assert set(found.vectors) == {"delta"} and found.shares == {"control": 0.0}


@dataclass(frozen=True)
class Half(Stage):
    """Sends halves."""

    def encode(self, update, told, memory, key):
        halves = {name: vector / 2 for name, vector in update.vectors.items()}
        return replace(update, vectors=halves), memory

    def decode(self, update, schema):
        whole = {name: vector * 2 for name, vector in update.vectors.items()}
        return replace(update, vectors=whole)


@pytest.mark.parametrize("shares", [{"delta.0": 0.0, "delta.1": 0.5}, {"delta.0": 0.0}])
def test_an_array_of_which_a_part_is_missing_is_refused(shares):
    schema = Schema.of({"delta": Spec((23,), optional=True)})
    pipeline = bind(PerLayer(("body.*", Half())) >> Mean(), schema, SHARED, Sampling())
    message, _ = pipeline.encode(Update({"delta": delta()}, 1.0), {}, {}, Key(0), Key(1))
    assert set(message.vectors) == {"delta.0", "delta.1"}
    pipeline.decode(message, {})
    part = replace(message, vectors={"delta.1": message.vectors["delta.1"]}, shares=shares)
    with pytest.raises(UpdateRefused, match="parts"):
        pipeline.decode(part, {})
