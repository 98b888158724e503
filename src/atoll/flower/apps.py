"""Apps: a folder as `flwr new` makes it, or a script that calls `flwr.simulation`."""

from __future__ import annotations

import inspect
import os
import runpy
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from atoll.errors import AtollError, ConfigurationError
from atoll.flower.draws import at_import, import_torch_for, seeded

#: What a run's configuration may hold, as Flower has it.
Settings = dict[str, bool | float | int | str]
#: Clients, where neither the app nor Flower's own configuration says: as many as Flower starts.
CLIENTS = 2


@dataclass(frozen=True)
class App:
    """What is run: two objects of Flower's, and what they are told.

    Args:
        name: for people.
        server: the `ServerApp`.
        client: the `ClientApp`.
        config: what `context.run_config` will say.
        clients: how many clients there are.
        references: where the two were found, `module:object`.
        place: the folder they are imported from; empty for a script.
        seed: what it drew from while it was imported.
        node_config: what else `context.node_config` will say, as `flower-supernode --node-config`
            does; "{partition-id}" in a text is the client's number.
    """

    name: str
    server: ServerApp
    client: ClientApp
    config: Settings = field(default_factory=dict)
    clients: int = CLIENTS
    references: tuple[str, str] = ("", "")
    place: str = ""
    seed: int = 0
    node_config: Settings = field(default_factory=dict)

    def told(self, settings: Mapping[str, str], clients: int | None) -> App:
        """The app with some of its settings, given as text, changed."""
        changed: Settings = dict(self.config)
        for name, text in settings.items():
            if name not in self.config:
                known = ", ".join(self.config) or "none"
                raise ConfigurationError(f"{self.name} has no setting {name!r}; it has {known}")
            changed[name] = _like(self.config[name], text, name)
        return replace(self, config=changed, clients=clients or self.clients)


def read_app(path: str | Path, seed: int = 0) -> App:
    """The app in a folder with a `pyproject.toml`; a script has `simulations_of` it.

    What it draws when it is imported, as a model at the top of a module, is drawn from `seed`.
    """
    place = Path(path)
    project = place / "pyproject.toml"
    if not project.is_file():
        raise ConfigurationError(
            f"{place} is not a Flower app: it has no pyproject.toml with [tool.flwr.app], and is "
            "no Python file that calls run_simulation"
        )
    try:
        whole = tomllib.loads(project.read_text(encoding="utf-8"))
        flwr = whole["tool"]["flwr"]
        parts = flwr["app"]["components"]
        references = str(parts["serverapp"]), str(parts["clientapp"])
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{project} does not say [tool.flwr.app.components] serverapp and clientapp: {error}"
        ) from error
    import_torch_for(place)
    _leave_others(place.resolve())
    sys.path.insert(0, str(place.resolve()))
    with seeded(at_import(seed)):
        server, client = (_found(reference, place) for reference in references)
    if not isinstance(server, ServerApp) or not isinstance(client, ClientApp):
        raise ConfigurationError(
            f"{references[0]} must be a ServerApp and {references[1]} a ClientApp, not "
            f"{type(server).__name__} and {type(client).__name__}"
        )
    name = str(whole.get("project", {}).get("name", place.resolve().name))
    config = _flat(flwr["app"].get("config", {}))
    return App(name, server, client, config, _clients(flwr), references, str(place.resolve()), seed)


_places: list[Path] = []


def _leave_others(place: Path) -> None:
    """Forget the modules of apps read before: theirs may have the same names."""
    for other in _places:
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and Path(file).is_relative_to(other):
                del sys.modules[name]
        while str(other) in sys.path:
            sys.path.remove(str(other))
    _places[:] = [place]


def loaded(reference: str) -> Any:
    """What `module:object` names."""
    module, _, names = reference.partition(":")
    value: Any = import_module(module)
    for name in names.split("."):
        value = getattr(value, name)
    return value


def _found(reference: str, place: Path) -> Any:
    try:
        return loaded(reference)
    except AtollError:
        raise
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{place} needs {_lacking(error.name or '')}") from error
    except ImportError as error:
        # A library of the system may lack too: that is no matter of versions.
        lacking = "another version of" if "cannot import name" in str(error) else "something of"
        raise ConfigurationError(f"{place} needs {lacking} what it imports: {error}") from error
    except AttributeError as error:
        raise ConfigurationError(f"{place} does not define {reference}: {error}") from error


def _lacking(module: str) -> str:
    """What an app lacks, and what to do: a package, or another version of one."""
    root, _, inside = module.partition(".")
    if inside and find_spec(root):
        try:
            there = f"{root} {metadata.version(root)}"
        except metadata.PackageNotFoundError:
            there = root
        return (
            f"the module {module!r}, which {there} does not have: it is written for another "
            "version; see its pyproject.toml"
        )
    return (
        f"the module {module!r}, which is not installed; install what its pyproject.toml lists "
        "under dependencies"
    )


def _clients(flwr: Mapping[str, Any]) -> int:
    """How many clients the app's own federation has, or that of Flower's configuration."""
    for places in (flwr.get("federations", {}), _configured().get("superlink", {})):
        chosen = places.get(str(places.get("default", "")), {})
        told = chosen.get("options", {}).get("num-supernodes")
        if isinstance(told, int) and told > 0:
            return told
    return CLIENTS


def _configured() -> Mapping[str, Any]:
    """What Flower's own configuration file says; nothing if there is none that can be read."""
    home = os.environ.get("FLWR_HOME") or Path.home() / ".flwr"
    try:
        return tomllib.loads((Path(home) / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def simulations_of(
    script: Path | str, run: Callable[[App], Any], arguments: Sequence[str] = ()
) -> int:
    """Run a script, or a module by its name, with its simulations run by `run`; how many those
    were."""
    # Here, because importing it takes a second that folders need not wait.
    from flwr import simulation

    count, name = 0, script.stem if isinstance(script, Path) else script.rsplit(".", 1)[-1]

    def simulated(app: App) -> None:
        nonlocal count
        count += 1
        run(app if count == 1 else replace(app, name=f"{app.name}-{count}"))

    def run_simulation(
        server_app: ServerApp, client_app: ClientApp, num_supernodes: int, *_: Any, **__: Any
    ) -> None:
        simulated(App(name, server_app, client_app, {}, num_supernodes))

    def start_simulation(*, client_fn: Any, num_clients: int, **settings: Any) -> Any:
        app, histories = _old(name, client_fn, num_clients, settings)
        simulated(app)
        return histories[-1] if histories else None

    kept = simulation.run_simulation, simulation.start_simulation, sys.argv
    simulation.run_simulation = run_simulation
    simulation.start_simulation = start_simulation
    sys.argv = [str(script), *arguments]
    sys.path.insert(
        0, str(script.parent.resolve()) if isinstance(script, Path) else str(Path.cwd())
    )
    try:
        if isinstance(script, Path):
            runpy.run_path(str(script), run_name="__main__")
        else:
            _run_module(script)
    except SystemExit as error:
        if error.code:  # to end by sys.exit(0) is to end well
            raise
    finally:
        simulation.run_simulation, simulation.start_simulation, sys.argv = kept
        sys.path.pop(0)
    if not count:
        raise ConfigurationError(
            f"{script} ended without a call of flwr.simulation.run_simulation or start_simulation"
        )
    return count


def _run_module(name: str) -> None:
    """As `python -m name`."""
    try:
        there = find_spec(name)
    except ModuleNotFoundError:
        there = None
    if there is None:
        raise ConfigurationError(f"there is no module {name!r} here or among what is installed")
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _old(
    name: str, client_fn: Any, clients: int, settings: Mapping[str, Any]
) -> tuple[App, list[Any]]:
    """The two apps that `start_simulation` of old stood for, and where its history will be."""
    from flwr.server.compat import start_grid

    parts = ("server", "config", "strategy", "client_manager")
    known = {part: settings[part] for part in parts if part in settings}
    histories: list[Any] = []
    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Context) -> None:
        histories.append(start_grid(grid=grid, **known))

    def made(context: Context) -> Any:
        # Before contexts, a client was made from its number as text.
        number = str(context.node_config["partition-id"])
        client = client_fn(number if _takes_number(client_fn) else context)
        return client.to_client() if hasattr(client, "to_client") else client

    return App(name, server, ClientApp(client_fn=made), {}, clients), histories


def _takes_number(function: Any) -> bool:
    """Whether a client function is of the kind that takes `cid`, and not a context."""
    first = next(iter(inspect.signature(function).parameters.values()), None)
    return first is not None and (
        first.name in ("cid", "client_id") or first.annotation in (str, "str")
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Settings:
    """Nested tables as dotted names, which is how Flower passes them on."""
    found: Settings = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _like(present: bool | float | int | str, text: str, name: str) -> bool | float | int | str:
    """A text as a value of the same kind as the present one."""
    try:
        if isinstance(present, bool):
            return {"true": True, "false": False}[text.lower()]
        # A whole number may become a fraction, as for Flower.
        whole = text.lstrip("+-").isdecimal()
        return float(text) if type(present) is int and not whole else type(present)(text)
    except (ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{name}={text} does not fit: it is {present!r} now, a {type(present).__name__}"
        ) from error
