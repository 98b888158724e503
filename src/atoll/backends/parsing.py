"""Engines in words, as the command line has them and a run folder keeps them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from atoll.backends.backend import Engine
from atoll.backends.choice import Auto, ByRule, Sequential, Stacked
from atoll.backends.ray import RayCluster
from atoll.errors import ConfigurationError

FORM = re.compile(r"(\w+)(?:\((.*)\))?")
#: What each engine can be told in words: whole numbers by name.
NUMBERS: Mapping[str, tuple[str, ...]] = {
    "auto": (),
    "sequential": ("workers", "processes", "threads"),
    "stacked": ("block", "workers", "processes", "threads"),
    "ray": ("actors", "cores"),
}


def engine_of(given: Engine | str | None) -> Engine:
    """An engine, or what says one: "auto", "stacked(block=8, workers=2)"; None chooses by rule."""
    if isinstance(given, Engine):
        return given
    if given is None:
        return ByRule()
    match = FORM.fullmatch(given.strip()) if isinstance(given, str) else None
    if match is None or match[1] not in NUMBERS:
        raise ConfigurationError(
            f"engine {given!r} is not known; use 'auto', 'sequential', 'stacked', 'ray', or one "
            "with its numbers, such as 'stacked(block=10, workers=2, threads=1)'"
        )
    numbers = _numbers(match[1], match[2] or "")
    if {"workers", "processes"} <= numbers.keys():
        raise ConfigurationError(
            f"{given!r}: workers are threads or processes; say one number of them"
        )
    apart = "processes" in numbers
    if apart:
        numbers["workers"] = numbers.pop("processes")
    kinds: Mapping[str, Callable[[], Engine]] = {
        "auto": Auto,
        "sequential": lambda: Sequential(processes=apart, **numbers),
        "stacked": lambda: Stacked(processes=apart, **numbers),
        "ray": lambda: RayCluster(**numbers),
    }
    return kinds[match[1]]()


def _numbers(engine: str, inside: str) -> dict[str, Any]:
    """The numbers between an engine's brackets."""
    found: dict[str, int] = {}
    for item in filter(None, (item.strip() for item in inside.split(","))):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in NUMBERS[engine] or not value.isdecimal() or name in found:
            known = ", ".join(NUMBERS[engine]) or "no numbers"
            raise ConfigurationError(
                f"{item!r} says nothing about the engine {engine!r}; it has {known}, each a whole "
                "number, said once"
            )
        if int(value) < 1:
            raise ConfigurationError(f"{name} must be a whole number of at least 1")
        found[name] = int(value)
    return found
