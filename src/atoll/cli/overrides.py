"""Overrides: `schedule.rounds=100` changes one field of a federation, checked like any other."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from atoll.aggregation.stage import Pipeline
from atoll.errors import ConfigurationError
from atoll.federation import Federation


def override(federation: Federation, settings: Sequence[str]) -> Federation:
    """The federation with these `path=value` settings, applied in order."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ConfigurationError(f"--set needs NAME=VALUE, not {setting!r}")
        federation = _replace(federation, path.split("."), _value(text), path)
    return federation


def _value(text: str) -> Any:
    """A Python literal where it is one, the text itself otherwise."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _replace(thing: Any, path: list[str], value: Any, whole: str) -> Any:
    name, *rest = path
    if isinstance(thing, Pipeline):
        if not name.isdecimal() or int(name) >= len(thing.stages):
            raise ConfigurationError(
                f"{whole!r}: the pipeline has stages 0 to {len(thing.stages) - 1}, "
                "e.g. pipeline.0.norm=0.5"
            )
        stages = list(thing.stages)
        stages[int(name)] = _replace(stages[int(name)], rest, value, whole)
        return Pipeline(*stages)
    if not is_dataclass(thing) or isinstance(thing, type):
        raise ConfigurationError(f"{whole!r}: {type(thing).__name__} has no settings")
    known = [field.name for field in fields(thing)]
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; it has {', '.join(known)}" if known else ", nor any other setting"
        hint = f"; did you mean {close[0]!r}?" if close else hint
        raise ConfigurationError(f"{whole!r}: {type(thing).__name__} has no {name!r}{hint}")
    present = getattr(thing, name)
    if rest:
        return replace(thing, **{name: _replace(present, rest, value, whole)})
    if is_dataclass(present) or isinstance(present, Pipeline):
        inner = [f.name for f in fields(present)] if is_dataclass(present) else ["0"]
        hint = f"; set one of its fields, e.g. {whole}.{inner[0]}=..." if inner else ""
        raise ConfigurationError(
            f"{whole!r} is a {type(present).__name__}, which is made in the file{hint}"
        )
    if isinstance(present, bool) and not isinstance(value, bool):
        raise ConfigurationError(f"{whole!r} is True or False, not {value!r}")
    if _is_number(present) != _is_number(value) and present is not None and value is not None:
        raise ConfigurationError(f"{whole!r} is {present!r}, which {value!r} cannot replace")
    try:
        return replace(thing, **{name: value})
    except TypeError as error:
        raise ConfigurationError(f"{whole}={value!r} does not fit: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
