"""Federation: the description of a federation, and the verbs that put it to work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from atoll.backends.backend import Engine
from atoll.backends.parsing import engine_of
from atoll.core.files import write_json
from atoll.core.model_file import ModelFile, load_model
from atoll.core.vectors import Vectors
from atoll.data.dataset import Dataset
from atoll.data.federated import FederatedData, check_population, one_client
from atoll.errors import CheckpointError, ConfigurationError, require
from atoll.learners.base import Learner
from atoll.learners.prediction import Predictions
from atoll.learners.saved import SavedModel
from atoll.rounds.describe import about_model, describe, short
from atoll.rounds.plan import Plan
from atoll.simulation.asynchronous import AsynchronousSimulator
from atoll.simulation.attackers import Attackers
from atoll.simulation.baselines import Baselines, train_baselines
from atoll.simulation.devices import Devices
from atoll.simulation.explain import Explanation, explain
from atoll.simulation.simulator import Simulator
from atoll.tracking.folder import RunFolder
from atoll.tracking.observer import Observer
from atoll.tracking.reading import read_engine, read_run, run_at
from atoll.tracking.record import Record, Run
from atoll.view import html as display

if TYPE_CHECKING:
    from atoll.service.storage.folder import StateFolder
    from atoll.site.agent import Ended


#: The part of a site's own data set that is not trained on.
HELD_OUT = 0.2


@dataclass(frozen=True, eq=False, kw_only=True)
class Federation(Plan):
    """What all parties agree on (see `Plan`), and the verbs that put it to work."""

    def simulate(
        self,
        clients: FederatedData,
        *,
        seed: int = 0,
        devices: Devices | None = None,
        attackers: Attackers | None = None,
        engine: Engine | str | None = None,
        initial: Any = None,
        folder: str | Path | RunFolder | None = None,
        resume: bool = False,
        observers: Sequence[Observer] = (),
    ) -> Run:
        """Run the federation over a population in virtual time.

        Args:
            clients: who holds what.
            seed: of every draw; the same plan, data and seed give the same bytes.
            devices: how fast and reliable clients are; None is instant and always there.
            attackers: clients that report something else than they should.
            engine: how tasks are run, e.g. `simulation.Stacked(block=10)`, or "auto"; None chooses
                by rule. See `explain`.
            initial: weights to start from: a run, named arrays, or what the learner's framework
                has (a module, a state_dict); None asks the learner.
            folder: where to keep the run (see `tracking.RunFolder`); None keeps nothing.
            resume: go on with the run in `folder` from its latest checkpoint.
            observers: what else is told about each round, e.g. `tracking.progress()`.
        """
        return self.rounds(
            clients, seed=seed, devices=devices, attackers=attackers, engine=engine,
            initial=initial, folder=folder, resume=resume, observers=observers,
        ).go()  # fmt: skip

    def rounds(
        self,
        clients: FederatedData,
        *,
        seed: int = 0,
        devices: Devices | None = None,
        attackers: Attackers | None = None,
        engine: Engine | str | None = None,
        initial: Any = None,
        folder: str | Path | RunFolder | None = None,
        resume: bool = False,
        observers: Sequence[Observer] = (),
    ) -> Rounds:
        """The same, round by round: `for record in federation.rounds(clients): ...`.

        What it yields are `tracking.Record`s; leaving the loop ends the run, whose state so far is
        in `.run`, and in its folder if it has one.
        """
        data = check_population(clients)
        run = Run(self.describe(), _fingerprint(data, folder), seed, self.schedule.rounds)
        run.learner, run.layout = self.learner, self.split.shared
        run.about = about_model(self, data)
        keeper = (
            RunFolder(folder, best=self.evaluation.best)
            if isinstance(folder, str | Path)
            else folder
        )
        if resume and keeper is not None and (engine is None or engine == "auto"):
            engine = read_engine(keeper.path) or engine
        start = None if initial is None else initial_model(self.learner, initial)
        simulator = (Simulator if self.schedule.lockstep else AsynchronousSimulator)(
            self,
            data,
            run,
            devices=devices or Devices(),
            engine=engine_of(engine),
            observers=[*([keeper] if keeper else []), *observers],
            attackers=attackers,
            initial=start,
        )
        for name, given in (("devices", devices), ("attackers", attackers), ("initial", start)):
            if given is not None:
                run.config[name] = describe(given)
        if resume:
            if keeper is None:
                raise CheckpointError("resume=True needs the folder of the run to go on with")
            snapshot = keeper.resume(run)
            if snapshot is not None:
                simulator.restore(snapshot)
        return Rounds(simulator)

    def serve(
        self,
        state: str | Path,
        *,
        host: str = "127.0.0.1",
        port: int = 8443,
        seed: int = 0,
        sites: int | None = None,
        lease: float = 900.0,
        linger: float = 600.0,
        test: FederatedData | Dataset | None = None,
        initial: Any = None,
        stop: threading.Event | None = None,
    ) -> Run:
        """Serve the federation to real sites, until its rounds are done; returns its run.

        As `atoll serve`. It may go on from where an earlier call was stopped.

        Args:
            state: the state folder, made if there is none (see `invite`).
            host, port: where to listen; a new folder's certificate is for this host.
            seed: of every draw that everyone may know.
            sites: how many must be there before the first round.
            lease: seconds after which an invited site that was not heard of is given up as lost.
            linger: seconds for which it goes on answering when the rounds are done.
            test: data on which each new model is measured.
            initial: weights to start from, as for `simulate`.
            stop: set it, from another thread, to leave.
        """
        from atoll.service.serve import Listening, serve
        from atoll.service.settings import Service

        start = None if initial is None else initial_model(self.learner, initial)
        if start is not None and not self.split.trivial:
            raise ConfigurationError(
                "a served federation's private parts begin at each site, from the learner: give "
                "the learner its weights, and no initial="
            )
        test = one_client(test, 0.0) if isinstance(test, Dataset) else test
        folder = state_folder(state, host)
        service = Service(seed=seed, sites=sites, lease=lease, presence=lease)
        listening = Listening(host=host, port=port, linger=linger)
        serve(self, folder, service, listening, test, initial=start, stop=stop)
        run = read_run(folder.path / "run")
        run.learner = self.learner
        return run

    def join(
        self,
        url: str,
        data: FederatedData | Dataset,
        folder: str | Path,
        *,
        token: str = "",
        report: Callable[[str], None] | None = None,
        stop: threading.Event | None = None,
    ) -> Ended:
        """Take part as a site, until the federation is over; as `atoll join`.

        Args:
            url: the server's address, "https://HOST:PORT".
            data: one client's data, which stay here; of a Dataset a fifth is held out, to say how
                good models are.
            folder: the site's own folder: its key, and what it remembers.
            token: what it was invited with (see `invite`); once joined, none is needed.
            report: is told, in words, how it goes.
            stop: set it, from another thread, to leave.

        Returns:
            How it has ended ("done", "stopped", "given up", or "left" before that), after how many
            rounds, and the file of the federation's `model`, if there is one.
        """
        from atoll.protocol.identity import Token
        from atoll.site.agent import Site

        own = one_client(data, HELD_OUT) if isinstance(data, Dataset) else check_population(data)
        site = Site(Path(folder), self, own)
        site.report, site.leaving = report or site.report, stop or site.leaving
        site.join(url, Token.read(token) if token else None)
        return site.run()

    def predict(self, model: Any, x: Any) -> Predictions:
        """What a model of this federation says of inputs; see `Predictions`.

        Args:
            model: a run, or the path of a saved model or of a run's folder.
            x: inputs [N, ...] or a dict of them; or, where the model knows an encoding, a table
                that `data.from_table` reads, with or without its label.

        Raises ConfigurationError for another federation's model.
        """
        saved = SavedModel.of(self.learner, saved_model(model))
        if saved.encoding is not None and not isinstance(x, np.ndarray | Mapping):
            x = saved.encoding.apply(x)
        return saved.predict(dict(x) if isinstance(x, Mapping) else np.asarray(x))

    def explain(self, clients: FederatedData, *, engine: Engine | str | None = None) -> Explanation:
        """How `simulate` would run this over these clients; print it.

        Engine and reason, how each layer is lowered, workers, threads and memory.
        """
        return explain(self, check_population(clients), engine_of(engine), 0)

    def baselines(
        self,
        clients: FederatedData,
        *,
        seed: int = 0,
        central_rounds: int | None = None,
        local_rounds: int | None = None,
        folder: str | Path | None = None,
    ) -> Baselines:
        """Train the same learner centrally, and on each client alone.

        Args:
            clients: the same population as for `simulate`.
            seed: as for `simulate`: the initial model is the same.
            central_rounds: rounds of local work on everybody's data together; None goes over each
                example as often as the federation does.
            local_rounds: rounds of local work of each client alone; None is as many as the
                federation has, as if the client had taken part in all of them.
            folder: a run's folder to keep them in, for its report.
        """
        data = check_population(clients)
        found = train_baselines(self, data, seed, central_rounds, local_rounds)
        if folder is not None:
            write_json(Path(folder) / "baselines.json", asdict(found))
        return found

    def _repr_html_(self) -> str:
        """What notebooks show: what the parties agree on."""
        plain = self.describe()
        rows = [(name, short(value)) for name, value in plain.items() if name != "kind"]
        return display.block("Federation", display.table(["", ""], rows))

    def describe(self) -> dict[str, object]:
        """The resolved configuration, ready for JSON."""
        plain: dict[str, object] = {"kind": "atoll.Federation"}
        return plain | {field.name: describe(getattr(self, field.name)) for field in fields(self)}


def saved_model(source: Any) -> ModelFile:
    """A model with what it is about: of a run, of its folder, or in a file."""
    if isinstance(source, Run):
        return source.saved()
    path = Path(source)
    folder = run_at(path)
    return load_model(path if folder is None else folder / "model.safetensors")


def invite(state: str | Path, name: str, *, host: str = "127.0.0.1", hours: float = 72.0) -> str:
    """A one-time token with which a site of this name can join; as `atoll invite`.

    `state` is the server's state folder, made if there is none, for a server at `host`.
    """
    return str(state_folder(state, host).invite(name, "site", hours))


def state_folder(path: str | Path, host: str) -> StateFolder:
    """A server's state folder, made if there is none."""
    require("sqlalchemy", "atoll[serve]", "a federation's server")
    from atoll.service.storage.folder import StateFolder

    place = Path(path)
    if (place / "federation.json").exists():
        return StateFolder.open(place)
    return StateFolder.make(place, place.name, [host])


class Rounds:
    """A run, round by round."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._records = simulator.rounds()

    @property
    def run(self) -> Run:
        """The run so far."""
        return self._simulator.run

    def __iter__(self) -> Iterator[Record]:
        try:
            yield from self._records
        finally:
            self._records.close()

    def go(self) -> Run:
        """Run to the end."""
        for _ in self._records:
            pass
        return self.run


def initial_model(learner: Learner, given: Any) -> Vectors:
    """A model to start from, from whatever people have it in."""
    if isinstance(given, Run):
        given = given.model
    model = learner.vectors_of(given)
    for name, vector in model.items():
        if vector.dtype.kind == "f" and np.isnan(vector).any():
            raise ConfigurationError(f"the weights to start from hold NaN among their {name}")
    return model


def _fingerprint(data: FederatedData, folder: object) -> dict[str, object]:
    """The population's figures; with a digest of its contents where a run is to be kept."""
    return data.summary() if folder is None else {**data.summary(), "digest": data.digest()}
