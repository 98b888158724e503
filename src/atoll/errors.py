"""Every error that atoll raises on purpose: a sentence for people, and what to do."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType


class AtollError(Exception):
    """Base of all of atoll's own errors; its text is a sentence for people.

    `code` is what a command ends with that it ends (see docs/promises.md).
    """

    code = 1


class ConfigurationError(AtollError):
    """A federation, a schedule or a command that cannot work as it is written."""


class DataError(AtollError):
    """Data that cannot be used: empty, not finite, out of range, or not found."""


class LayoutError(AtollError):
    """Vectors that do not fit the layout of the model."""


class UpdateRefused(AtollError):
    """An update that was refused on arrival; the run goes on without it."""


class CheckpointError(AtollError):
    """A checkpoint or run folder that is missing, damaged or of another run."""


class RunError(AtollError):
    """A run that cannot go on."""


class GivenUp(RunError):
    """A federation that has come to its end without being done; to begin again changes nothing."""

    code = 3


class NotAdmitted(RunError):
    """A site that may not take part as it is: somebody has to change something first."""

    code = 4


class CannotClose(RunError):
    """A reducer that can make nothing of a round's answers: the attempt is abandoned."""


class MissingPackage(AtollError, ImportError):
    """An optional package that is not installed."""


def shown(values: Sequence[object], most: int = 5) -> str:
    """Some of these values, for a sentence."""
    return ", ".join(map(repr, values[:most])) + (", ..." if len(values) > most else "")


def require(module: str, install: str, purpose: str) -> ModuleType:
    """Import an optional module, or say which `pip install` line brings it.

    `module` may be dotted; `install` is what pip is asked for; `purpose` completes "... needs".
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        # A package that is there but broken is a different problem with a different cure.
        if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith(package):
            raise MissingPackage(
                f"{purpose} needs the package {package!r}, which is not installed; "
                f"run: {pip_line(install)}"
            ) from None
        raise MissingPackage(
            f"{purpose} needs {module!r}, which does not import: {error}"
        ) from error


def pip_line(install: str) -> str:
    """The command that brings a package, or one of atoll's extras: by what that is made of.

    atoll's name on the public index is not ours yet: a line with it would fetch a stranger's
    package.
    """
    wanted = _of_extras(install) if install.startswith("atoll[") else [install]
    return "pip install " + " ".join(f"'{each}'" for each in wanted)


def _of_extras(install: str) -> list[str]:
    """What "atoll[a,b]" asks for, by this installation's own metadata."""
    names = install.removeprefix("atoll[").rstrip("]").split(",")
    found: dict[str, None] = {}
    try:
        lines = metadata.requires("atoll") or []
    except metadata.PackageNotFoundError:
        lines = []
    for line in lines:
        what, _, marker = line.partition(";")
        if not any(re.search(rf"extra == ['\"]{name}['\"]", marker) for name in names):
            continue
        other = re.sub(r"(?:and )?extra == ['\"][^'\"]*['\"](?: and)?", "", marker).strip(" ()")
        inner = _of_extras(what.strip()) if what.startswith("atoll[") else [what.strip()]
        found |= dict.fromkeys(
            f"{each}; {other}".replace("'", '"') if other else each for each in inner
        )
    return list(found) or [install]


@contextmanager
def no_exit(what: str) -> Iterator[None]:
    """People's code that ends the process ends what it was asked for instead."""
    try:
        yield
    except SystemExit as error:
        raise RunError(f"{what} called sys.exit({error.code!r})") from error
