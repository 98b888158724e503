"""Watching an app: its messages and its strategy's results, as the rounds of one of our runs."""

from __future__ import annotations

import functools
import inspect
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from atoll.core.vectors import Layout
from atoll.errors import ConfigurationError
from atoll.rounds.client_states import ClientStates
from atoll.tracking.observer import Observer, RoundEnd, Snapshot
from atoll.tracking.record import Participant, Record, Run

Figures = dict[str, float]
#: A list of more numbers is a curve, and no figure of a round.
LISTED = 32


class Watch:
    """Keeps `run` up to date and tells observers, round by round.

    A round is the number that strategies put into their messages; it closes when the next one
    begins, or at the end.
    """

    def __init__(self, run: Run, observers: Sequence[Observer]) -> None:
        self.run, self._observers = run, observers
        self._round = 0
        self._begun = False
        #: What a strategy has aggregated last: the model of an app with a loop of its own.
        self._latest: ArrayRecord | None = None
        self._clear()

    def _clear(self) -> None:
        self._parts: dict[int, Participant] = {}
        self._asked: set[tuple[int, str]] = set()
        #: What the strategy made of the metrics of training and of evaluation.
        self._made: list[Figures | None] = [None, None]
        self._trained: dict[int, tuple[float, Figures]] = {}
        self._tested: dict[int, tuple[float, Figures]] = {}
        self._central: Figures = {}
        self._started = time.perf_counter()

    def begin(self, rounds: int | None = None) -> None:
        """The app is about to send its first message; `rounds` are to come, if that is known."""
        if self._begun:
            return
        self._begun = True
        self.run.rounds = rounds or self.run.rounds
        for observer in self._observers:
            observer.begin(self.run)
        self._started = time.perf_counter()

    def message(self, client: int, sent: Message, reply: Message) -> None:
        """A client has answered."""
        self.begin()
        kind = sent.metadata.message_type.partition(".")[0]
        number = _round_of(sent)
        # Without numbers, whoever is asked the same again is asked in another round.
        again = not number and (client, sent.metadata.message_type) in self._asked
        if again or (number and number != self._round):
            self.close()
            self._round = number or self._round + 1
        self._asked.add((client, sent.metadata.message_type))
        failed = reply.has_error()
        up = 0 if failed else _bytes(reply.content)
        if kind in ("train", "query"):
            # A protocol of several stages asks a client several times in a round.
            before = self._parts.get(client)
            down = _bytes(sent.content)
            if before is not None:
                down, up = down + before.down, up + before.up
            lost = failed or (before is not None and before.outcome == "lost")
            outcome = "lost" if lost else "accepted"
            self._parts[client] = Participant(str(client), outcome, down, up)
        if failed:
            place = f"round {self._round or 1}, client {client}"
            self.run.refusals.append(f"{place}: {reply.error.reason}")
            return
        weight, figures = _figures(reply.content)
        if kind in ("train", "query"):
            self._trained[client] = weight, figures
        elif kind == "evaluate":
            self._tested[client] = weight, figures

    def evaluated(self, number: int, figures: Figures) -> None:
        """The server has evaluated the model of a round; 0 is the initial one."""
        if number and number == self._round:
            self._central = figures

    def close(self) -> None:
        """The round that is open has ended, if one is."""
        if not self._parts and not self._tested:
            self._clear()
            return
        # Threads and workers answer in any order.
        parts = [self._parts[client] for client in sorted(self._parts)]
        accepted = sum(part.outcome == "accepted" for part in parts)
        trained, tested = self._made
        trained = _mean(self._trained) if trained is None else trained
        tested = _mean(self._tested) if tested is None else tested
        # What the server measures has the plain names.
        metrics = {**{f"client_{n}" if n in self._central else n: v for n, v in tested.items()},
                   **self._central}  # fmt: skip
        record = Record(
            len(self.run.history) + 1, metrics, trained, len(parts), accepted, 1,
            sum(part.up for part in parts), sum(part.down for part in parts), 0.0,
        )  # fmt: skip
        spread: dict[str, dict[str, float]] = defaultdict(dict)
        for client, (_, figures) in sorted(self._tested.items()):
            for name, value in figures.items():
                spread[name][str(client)] = value
        if spread:
            self.run.per_client = dict(spread)
        self.run.history.append(record)
        self.run.rounds = max(self.run.rounds, len(self.run.history))
        seconds = time.perf_counter() - self._started
        self.run.seconds += seconds
        end = RoundEnd(record, parts, self._nothing(), seconds)
        for observer in self._observers:
            observer.round(self.run, end)
        self._clear()

    def finished(self, arrays: ArrayRecord | None) -> None:
        """The strategy has ended with these arrays."""
        if arrays is None:
            return
        named = {name: array.numpy() for name, array in arrays.items()}
        floating = {n: a.astype(np.float32) for n, a in named.items() if a.dtype.kind == "f"}
        others = {n: a.astype(np.int64) for n, a in named.items() if a.dtype.kind in "iub"}
        layout = Layout.of(floating, others)
        self.run.model = layout.pack({**floating, **others})

    def end(self) -> None:
        """The app has ended by itself."""
        self.close()
        if not self.run.model:
            self.finished(self._latest)
        # An app may have made fewer rounds than its settings say, or more.
        self.run.rounds = len(self.run.history)
        if self._begun:
            for observer in self._observers:
                observer.end(self.run)

    def interrupted(self) -> None:
        """The app has ended before its time."""
        if self._begun:
            self.close()
            for observer in self._observers:
                observer.interrupted(self.run, self._nothing())

    def _nothing(self) -> Snapshot:
        """An app's state is its own: there is nothing to go on from."""
        return Snapshot(len(self.run.history), {}, ClientStates(), {}, 0.0)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear of what passes inside Flower's strategies: rounds, evaluations, the final model."""
        from flwr.server.client_manager import SimpleClientManager
        from flwr.server.server import Server
        from flwr.serverapp.strategy import Strategy

        kept = Strategy.start, Server.fit, SimpleClientManager.wait_for
        Strategy.start = self._started_as(kept[0])  # type: ignore[method-assign]
        Server.fit = self._fitted_as(kept[1])  # type: ignore[method-assign]
        SimpleClientManager.wait_for = self._never_waiting(kept[2])  # type: ignore[method-assign]
        try:
            with self._hearing():
                yield
        finally:
            Strategy.start, Server.fit, SimpleClientManager.wait_for = kept  # type: ignore

    @contextmanager
    def _hearing(self) -> Iterator[None]:
        """Hear of what strategies make, whoever calls them: apps may have loops of their own."""
        from flwr.common import parameters_to_ndarrays
        from flwr.server.strategy import Strategy as OldStrategy
        from flwr.serverapp.strategy import Strategy

        def trained(made: Any) -> None:
            arrays, metrics = made
            self._latest = arrays if arrays is not None else self._latest
            if metrics is not None:
                self._made[0] = _numbers(metrics)

        def tested(made: Any) -> None:
            if made is not None:
                self._made[1] = _numbers(made)

        def fitted(made: Any) -> None:
            if made is not None and made[0] is not None:
                self._latest = ArrayRecord(parameters_to_ndarrays(made[0]))
            if made is not None and made[1]:
                self._made[0] = _numbers(made[1])

        def judged(made: Any) -> None:
            # Without figures of its own the means of what clients told say more than its loss.
            if made is not None and made[0] is not None and made[1]:
                self._made[1] = _numbers({"loss": made[0], **made[1]})

        heard = [
            (Strategy, "aggregate_train", trained), (Strategy, "aggregate_evaluate", tested),
            (OldStrategy, "aggregate_fit", fitted), (OldStrategy, "aggregate_evaluate", judged),
        ]  # fmt: skip
        kept = []
        for root, name, told in heard:
            for kind in _derived(root):
                original = vars(kind).get(name)
                if original is not None:
                    kept.append((kind, name, original))
                    setattr(kind, name, _telling(original, told))
        try:
            yield
        finally:
            for kind, name, original in kept:
                setattr(kind, name, original)

    def _never_waiting(self, original: Any) -> Any:
        """What the old loop waits for clients with: those that there are not will not come."""

        def wait_for(manager: Any, num_clients: int, timeout: int = 86400) -> bool:
            there = int(self.run.data.get("clients", 0))
            if num_clients > there:
                raise ConfigurationError(
                    f"the app waits for {num_clients} clients, and there are {there} (see "
                    "min_available_clients of its strategy); give it more with --clients N"
                )
            return bool(original(manager, num_clients, timeout))

        return wait_for

    def _started_as(self, original: Any) -> Any:
        parameters = inspect.signature(original)

        def start(*given: Any, **named: Any) -> Any:
            bound = parameters.bind(*given, **named)
            bound.apply_defaults()
            strategy, evaluate = bound.arguments["self"], bound.arguments["evaluate_fn"]

            def evaluated(number: int, arrays: ArrayRecord) -> Any:
                found = evaluate(number, arrays)
                if found is not None:
                    self.evaluated(number, _numbers(found))
                return found

            if evaluate is not None:
                bound.arguments["evaluate_fn"] = evaluated
            # A strategy may be the second of its app, and count from one again.
            self.close()
            self._round = 0
            self.begin(bound.arguments["num_rounds"])
            with self._aggregates(strategy):
                result = original(*bound.args, **bound.kwargs)
            self.finished(result.arrays)
            return result

        return start

    @contextmanager
    def _aggregates(self, strategy: Any) -> Iterator[None]:
        """Hear what the strategy makes of the metrics of clients: its word is what counts."""
        kept = strategy.aggregate_train, strategy.aggregate_evaluate

        def train(server_round: int, replies: Any) -> Any:
            arrays, metrics = kept[0](server_round, replies)
            if metrics is not None:
                self._made[0] = _numbers(metrics)
            return arrays, metrics

        def evaluate(server_round: int, replies: Any) -> Any:
            metrics = kept[1](server_round, replies)
            if metrics is not None:
                self._made[1] = _numbers(metrics)
            return metrics

        strategy.aggregate_train, strategy.aggregate_evaluate = train, evaluate
        try:
            yield
        finally:
            strategy.aggregate_train, strategy.aggregate_evaluate = kept

    def _fitted_as(self, original: Any) -> Any:
        """The loop of apps of the old kind, whose threads end in any order."""

        def fit(server: Any, num_rounds: int, timeout: float | None) -> Any:
            from flwr.common import parameters_to_ndarrays

            strategy = server.strategy
            evaluate = strategy.evaluate
            aggregates = strategy.aggregate_fit, strategy.aggregate_evaluate

            def told(server_round: int, parameters: Any) -> Any:
                found = evaluate(server_round, parameters)
                if found is not None:
                    loss, metrics = found
                    self.evaluated(server_round, _numbers({"loss": loss, **metrics}))
                return found

            def ordered(aggregate: Any) -> Any:
                def sums(server_round: int, results: Any, failures: Any) -> Any:
                    by_client = sorted(results, key=lambda each: int(each[0].cid))
                    return aggregate(server_round, by_client, failures)

                return sums

            strategy.evaluate = told
            strategy.aggregate_fit, strategy.aggregate_evaluate = map(ordered, aggregates)
            self.begin(num_rounds)
            try:
                result = original(server, num_rounds, timeout)
            finally:
                strategy.evaluate = evaluate
                strategy.aggregate_fit, strategy.aggregate_evaluate = aggregates
            arrays = parameters_to_ndarrays(server.parameters)
            self.finished(ArrayRecord(arrays) if arrays else None)
            return result

        return fit


def _derived(kind: type) -> Iterator[type]:
    """Every class below this one, once."""
    seen = set()
    below: list[type] = [*kind.__subclasses__()]
    while below:
        each = below.pop()
        if each not in seen:
            seen.add(each)
            below += each.__subclasses__()
            yield each


def _telling(original: Any, told: Callable[[Any], None]) -> Any:
    """The same method, whose result is told; that of a derived class is told last."""

    @functools.wraps(original)
    def method(*given: Any, **named: Any) -> Any:
        made = original(*given, **named)
        told(made)
        return made

    return method


def _round_of(message: Message) -> int:
    """The number of a message's round; 0 where the app does not say."""
    for record in message.content.values():
        if isinstance(record, ConfigRecord) and isinstance(record.get("server-round"), int):
            return int(record["server-round"])  # type: ignore[arg-type]
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else 0


def _figures(content: RecordDict) -> tuple[float, Figures]:
    """The weight and the numbers of a reply, of today's kind or of the old one."""
    numbers: Figures = {}
    for name, record in content.items():
        if isinstance(record, MetricRecord | ConfigRecord):
            old = name.startswith(("fitres.", "evaluateres."))
            if name.endswith(".status"):
                continue
            found = _numbers(record)
            if old and set(found) == {"num_examples"}:
                found = {"num-examples": found["num_examples"]}
            numbers |= found
    weight = numbers.pop("num-examples", 1.0)
    return weight, numbers


def _numbers(record: Any) -> Figures:
    """The figures of a record; short lists, as of classes, one by one."""
    found: Figures = {}
    for name, value in record.items():
        # A protocol's own lists stand in the other kind of record.
        if isinstance(value, list) and isinstance(record, MetricRecord) and len(value) <= LISTED:
            parts = {f"{name}[{place}]": each for place, each in enumerate(value)}
        else:
            parts = {str(name): value}
        found |= {
            part: float(each)
            for part, each in parts.items()
            if isinstance(each, int | float | np.number) and not isinstance(each, bool)
        }
    return found


def _mean(by_client: dict[int, tuple[float, Figures]]) -> Figures:
    """Weighted means of what each client has."""
    parts = [by_client[client] for client in sorted(by_client)]
    names = dict.fromkeys(name for _, figures in parts for name in figures)
    means = {}
    for name in names:
        having = [(weight, figures[name]) for weight, figures in parts if name in figures]
        total = sum(weight for weight, _ in having)
        if total > 0:
            means[name] = sum(weight * value for weight, value in having) / total
    return means


def _bytes(content: RecordDict) -> int:
    """Bytes of what a message holds: arrays as they are sent, eight for a number."""
    total = 0
    for record in content.values():
        if isinstance(record, ArrayRecord):
            total += sum(len(array.data) for array in record.values())
        else:
            total += sum(_size(value) for value in record.values())
    return total


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 8
