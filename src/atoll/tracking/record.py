"""A run: what was tried, what came of each round, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from atoll.core.model_file import ModelFile, load_model
from atoll.core.vectors import Layout, Vectors
from atoll.errors import CheckpointError, ConfigurationError
from atoll.learners.base import Learner
from atoll.learners.metrics import directions, main_metric, more_is_better
from atoll.learners.saving import write_model
from atoll.view import html as display

#: The best model's file in a run folder.
BEST = "best.safetensors"


class Participant(NamedTuple):
    """One client's part in one attempt at a round, for the byte ledger.

    `outcome` is "accepted", "late", "no longer needed", "malformed" or "lost". `down` and `up` are
    bytes of messages; an upload that the end of the round cut off counts as far as it had come.
    """

    client: str
    outcome: str
    down: int
    up: int


@dataclass(frozen=True)
class Record:
    """One closed round. Everything in it is determined by the plan, the data and the seed.

    `metrics` are the evaluation of the new model (empty in rounds without one), `measurements`
    what clients and pipeline reported. `clock` is the simulated time in seconds at its end.
    `attempts` counts the abandoned ones too.
    """

    round: int
    metrics: Mapping[str, float]
    measurements: Mapping[str, float]
    invited: int
    accepted: int
    attempts: int
    bytes_up: int
    bytes_down: int
    clock: float

    def json(self) -> dict[str, Any]:
        """The record as strict JSON, in which a figure that is not defined is null."""
        plain = asdict(self)
        for name in ("metrics", "measurements"):
            plain[name] = {k: None if math.isnan(v) else v for k, v in plain[name].items()}
        return plain

    @staticmethod
    def read(plain: Mapping[str, Any]) -> Record:
        """A record from what `json` gave."""
        known = {
            name: {k: math.nan if v is None else v for k, v in plain[name].items()}
            for name in ("metrics", "measurements")
            if name in plain
        }
        return Record(**{**plain, **known})


@dataclass(frozen=True)
class Closed:
    """One closed round as it is kept: its record, who took part in all its attempts, and its time.

    `seconds` and `phases` are real time; None and nothing, where they were not noted.
    """

    record: Record
    participants: Iterable[Participant]
    seconds: float | None
    phases: Mapping[str, float]

    def json(self) -> dict[str, Any]:
        """Ready for JSON, for `read`."""
        return {**self.record.json(), **self._parts(), **self._time()}

    @staticmethod
    def read(plain: Mapping[str, Any]) -> Closed:
        """A closed round from what `json` gave."""
        plain = dict(plain)
        parts = [Participant(*each) for each in plain.pop("participants")]
        seconds, phases = plain.pop("seconds"), plain.pop("phases")
        return Closed(Record.read(plain), parts, seconds, phases)

    def lines(self) -> dict[str, dict[str, Any]]:
        """What the files of a run folder say of it, by name; a line each."""
        number = {"round": self.record.round}
        return {
            "rounds.jsonl": self.record.json(),
            "ledger.jsonl": number | self._parts(),
            "timings.jsonl": number | self._time(),
        }

    def _parts(self) -> dict[str, Any]:
        return {"participants": [list(part) for part in self.participants]}

    def _time(self) -> dict[str, Any]:
        seconds = None if self.seconds is None else round(self.seconds, 6)
        phases = {name: round(each, 6) for name, each in self.phases.items()}
        return {"seconds": seconds, "phases": phases}


@dataclass
class Run:
    """The result of a federation's run, complete at any time up to its latest round.

    `config` describes the plan, `data` the population. `per_client` holds the latest evaluation on
    clients' own test parts: metric -> client -> value, without those that have none. `refusals`
    are the reasons, in words, why updates were refused or attempts abandoned. `seconds` is the
    real time spent. `engine` is the engine that ran it, in the words
    that ask for it again, and `engine_notes` say why it is that one. `stopped` says why it ended
    before its last round, if it did.
    """

    config: dict[str, Any]
    data: dict[str, Any]
    seed: int
    rounds: int
    history: list[Record] = field(default_factory=list)
    per_client: dict[str, dict[str, float]] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    model: Vectors = field(default_factory=dict)
    seconds: float = 0.0
    engine: str = ""
    engine_notes: list[str] = field(default_factory=list)
    folder: Path | None = None
    stopped: str = ""
    #: Whose model it is, where that is known: a run read from a folder does not.
    learner: Learner | None = None
    #: The names and shapes of the model's arrays.
    layout: Layout | None = None
    #: What a saved model tells of itself, beside its round and metrics.
    about: dict[str, Any] = field(default_factory=dict)

    def best(self) -> tuple[int, Vectors]:
        """The round of the best model, by `Evaluation(best=...)`, and that model.

        It is kept in the run's folder; `CheckpointError` says if there is none.
        """
        if self.folder is None:
            raise CheckpointError("the best model is kept in a run's folder; give it one: folder=")
        path = self.folder / BEST
        if not path.exists():
            why = "no round has been evaluated" if not self.metrics else f"{path} is not there"
            raise CheckpointError(f"there is no best model: {why}")
        best = load_model(path)
        return int(best.about["round"]), best.vectors

    def load_into(self, target: Any, *, best: bool = False) -> Any:
        """Write the final or the best model into a framework's own object, and return that.

        A torch module, for one. `best` takes the model that `best()` gives.
        """
        if self.learner is None:
            raise ConfigurationError(
                "this run was read from its folder and does not know its learner; use "
                "learner.load_into(run.model, target)"
            )
        if not self.model:
            raise ConfigurationError("this run has no one model: its clients have their own")
        return self.learner.load_into(self.best()[1] if best else self.model, target)

    def save(self, path: str | Path, *, best: bool = False) -> Path:
        """Write the final or the best model as .safetensors, .npz, .pt or .onnx.

        Names are the framework's own, so that its own call loads it; see docs/models.md.
        """
        return write_model(Path(path), self.saved(best=best), self.learner)

    def saved(self, *, best: bool = False) -> ModelFile:
        """The final or the best model, by the names of its arrays, with what it is about."""
        if best:
            self.best()  # says what is lacking, if it is
            assert self.folder is not None
            return load_model(self.folder / BEST)
        if not self.model:
            raise ConfigurationError("this run has no one model: its clients have their own")
        rounds = self.history[-1].round if self.history else 0
        about = {**self.about, "round": rounds, "metrics": dict(self.metrics)}
        return ModelFile.of(self.model, self.layout, about)

    @property
    def served(self) -> bool:
        """Whether real sites took part, so that the clock of its rounds is real time too."""
        return bool(self.data.get("served"))

    @property
    def bytes_up(self) -> int:
        """Bytes that all clients sent so far."""
        return sum(record.bytes_up for record in self.history)

    @property
    def bytes_down(self) -> int:
        """Bytes that all clients received so far."""
        return sum(record.bytes_down for record in self.history)

    @property
    def metrics(self) -> dict[str, float]:
        """The latest evaluation."""
        for record in reversed(self.history):
            if record.metrics:
                return dict(record.metrics)
        return {}

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Rounds and values of a metric or measurement, where it was taken."""
        rounds, values = [], []
        for record in self.history:
            value = record.metrics.get(metric, record.measurements.get(metric))
            if value is not None:
                rounds.append(record.round)
                values.append(value)
        if not rounds:
            known = ", ".join(sorted(self.names)) or "none yet"
            raise ConfigurationError(f"the run has no metric {metric!r}; it has {known}")
        return rounds, values

    def rounds_to(self, metric: str, target: float) -> int | None:
        """The first round in which a metric was at least as good as a target; None if never.

        From below where more is better, else from above.
        """
        rounds, values = self.series(metric)
        sign = 1 if more_is_better(metric, directions(self.config, self.data)) else -1
        good = (r for r, v in zip(rounds, values, strict=True) if sign * v >= sign * target)
        return next(good, None)

    @property
    def names(self) -> set[str]:
        """Of every metric and measurement that some round has."""
        return {name for r in self.history for name in (*r.metrics, *r.measurements)}

    def plot(self, path: str | Path, metric: str | None = None, against: str = "round") -> Path:
        """Draw a metric against "round" or "bytes"; None is accuracy, or a loss without it."""
        from atoll.view.plots import draw_metric

        return draw_metric({"": self}, Path(path), metric or main_metric(self.names), against)

    def plot_spread(self, path: str | Path, metric: str | None = None) -> Path:
        """Draw a metric of every client at the latest evaluation on their own test parts."""
        from atoll.view.plots import draw_spread

        return draw_spread(self, Path(path), metric or main_metric(self.per_client))

    def _repr_html_(self) -> str:
        """What notebooks show: where the run stands, its figures, and the curve of the main one."""
        parts = [display.line(str(self))]
        rows = [
            [name.replace("_", " "), f"{value:.4g}"]
            for name, value in self.metrics.items()
            if "_client_" not in name
        ]
        parts += [display.table(["", ""], rows)] if rows else []
        metric = main_metric(self.metrics)
        if metric in self.metrics:
            rounds, values = self.series(metric)
            known = [(r, v) for r, v in zip(rounds, values, strict=True) if math.isfinite(v)]
            if len(known) > 1:
                title = f"{metric} by round"
                places, heights = [float(r) for r, _ in known], [v for _, v in known]
                parts += [display.curve(places, heights, title), display.line(title)]
        return display.block(str(self.data.get("name", "run")), *parts)

    def __str__(self) -> str:
        last = self.metrics
        shown = ", ".join(f"{name} {value:.4g}" for name, value in last.items() if "_" not in name)
        if not shown and (metric := main_metric(last)) in last:
            count = last.get(f"{metric.partition('_client_')[0]}_client_count", 0)
            shown = f"{metric} {last[metric]:.4g} (of {count:.0f} clients that have test data)"
        return (
            f"{len(self.history)} of {self.rounds} rounds on {self.data.get('name', 'data')}: "
            f"{shown or 'not evaluated'}; {human_bytes(self.bytes_up)} up, "
            f"{human_bytes(self.bytes_down)} down"
        )


def human_bytes(count: float) -> str:
    """Bytes as people read them, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_seconds(seconds: float) -> str:
    """A duration as people read it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
