"""Federation: the description of a federation, and the verbs that put it to work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from atoll.backends.backend import Engine
from atoll.backends.choice import engine_of
from atoll.core.files import write_json
from atoll.data.federated import FederatedData
from atoll.errors import CheckpointError
from atoll.rounds.describe import describe, short
from atoll.rounds.plan import Plan
from atoll.rounds.schedules import Buffered
from atoll.simulation.asynchronous import AsynchronousSimulator
from atoll.simulation.baselines import Baselines, train_baselines
from atoll.simulation.devices import Devices
from atoll.simulation.explain import Explanation, explain
from atoll.simulation.simulator import Simulator, check_population
from atoll.tracking.folder import RunFolder
from atoll.tracking.observer import Observer
from atoll.tracking.reading import read_engine
from atoll.tracking.record import Run
from atoll.view import html as display


@dataclass(frozen=True, eq=False, kw_only=True)
class Federation(Plan):
    """What all parties agree on; `simulate` runs it in this process.

    Args:
        learner: the model and how one client trains and evaluates it.
        algorithm: what clients do with what they receive, and what the server does in return.
        schedule: how many rounds, who is asked, when a round ends.
        pipeline: what happens to updates on their way, e.g. `Clip(1.0) >> Mean()`.
        evaluation: when the model is measured, and on whose data.
    """

    def simulate(
        self,
        clients: FederatedData,
        *,
        seed: int = 0,
        devices: Devices | None = None,
        engine: Engine | str | None = None,
        folder: str | Path | RunFolder | None = None,
        resume: bool = False,
        observers: Sequence[Observer] = (),
    ) -> Run:
        """Run the federation over a population in virtual time.

        Args:
            clients: who holds what.
            seed: of every draw; the same plan, data and seed give the same bytes.
            devices: how fast and reliable clients are; None is instant and always there.
            engine: how turns are run, e.g. "auto", "sequential", "stacked(block=10, workers=2)" or
                one of `atoll.simulation`'s engines; None chooses by rule. See `explain`.
            folder: where to keep the run (see `tracking.RunFolder`); None keeps nothing.
            resume: go on with the run in `folder` from its latest checkpoint.
            observers: what else is told about each round, e.g. `tracking.progress()`.
        """
        data = check_population(clients)
        run = Run(self.describe(), _fingerprint(data, folder), seed, self.schedule.rounds)
        keeper = (
            RunFolder(folder, best=self.evaluation.best)
            if isinstance(folder, str | Path)
            else folder
        )
        if resume and keeper is not None and (engine is None or engine == "auto"):
            engine = read_engine(keeper.path) or engine
        kind = AsynchronousSimulator if isinstance(self.schedule, Buffered) else Simulator
        simulator = kind(
            self,
            data,
            run,
            devices=devices or Devices(),
            engine=engine_of(engine),
            observers=[*([keeper] if keeper else []), *observers],
        )
        if devices is not None:
            run.config["devices"] = describe(devices)
        if resume:
            if keeper is None:
                raise CheckpointError("resume=True needs the folder of the run to go on with")
            snapshot = keeper.resume(run)
            if snapshot is not None:
                simulator.restore(snapshot)
        return simulator.go()

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


def _fingerprint(data: FederatedData, folder: object) -> dict[str, object]:
    """The population's figures; with a digest of its contents where a run is to be kept."""
    return data.summary() if folder is None else {**data.summary(), "digest": data.digest()}
