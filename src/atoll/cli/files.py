"""Federation files and run folders as the command line names them."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atoll.data.dataset import Dataset
from atoll.data.encoding.encoding import Encoding
from atoll.data.federated import FederatedData, one_client
from atoll.data.sources.table import from_table
from atoll.errors import AtollError, CheckpointError, ConfigurationError
from atoll.federation import Federation
from atoll.simulation.devices import Devices
from atoll.tracking.reading import run_at

#: Files that are tables.
TABLES = frozenset({".csv", ".parquet"})
SITE = "data = atoll.data.from_arrays(x, y, classes=10)"
EXAMPLE = "federation = Federation(...) and clients = data.load(...).dirichlet(...)"


def read_federation(name: str) -> tuple[Federation, FederatedData, Devices | None]:
    """`federation`, `clients` and, if it has them, `devices` of a Python file.

    It is run as a module, not as a script; any of the three may be a function that gives it.
    """
    return _simulated(_run(name), name)


def read_sweep(
    name: str,
) -> tuple[Federation, FederatedData, Devices | None, dict[str, dict[str, Any]]]:
    """The same, and its `choices`: for fields of the federation, what they may be, by name."""
    found = _run(name)
    choices = found.get("choices", {})
    if not isinstance(choices, dict) or not all(isinstance(o, dict) for o in choices.values()):
        raise ConfigurationError(
            f"`choices` in {name} must be like "
            '{"algorithm": {"fedavg": FedAvg(), "scaffold": Scaffold()}}'
        )
    return *_simulated(found, name), choices


def _simulated(
    found: dict[str, Any], name: str
) -> tuple[Federation, FederatedData, Devices | None]:
    federation = _federation(found, name)
    clients = _called(found, "clients", name)
    devices = _called(found, "devices", name) if "devices" in found else None
    if not isinstance(clients, FederatedData):
        raise ConfigurationError(
            f"`clients` in {name} is a {type(clients).__name__}, not FederatedData; partition "
            "a set, e.g. clients = data.load('digits').dirichlet(clients=100, alpha=0.3)"
        )
    if devices is not None and not isinstance(devices, Devices):
        raise ConfigurationError(f"`devices` in {name} are not Devices but {devices!r}")
    return federation, clients, devices


def read_plan(name: str) -> Federation:
    """`federation` of a Python file, which may have `clients` for simulation too."""
    return _federation(_run(name), name)


def read_data(
    name: str, encoding: Encoding | None = None, held_out: float = 0.0,
    units: Mapping[str, str] | None = None,
) -> FederatedData:  # fmt: skip
    """One client's data from a Python file that defines `data`, or a table as it is.

    `data` is a Dataset, a population of one, or a population of which `client` names one. A .csv or
    .parquet file is read as the federation's `encoding` says. Of a Dataset or a table the fraction
    `held_out` is for testing.
    """
    if Path(name).suffix.lower() in TABLES:
        return one_client(_table(name, encoding, units or {}), held_out)
    found = _run(name)
    data = _called(found, "data", name, SITE)
    if isinstance(data, Dataset):
        return one_client(data, held_out)
    if not isinstance(data, FederatedData):
        raise ConfigurationError(
            f"`data` in {name} is a {type(data).__name__}; it must be a Dataset, e.g. {SITE}"
        )
    if "client" in found:
        return data.subset([data.index(str(found["client"]))])
    if len(data) != 1:
        raise ConfigurationError(
            f"`data` in {name} has {len(data)} clients; say which one this site is: client = "
            f"{data.names[0]!r}"
        )
    return data


def _table(name: str, encoding: Encoding | None, units: Mapping[str, str]) -> Dataset:
    if encoding is None:
        raise ConfigurationError(
            f"{name} is a table, and the federation has no encoding that says what its columns "
            "are: give Federation(encoding=...), see `atoll agree`, or a Python file that defines "
            "`data`"
        )
    return from_table(name, encoding=encoding, units=units)


def _run(name: str) -> dict[str, Any]:
    """What a Python file defines."""
    path = Path(name)
    if not path.is_file():
        raise ConfigurationError(f"there is no file {name}")
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        return runpy.run_path(str(path), run_name="federation")
    except AtollError:
        raise
    except SystemExit as error:
        raise ConfigurationError(f"{name} ended by sys.exit({error.code!r})") from error
    except Exception as error:
        raise _raised(error, path) from error
    finally:
        sys.path.pop(0)


def _raised(error: Exception, path: Path) -> ConfigurationError:
    line = _line_of(error, path)
    return ConfigurationError(f"{path} raised {type(error).__name__}{line}: {error}")


def _federation(found: dict[str, Any], name: str) -> Federation:
    federation = _called(found, "federation", name)
    if not isinstance(federation, Federation):
        raise ConfigurationError(f"`federation` in {name} is not a Federation but {federation!r}")
    return federation


def find_run(name: str, root: str) -> Path:
    """A run folder, or that of a state folder, by path or by name below the folder of runs."""
    for path in (Path(name), Path(root) / name):
        found = run_at(path)
        if found is not None:
            return found
        if (path / "federation.json").is_file():
            raise CheckpointError(f"{path} has not been served yet: atoll serve FILE.py --state it")
    raise CheckpointError(f"there is no run {name!r}, neither here nor in {root}; see `atoll runs`")


def _called(found: dict[str, Any], name: str, file: str, example: str = EXAMPLE) -> Any:
    if name not in found:
        raise ConfigurationError(f"{file} does not define `{name}`; it must have {example}")
    value = found[name]
    known = Federation | FederatedData | Dataset | Devices | type
    if not callable(value) or isinstance(value, known):
        return value
    sys.path.insert(0, str(Path(file).parent.resolve()))
    try:
        return value()
    except AtollError:
        raise
    except Exception as error:
        raise _raised(error, Path(file)) from error
    finally:
        sys.path.pop(0)


def _line_of(error: Exception, path: Path) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    number = frames[-1].lineno if frames else getattr(error, "lineno", None)
    return f" at line {number}" if number else ""
