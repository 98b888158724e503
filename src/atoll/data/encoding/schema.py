"""Plain dataclasses as JSON for people, read back against the closed schema that they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from atoll.errors import DataError

T = TypeVar("T")
#: Letters of one text, items of one list or object.
LONGEST, MOST = 1000, 1 << 20


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST


def _number(value: Any) -> bool:
    try:
        real = isinstance(value, int | float) and not isinstance(value, bool)
        return real and math.isfinite(float(value))
    except OverflowError:
        return False


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 1 << 48


def _listed(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) <= MOST and all(map(fits, value))


def _named(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, dict)
        and len(value) <= MOST
        and all(map(_text, value))
        and all(map(fits, value.values()))
    )


#: What a field holds, by its type as written in the class.
CHECKS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    str: ("a text", _text),
    int: ("a whole number", _whole),
    bool: ("true or false", lambda value: isinstance(value, bool)),
    tuple[str, ...]: ("texts", _listed(_text)),
    tuple[float, ...]: ("numbers", _listed(_number)),
    tuple[int, ...]: ("whole numbers", _listed(_whole)),
    Mapping[str, str]: ("texts by text", _named(_text)),
    Mapping[str, float]: ("numbers by text", _named(_number)),
    Mapping[str, int]: ("whole numbers by text", _named(_whole)),
}


def told(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not as by default, ready for JSON."""
    plain: dict[str, Any] = {}
    for field in fields(value):
        own = getattr(value, field.name)
        make = field.default_factory
        if own == (field.default if make is MISSING else make()):
            continue
        if isinstance(own, tuple):
            own = list(own)
        plain[field.name] = dict(own) if isinstance(own, Mapping) else own
    return plain


def read(kind: type[T], plain: Any, name: str) -> T:
    """What `told` has been told of, which `name` is said of; DataError for anything else."""
    if not isinstance(plain, dict):
        raise DataError(f"{name} must be an object, not {plain!r:.100}")
    hints = get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    odd = [key for key in plain if key not in known]
    if odd:
        raise DataError(f"{name} has no {odd[0]!r:.100}; it may have {', '.join(known)}")
    given = {}
    for key, field in known.items():
        if key not in plain:
            if field.default is MISSING and field.default_factory is MISSING:
                raise DataError(f"{name} needs {key}")
            continue
        noun, fits = CHECKS[hints[key]]
        value = plain[key]
        if not fits(value):
            raise DataError(f"{key} of {name} must be {noun}, not {value!r:.100}")
        given[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**given)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def read_json(path: str | Path) -> Any:
    """A JSON file's content; DataError if it is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: this is no JSON: {error}") from None
