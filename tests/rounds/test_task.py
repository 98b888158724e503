"""What a round's questions draw: each numbers of its own, in each attempt."""

from dataclasses import dataclass

import numpy as np
import pytest

from atoll import Federation, algorithms, schedules
from atoll.aggregation import Ask, Gathered, Mean, Reducer, Schema
from atoll.core.random import Key
from atoll.core.updates import Update
from atoll.errors import CannotClose, RunError
from atoll.learners import NumpyLearner
from atoll.rounds.server import Server
from atoll.rounds.task import ClientTask, assignment_for

DRAWN = Schema.of({"drawn": 1}, weights=(1.0, 1.0))


@dataclass(frozen=True)
class Drawing(Reducer):
    """Asks for a drawn number three times over, and keeps what it heard and drew itself."""

    secret: bool = False
    log: tuple = ()
    refuses: int = 0

    def open(self, schema):
        return Mean().open(schema)

    def talk(self, schema, talk):
        work = yield Ask("update", self.open(schema), schema, works=True)
        self.log[0].append(("server", float(talk.key.fold("own").generator().random())))
        for _ in range(3):
            heard = yield Ask("draw", Gathered(), DRAWN)
            for sender in heard.senders:
                self.log[0].append((sender[0], float(heard.into[sender]["drawn"][0])))
        if sum(name == "server" for name, _ in self.log[0]) <= self.refuses:
            raise CannotClose("not this time")
        return work.into.close(talk.population, talk.state, talk.key)

    def answer(self, name, told, mail, kept, key):
        return Update({"drawn": key.generator().random(1).astype(np.float32)}), kept


def drawn(clients, seed=0, **reducer):
    log = []
    federation = Federation(
        learner=NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1, cohort=2),
        pipeline=Drawing(log=(log,), **reducer),
    )
    federation.simulate(clients, seed=seed)
    return log


@pytest.mark.parametrize("secret", [False, True])
def test_every_question_draws_numbers_of_its_own(blobs, secret):
    log = drawn(blobs, secret=secret)
    numbers = [number for name, number in log if name != "server"]
    assert len(numbers) == len(set(numbers)) == 6
    assert log == drawn(blobs, secret=secret)
    assert log != drawn(blobs, seed=1, secret=secret)


def test_a_secret_reducer_draws_anew_in_each_attempt(blobs):
    own = [number for name, number in drawn(blobs, secret=True, refuses=2) if name == "server"]
    assert len(own) == len(set(own)) == 3


def test_questions_fold_the_secret_key_too():
    first, second = (assignment_for(Key(0), "a", 1, 1, 1.0, Key(5), step).secret for step in (0, 1))
    assert first == Key(5) != second


def test_a_task_travels_whole():
    assignment = assignment_for(Key(0), "a", 3, 2, 0.5, step=4)
    task = ClientTask(7, "a", assignment, {}, 2, 0.25, step=4)
    assert ClientTask.read(task.row(), Key(0), {}) == task


def test_secrets_are_in_no_repr(federation):
    secret = Key(1234567891011)
    server = Server(federation, Key(0), secret)
    assert repr(secret) not in repr(server)
    assert repr(secret) not in repr(assignment_for(Key(0), "a", 1, 1, 1.0, secret))


@dataclass(frozen=True)
class Wordless(Drawing):
    """Can ask nobody anything."""

    def talk(self, schema, talk):
        raise CannotClose("these members have no keys")
        yield


def test_a_conversation_that_cannot_begin_is_abandoned(blobs):
    federation = Federation(
        learner=NumpyLearner(layers=(2, 3), lr=0.1, batch_size=10),
        algorithm=algorithms.FedAvg(),
        schedule=schedules.Synchronous(rounds=1, cohort=2, attempts=3),
        pipeline=Wordless(),
    )
    with pytest.raises(RunError, match=r"(?s)3 .*these members have no keys"):
        federation.simulate(blobs, seed=0)
