"""Federation files and run folders as the command line names them."""

from __future__ import annotations

import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

from atoll.data.federated import FederatedData
from atoll.errors import AtollError, CheckpointError, ConfigurationError
from atoll.federation import Federation
from atoll.simulation.devices import Devices

EXAMPLE = "federation = Federation(...) and clients = data.load(...).dirichlet(...)"


def read_federation(name: str) -> tuple[Federation, FederatedData, Devices | None]:
    """`federation`, `clients` and, if it has them, `devices` of a Python file.

    It is run as a module, not as a script; any of the three may be a function that gives it.
    """
    path = Path(name)
    if not path.is_file():
        raise ConfigurationError(f"there is no file {name}")
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        found = runpy.run_path(str(path), run_name="federation")
        federation, clients = (_called(found, part, name) for part in ("federation", "clients"))
        devices = _called(found, "devices", name) if "devices" in found else None
    except AtollError:
        raise
    except SystemExit as error:
        raise ConfigurationError(f"{name} ended by sys.exit({error.code!r})") from error
    except Exception as error:
        line = _line_of(error, path)
        raise ConfigurationError(f"{name} raised {type(error).__name__}{line}: {error}") from error
    finally:
        sys.path.pop(0)
    if not isinstance(federation, Federation):
        raise ConfigurationError(f"`federation` in {name} is not a Federation but {federation!r}")
    if not isinstance(clients, FederatedData):
        raise ConfigurationError(
            f"`clients` in {name} is a {type(clients).__name__}, not FederatedData; partition "
            "a set, e.g. clients = data.load('digits').dirichlet(clients=100, alpha=0.3)"
        )
    if devices is not None and not isinstance(devices, Devices):
        raise ConfigurationError(f"`devices` in {name} are not Devices but {devices!r}")
    return federation, clients, devices


def find_run(name: str, root: str) -> Path:
    """A run folder by path, or by name below the folder of runs."""
    for path in (Path(name), Path(root) / name):
        if (path / "config.json").is_file():
            return path
    raise CheckpointError(f"there is no run {name!r}, neither here nor in {root}; see `atoll runs`")


def _called(found: dict[str, Any], name: str, file: str) -> Any:
    if name not in found:
        raise ConfigurationError(f"{file} does not define `{name}`; it must have {EXAMPLE}")
    value = found[name]
    is_function = callable(value) and not isinstance(
        value, Federation | FederatedData | Devices | type
    )
    return value() if is_function else value


def _line_of(error: Exception, path: Path) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    number = frames[-1].lineno if frames else getattr(error, "lineno", None)
    return f" at line {number}" if number else ""
