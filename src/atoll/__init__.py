"""atoll: federated learning. One description of a federation, simulated and then served."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atoll import aggregation, algorithms, data, learners, simulation, tracking
    from atoll.errors import AtollError
    from atoll.federation import Federation
    from atoll.rounds import schedules, stopping
    from atoll.rounds.plan import Evaluation

try:
    __version__ = version("atoll")
except PackageNotFoundError:
    __version__ = "unknown"

__all__ = [
    "AtollError",
    "Evaluation",
    "Federation",
    "__version__",
    "aggregation",
    "algorithms",
    "data",
    "learners",
    "schedules",
    "simulation",
    "stopping",
    "tracking",
]

# Looked up on first use, so that `import atoll` and `atoll --help` stay instant.
_NAMES = {
    "AtollError": ("atoll.errors", "AtollError"),
    "Evaluation": ("atoll.rounds.plan", "Evaluation"),
    "Federation": ("atoll.federation", "Federation"),
    "schedules": ("atoll.rounds.schedules", None),
    "stopping": ("atoll.rounds.stopping", None),
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        module, attribute = _NAMES[name]
        found = import_module(module)
        return found if attribute is None else getattr(found, attribute)
    if name in __all__:
        return import_module(f"atoll.{name}")
    raise AttributeError(f"module 'atoll' has no attribute {name!r}")
