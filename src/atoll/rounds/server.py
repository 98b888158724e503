"""The server's side of a round in vectors: broadcast, receive, aggregate, step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from atoll.aggregation.conversation import Ask, Conversation, Heard, Talk
from atoll.algorithms.algorithm import Gather, Start
from atoll.algorithms.client import Client, Holder
from atoll.core import room
from atoll.core.random import Key
from atoll.core.updates import Aggregate, Sender
from atoll.core.vectors import Tree, Vector, Vectors, describe_names, flatten, nest
from atoll.data.examples import Examples
from atoll.errors import CheckpointError, ConfigurationError, RunError
from atoll.learners.base import Assignment
from atoll.rounds.plan import Plan


@dataclass
class Server:
    """The state of a federation's model between rounds.

    `state` is the algorithm's, `statistics` are the shared buffers and counters, `stages` is the
    pipeline's; `blank` is what clients' private parts begin from, a function of the seed. None of
    them is changed in place: each round makes new ones.

    Args:
        plan: what all parties agree on.
        key: of every draw that everyone may know.
        secret: of those draws that nobody else may know, such as the noise of privacy; None, in a
            simulation, takes them from `key` as well.
        initial: the whole model to start from; None asks the learner.
    """

    plan: Plan
    key: Key
    secret: Key | None = field(default=None, repr=False)
    initial: Vectors | None = None
    state: Vectors = field(init=False)
    statistics: Vectors = field(init=False)
    stages: Tree = field(init=False)
    blank: Vectors = field(init=False)

    def __post_init__(self) -> None:
        plan = self.plan
        model = self.initial or plan.learner.init(self.key.fold("init"))
        plan.learner.layout.check(model)
        shared, self.blank = plan.split.parts(model)
        params = shared.pop("params", np.zeros(0, np.float32))
        start = Start(params, plan.learner, plan.split.shared, self.key.fold("init"))
        self.state = _checked(plan.algorithm.init(start))
        self.statistics = shared
        self.stages = plan.stages.init()
        self.initial = None

    def model(self) -> Vectors:
        """The current model; empty where the algorithm has no one model."""
        params = self.plan.algorithm.model(self.state)
        if params is None:
            return {}
        return self.plan.split.merged({"params": params, **self.statistics}, self.blank)

    def broadcast(self, version: int) -> Tree:
        """What every client of a round receives, by whose it is; `version` is rounds so far."""
        told = self.plan.algorithm.broadcast(self.state)
        tree: Tree = {"algorithm": told, "statistics": self.statistics}
        tree["stages"] = self.plan.stages.broadcast(self.stages)
        downward = self.plan.downward
        if downward is not None:
            whole = {name: vector for name, vector in told.items() if downward.fits(vector)}
            key = self.key.fold("download", version)
            tree["algorithm"] = {name: v for name, v in told.items() if name not in whole}
            tree["download"] = downward.encode(whole, key)
        return {name: part for name, part in tree.items() if part}

    def talk(
        self, round: int, members: Sequence[Sender], population: int, attempt: int = 0
    ) -> Conversation:
        """A round with these members, question by question; see `conversation`.

        What a secret reducer draws is drawn anew in each attempt, whose members are others.
        """
        key = self._public(round)
        if self.plan.stages.reducer.secret:
            key = self._key(round, "").fold("attempt", attempt)
        algorithm = self.plan.algorithm
        if not algorithm.several:
            return self.plan.stages.talk(members, population, self.stages, key)
        own = Talk(tuple(members), population, self.state, self._public(round).fold("talk"))
        return self._of_algorithm(own, key)

    def _of_algorithm(self, talk: Talk, key: Key) -> Conversation:
        """The algorithm's questions, and the pipeline's where clients are to work."""
        questions = self.plan.algorithm.talk(self.state, talk)
        members: Sequence[Sender] = talk.members
        answer: Heard | Aggregate | None = None
        gathered = 0
        while True:
            try:
                question = questions.send(answer)
            except StopIteration as stop:
                aggregate: Aggregate = stop.value
                return aggregate
            except Exception as error:
                name = type(error).__name__
                raise RunError(f"{self.plan.algorithm!r} failed: {name}: {error}") from error
            if gathered and self.plan.stages.covers:
                raise RunError(
                    f"{self.plan.algorithm!r} asks on after it has gathered, and could tell "
                    "clients the aggregate before a stage of the pipeline has covered it; let it "
                    "gather last, or leave out the secret stage"
                )
            if isinstance(question, Ask):
                heard = yield replace(question, owner="algorithm")
                members, answer = heard.senders, heard
            else:
                own = key.fold("gather", gathered) if gathered else key
                answer = yield from self._gather(question, members, talk.population, own)
                gathered += 1

    def _gather(
        self, gather: Gather, members: Sequence[Sender], population: int, key: Key
    ) -> Conversation:
        """The pipeline's conversation with those who are to work."""
        whom = tuple(members) if gather.whom is None else gather.whom
        talk = self.plan.stages.talk(whom, population, self.stages, key)
        ask = next(talk)
        first: tuple[Sender, ...] | None = whom
        while True:
            heard = yield replace(ask, given=gather.told, whom=ask.whom or first)
            first = None
            try:
                ask = talk.send(heard)
            except StopIteration as stop:
                aggregate: Aggregate = stop.value
                return aggregate

    def close(
        self,
        round: int,
        aggregate: Aggregate,
        pulled: tuple[float, Vector] | None = None,
        digest: str = "",
    ) -> dict[str, float]:
        """Step to the next model; returns the round's measurements.

        `pulled` is the discount of a single update and the parameters that it began from: the
        model is then moved towards the client's own (see `schedules.Schedule.pull`). `digest` is of
        the updates that were accepted: what is drawn in secret must never be drawn again for
        others.
        """
        if pulled is not None:
            discount, began = pulled
            drift = np.float32(discount) * (began - self.state["params"])
            vectors = {**aggregate.vectors, "delta": aggregate["delta"] + drift}
            aggregate = replace(aggregate, vectors=vectors)
        public = self._public(round)
        aggregate, self.stages = self.plan.stages.release(
            aggregate, self.stages, public, self._key(round, digest)
        )
        if self.statistics.keys() - aggregate.statistics.keys():
            raise RunError(
                f"{self.plan.stages.reducer!r} made no mean of the model's "
                f"{describe_names(self.statistics)}; its aggregate must hold it in `statistics`"
            )
        self.state, measured = self._stepped(aggregate, self._public_client(round))
        self.statistics = {
            name: _moved(vector, aggregate.statistics[name])
            for name, vector in self.statistics.items()
        }
        return {**aggregate.measurements, **measured}

    def _stepped(self, aggregate: Aggregate, public: Client) -> tuple[Vectors, Mapping[str, float]]:
        """The algorithm's next state, and what it measured; large ones are stepped in pieces."""
        algorithm, size = self.plan.algorithm, self.plan.split.shared.size
        flat = {*map(np.shape, (*self.state.values(), *aggregate.vectors.values()))} == {(size,)}
        if 4 * size < room.LARGE or not flat or not algorithm.elementwise:
            found = algorithm.step(self.state, aggregate, public)
            stepped, measured = found if isinstance(found, tuple) else (found, {})
            return _alike(stepped, self.state), measured
        places = self._places(aggregate)
        for start, stop in room.pieces(size, 4):
            before = _cut(self.state, start, stop)
            mean = replace(
                aggregate,
                vectors=_cut(aggregate.vectors, start, stop),
                sums=_cut(aggregate.sums, start, stop),
            )
            after = algorithm.step(before, mean, public)
            assert not isinstance(after, tuple), f"{algorithm!r} is elementwise, and measures"
            made = {
                # What is kept of the mean lies where another vector is about to go.
                name: vector.copy() if _shared(vector, places) else vector
                for name, vector in _alike(after, before).items()
            }
            for name, vector in made.items():
                places[name][start:stop] = vector
                room.rest(places[name], start, stop)
                room.rest(self.state[name], start, stop)
        return places, {}

    def _places(self, aggregate: Aggregate) -> Vectors:
        """Where the next state goes: over the mean, a piece of which is not needed any more."""
        kept = flatten(self.stages).values()
        free = [
            vector
            for vector in aggregate.vectors.values()
            if vector.flags.writeable and not any(np.may_share_memory(vector, v) for v in kept)
        ]
        places: Vectors = {}
        for name, vector in self.state.items():
            if free and free[-1].dtype == vector.dtype:
                places[name] = free.pop()
            else:
                places[name] = room.zeros(len(vector), vector.dtype)
        return places

    def vectors(self) -> Vectors:
        """Everything that `restore` needs."""
        return flatten(
            {"state": self.state, "statistics": self.statistics, "stages": self.stages}
            | {"blank": self.blank}
        )

    def restore(self, vectors: Vectors) -> None:
        """Go on from what `vectors` gave; raises `CheckpointError` if it is another model's."""
        present = self.vectors()
        for name in sorted(set(present) ^ set(vectors)):
            raise CheckpointError(
                f"the checkpoint is of another federation: {name!r} is only in one of the two"
            )
        for name, vector in vectors.items():
            if vector.shape != present[name].shape or vector.dtype != present[name].dtype:
                raise CheckpointError(
                    f"the checkpoint is of another federation: {name!r} has another shape"
                )
        tree = nest(vectors)
        self.state, self.statistics = tree.get("state", {}), tree.get("statistics", {})
        self.stages, self.blank = tree.get("stages", {}), tree.get("blank", {})

    def _public(self, round: int) -> Key:
        return self.key.fold("release", round)

    def _key(self, round: int, digest: str) -> Key:
        """The key of what only the server may know."""
        if self.secret is None:
            return self._public(round)
        return self.secret.fold("release", round, digest)

    def _public_client(self, round: int) -> Client:
        """The server as a client of the public examples."""
        plan = self.plan
        public = plan.public or Examples(np.zeros((0, 1), np.float32), np.zeros(0, np.int64))
        assignment = Assignment(round, self.key.fold("step", round))
        model: Vectors = {"params": np.zeros(plan.split.shared.size, np.float32), **self.statistics}
        holder = Holder("server", public, assignment)
        return Client(plan.learner, model, plan.split, holder, dict(self.blank), plan.public)


def _cut(vectors: Vectors, start: int, stop: int) -> Vectors:
    """The same piece of vectors of one length."""
    return {name: vector[start:stop] for name, vector in vectors.items()}


def _shared(vector: Vector, places: Vectors) -> bool:
    return any(np.may_share_memory(vector, place) for place in places.values())


def _moved(vector: Vector, change: Vector) -> Vector:
    """The statistics after a change; integer counters stay integers, whatever a reducer made."""
    if vector.dtype.kind in "iu" and change.dtype.kind == "f":
        change = np.rint(change)
    return np.asarray(vector + change.astype(vector.dtype), vector.dtype)


def _checked(state: Vectors) -> Vectors:
    """The first state, as arrays with names that can be kept."""
    for name, vector in state.items():
        if "/" in name or not isinstance(vector, np.ndarray):
            raise ConfigurationError(
                f"the algorithm's state {name!r} must be a NumPy array, and its name without '/'"
            )
    return dict(state)


def _alike(state: Vectors, before: Vectors) -> Vectors:
    """The new state in the dtypes of the old one, whatever number types a rule mixed in."""
    if state.keys() != before.keys():
        raise RunError(
            f"the algorithm's step made {describe_names(state)} of {describe_names(before)}; it "
            "must give every vector of its state"
        )
    return {name: np.asarray(vector, before[name].dtype) for name, vector in state.items()}
