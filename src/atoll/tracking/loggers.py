"""Loggers for other people's dashboards: TensorBoard, MLflow, Weights & Biases.

Each is an observer: `federation.simulate(clients, observers=[loggers.TensorBoard("tb")])`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from atoll.errors import require
from atoll.tracking.observer import Observer, RoundEnd
from atoll.tracking.record import Record, Run


def scalars(run: Run, record: Record) -> dict[str, float]:
    """Everything of a round that is a number, by name."""
    return {
        **record.metrics,
        **{f"round/{name}": value for name, value in record.measurements.items()},
        "communication/bytes_up": float(run.bytes_up),
        "communication/bytes_down": float(run.bytes_down),
        "participants/accepted": float(record.accepted),
        "participants/invited": float(record.invited),
    }


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A nested configuration as dotted names and texts."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)


class TensorBoard(Observer):
    """Writes event files with `tensorboardX`-compatible `torch.utils.tensorboard`."""

    def __init__(self, folder: str | Path) -> None:
        require("tensorboard", "tensorboard", "the TensorBoard logger")
        module = require("torch.utils.tensorboard", "torch>=2.6,<2.14", "the TensorBoard logger")
        self._writer = module.SummaryWriter(str(folder))

    def begin(self, run: Run) -> None:
        lines = [f"    {name}: {value}" for name, value in flat(run.config)]
        self._writer.add_text("configuration", "\n".join(lines))

    def round(self, run: Run, end: RoundEnd) -> None:
        for name, value in scalars(run, end.record).items():
            self._writer.add_scalar(name, value, end.record.round)

    def close(self) -> None:
        self._writer.close()


class MLflow(Observer):
    """Logs to an MLflow run of its own; `tracking_uri` None is MLflow's default."""

    def __init__(self, experiment: str = "atoll", tracking_uri: str | None = None) -> None:
        self._mlflow = require("mlflow", "mlflow", "the MLflow logger")
        if tracking_uri is not None:
            self._mlflow.set_tracking_uri(tracking_uri)
        self._mlflow.set_experiment(experiment)
        self._open = False

    def begin(self, run: Run) -> None:
        self._mlflow.start_run()
        self._open = True
        self._mlflow.log_params({name: value[:500] for name, value in flat(run.config)})

    def round(self, run: Run, end: RoundEnd) -> None:
        self._mlflow.log_metrics(scalars(run, end.record), step=end.record.round)

    def close(self) -> None:
        if self._open:
            self._mlflow.end_run()
            self._open = False


class WeightsAndBiases(Observer):
    """Logs to W&B; `mode="offline"` needs no account and no network."""

    def __init__(self, project: str = "atoll", mode: str = "offline", **settings: Any) -> None:
        self._wandb = require("wandb", "wandb", "the Weights & Biases logger")
        self._arguments = {"project": project, "mode": mode, **settings}
        self._run: Any = None

    def begin(self, run: Run) -> None:
        self._run = self._wandb.init(config=run.config, **self._arguments)

    def round(self, run: Run, end: RoundEnd) -> None:
        self._run.log(scalars(run, end.record), step=end.record.round)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None
